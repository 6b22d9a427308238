"""Which part of a feature's variance follows the image, which the question: a balanced two-way analysis of variance.

Every one of I images is asked every one of S questions in R phrasings, and a feature has one activation for each:
values [I, S, R, F]. Images cross phrasings; a phrasing belongs to one question (is nested in it). The four parts are
the image, the question, their interaction (an answer depends on both), and the residual: all that differs between
phrasings of one question, for all images alike or for each. Proposed in paper B, section 4, and not run there.
"""

from typing import NamedTuple

import numpy as np

from mmsae_helpers.errors import InputError

PARTS = ("image", "question", "interaction", "residual")


class Shares(NamedTuple):
    """Of each feature's variance, by `PARTS`, float64 [F, 4]; rows sum to 1, or are nan where nothing varies."""

    eta: np.ndarray  # raw: of the sum of squares; biased towards the parts with many degrees of freedom
    component: np.ndarray  # of the variance components: expected for other images, questions and phrasings


class Split(NamedTuple):
    """`Shares` of a pass, and the components of as many shuffled ones [n_shuffles, F, 4]."""

    shares: Shares
    shuffled: np.ndarray

    def followers(self, more_than: float = 0.5, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Features of which one part holds ``more_than`` of the variance, and more than in ``level`` of the shuffles.

        bool [F, 4]; and the share of all F for which the same holds of a shuffle in the data's place, float [4].
        """
        bar = self.bar(more_than, level)
        return self.shares.component > bar, (self.shuffled > bar).mean((0, 1))

    def bar(self, more_than: float = 0.5, level: float = 0.95) -> np.ndarray:
        """What a follower's share exceeds, float [F, 4]."""
        return np.maximum(more_than, np.quantile(self.shuffled, level, axis=0))


def two_way(values) -> Shares:
    """Shares of ``values`` [I, S, R, F], all of I, S, R at least 2 (InputError otherwise).

    Images, questions and phrasings are random samples, so the mean squares are expected to be, with the variances
    s_i, s_q, s_iq, s_p (phrasing within question) and s_e (image by phrasing):
    image S R s_i + R s_iq + s_e; question I R s_q + R s_iq + I s_p + s_e; interaction R s_iq + s_e; phrasing I s_p +
    s_e; rest s_e. So a question counts only for what exceeds the difference between its own phrasings. Solved for the
    variances (Henderson's method); negative ones are 0; residual is s_p + s_e.
    """
    y = np.asarray(values, np.float64)
    if y.ndim != 4 or min(y.shape[:3]) < 2:
        shape = f"values are {y.shape}, not [images, questions, phrasings, features]"
        raise InputError(f"{shape} with at least 2 of the first three: ask more, or more often")
    centred = y - y.mean((0, 1, 2))
    total = np.square(centred).sum((0, 1, 2))
    constant = total <= 1e-12 * np.square(y).sum((0, 1, 2))
    return _shares(centred, np.where(constant, np.nan, total))


def _shares(y, total) -> Shares:
    """`two_way` of values with mean 0 and sum of squares ``total`` [F] (nan: give nan)."""
    n_i, n_s, n_r, _ = y.shape
    column, cell = y.mean(0), y.mean(2)
    image, question = cell.mean(1), column.mean(1)
    squares = n_s * n_r * np.square(image).sum(0), n_i * n_r * np.square(question).sum(0)
    both = n_r * np.square(cell - image[:, None] - question).sum((0, 1))
    phrasing = n_i * np.square(column - question[:, None]).sum((0, 1))
    rest = (total - sum(squares) - both - phrasing).clip(0)
    degrees = n_i - 1, n_s - 1, (n_i - 1) * (n_s - 1), n_s * (n_r - 1), n_s * (n_i - 1) * (n_r - 1)
    mean = [part / n for part, n in zip((*squares, both, phrasing, rest), degrees, strict=True)]
    s_q = (mean[1] - mean[2] - mean[3] + mean[4]) / (n_i * n_r)
    s_i, s_iq, s_p = (mean[0] - mean[2]) / (n_s * n_r), (mean[2] - mean[4]) / n_r, (mean[3] - mean[4]) / n_i
    components = np.stack([s_i, s_q, s_iq, np.maximum(s_p, 0) + mean[4]], 1).clip(0)
    parts = np.stack([*squares, both, phrasing + rest], 1)
    return Shares(*(part / part.sum(1, keepdims=True) for part in (parts, components)))


def shuffle(values, seed) -> np.ndarray:
    """``values`` [I, S, R, F] with images dealt out anew in every phrasing, and phrasings dealt out among questions.

    What no image and no question is behind any more; each phrasing keeps its own activations. All features alike.
    """
    n_i, n_s, n_r, n_f = values.shape
    rng = np.random.default_rng(seed)
    columns = rng.permutation(n_s * n_r)
    rows = rng.permuted(np.tile(np.arange(n_i)[:, None], n_s * n_r), axis=0)
    return values.reshape(n_i, -1, n_f)[rows, columns].reshape(values.shape)


def dense(pooled, shape: tuple[int, int, int], wanted) -> np.ndarray:
    """Columns ``wanted`` of ``pooled`` csr [I * S * R, F], phrasings fastest, as values [I, S, R, len(wanted)]."""
    if pooled.shape[0] != np.prod(shape):
        raise InputError(
            f"{pooled.shape[0]} rows do not fill {' x '.join(map(str, shape))} images, questions, phrasings"
        )
    return pooled[:, np.asarray(wanted, np.int64)].toarray().reshape(*shape, -1)


def split(pooled, shape: tuple[int, int, int], wanted, *, n_shuffles: int = 0, seed=0, batch: int = 128) -> Split:
    """`two_way` of the features ``wanted`` of a csr (see `dense`) and of ``n_shuffles`` shuffles, a batch at a time."""
    eta, component, null = (np.empty((*n, len(wanted), 4)) for n in ((), (), (n_shuffles,)))
    for start in range(0, len(wanted), batch):
        now = slice(start, start + batch)
        values = dense(pooled, shape, wanted[now])
        eta[now], component[now] = two_way(values)
        values = values - values.mean((0, 1, 2), dtype=np.float64)
        total = np.square(values).sum((0, 1, 2))  # a shuffle keeps both
        for k in range(n_shuffles):
            null[k, now] = _shares(shuffle(values, [seed, k]), total).component
    return Split(Shares(eta, component), null)


def explained(effects, values) -> np.ndarray:
    """How much of ``effects`` [I, F] the grouping of images by ``values`` [I] explains, float64 [F].

    Epsilon squared, the adjusted R^2 of a one-way analysis: near 0 (and below) by chance; nan where nothing varies.
    """
    effects = np.asarray(effects, np.float64)
    group, size = np.unique(np.asarray(values), return_inverse=True, return_counts=True)[1:]
    total = np.zeros((len(size), effects.shape[1]))
    np.add.at(total, group, effects)
    within = np.square(effects - (total / size[:, None])[group]).sum(0) / (len(effects) - len(size))
    whole = np.square(effects - effects.mean(0)).sum(0) / (len(effects) - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 1e-12 * np.square(effects).mean(0), 1 - within / whole, np.nan)


def told_apart(values, images, kinds, more_than: float = 0.5) -> dict[str, float]:
    """Shares of features that vary with the image alone, with the kind of question alone, or with both, which cannot be
    told apart: more than ``more_than`` is explained (`explained`) by the groups ``images`` [N], ``kinds`` [N], or each.

    ``values`` [N, F] of any questions about images: where every image has its own, the groups overlap. What varies with
    nothing, and a grouping in which no group has two rows, counts as not explained; no features at all, as 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        image, kind = (explained(values, by) > more_than for by in (images, kinds))
    found = {"image alone": image & ~kind, "question alone": kind & ~image, "not told apart": image & kind}
    return {part: float(rows.mean()) if len(rows) else 0.0 for part, rows in found.items()}
