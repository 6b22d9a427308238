"""What one pass over captioned images says about every feature of an SAE.

Shapes: S images, N tokens, F features, V words. A feature's activation on an image is its largest over the tokens of
the image's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from mmsae_helpers import activations
from mmsae_helpers.errors import InputError
from mmsae_helpers.features import TopImages, encode, image_maxima
from mmsae_helpers.labels import WordMeans, next_tokens
from mmsae_helpers.monosemanticity import Similarity, purity
from mmsae_helpers.workers import crew

BIN_EDGES = np.geomspace(1e-2, 1e2, 25)  # of the histograms of activations; what lies outside counts in the end bins


class Survey:
    """Of one SAE: ``tops`` (`features.TopImages`), ``words`` (`labels.WordMeans`), ``histogram`` [F, bins] of positive
    activations over tokens, ``n_tokens``, and `table`. ``embeddings`` [S, d] and ``attributes`` (DataFrame [S, A] of
    strings) are of all images. An image without a token (an empty caption) fires nothing and counts in frequency.
    """

    def __init__(self, sae, layer: int, embeddings, attributes: pd.DataFrame, n_words: int, k: int = 9, seed: int = 0):
        if len(embeddings) != len(attributes):
            raise InputError(
                f"{len(embeddings)} embeddings but {len(attributes)} rows of attributes: give one an image"
            )
        d_sae = sae.cfg.d_sae
        self.sae, self.layer, self.seed, self.n_tokens = sae, layer, seed, 0
        self.embeddings, self.attributes = np.asarray(embeddings), attributes
        self.dealt = np.random.default_rng(seed).permutation(len(attributes))
        self.tops, self.words = TopImages(d_sae, k), WordMeans(n_words, d_sae)
        self.similarity, self.control = (Similarity(d_sae, self.embeddings.shape[1]) for _ in range(2))
        self.histogram = np.zeros((d_sae, len(BIN_EDGES) - 1), np.int64)
        self._parts: list[tuple[np.ndarray, sp.csr_matrix]] = []

    def add(self, batch: activations.TokenBatch) -> None:
        """Take in a TokenBatch of whole images."""
        if not len(batch.sample):
            return
        found = encode(self.sae, batch.acts[self.layer])
        self.n_tokens += found.shape[0]
        self.words.add(found, batch.token, next_tokens(batch.token, batch.sample, batch.position))
        bins = np.clip(np.digitize(found.data, BIN_EDGES) - 1, 0, len(BIN_EDGES) - 2)
        flat = np.bincount(found.indices * np.int64(self.histogram.shape[1]) + bins, minlength=self.histogram.size)
        self.histogram += flat.reshape(self.histogram.shape)
        ids, maxima = image_maxima(found, batch.sample.numpy())
        self.tops.add(maxima, ids)
        self.similarity.add(maxima, self.embeddings[ids])
        self.control.add(maxima, self.embeddings[self.dealt[ids]])
        self._parts.append((ids, maxima))

    def table(self) -> pd.DataFrame:
        """A row a feature: feature, n_images it fires on, frequency (their share), max, similarity, purity with the
        attribute and value it is pure in, and both scores with the images dealt out at random (``_control``)."""
        ids = np.concatenate([part[0] for part in self._parts])
        maxima = sp.vstack([part[1] for part in self._parts], format="csr")
        truth = self.attributes.iloc[ids].reset_index(drop=True)
        found = purity(maxima, truth)
        return pd.DataFrame(
            {
                "feature": np.arange(len(found)),
                "n_images": self.tops.n_images,
                "frequency": self.tops.n_images / len(self.attributes),
                "max": self.tops.values[:, 0],
                "similarity": self.similarity.score(),
                "similarity_control": self.control.score(),
                "purity": found["purity"].to_numpy(),
                "purity_control": purity(maxima, truth, seed=self.seed)["purity"].to_numpy(),
                "attribute": found["attribute"].to_numpy(),
                "value": found["value"].to_numpy(),
            }
        )


def survey(saes: Mapping[tuple, object], tokens: Iterable, embeddings, **options) -> dict[tuple, Survey]:
    """A `Survey` of every SAE by its key (layer, ...), in one pass over ``tokens``; options as of Survey."""
    surveys = {key: Survey(sae, key[0], embeddings, **options) for key, sae in saes.items()}
    with crew() as each:
        for batch in tokens:
            each(lambda one, batch=batch: one.add(batch), surveys.values())
    return surveys


def where_it_looked(captioner, saes: Mapping[int, object], ids: Mapping[int, np.ndarray], batches: Iterable) -> dict:
    """Cross-attention at the token where a feature fires most, for each of its top images; one pass for all layers.

    ``saes`` and ``ids`` [F, k] (image ids, -1: none) by layer; ``batches``: `activations.Inputs` with those images.
    Returns by layer uint8 [F, k, rows, columns] over the encoder's patches: the attention of that block, averaged over
    heads, the largest of a map 255.
    """
    maps = {layer: np.zeros((*of.shape, *captioner.patch_grid), np.uint8) for layer, of in ids.items()}
    wanted = {layer: np.argsort(of, axis=None, kind="stable") for layer, of in ids.items()}
    for sample, inputs in batches:
        with captioner.looking(saes) as attention, activations.hooked(captioner, saes) as residual:
            activations.run(captioner, inputs)
        real = inputs["attention_mask"].bool()
        real[:, 0] = False  # the start token
        for (layer, sae), (i, image) in product(saes.items(), enumerate(sample.tolist())):
            bounds = np.searchsorted(ids[layer].ravel()[wanted[layer]], [image, image + 1])
            features, places = np.unravel_index(wanted[layer][slice(*bounds)], ids[layer].shape)
            if len(features):
                z = sae.encode(residual[layer][i, real[i]])[:, features]
                seen = attention[layer][i, real[i]][z.argmax(0)]
                seen = (seen / seen.amax(1, keepdim=True) * 255).round().byte().cpu().numpy()
                maps[layer][features, places] = seen.reshape(-1, *captioner.patch_grid)
    return maps


def for_browser(surveys: Mapping[int, Survey], labels: Mapping[int, pd.DataFrame], words: Mapping[int, str]) -> dict:
    """Arguments of `browser.write` for the surveys by layer; ``labels`` as from `labels.label`, ``words`` by id."""
    tables, tokens, near, cosines = [], [], [], []
    for layer, one in surveys.items():
        table = one.table().assign(layer=layer)
        table["label"] = table["feature"].map(labels[layer].set_index("feature")["label"]).fillna("")
        table["about"] = (table["attribute"] + " " + table["value"]).where(table["n_images"] > 0, "")
        rows, of = _neighbours(one.sae.W_dec)
        near.append(rows + sum(map(len, tables)))
        cosines.append(of)
        tables.append(table)
        tokens += _words_of(one.words, words)
    return {
        "table": pd.concat(tables, ignore_index=True),
        "top_ids": np.concatenate([one.tops.ids for one in surveys.values()]),
        "top_values": np.concatenate([one.tops.values for one in surveys.values()]),
        "histograms": np.concatenate([one.histogram for one in surveys.values()]),
        "bin_edges": BIN_EDGES,
        "tokens": tokens,
        "neighbours": (np.concatenate(near), np.concatenate(cosines)),
        "n_tokens": next(iter(surveys.values())).n_tokens,
    }


def _neighbours(W_dec: torch.Tensor, m: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """The ``m`` features whose decoder rows are nearest by cosine, and these cosines, both [F, m]."""
    directions = torch.nn.functional.normalize(W_dec.float(), dim=1)
    parts = []
    for start in range(0, len(directions), 1024):
        cosine = directions[start : start + 1024] @ directions.T
        cosine.diagonal(start).fill_(-2)  # not its own neighbour
        parts.append(cosine.topk(min(m, len(directions) - 1), dim=1))
    return tuple(torch.cat([getattr(p, name) for p in parts]).cpu().numpy() for name in ("indices", "values"))


def _words_of(means: WordMeans, words: Mapping[int, str], m: int = 8) -> list[list[tuple[str, float, int]]]:
    """Each feature's ``m`` words of largest mean activation: (word, mean, occurrences)."""
    counts = means.counts["reads"]
    sums = means.sums["reads"].tocsc()
    sums.data /= counts[sums.indices]
    found = []
    for start, stop in zip(sums.indptr[:-1], sums.indptr[1:], strict=True):
        ids, mean = sums.indices[start:stop], sums.data[start:stop]
        best = np.argsort(-mean, kind="stable")[:m]
        found.append([(words[ids[i]], mean[i], counts[ids[i]]) for i in best])
    return found
