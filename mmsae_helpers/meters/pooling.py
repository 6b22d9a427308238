"""Pooling the features of a sample's tokens into one vector (paper A, METHODS A.2).

Sums run in float64, in token order, so pooling in chunks equals pooling at once bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from mmsae_helpers.meters.features import LOW, Once, from_flat, top_keys
from mmsae_helpers.meters.feed import Meter

POOLINGS = (None, 1, 3, 5, 10, 50)  # paper A: sum over tokens, and top-N


class Pooled(NamedTuple):
    """csr [samples, d_sae]: ``values`` sums the kept activations (float32), ``counts`` the tokens that kept them.

    Both have the same entries. ``counts`` is paper A's as-published top-N; ``counts > 0`` its binarised form.
    """

    values: sp.csr_matrix
    counts: sp.csr_matrix


def pool_all(features: sp.csr_matrix, sample_rows, n_samples: int, ns: Sequence = POOLINGS) -> dict:
    """Pool tokens into samples for every N of ``ns`` in one pass (None: sum over all active features): {N: Pooled}.

    ``sample_rows`` [tokens]: row of each token's sample, 0 to n_samples - 1, in any order. Temporary memory is that
    of a few samples, whatever their number.
    """
    rows = np.asarray(sample_rows, np.int64)
    if len(rows) != features.shape[0]:
        raise ValueError(f"{features.shape[0]} tokens but {len(rows)} sample rows")
    if len(rows) and np.any(rows[1:] < rows[:-1]):
        order = np.argsort(rows, kind="stable")
        rows, features = rows[order], features[order]
    if len(rows) and (rows[0] < 0 or rows[-1] >= n_samples):
        raise ValueError(f"sample rows {rows[0]} to {rows[-1]} outside 0 to {n_samples - 1}")
    d = features.shape[1]
    step = max(1, 2**16 // d)  # accumulators of one block stay in the second-level cache
    parts = {n: [] for n in ns}
    for first in range(0, n_samples, step):
        last = min(first + step, n_samples)
        lo, hi = np.searchsorted(rows, [first, last])
        base = (rows[lo:hi] - first) * d
        for n, flat, values in _kept(features, lo, hi, base, (last - first) * d, ns):
            parts[n].append(_sum(flat, values, last - first, d))
    return {n: _stack(p, d) for n, p in parts.items()}


def _kept(features, lo, hi, base, overflow, ns) -> Iterator[tuple]:
    """Per N: flat (sample, feature) positions and activations kept, in token order; padding: ``overflow``."""
    numbers = [n for n in ns if n is not None]
    if None in ns:
        entries = slice(features.indptr[lo], features.indptr[hi])
        flat = np.repeat(base, np.diff(features.indptr[lo : hi + 1])) + features.indices[entries]
        yield None, flat, features.data[entries]
    if numbers:
        keys = top_keys(features, max(numbers), lo, hi)
        values = (keys >> 32).astype(np.int32).view(np.float32)
        flat = np.where(keys > 0, base[:, None] + (LOW - (keys & LOW)), overflow)
        for n in numbers:
            yield n, flat[:, :n].reshape(-1), values[:, :n].reshape(-1)


def _sum(flat, values, n_samples, d) -> Pooled:
    size = n_samples * d
    count = np.bincount(flat, minlength=size + 1)[:size]
    position = np.flatnonzero(count > 0)
    total = np.bincount(flat, weights=values, minlength=size + 1)[position]
    summed = from_flat(position, total.astype(np.float32), (n_samples, d))
    return Pooled(summed, _like(summed, count[position].astype(np.int32)))


def _like(matrix: sp.csr_matrix, values: np.ndarray) -> sp.csr_matrix:
    """Other values at the same entries; the index arrays are shared."""
    return sp.csr_matrix((values, matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)


def _stack(parts: list[Pooled], d: int) -> Pooled:
    if len(parts) == 1:
        return parts[0]
    values = sp.vstack([sp.csr_matrix((0, d), dtype=np.float32), *(p.values for p in parts)], format="csr")
    counts = np.concatenate([np.empty(0, np.int32), *(p.counts.data for p in parts)])
    return Pooled(values, _like(values, counts))


class Pooling(Meter):
    """Pools the features of one SAE; ``keep`` (TokenBatch -> bool [N]) chooses tokens. The result is {N: `Pooled`}.

    ``add`` takes all tokens of a sample in one call (ValueError when a sample comes back); ``sample`` lists the ids by
    row: as they came, ascending within one ``add``. ``result`` forgets what it gave.
    """

    def __init__(self, sae, layer: int, ns: Sequence = POOLINGS, scale: float = 1.0, keep: Callable | None = None):
        super().__init__(sae, layer, scale)
        self.ns, self.keep, self.once, self.sample, self.parts = tuple(ns), keep, Once(), [], []

    def add(self, batch, features: sp.csr_matrix) -> None:
        sample = batch.sample.numpy()
        if self.keep:
            rows = np.flatnonzero(self.keep(batch))
            features, sample = features[rows], sample[rows]
        ids, rows = np.unique(sample, return_inverse=True)
        self.once(ids)
        self.sample += ids.tolist()
        self.parts.append(pool_all(features, rows, len(ids), self.ns))

    def result(self) -> dict:
        parts, self.parts = self.parts, []
        if not parts:
            raise ValueError("nothing was pooled: the stream gave no tokens")
        d = next(iter(parts[0].values())).values.shape[1]
        return {n: _stack([part.pop(n) for part in parts], d) for n in self.ns}


def matrices(pooled: Mapping, reading: str = "corrected") -> dict[tuple[str, str], sp.csr_matrix]:
    """What paper A's classifiers are given, by (pooling, form), from {N: Pooled}.

    Pooling "sum" or "top-N". Form "binarised": whether any token kept the feature, 0 or 1; "raw": the sum of
    the kept activations, but for top-N of ``as_published`` the number of tokens that kept it (METHODS A.2).
    """
    out = {}
    for n, (values, counts) in pooled.items():
        name, counted = ("sum", False) if n is None else (f"top-{n}", reading == "as_published")
        out[name, "raw"] = counts.astype(np.float32) if counted else values
        out[name, "binarised"] = _like(values, np.ones(values.nnz, np.float32))
    return out
