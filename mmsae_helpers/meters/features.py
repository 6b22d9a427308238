"""Sparse feature reductions: what leaves the encoder, and everything the notebooks compute from it.

Token features are a ``scipy.sparse.csr_matrix`` [tokens, d_sae], float32, of the positive activations, columns
ascending. Where features of one token are ranked, ties go to the lowest feature index and inactive features never
count. Sums run in float64, in token order, so pooling in chunks equals pooling at once bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from mmsae_helpers.errors import InputError
from mmsae_helpers.workers import crew

POOLINGS = (None, 1, 3, 5, 10, 50)  # paper A: sum over tokens, and top-N
_LOW = np.int64(2**31 - 1)


class Pooled(NamedTuple):
    """csr [samples, d_sae]: ``values`` sums the kept activations (float32), ``counts`` the tokens that kept them.

    Both have the same entries. ``counts`` is paper A's as-published top-N; ``counts > 0`` its binarised form.
    """

    values: sp.csr_matrix
    counts: sp.csr_matrix


class PooledSamples(NamedTuple):
    """Result of a `PoolStream`: sample ids [S] (int64) in row order, and one `Pooled` per requested N."""

    sample: np.ndarray
    pooled: dict[int | None, Pooled]


class Share(NamedTuple):
    """Per requested feature: activation summed over the object's patches, and over all patches (float64)."""

    on_object: np.ndarray
    total: np.ndarray


# ---------------------------------------------------------------- encoder to sparse


def to_csr(z) -> sp.csr_matrix:
    """Keep the positive entries of a dense [tokens, d_sae] array or CPU/GPU tensor."""
    if hasattr(z, "detach"):
        z = z.detach().float()
        if z.device.type != "cpu":
            flat = (z.reshape(-1) > 0).nonzero().squeeze(1)
            return _from_flat(flat.cpu().numpy(), z.reshape(-1)[flat].cpu().numpy(), tuple(z.shape))
        z = z.numpy()
    z = np.ascontiguousarray(z, dtype=np.float32)
    n, d = z.shape
    step = max(1, 2**18 // max(d, 1))  # 16 rows of 16,384: the comparison's result stays in cache
    flats, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for start in range(0, n, step):
        block = z[start : start + step].reshape(-1)
        flat = np.flatnonzero(block > 0)
        values.append(block[flat])
        flat += start * d
        flats.append(flat)
    return _from_flat(np.concatenate(flats), np.concatenate(values), (n, d))


def _from_flat(flat: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """Csr from ascending flat positions row * d + column."""
    n, d = shape
    indptr = np.searchsorted(flat, np.arange(n + 1) * d)
    columns = flat - np.repeat(np.arange(n) * d, np.diff(indptr))
    return sp.csr_matrix((values, columns.astype(np.int32), indptr), shape=shape, copy=False)


def encode(sae, acts, scale: float = 1.0, chunk: int = 2048) -> sp.csr_matrix:
    """Token features of residuals ``acts`` [tokens, d_model] under ``sae`` (anything with ``encode``).

    ``scale`` multiplies the residuals first (see `saes.rescale_factor`). Dense only for ``chunk`` tokens at a time.
    Raises InputError when a residual is not finite.
    """
    weight = next(iter(sae.parameters()), None) if hasattr(sae, "parameters") else None
    parts = []
    with torch.no_grad():
        for start in range(0, max(len(acts), 1), chunk):
            x = acts[start : start + chunk]
            if weight is not None:
                x = x.to(weight.device, weight.dtype)
            if not torch.isfinite(x).all():
                where = f"activations of tokens {start} to {start + len(x) - 1} hold NaN or infinity"
                raise InputError(f"{where}: run the model in float32 or bfloat16 (parameter dtype)")
            parts.append(to_csr(sae.encode(x * scale if scale != 1.0 else x)))
    return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")


# ---------------------------------------------------------------- ranking within a token


def _keys(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Int64 keys that rank features of a token: by value (positive floats sort as ints), then low column."""
    return (values.view(np.int32).astype(np.int64) << 32) | (_LOW - columns)


def _top_keys(features: sp.csr_matrix, n: int, start: int, stop: int) -> np.ndarray:
    """Keys of the n largest features of tokens start to stop [rows, n], descending, then 0."""
    entries = slice(features.indptr[start], features.indptr[stop])
    keys = _keys(features.data[entries], features.indices[entries])
    return _largest(keys, features.indptr[start : stop + 1] - entries.start, n)


def _largest(keys: np.ndarray, indptr: np.ndarray, n: int, held=None, step: int = 512) -> np.ndarray:
    """The n largest of each row's keys, which lie between indptr[row] and indptr[row + 1]; descending, then 0.

    ``held`` [rows, n]: keys that compete too.
    """
    out = np.zeros((len(indptr) - 1, n), np.int64)
    for lo in range(0, len(out), step):
        some = indptr[lo : lo + step + 1]
        count = np.diff(some)
        width = int(count.max(initial=0))
        padded = np.zeros((len(count), width), np.int64)
        padded[np.arange(width) < count[:, None]] = keys[some[0] : some[-1]]
        if held is not None:
            padded = np.concatenate([padded, held[lo : lo + step]], axis=1)
            width += n
        if width > 2 * n:
            padded.partition(width - n, axis=1)
            padded = padded[:, -n:]
        padded.sort(axis=1)
        k = min(n, width)
        out[lo : lo + step, :k] = padded[:, ::-1][:, :k]
    return out


def retrieve_top1(features: sp.csr_matrix) -> np.ndarray:
    """Index of each token's largest feature [tokens] int64, -1 where none is active (paper A, retrieval)."""
    key = _top_keys(features, 1, 0, features.shape[0])[:, 0]
    return np.where(key > 0, _LOW - (key & _LOW), -1)


def top_n(features: sp.csr_matrix, n: int) -> sp.csr_matrix:
    """Csr of the n largest features of every token, largest first (not by column)."""
    key = _top_keys(features, n, 0, features.shape[0])
    kept, key = key > 0, key[key > 0]
    indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    columns, values = (_LOW - (key & _LOW)).astype(np.int32), (key >> 32).astype(np.int32).view(np.float32)
    return sp.csr_matrix((values, columns, indptr), shape=features.shape, copy=False)


# ---------------------------------------------------------------- pooling over the tokens of a sample


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
        keys = _top_keys(features, max(numbers), lo, hi)
        values = (keys >> 32).astype(np.int32).view(np.float32)
        flat = np.where(keys > 0, base[:, None] + (_LOW - (keys & _LOW)), overflow)
        for n in numbers:
            yield n, flat[:, :n].reshape(-1), values[:, :n].reshape(-1)


def _sum(flat, values, n_samples, d) -> Pooled:
    size = n_samples * d
    count = np.bincount(flat, minlength=size + 1)[:size]
    position = np.flatnonzero(count > 0)
    total = np.bincount(flat, weights=values, minlength=size + 1)[position]
    summed = _from_flat(position, total.astype(np.float32), (n_samples, d))
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


def pool(features: sp.csr_matrix, sample_rows, n_samples: int, n: int | None = None) -> Pooled:
    """`pool_all` for a single N (None: sum over all active features)."""
    return pool_all(features, sample_rows, n_samples, (n,))[n]


class PoolStream:
    """Pools a stream of token features; holds nothing but the pooled result.

    ``add`` takes all tokens of a sample in one call (ValueError when a sample comes back). ``result`` returns what was
    pooled since the last call and forgets it.
    """

    def __init__(self, ns: Sequence = POOLINGS):
        self.ns = tuple(ns)
        self._seen = _Once()
        self._parts: list[PooledSamples] = []

    def add(self, features: sp.csr_matrix, sample) -> None:
        """``features`` csr [tokens, d_sae], ``sample`` [tokens] sample ids."""
        ids, rows = np.unique(np.asarray(sample), return_inverse=True)
        self._seen(ids)
        self._parts.append(PooledSamples(ids, pool_all(features, rows, len(ids), self.ns)))

    def result(self) -> PooledSamples:
        """Rows in the order in which samples came (ascending id within one ``add``)."""
        parts, self._parts = self._parts, []
        if not parts:
            raise ValueError("nothing was pooled: the stream gave no tokens")
        d = next(iter(parts[0].pooled.values())).values.shape[1]
        sample = np.concatenate([p.sample for p in parts])
        return PooledSamples(sample, {n: _stack([p.pooled.pop(n) for p in parts], d) for n in self.ns})


def pool_pass(tokens, saes: Mapping, ns: Sequence = POOLINGS, scales: Mapping | None = None) -> dict:
    """Pool one pass over TokenBatches of whole samples under every SAE, two at a time on two cores.

    ``saes`` by key (layer, ...); ``scales``: factor on the residuals, by key. Returns {key: {N: Pooled}}, rows in the
    order of the samples.
    """
    streams = {key: PoolStream(ns) for key in saes}
    with crew() as each:
        for batch in tokens:

            def add(key, batch=batch):
                found = encode(saes[key], batch.acts[key[0]], (scales or {}).get(key, 1.0))
                streams[key].add(found, batch.sample.numpy())

            each(add, streams)
    return {key: stream.result().pooled for key, stream in streams.items()}


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


class _Once:
    """Refuses a sample that comes a second time: its tokens would be counted as another sample's."""

    def __init__(self):
        self._ids: set[int] = set()

    def __call__(self, ids: np.ndarray) -> None:
        new = set(ids.tolist())
        if again := self._ids & new:
            raise ValueError(f"sample {min(again)} came twice: give all tokens of a sample in one call")
        self._ids |= new


# ---------------------------------------------------------------- retrieval, paper A section 1


class OccurrenceCounter:
    """Counts, per class and feature, the images whose tokens retrieve the feature; whole samples per ``add``.

    ``labels`` [samples]: class of every sample id. ``counts`` [n_classes, d_sae] int64.
    """

    def __init__(self, labels, n_classes: int, d_sae: int):
        self.labels = np.asarray(labels, np.int64)
        self.counts = np.zeros((n_classes, d_sae), np.int64)
        self._seen = _Once()

    def add(self, top1, sample) -> None:
        """``top1`` [tokens] from `retrieve_top1` (-1 is no feature), ``sample`` [tokens] sample ids."""
        top1, sample = np.asarray(top1, np.int64), np.asarray(sample, np.int64)
        self._seen(np.unique(sample))
        d = self.counts.shape[1]
        pairs = np.unique((sample * d + top1)[top1 >= 0])  # an image retrieves a feature or does not
        np.add.at(self.counts, (self.labels[pairs // d], pairs % d), 1)

    @property
    def images_per_feature(self) -> np.ndarray:
        """Number of images, of any class, that retrieve each feature [d_sae]."""
        return self.counts.sum(axis=0)


def clean(counts, max_images: int) -> np.ndarray:
    """Paper A's cleaning: bool [d_sae], False for features that more than ``max_images`` images retrieve."""
    counts = np.asarray(counts)
    return (counts.sum(axis=0) if counts.ndim == 2 else counts) <= max_images


# ---------------------------------------------------------------- images on which a feature is largest


def image_maxima(features: sp.csr_matrix, sample) -> tuple[np.ndarray, sp.csr_matrix]:
    """Largest activation of each feature over every image's tokens: ids [S] ascending, csr [S, d_sae].

    ``features`` csr [tokens, d_sae]; ``sample`` [tokens]: image of each, in any order.
    """
    ids, rows = np.unique(np.asarray(sample), return_inverse=True)
    if np.any(rows[1:] < rows[:-1]):
        order = np.argsort(rows, kind="stable")
        rows, features = rows[order], features[order]
    d = features.shape[1]
    parts = [sp.csr_matrix((0, d), dtype=np.float32)]
    step = max(1, 2**18 // max(d, 1))  # dense only for a few images at a time
    for first in range(0, len(ids), step):
        lo, hi = np.searchsorted(rows, [first, first + step])
        entries = slice(features.indptr[lo], features.indptr[hi])
        flat = np.repeat((rows[lo:hi] - first) * d, np.diff(features.indptr[lo : hi + 1])) + features.indices[entries]
        largest = np.zeros((min(step, len(ids) - first), d), np.float32)
        np.maximum.at(largest.reshape(-1), flat, features.data[entries])
        parts.append(to_csr(largest))
    return ids, sp.vstack(parts, format="csr")


class TopImages:
    """The k images on which each feature is largest, in one pass: ties go to the lowest image id, zeros do not fire.

    Equal to sorting all images, in whatever order they come. Memory is d_sae x k, whatever the number of images; an
    image below a feature's k-th is dropped by one comparison. ``n_images`` [d_sae]: images that fire.
    """

    def __init__(self, d_sae: int, k: int = 9):
        self.n_images = np.zeros(d_sae, np.int64)
        self._keys = np.zeros((d_sae, k), np.int64)  # as `_keys`, the image in the place of the column

    def add(self, maxima: sp.csr_matrix, ids) -> None:
        """``maxima`` csr [S, d_sae] of whole images (`image_maxima`), ``ids`` [S] of them, 0 to 2^31 - 2.

        An image comes once: InputError for an id twice in one call; one that comes back in a later call is not noticed
        and would stand twice. InputError too where ids or widths do not fit.
        """
        ids = np.asarray(ids, np.int64)
        if maxima.shape != (len(ids), len(self._keys)):
            raise InputError(f"top images: maxima are {maxima.shape}, but {len(ids)} ids, {len(self._keys)} features")
        if len(np.unique(ids)) < len(ids):
            raise InputError("top images: an image id comes twice in one call: take the maxima of whole images first")
        if len(ids) and (ids.min() < 0 or ids.max() >= _LOW):
            raise InputError(f"top images: ids {ids.min()} to {ids.max()} outside 0 to {_LOW - 1}")
        data, columns, (d, k) = maxima.data, maxima.indices.astype(np.intp), self._keys.shape
        last = (self._keys[:, -1] >> 32).astype(np.int32).view(np.float32)
        enough = np.maximum(last, np.finfo(np.float32).smallest_subnormal)
        if len(data) == len(ids) * d:  # nothing is zero: columns need not be looked up
            self.n_images += (data.reshape(-1, d) > 0).sum(axis=0)
            place = np.flatnonzero(data.reshape(-1, d) >= enough)
        else:
            self.n_images += np.bincount(columns if (data > 0).all() else columns[data > 0], minlength=d)
            place = np.flatnonzero(data >= enough[columns])
        image = np.repeat(ids, np.diff(np.searchsorted(place, maxima.indptr)))
        keys, columns = _keys(data[place], image), columns[place]
        order = np.argsort(columns.astype(np.min_scalar_type(d)), kind="stable")  # by radix up to 16 bits
        count = np.bincount(columns, minlength=d)
        changed = np.flatnonzero(count)
        starts = np.r_[0, np.cumsum(count[changed])]
        self._keys[changed] = _largest(keys[order], starts, k, self._keys[changed])

    @property
    def values(self) -> np.ndarray:
        """Activations [d_sae, k] float32, descending, 0 where fewer images fire."""
        return (self._keys >> 32).astype(np.int32).view(np.float32)

    @property
    def ids(self) -> np.ndarray:
        """Image ids [d_sae, k] int64, -1 where fewer images fire."""
        return np.where(self._keys > 0, _LOW - (self._keys & _LOW), -1)


# ---------------------------------------------------------------- chosen features


def max_per_sample(features: sp.csr_matrix, sample, wanted) -> np.ndarray:
    """Largest activation of every wanted feature over each sample's tokens, float32 [samples, len(wanted)].

    Rows are the distinct ids of ``sample`` [tokens], ascending.
    """
    return image_maxima(features[:, np.asarray(wanted, np.int64)], sample)[1].toarray()


def share_on_object(features: sp.csr_matrix, sample, patch, object_patch_mask, wanted) -> Share:
    """How much of each feature of ``wanted`` falls on the object's patches; sums of chunks add up.

    ``patch`` [tokens]: patch index, -1 for tokens that show none (left out of both sums). ``object_patch_mask``
    [samples, patches]: row = sample id; bool, or the covered fraction of each patch.
    """
    patch = np.asarray(patch)
    shown = (patch >= 0).astype(np.float64)
    cover = np.asarray(object_patch_mask)[np.asarray(sample), np.maximum(patch, 0)] * shown
    of_feature = features[:, np.asarray(wanted, np.int64)].T
    return Share(of_feature @ cover, of_feature @ shown)
