"""Linear probes: how much of a class can be read off pooled features by a linear classifier (Macro F1).

Shapes: n rows (images), d features, k classes. Sparse features are made dense for the training rows only.
"""

from __future__ import annotations

import os
import warnings
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

# a split of one row a class is meant; a filter for the process, as fits run in threads
warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")

RELATIVE_ALPHAS = (30.0, 10.0, 3.0, 1.0, 0.1, 0.01)  # times n_train: a standardised feature's squared norm
SHRINKAGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # added to the covariance of standardised features
START = 2  # where among these the search begins


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
    alpha: the penalty; "auto" takes the one of RELATIVE_ALPHAS x n_train (ridge) or SHRINKAGES (lda, where the search
        ends at the first that no neighbour betters) that is most accurate on every fifth training row when fitted on
        the others, and 1 for logistic.
    """
    with threadpool_limits(1):
        return _predict(X, y, train_idx, test_idx, classifier, standardise, alpha)


def _predict(X, y, train_idx, test_idx, classifier="lda", standardise="train", alpha="auto") -> np.ndarray:
    """`predict` with as many threads as there are: `grid` limits them once, as changing that while another
    thread is inside a BLAS call can hang it."""
    fits = {"ridge": _ridge, "lda": _lda, "logistic": _logistic}
    if classifier not in fits or standardise not in ("train", "all"):
        raise InputError(f"probe: no classifier {classifier!r} with standardise {standardise!r}")
    X, y = X.tocsr() if sp.issparse(X) else np.asarray(X), np.asarray(y)
    train = X[train_idx]
    # it finds the mean all the same, of sparse features too; a constant column gets deviation 1
    scaler = StandardScaler(with_mean=False).fit(X if standardise == "all" else train)
    mean, deviation = scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)
    train = (train.toarray() if sp.issparse(train) else train).astype(np.float32)
    varies = np.ptp(train, axis=0) > 0  # a feature that does not vary in training gets no weight
    used = np.flatnonzero(varies) if varies.any() else np.arange(1)  # of an SAE that is silent here
    train = train if len(used) == len(varies) else train[:, used]
    train -= mean[used]
    train /= deviation[used]
    classes, target = np.unique(y[train_idx], return_inverse=True)
    fitted, bias = fits[classifier](train, target, alpha)
    weights = np.zeros((len(mean), fitted.shape[1]), np.float32)
    weights[used] = fitted / deviation[used, None]
    scores = X[test_idx] @ weights + (bias - mean @ weights).astype(np.float32)
    return classes[scores.argmax(1)]


def _sklearn(model, Z: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W [d, k], bias [k]) of a scikit-learn classifier; for two classes it keeps the second one's only."""
    W, bias = np.atleast_2d(model.fit(Z, target).coef_).T, model.intercept_  # of two classes a ridge has a row alone
    return (W, bias) if W.shape[1] > 1 else (np.hstack([-W, W]), np.append(-bias, bias))


def _ridge(Z: np.ndarray, target: np.ndarray, alpha: float | str) -> tuple[np.ndarray, np.ndarray]:
    """One against all, least squares on targets -1 and 1."""
    if alpha == "auto":
        alphas, held = [a * len(Z) for a in RELATIVE_ALPHAS], _every_fifth(target)
        tries = (RidgeClassifier(alpha=a).fit(Z[~held], target[~held]) for a in alphas)
        alpha = alphas[int(np.argmax([model.score(Z[held], target[held]) for model in tries]))]
    return _sklearn(RidgeClassifier(alpha=alpha), Z, target)


def _logistic(Z: np.ndarray, target: np.ndarray, alpha: float | str) -> tuple[np.ndarray, np.ndarray]:
    # three times the default tolerance: half the time, Macro F1 within .02 of the optimum's
    return _sklearn(LogisticRegression(C=1 / (1.0 if alpha == "auto" else alpha), max_iter=1000, tol=3e-4), Z, target)


def _every_fifth(target: np.ndarray) -> np.ndarray:
    """Rows on which a penalty is chosen, bool [n]: every fifth within the classes."""
    held = np.zeros(len(target), dtype=bool)
    held[np.argsort(target, kind="stable")[::5]] = True
    return held


def _lda(Z: np.ndarray, target: np.ndarray, alpha: float | str) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes with one covariance, alpha added to its diagonal: (W [d, k], bias [k])."""
    rows, span, held = Z, None, _every_fifth(target)
    if 2 * len(Z) < Z.shape[1]:  # the same in coordinates of the rows' span, n of them: span with Z = span M'
        exact = Z.astype(np.float64)  # in float32 the diagonal below is lost where one direction has most variance
        gram = exact @ exact.T
        gram[np.diag_indices(len(Z))] += 1e-6 * gram.trace() / len(Z)  # centred rows have one direction less
        span = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
        rows = span.astype(np.float32)
    free, others = (_sums(rows[some], target[some], target.max() + 1) for some in (~held, held))
    if alpha == "auto":
        tried = _means(*free)

        def accuracy(i):
            weights, bias = _discriminants(*tried, SHRINKAGES[i], np.float32)
            return np.mean((rows[held] @ weights + bias).argmax(1) == target[held])

        alpha = SHRINKAGES[_climb(accuracy, len(SHRINKAGES))]
    weights, bias = _discriminants(*_means(*map(np.add, free, others)), alpha, np.float64)
    if span is not None:
        weights = Z.T @ scipy.linalg.solve_triangular(span, weights, trans=1, lower=True).astype(np.float32)
    return weights, bias


def _climb(score, n: int) -> int:
    """The first of 0 to n - 1, uphill from START, whose score is not below its neighbours'; the lower one of equals."""
    tried, at, best = {}, None, START
    while at != best:
        at, around = best, range(max(best - 1, 0), min(best + 2, n))
        tried |= {i: score(i) for i in around if i not in tried}
        best = max(around, key=tried.get)
    return best


def _sums(Z: np.ndarray, target: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that discriminant analysis needs of rows, and adds up: by class count [k] and sum [k, d]; Gram [d, d]."""
    one_hot = sp.csr_matrix((np.ones(len(Z), np.float32), (target, np.arange(len(Z)))), shape=(k, len(Z)))
    return np.bincount(target, minlength=k), one_hot @ Z, Z.T @ Z


def _means(count, total, gram) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class counts, class means [k, d], and the scatter within classes [d, d], from `_sums`."""
    mean = total / np.maximum(count, 1).astype(np.float32)[:, None]
    return count, mean, gram - total.T @ mean


def _discriminants(count, mean, within, alpha: float, dtype) -> tuple[np.ndarray, np.ndarray]:
    """(W [d, k], bias [k]): (within / n + alpha I)^-1, factored in ``dtype``, on the class means."""
    n, system = count.sum(), within.T.astype(dtype)  # by columns, as LAPACK wants it
    system[np.diag_indices(len(system))] += alpha * n
    factor = scipy.linalg.cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
    weights = scipy.linalg.cho_solve(factor, mean.T * n, check_finite=False).astype(np.float32)
    return weights, np.log(np.maximum(count, 1e-3) / n) - 0.5 * np.einsum("kd,dk->k", mean, weights)


def grid(features: Mapping, y, parts: Sequence[tuple[int, int]], seeds, names="name", **options) -> pd.DataFrame:
    """Macro F1 of every feature matrix x split (train_parts, test_parts) x seed; one core works on each fit.

    Columns: name, the key in `features` (or its parts, as ``names`` calls them in one string), train_parts, test_parts,
    seed, value.
    """
    y, names = np.asarray(y), names.split()
    split = {(part, seed): splits(y, *part, seed) for part in parts for seed in seeds}
    tasks = [(name, *key) for name in features for key in split]

    def run(task):
        name, part, seed = task
        train, test = split[part, seed]
        f1 = macro_f1(y[test], _predict(features[name], y, train, test, **options))
        return (*(name if len(names) > 1 else [name]), *part, seed, f1)

    with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return pd.DataFrame(pool.map(run, tasks), columns=[*names, "train_parts", "test_parts", "seed", "value"])


def chosen(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Of every seed, and whatever else ``table`` tells apart, the row whose cell is best on the *other* seeds.

    table: rows of `grid`; ``by`` names the columns of a cell. A best cell picked on the seeds it is then judged on
    would flatter itself; with a single seed there is no other, and it is.
    """
    apart = [c for c in table if c not in (*by, "value")]
    cell = table.groupby([c for c in (*apart, *by) if c != "seed"], sort=False)["value"]
    total, n = cell.transform("sum"), cell.transform("count")
    others = ((total - table["value"]) / (n - 1)).where(n > 1, total)
    best = table.assign(others=others).sort_values("others", ascending=False, kind="stable").drop_duplicates(apart)
    return best.sort_index().drop(columns="others")
