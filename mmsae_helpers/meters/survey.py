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
from mmsae_helpers.meters.feed import Meter, feed
from mmsae_helpers.meters.purity import Purity, Similarity, beyond_chance
from mmsae_helpers.meters.top_images import TopImages, image_maxima
from mmsae_helpers.meters.words import WordMeans, label, next_tokens
from mmsae_helpers.saes import groups
from mmsae_helpers.suite.results import Interval, mean_ci
from mmsae_helpers.workers import crew

BIN_EDGES = np.geomspace(1e-2, 1e2, 25)  # of the histograms of activations; what lies outside counts in the end bins


class Survey(Meter):
    """Of one SAE: ``tops`` (`features.TopImages`), ``words`` (`labels.WordMeans`), ``purity`` (`Purity`), ``histogram``
    [F, bins] of positive activations over tokens, ``n_tokens``, and `table`. ``embeddings`` [S, d] and ``attributes``
    (DataFrame [S, A] of strings) are of all images; ``names``: the word of every token id. An image without a token (an
    empty caption) fires nothing and counts in frequency. ``seed`` deals out images and words for the controls. Memory
    F x (2 d + 2 V (1 + ``draws``)), V attribute values, and the words seen: whatever the number of images.
    """

    def __init__(
        self, sae, layer: int, embeddings, attributes: pd.DataFrame, names: Mapping[int, str], *, k: int = 9,
        min_images: int = 1, seed: int = 0, draws: int = 0,
    ):  # fmt: skip
        if len(embeddings) != len(attributes):
            raise InputError(
                f"{len(embeddings)} embeddings but {len(attributes)} rows of attributes: give one an image"
            )
        super().__init__(sae, layer)
        d_sae, self.embeddings = sae.cfg.d_sae, np.asarray(embeddings)
        self.names, self.min_images = names, min_images
        self.n_tokens, self.n = 0, len(attributes)
        self._chance = np.random.default_rng(seed)
        self.dealt = self._chance.permutation(self.n)
        self.tops = TopImages(d_sae, k)
        self.words, self.words_control = (WordMeans(len(names), d_sae) for _ in range(2))
        self.similarity, self.similarity_control = (Similarity(d_sae, self.embeddings.shape[1]) for _ in range(2))
        self.purity, self.purity_control = Purity(attributes, d_sae, draws=draws), Purity(attributes, d_sae, seed)
        self.histogram = np.zeros((d_sae, len(BIN_EDGES) - 1), np.int64)
        self.sum = np.zeros(d_sae)

    def add(self, batch: activations.TokenBatch, found: sp.csr_matrix) -> None:
        """Take in a TokenBatch of whole images."""
        if not len(batch.sample):
            return
        self.n_tokens += found.shape[0]
        words = np.stack([batch.token, next_tokens(batch.token, batch.sample, batch.position)])
        self.words.add(found, *words)
        self.words_control.add(found, *words[:, self._chance.permutation(found.shape[0])])
        bins = np.clip(np.digitize(found.data, BIN_EDGES) - 1, 0, len(BIN_EDGES) - 2)
        flat = np.bincount(found.indices * np.int64(self.histogram.shape[1]) + bins, minlength=self.histogram.size)
        self.histogram += flat.reshape(self.histogram.shape)
        self.sum += np.asarray(found.sum(axis=0, dtype=np.float64)).ravel()
        ids, maxima = image_maxima(found, batch.sample.numpy())
        for measure in (self.tops, self.purity, self.purity_control):
            measure.add(maxima, ids)
        self.similarity.add(maxima, self.embeddings[ids])
        self.similarity_control.add(maxima, self.embeddings[self.dealt[ids]])

    def table(self) -> pd.DataFrame:
        """A row a feature: feature, n_images it fires on, frequency (their share), n_tokens, max and mean activation;
        similarity; purity with the attribute and value it is pure in; word_purity with its label and kind
        (`labels.label`); and each score with images and words dealt out at random (``_control``)."""
        pure = self.purity.score()
        count = {"min_purity": 0.0, "min_count": self.min_images}
        word, chance = (label(of, self.names, **count) for of in (self.words, self.words_control))
        word, chance = (of.set_index("feature").reindex(pure.index) for of in (word, chance))
        return pd.DataFrame(
            {
                "feature": pure.index,
                "n_images": self.tops.n_images,
                "frequency": self.tops.n_images / self.n,
                "n_tokens": self.histogram.sum(axis=1),
                "max": self.tops.values[:, 0],
                "mean": self.sum / max(self.n_tokens, 1),
                "similarity": self.similarity.score(),
                "similarity_control": self.similarity_control.score(),
                **pure,
                "purity_control": self.purity_control.score()["purity"],
                "label": word["label"].fillna(""),
                "kind": word["kind"].fillna(""),
                "word_purity": word["purity"],
                "word_purity_control": chance["purity"],
            }
        )


def survey(
    saes: Mapping[tuple, object], tokens: Iterable, embeddings, *, device="cpu", together=None, keep=(), **options
):
    """Surveys every SAE by its key (layer, arm, seed); options as of `Survey`, whose seed is the key's.

    Returns their tables in one, with columns layer, arm, seed, and {key: `Survey`} of those in ``keep``; the others'
    sums are freed. ``together``: so many in one pass over ``tokens`` (all), lent to ``device`` meanwhile.
    """
    tables, kept = [], {}
    for part in groups({key: saes[key] for key in sorted(saes)}, together):
        surveys = {key: Survey(sae, key[0], embeddings, seed=key[-1], **options) for key, sae in part.items()}
        feed(surveys, tokens, device=device)
        with crew() as each:
            found = each(Survey.table, surveys.values())
        tables += [of.assign(layer=key[0], arm=key[1], seed=key[2]) for key, of in zip(part, found, strict=True)]
        kept |= {key: one for key, one in surveys.items() if key in keep}
    return pd.concat(tables, ignore_index=True), kept


def judged(table: pd.DataFrame, min_images: int, monosemantic: float, polysemous: float) -> pd.DataFrame:
    """`survey`'s table with a column ``counts``, True for features that fire on at least ``min_images`` images, and of
    these alone (else nan) as 0 or 1: ``pure`` and ``pure_control``, purity >= ``monosemantic``; ``impure``, purity <
    ``polysemous``; ``means_attribute`` and ``means_word``, that purity >= ``polysemous`` and `beyond_chance` among the
    features of its layer and arm; ``polysemous``, neither."""
    table = table.assign(counts=table["n_images"] >= min_images)
    counted = table[table["counts"]]
    by = [counted["layer"], counted["arm"]]
    said = pd.DataFrame({"pure": counted["purity"] >= monosemantic, "impure": counted["purity"] < polysemous})
    said["pure_control"] = counted["purity_control"] >= monosemantic
    for what, score, n in (("attribute", "purity", "n_images"), ("word", "word_purity", "n_tokens")):
        beyond = beyond_chance(counted[score], counted[f"{score}_control"], counted[n], by)
        said[f"means_{what}"] = (counted[score] >= polysemous) & beyond
    said["polysemous"] = ~(said["means_attribute"] | said["means_word"])
    return table.assign(**said.astype(float).reindex(table.index))


def per_seed(table: pd.DataFrame, k: int = 9) -> pd.DataFrame:
    """Of a `judged` table by layer, arm and seed: means over the features that count (nan where there are none), their
    number ``features``, their median ``frequency``, and how many are ``dead`` or ``rare``: on none, on fewer than ``k``
    images."""
    keys = ["layer", "arm", "seed"]
    counted = table[table["counts"]].groupby(keys)
    scores = [f"{score}{of}" for score in ("similarity", "purity", "word_purity") for of in ("", "_control")]
    said = ["pure", "pure_control", "impure", "means_attribute", "means_word", "polysemous"]
    whole = table.groupby(keys)
    result = counted[[*said, *scores]].mean().reindex(whole.size().index)
    result["frequency"] = counted["frequency"].median()
    result["features"] = whole["counts"].sum()
    result["rare"] = whole["n_images"].agg(lambda n: ((n > 0) & (n < k)).sum())
    result["dead"] = whole["n_images"].agg(lambda n: (n == 0).sum())
    return result


def over_seeds(values) -> Interval:
    """`results.mean_ci`; nan without an interval, n 0, where a seed has no value or there is none."""
    values = np.asarray([*values], float)
    return mean_ci(values) if len(values) and np.isfinite(values).all() else Interval(np.nan, None, None, 0)


def intervals(by_seed: pd.DataFrame) -> dict[tuple, dict[str, Interval]]:
    """`over_seeds` of every column, by the index's levels but for seed."""
    levels = [name for name in by_seed.index.names if name != "seed"]
    return {key: {c: over_seeds(part[c]) for c in part} for key, part in by_seed.groupby(level=levels)}


def known(values: Mapping[str, Interval]) -> dict[str, Interval]:
    """Those that `over_seeds` found a value for."""
    return {name: value for name, value in values.items() if value.n}


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


def for_browser(surveys: Mapping[int, Survey], min_purity: float = 0.5) -> dict:
    """Arguments of `browser.write` for the surveys by layer. A label is the word a feature fires on, or ``before
    "word"`` for the one that comes next, of at least ``min_purity``; no purity below the surveys' min_images."""
    tables, tokens, near, cosines = [], [], [], []
    for layer, one in surveys.items():
        table = one.table().assign(layer=layer)
        word = table["label"].where(table["kind"] != "predicts", 'before "' + table["label"] + '"')
        table["label"] = word.where(table["word_purity"] >= min_purity, "")
        known = table["n_images"] >= max(one.min_images, 1)
        table["about"] = (table["attribute"] + " " + table["value"]).where(known, "")
        table["purity"] = table["purity"].where(known)
        rows, of = _neighbours(one.sae.W_dec)
        near.append(rows + sum(map(len, tables)))
        cosines.append(of)
        tables.append(table)
        tokens += _words_of(one.words, one.names)
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
