"""Cross-modal weights of features, and the scores of samples that follow from them (paper C, METHODS C.2 and C.3).

Token features are a csr matrix [tokens, d_sae] of positive activations (see `features`). An active feature is one
above ``delta``; text is every token that is not an image token.
"""

from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.features import top_n
from mmsae_helpers.meters.feed import Meter

Reading = Literal["paper", "as_published"]
PUBLISHED_FEATURES, PUBLISHED_TOKENS = 50, 30  # as published: features kept a token, tokens kept a feature
_LARGEST = np.int64(2**31 - 1)  # above the bits of every positive float32


class CrossModal:
    """Streams tokens and keeps, for every feature, the residuals of its highest tokens.

    ``paper``: the weight of a feature is the mean cosine between the residuals of its ``k`` highest text tokens and its
    ``k`` highest image tokens, of those above ``delta``, paired by rank. With fewer of one modality the surplus of the
    other is left out and the mean is over the pairs there are; nan where there is none. ``as_published``: every token
    keeps its 50 largest features (``delta`` has no part), every feature its 30 highest tokens of both modalities
    together; with at least ``k`` of each among them the weight is the mean of all k x k cosines between the highest k,
    else nan. Among equal activations the token that came first ranks first. A residual of zeros has cosine 0.

    Memory: one residual (float32) for every token that is still among some feature's highest, at most
    2 x d_sae x k of them (as published d_sae x 30), whatever the number of tokens.
    """

    def __init__(self, d_sae: int, d_model: int, k: int = 5, delta: float = 1.0, reading: Reading = "paper"):
        if reading not in Reading.__args__:
            raise InputError(f"reading is {reading!r}: choose one of {', '.join(Reading.__args__)}")
        self.d_sae, self.d_model, self.k, self.reading = d_sae, d_model, k, reading
        # a list of highest tokens for every feature, and modality if they are kept apart
        n_lists, self._width, least = (2 * d_sae, k, delta) if reading == "paper" else (d_sae, PUBLISHED_TOKENS, 0.0)
        self._value = np.full((n_lists, self._width), max(least, 0.0), np.float32)  # descending
        self._slot = np.full((n_lists, self._width), -1, np.int32)  # row of the pool, -1: none yet
        self._least = self._value[:, -1].copy()  # what a token must exceed to enter a list
        # reserved whole, touched (and so resident) only as far as it fills: one row is free for every list entry
        self._pool = np.empty((self._slot.size, d_model), np.float32)
        self._pool[-1] = 0  # what slot -1 reads, and weights() then leaves out
        self._pool_is_image = np.zeros(self._slot.size, bool)
        # a sort key holds the list, the activation (31 bits) and the order of arrival
        self._order_bits = 32 - max(1, (n_lists - 1).bit_length())
        self._step = 2**self._order_bits - self._width
        if self._step < 1:
            raise InputError(f"an SAE of {d_sae} features is too wide for cross-modal weights")

    def add(self, features: sp.csr_matrix, is_image, residual) -> None:
        """Tokens in stream order: features csr [N, d_sae], ``is_image`` [N] bool, ``residual`` [N, d_model] (CPU).

        Raises InputError where the widths are another SAE's or another model's.
        """
        residual, is_image = np.asarray(residual, np.float32), np.asarray(is_image, bool)
        _check_width(features, self.d_sae)
        if residual.shape[1] != self.d_model:
            raise InputError(f"residuals have width {residual.shape[1]} but the weights were set up for {self.d_model}")
        if self.reading == "as_published":
            features = top_n(features, PUBLISHED_FEATURES)
        for lo in range(0, len(residual), self._step):
            hi = min(lo + self._step, len(residual))
            entries, length = slice(*features.indptr[[lo, hi]]), np.diff(features.indptr[lo : hi + 1])
            lists, value = features.indices[entries], features.data[entries]
            if self.reading == "paper":
                lists = lists + np.repeat(np.where(is_image[lo:hi], np.int32(self.d_sae), np.int32(0)), length)
            enters = np.flatnonzero(value > self._least[lists])
            row = np.repeat(np.arange(hi - lo, dtype=np.int32), length)[enters]
            self._merge(lists[enters], value[enters], row, is_image[lo:hi], residual[lo:hi])

    def _merge(self, lists, value, row, is_image, residual) -> None:
        """Merge entries (list, activation, token) with the lists they enter: sort both, keep the first of each."""
        n_new = np.bincount(lists, minlength=len(self._slot))
        touched = np.flatnonzero(n_new)
        ranks = np.arange(self._width)
        old = self._keys(touched[:, None], self._value[touched], ranks)
        key = np.concatenate([old.reshape(-1), self._keys(lists, value, self._width + row)])
        key.sort()
        count = n_new[touched] + self._width
        key = key[(np.cumsum(count) - count)[:, None] + ranks]  # [touched, width]
        value = (_LARGEST - (key >> self._order_bits & _LARGEST)).astype(np.int32).view(np.float32)
        order = key & (2**self._order_bits - 1)
        new = order >= self._width
        slot = np.take_along_axis(self._slot[touched], np.where(new, 0, order), axis=1)
        slot[new] = -1
        self._value[touched], self._slot[touched], self._least[touched] = value, slot, value[:, -1]
        slot[new] = self._store(order[new] - self._width, is_image, residual)
        self._slot[touched] = slot

    def _keys(self, lists, value, order):
        """Int64 keys that rank by list, then high activation (positive floats sort as ints), then early arrival."""
        high = _LARGEST - value.view(np.int32)
        return ((lists.astype(np.int64) << 31 | high) << self._order_bits) | order

    def _store(self, row, is_image, residual) -> np.ndarray:
        """Copy the residuals of the tokens ``row`` to rows of the pool that no list names; returns these rows."""
        wanted, used = np.zeros(len(residual), bool), np.zeros(len(self._pool) + 1, bool)
        wanted[row], used[self._slot] = True, True  # slot -1 marks the one too many
        tokens = np.flatnonzero(wanted)
        free = np.flatnonzero(~used[:-1])[: len(tokens)]
        self._pool[free], self._pool_is_image[free] = residual[tokens], is_image[tokens]
        slot = np.empty(len(residual), np.int32)
        slot[tokens] = free
        return slot[row]

    def weights(self) -> np.ndarray:
        """Cross-modal weight of every feature [d_sae] float64, nan where it has none."""
        out, k = np.full(self.d_sae, np.nan), self.k
        if self.reading == "paper":
            text, image = self._slot[: self.d_sae], self._slot[self.d_sae :]
            pairs = ((text >= 0) & (image >= 0)).sum(axis=1)
            having = np.flatnonzero(pairs)
        else:
            there = self._slot >= 0
            of_image = there & self._pool_is_image[self._slot]
            of_text = there & ~of_image
            having = np.flatnonzero((of_text.sum(axis=1) >= k) & (of_image.sum(axis=1) >= k))
            text, image = (
                np.take_along_axis(self._slot, np.argsort(~of, axis=1, kind="stable")[:, :k], axis=1)
                for of in (of_text, of_image)
            )
        step = max(1, 2**18 // (k * self.d_model))
        for block in (having[i : i + step] for i in range(0, len(having), step)):
            t, i = (_unit(self._pool[slot[block]]) for slot in (text, image))
            if self.reading == "paper":
                cosine = np.einsum("fkd,fkd->fk", t, i)
                out[block] = np.where(np.arange(k) < pairs[block, None], cosine, 0).sum(axis=1) / pairs[block]
            else:  # the mean of all k x k cosines is one product of two mean unit vectors
                out[block] = np.einsum("fd,fd->f", t.mean(axis=1), i.mean(axis=1))
        return out


class Weights(Meter):
    """`CrossModal` of one SAE, with its options; the result is its weights [d_sae]."""

    def __init__(self, sae, layer: int, scale: float = 1.0, **options):
        super().__init__(sae, layer, scale)
        self.of = CrossModal(sae.cfg.d_sae, sae.cfg.d_in, **options)

    def add(self, batch, features: sp.csr_matrix) -> None:
        self.of.add(features, batch.is_image, batch.acts[self.layer])

    def result(self) -> np.ndarray:
        return self.of.weights()


def _unit(x):
    norm = np.sqrt(np.einsum("fkd,fkd->fk", x, x))
    return x * np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)[..., None]


def sample_scores(features: sp.csr_matrix, sample, is_image, weights, delta: float = 1.0) -> pd.DataFrame:
    """Scores of whole samples (paper C, Algorithms 1 to 3), one row each, indexed by sample id ascending.

    ``sample`` [N] ids and ``is_image`` [N] of the tokens, ``weights`` [d_sae] from `CrossModal`, nan counts 0. Columns:
    ``cosine``, the sum of the weights of the features active on some text token and some image token; ``l0``, the mean
    over tokens of the number of active features; ``cooccurrence``, the number of features active on both; and the
    tokens ``n_text`` and ``n_image``: without either, cosine and cooccurrence are 0. Frames of batches concatenate.
    """
    weights, is_image = np.nan_to_num(np.asarray(weights, np.float64)), np.asarray(is_image, bool)
    _check_width(features, len(weights))
    ids, rows = np.unique(np.asarray(sample), return_inverse=True)
    on_text, on_image, active = active_features(features, rows, len(ids), is_image, delta)
    on_both = on_text & on_image
    n, n_image = np.bincount(rows, minlength=len(ids)), np.bincount(rows[is_image], minlength=len(ids))
    scores = {
        "cosine": on_both @ weights,
        "l0": active / n,
        "cooccurrence": np.count_nonzero(on_both, axis=1),
        "n_text": n - n_image,
        "n_image": n_image,
    }
    return pd.DataFrame(scores, index=pd.Index(ids, name="sample"))


def active_features(features: sp.csr_matrix, rows, n_samples: int, is_image, delta: float = 0.0):
    """What is active on some text token and on some image token of each sample, and how many are on all its tokens;
    active is above ``delta``, a number or one a feature [d_sae].

    ``rows`` [N]: row of each token's sample. Returns (bool [S, d_sae] for text, the same for images, int [S]).
    """
    d = features.shape[1]
    found, count = np.zeros((2 * n_samples, d + 1), bool), np.zeros(2 * n_samples, np.int64)
    kind = np.asarray(is_image, np.int64) * n_samples + rows
    runs = np.flatnonzero(np.diff(kind, prepend=-1))  # few: tokens of a sample and modality come together
    ends = features.indptr[np.append(runs, len(kind))].tolist()
    outside = np.int64(d)  # the column too many, for what is not active
    for k, lo, hi in zip(kind[runs].tolist(), ends[:-1], ends[1:], strict=True):
        which = features.indices[lo:hi]
        active = features.data[lo:hi] > (delta if np.isscalar(delta) else delta[which])
        found[k][np.where(active, which, outside)] = True
        count[k] += np.count_nonzero(active)
    return found[:n_samples, :d], found[n_samples:, :d], count[:n_samples] + count[n_samples:]


def _check_width(features: sp.csr_matrix, d_sae: int) -> None:
    if features.shape[1] != d_sae:
        raise InputError(
            f"features of an SAE of width {features.shape[1]} where {d_sae} is expected: use one SAE for all"
        )
