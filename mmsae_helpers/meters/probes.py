"""Linear probes: how much of a class can be read off pooled features by a linear classifier (Macro F1).

Shapes: n rows (images), d features, k classes. Sparse features are made dense for the training rows only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from mmsae_helpers.errors import InputError

RELATIVE_ALPHAS = (30.0, 10.0, 3.0, 1.0, 0.1, 0.01)  # times n_train: a standardised feature's squared norm
SHRINKAGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # added to the covariance of standardised features


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """scikit-learn's, over the classes that occur in either; a prediction below 0 is a miss but no class itself."""
    present = np.union1d(truth, predicted[predicted >= 0])
    return float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0))


def between_classes(X, y: np.ndarray) -> np.ndarray:
    """Share of each feature's variance that lies between the classes y, [d]; nan where it is constant.

    X [n, d] is dense or sparse. sum_k n_k (mean_k - mean)^2 / sum_i (x_i - mean)^2.
    """
    y = np.asarray(y)
    total = sp.csr_matrix((np.ones(len(y)), (y, np.arange(len(y))))) @ X
    total = total.toarray() if sp.issparse(total) else np.asarray(total)
    n_k = np.maximum(np.bincount(y), 1)
    squares = np.asarray((X.multiply(X) if sp.issparse(X) else np.square(X)).sum(0, dtype=np.float64)).ravel()
    rest = total.sum(0) ** 2 / len(y)
    between, whole = (total**2 / n_k[:, None]).sum(0) - rest, squares - rest
    return np.divide(between, whole, out=np.full(len(whole), np.nan), where=whole > 1e-6 * squares)


def splits(y: np.ndarray, train_parts: int, test_parts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified (train, test) row indices in the proportion train_parts : test_parts, both sorted.

    With one seed, a larger training part contains the smaller one. InputError if a class has too few rows.
    """
    y = np.asarray(y)
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        n_train = round(len(rows) * train_parts / (train_parts + test_parts))
        if not 0 < n_train < len(rows):
            raise InputError(f"class {label} has {len(rows)} rows: too few to split {train_parts}:{test_parts}")
        train.append(rows[:n_train])
        test.append(rows[n_train:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def probe(X, y, train_idx, test_idx, **options) -> float:
    """Macro F1 on the test rows of a linear classifier fitted on the training rows; see `predict`."""
    return macro_f1(np.asarray(y)[test_idx], predict(X, y, train_idx, test_idx, **options))


def predict(X, y, train_idx, test_idx, classifier="lda", standardise="train", alpha="auto") -> np.ndarray:
    """Class ids [n_test] that a linear classifier fitted on rows train_idx of X [n, d] (dense or csr) gives test_idx.

    y: class ids [n].
    classifier: "lda", discriminant analysis (scikit-learn's with shrinkage), alpha on the covariance's diagonal, or
        scikit-learn's "ridge" (twice as slow) or "logistic" (C = 1 / alpha; up to ten times slower).
    standardise: mean 0, variance 1 by the training rows, or by "all" rows as paper A's code (METHODS A.3 c).
    alpha: the penalty; "auto" takes the one of RELATIVE_ALPHAS x n_train (ridge) or SHRINKAGES (lda) that is most
        accurate on every fifth training row when fitted on the others, and 1 for logistic.
    """
    with threadpool_limits(1):
        return _predict(X, y, train_idx, test_idx, classifier, standardise, alpha)


def _predict(X, y, train_idx, test_idx, classifier="lda", standardise="train", alpha="auto") -> np.ndarray:
    """`predict` with as many threads as there are: `grid` limits them once, as changing that while another
    thread is inside a BLAS call can hang it."""
    fits = {"ridge": _ridge, "lda": _lda, "logistic": _logistic}
    if classifier not in fits or standardise not in ("train", "all"):
        raise InputError(f"probe: no classifier {classifier!r} with standardise {standardise!r}")
    X = X.tocsr() if sp.issparse(X) else np.asarray(X)
    y = np.asarray(y)
    train = X[train_idx]
    train = (train.toarray() if sp.issparse(train) else train).astype(np.float32)
    # it finds the mean all the same, of sparse features too; a constant column gets deviation 1
    scaler = StandardScaler(with_mean=False).fit(X if standardise == "all" else train)
    mean, deviation = scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)
    varies = np.ptp(train, axis=0) > 0  # a feature that does not vary in training gets no weight
    used = np.flatnonzero(varies) if varies.any() else np.arange(len(varies))
    train = (train[:, used] - mean[used]) / deviation[used]
    classes, target = np.unique(y[train_idx], return_inverse=True)
    fitted, bias = fits[classifier](train, target, alpha)
    weights = np.zeros((len(mean), fitted.shape[1]), np.float32)
    weights[used] = fitted / deviation[used, None]
    scores = X[test_idx] @ weights + (bias - mean @ weights).astype(np.float32)
    return classes[scores.argmax(1)]


def _ridge(Z: np.ndarray, target: np.ndarray, alpha: float | str) -> tuple[np.ndarray, np.ndarray]:
    """One against all, least squares on targets -1 and 1: (W [d, k], bias [k])."""
    if alpha == "auto":
        alphas, held = [a * len(Z) for a in RELATIVE_ALPHAS], _every_fifth(target)
        tries = (RidgeClassifier(alpha=a).fit(Z[~held], target[~held]) for a in alphas)
        alpha = alphas[int(np.argmax([model.score(Z[held], target[held]) for model in tries]))]
    return _weights(RidgeClassifier(alpha=alpha).fit(Z, target))


def _logistic(Z: np.ndarray, target: np.ndarray, alpha: float | str) -> tuple[np.ndarray, np.ndarray]:
    alpha = 1.0 if alpha == "auto" else alpha
    # three times the default tolerance: half the time, Macro F1 within .02 of the optimum's
    return _weights(LogisticRegression(C=1 / alpha, max_iter=1000, tol=3e-4).fit(Z, target))


def _weights(model) -> tuple[np.ndarray, np.ndarray]:
    """Those of a scikit-learn classifier [d, k] and [k]; for two classes it keeps the second one's only."""
    if len(model.coef_) > 1:
        return model.coef_.T, model.intercept_
    return np.vstack([-model.coef_, model.coef_]).T, np.append(-model.intercept_, model.intercept_)


def _every_fifth(target: np.ndarray) -> np.ndarray:
    """Rows on which a penalty is chosen, bool [n]: every fifth within the classes."""
    held = np.zeros(len(target), dtype=bool)
    held[np.argsort(target, kind="stable")[::5]] = True
    return held


def _lda(Z: np.ndarray, target: np.ndarray, alpha: float | str) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes with one covariance, alpha added to its diagonal: (W [d, k], bias [k])."""
    n_classes, held = target.max() + 1, _every_fifth(target)
    if alpha == "auto":
        tries = _discriminants(Z[~held], target[~held], n_classes, SHRINKAGES, np.float32)
        hits = [np.mean((Z[held] @ weights + bias).argmax(1) == target[held]) for weights, bias in tries]
        alpha = SHRINKAGES[int(np.argmax(hits))]
    return next(_discriminants(Z, target, n_classes, [alpha], np.float64))


def _discriminants(Z: np.ndarray, target: np.ndarray, n_classes: int, alphas, dtype):
    """(W [d, k], bias [k]) for every alpha, through d x d or n x n equations, whichever are fewer."""
    n, d = Z.shape
    count = np.bincount(target, minlength=n_classes).astype(np.float32)
    one_hot = sp.csr_matrix((np.ones(n, np.float32), (target, np.arange(n))), shape=(n_classes, n))
    mean = one_hot @ Z / np.maximum(count, 1)[:, None]
    within = Z - mean[target]
    small, right = (within @ within.T, within @ mean.T) if n < d else (within.T @ within, mean.T)
    for alpha in alphas:
        solved = _solve(small, right, alpha * n, dtype)
        weights = (mean.T - within.T @ solved) / alpha if n < d else solved * n
        yield weights, np.log(np.maximum(count, 1e-3) / n) - 0.5 * np.einsum("kd,dk->k", mean, weights)


def _solve(gram: np.ndarray, right: np.ndarray, alpha: float, dtype=np.float64) -> np.ndarray:
    """(gram + alpha I)^-1 right, factored in `dtype`; float32 result."""
    gram = gram.astype(dtype)
    gram[np.diag_indices(len(gram))] += alpha
    factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, right, check_finite=False).astype(np.float32)


def grid(features: Mapping, y, parts: Sequence[tuple[int, int]], seeds, progress=True, **options) -> pd.DataFrame:
    """Macro F1 of every feature matrix x split (train_parts, test_parts) x seed; one core works on each fit.

    Columns: name (the key in `features`), train_parts, test_parts, seed, macro_f1.
    """
    from tqdm import tqdm

    split = {(part, seed): splits(y, *part, seed) for part in parts for seed in seeds}
    tasks = [(name, part, seed) for name in features for part, seed in split]

    def run(task):
        name, part, seed = task
        train, test = split[part, seed]
        return (name, *part, seed, macro_f1(y[test], _predict(features[name], y, train, test, **options)))

    y = np.asarray(y)
    with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(tqdm(pool.map(run, tasks), "probes", len(tasks), mininterval=1, disable=not progress))
    return pd.DataFrame(rows, columns=["name", "train_parts", "test_parts", "seed", "macro_f1"])


def chosen(table: pd.DataFrame, by: Sequence[str]) -> tuple[pd.Series, dict]:
    """Score of the cell that is best on the *other* seeds, by seed, and that cell by seed.

    table: rows of `grid` with columns seed, macro_f1 and those of `by`, which name a cell. A best cell picked on the
    seeds it is then judged on would flatter itself; with a single seed there is no other, and it is.
    """
    wide = table.pivot_table(index="seed", columns=by, values="macro_f1")
    others = {seed: wide.drop(index=seed) if len(wide) > 1 else wide for seed in wide.index}
    best = {seed: rest.mean().idxmax() for seed, rest in others.items()}
    return pd.Series({seed: wide.loc[seed, cell] for seed, cell in best.items()}), best
