"""The images on which a feature is largest."""

import numpy as np
import scipy.sparse as sp

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.features import LOW, keys_of, largest, to_csr


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
        self._keys = np.zeros((d_sae, k), np.int64)  # as `keys_of`, the image in the place of the column

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
        if len(ids) and (ids.min() < 0 or ids.max() >= LOW):
            raise InputError(f"top images: ids {ids.min()} to {ids.max()} outside 0 to {LOW - 1}")
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
        keys, columns = keys_of(data[place], image), columns[place]
        order = np.argsort(columns.astype(np.min_scalar_type(d)), kind="stable")  # by radix up to 16 bits
        count = np.bincount(columns, minlength=d)
        changed = np.flatnonzero(count)
        starts = np.r_[0, np.cumsum(count[changed])]
        self._keys[changed] = largest(keys[order], starts, k, self._keys[changed])

    @property
    def values(self) -> np.ndarray:
        """Activations [d_sae, k] float32, descending, 0 where fewer images fire."""
        return (self._keys >> 32).astype(np.int32).view(np.float32)

    @property
    def ids(self) -> np.ndarray:
        """Image ids [d_sae, k] int64, -1 where fewer images fire."""
        return np.where(self._keys > 0, LOW - (self._keys & LOW), -1)
