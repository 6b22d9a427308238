"""Sparse features: what leaves the encoder, and their ranking within a token.

Token features are a ``scipy.sparse.csr_matrix`` [tokens, d_sae], float32, of the positive activations, columns
ascending. Where features of one token are ranked, ties go to the lowest feature index and inactive features never
count.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch

from mmsae_helpers.errors import InputError

LOW = np.int64(2**31 - 1)


def to_csr(z) -> sp.csr_matrix:
    """Keep the positive entries of a dense [tokens, d_sae] array or CPU/GPU tensor."""
    if hasattr(z, "detach"):
        z = z.detach().float()
        if z.device.type != "cpu":
            flat = (z.reshape(-1) > 0).nonzero().squeeze(1)
            return from_flat(flat.cpu().numpy(), z.reshape(-1)[flat].cpu().numpy(), tuple(z.shape))
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
    return from_flat(np.concatenate(flats), np.concatenate(values), (n, d))


def from_flat(flat: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """Csr from ascending flat positions row * d + column."""
    n, d = shape
    indptr = np.searchsorted(flat, np.arange(n + 1) * d)
    columns = flat - np.repeat(np.arange(n) * d, np.diff(indptr))
    return sp.csr_matrix((values, columns.astype(np.int32), indptr), shape=shape, copy=False)


def encode_chunks(sae, acts, scale: float = 1.0, chunk: int = 2048) -> Iterator[tuple]:
    """Residuals [n, d_model], the same times ``scale``, and their dense features [n, d_sae], ``chunk`` at a time.

    All on the device and in the type of ``sae`` (anything with ``encode``). Raises InputError when a residual is not
    finite.
    """
    weight = next(iter(sae.parameters()), None) if hasattr(sae, "parameters") else None
    for start in range(0, max(len(acts), 1), chunk):
        raw = acts[start : start + chunk]
        if weight is not None:
            raw = raw.to(weight.device, weight.dtype)
        if not (raw.sum(dtype=torch.float32).isfinite() or raw.isfinite().all()):  # the sum takes a sixth of the time
            where = f"activations of tokens {start} to {start + len(raw) - 1} hold NaN or infinity"
            raise InputError(f"{where}: run the model in float32 or bfloat16 (parameter dtype)")
        x = raw * scale if scale != 1.0 else raw
        with torch.no_grad():
            features = sae.encode(x)
        yield raw, x, features


def encode(sae, acts, scale: float = 1.0, chunk: int = 2048) -> sp.csr_matrix:
    """Token features of residuals ``acts`` [tokens, d_model]; see `encode_chunks`."""
    parts = [to_csr(features) for *_, features in encode_chunks(sae, acts, scale, chunk)]
    return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")


def keys_of(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Int64 keys that rank features of a token: by value (positive floats sort as ints), then low column."""
    return (values.view(np.int32).astype(np.int64) << 32) | (LOW - columns)


def top_keys(features: sp.csr_matrix, n: int, start: int, stop: int) -> np.ndarray:
    """Keys of the n largest features of tokens start to stop [rows, n], descending, then 0."""
    entries = slice(features.indptr[start], features.indptr[stop])
    keys = keys_of(features.data[entries], features.indices[entries])
    return largest(keys, features.indptr[start : stop + 1] - entries.start, n)


def largest(keys: np.ndarray, indptr: np.ndarray, n: int, held=None, step: int = 512) -> np.ndarray:
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
    key = top_keys(features, 1, 0, features.shape[0])[:, 0]
    return np.where(key > 0, LOW - (key & LOW), -1)


def top_n(features: sp.csr_matrix, n: int) -> sp.csr_matrix:
    """Csr of the n largest features of every token, largest first (not by column)."""
    key = top_keys(features, n, 0, features.shape[0])
    kept, key = key > 0, key[key > 0]
    indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    columns, values = (LOW - (key & LOW)).astype(np.int32), (key >> 32).astype(np.int32).view(np.float32)
    return sp.csr_matrix((values, columns, indptr), shape=features.shape, copy=False)


class Once:
    """Refuses a sample that comes a second time: its tokens would be counted as another sample's."""

    def __init__(self):
        self._ids: set[int] = set()

    def __call__(self, ids: np.ndarray) -> None:
        new = set(ids.tolist())
        if again := self._ids & new:
            raise ValueError(f"sample {min(again)} came twice: give all tokens of a sample in one call")
        self._ids |= new
