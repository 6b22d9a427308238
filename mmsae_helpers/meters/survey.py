"""What one pass over captioned images says about every feature of an SAE.

Shapes: S images, N tokens, F features, V words. A feature's activation on an image is its largest over the tokens of
the text read with the image.
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
from mmsae_helpers.workers import crew

BIN_EDGES = np.geomspace(1e-2, 1e2, 25)  # of the histograms of activations; what lies outside counts in the end bins
KEYS = ["arm", "layer", "penalty", "seed"]  # of an SAE in a table


class Survey(Meter):
    """Of one SAE: ``tops`` (`TopImages`), ``words`` (`WordMeans`), ``purity`` {score: `Purity`}, ``histogram``
    [F, bins] of positive activations over tokens, ``n_tokens``, and `table`.

    ``embeddings`` [S, d] and ``attributes`` (DataFrame [S, A] of strings) are of all images; ``names``: the word of
    every token id; ``swap`` [S]: the image whose caption is read with each, where captions are swapped. An image
    without a token (an empty caption) fires nothing and counts in frequency. ``seed`` deals out images and words for
    the controls. Memory F x (d + 2 V (1 + ``draws``)), V attribute values, and the words seen, however many images.
    """

    def __init__(
        self, sae, layer: int, embeddings, attributes: pd.DataFrame, names: Mapping[int, str], *, swap=None, k: int = 9,
        min_images: int = 1, seed: int = 0, draws: int = 0,
    ):  # fmt: skip
        if len(embeddings) != len(attributes):
            n = f"{len(embeddings)} embeddings but {len(attributes)} rows of attributes"
            raise InputError(f"{n}: give one an image")
        super().__init__(sae, layer)
        d_sae, self.embeddings = sae.cfg.d_sae, np.asarray(embeddings)
        self.names, self.min_images = names, min_images
        self.n_tokens, self.n = 0, len(attributes)
        self._chance = np.random.default_rng(seed)
        self.tops, self.similarity = TopImages(d_sae, k), Similarity(d_sae, self.embeddings.shape[1])
        self.words, self.words_control = (WordMeans(len(names), d_sae) for _ in range(2))
        about = {"purity": attributes} | ({} if swap is None else {"said": attributes.iloc[swap]})
        self.purity = {name: Purity(of, d_sae, draws=draws * (name == "purity")) for name, of in about.items()}
        dealt = [seed, 1]  # another order than a caller's own of this seed: dealt as swapped, images get their captions
        self.purity |= {f"{name}_control": Purity(of, d_sae, dealt) for name, of in about.items()}
        self.histogram = np.zeros((d_sae, len(BIN_EDGES) - 1), np.int64)

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
        ids, maxima = image_maxima(found, batch.sample.numpy())
        for measure in (self.tops, *self.purity.values()):
            measure.add(maxima, ids)
        self.similarity.add(maxima, self.embeddings[ids])

    def table(self) -> pd.DataFrame:
        """A row a feature: feature, n_images it fires on, frequency (their share), n_tokens, max activation;
        similarity; purity with the attribute and value it is pure in, said, its purity in what a swapped caption says,
        and both with images dealt out at random (``_control``); word_purity with its label and kind (`words.label`),
        and word_purity_control with words dealt out."""
        table = self.purity["purity"].score().rename_axis("feature").reset_index()
        table = table.assign(**{name: of.score()["purity"] for name, of in self.purity.items()})
        fires, similarity, largest = self.tops.n_images, self.similarity.score(), self.tops.values[:, 0]
        table = table.assign(n_images=fires, frequency=fires / self.n, n_tokens=self.histogram.sum(axis=1), max=largest)
        table = table.assign(similarity=similarity)
        both = (label(of, self.names, 0.0, self.min_images) for of in (self.words, self.words_control))
        word, chance = (of.set_index("feature").reindex(table.index) for of in both)
        table = table.assign(label=word["label"].fillna(""), kind=word["kind"].fillna(""))
        return table.assign(word_purity=word["purity"], word_purity_control=chance["purity"])


def survey(arms: Mapping, tokens: Iterable, embeddings, *, device="cpu", together=None, keep=(), draws=0, **options):
    """Surveys every SAE of {arm: {(layer, penalty, seed): SAE}}; options as of `Survey`, whose seed is the SAE's.

    Returns their tables in one, with columns `KEYS`, and {(arm, layer, penalty, seed): `Survey`} of those in ``keep``,
    which alone have ``draws``; the others' sums are freed. ``together``: so many in one pass over ``tokens`` (all),
    lent to ``device`` meanwhile.
    """
    saes = {(arm, *key): sae for arm, some in arms.items() for key, sae in some.items()}
    tables, kept = [], {}
    for part in groups(saes, together):
        own = {key: options | {"seed": key[-1], "draws": draws if key in keep else 0} for key in part}
        surveys = {key: Survey(sae, key[1], embeddings, **own[key]) for key, sae in part.items()}
        feed(surveys, tokens, device=device)
        with crew() as each:
            found = each(Survey.table, surveys.values())
        tables += [of.assign(**dict(zip(KEYS, key, strict=True))) for key, of in zip(part, found, strict=True)]
        kept |= {key: one for key, one in surveys.items() if key in keep}
    return pd.concat(tables, ignore_index=True), kept


def judged(table: pd.DataFrame, min_images: int, monosemantic: float, polysemous: float) -> pd.DataFrame:
    """`survey`'s table with columns of True and False: ``counts``, fires on at least ``min_images`` images; and of
    those that count, ``pure``: purity >= ``monosemantic``; ``impure``: < ``polysemous``;
    ``means_attribute`` and ``means_word``: >= ``polysemous`` and `beyond_chance` among the features of its arm, layer
    and penalty; ``polysemous``: neither; and of swapped captions, ``source``: the purer of image and caption is so, and
    ``image``: that is the image."""
    counts = table["n_images"] >= min_images
    counted = table[counts]

    def means(purity, control, n):
        beyond = beyond_chance(purity, control, counted[n], [counted[key] for key in KEYS[:-1]])
        return (purity >= polysemous) & beyond

    said = pd.DataFrame({"pure": counted["purity"] >= monosemantic, "impure": counted["purity"] < polysemous})
    said["means_attribute"] = means(counted["purity"], counted["purity_control"], "n_images")
    said["means_word"] = means(counted["word_purity"], counted["word_purity_control"], "n_tokens")
    said["polysemous"] = ~(said["means_attribute"] | said["means_word"])
    if "said" in table:
        purer, control = (counted[["purity" + of, "said" + of]].max(axis=1) for of in ("", "_control"))
        said["source"] = means(purer, control, "n_images")
        said["image"] = said["source"] & (counted["purity"] >= counted["said"])
    return table.assign(counts=counts, **said.reindex(table.index, fill_value=False))


def shares(table: pd.DataFrame, what, among="counts") -> pd.DataFrame:
    """Of each SAE of a `judged` table, the share of features that are ``what`` among those that are ``among`` (columns,
    or True and False by feature): columns `KEYS` and value, which is 0 where there are none."""
    what, among = (table[one] if isinstance(one, str) else one for one in (what, among))
    sizes = pd.DataFrame({"what": what & among, "among": among}).groupby([table[key] for key in KEYS], sort=False).sum()
    return (sizes["what"] / sizes["among"].clip(lower=1)).rename("value").reset_index()


def beyond_dealt(table: pd.DataFrame, purity: float) -> pd.DataFrame:
    """`shares` of features with at least this purity, less those with as much when images are dealt out at random."""
    own, dealt = (shares(table, table[of] >= purity) for of in ("purity", "purity_control"))
    return own.assign(value=own["value"] - dealt["value"])


def slopes(table: pd.DataFrame, score: str, like=None) -> pd.DataFrame:
    """Least-squares slope of a score over log2 of the penalty by arm, layer and seed, over the features of a `judged`
    table that count, and within classes that are ``like`` (a series, as of `purity.alike`): columns as of `shares`."""
    table = table[table["counts"]].dropna(subset=score)
    by = [table[key] for key in ("arm", "layer", "seed")]
    both = pd.DataFrame({"x": np.log2(table["penalty"].astype(float)), "y": table[score]})
    both -= both.groupby([*by, like] if like is not None else by).transform("mean")
    sums = pd.DataFrame({"xy": both["x"] * both["y"], "xx": both["x"] ** 2}).groupby(by).sum()
    return (sums["xy"] / sums["xx"]).rename("value").reset_index()


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
    tables, tokens, arrays = [], [], []
    for layer, one in surveys.items():
        table = one.table().assign(layer=layer)
        word = table["label"].where(table["kind"] != "predicts", 'before "' + table["label"] + '"')
        known = table["n_images"] >= max(one.min_images, 1)
        about = (table["attribute"] + " " + table["value"]).where(known, "")
        word = word.where(table["word_purity"] >= min_purity, "")
        near, cosines = _neighbours(one.sae.W_dec)
        arrays.append((one.tops.ids, one.tops.values, one.histogram, near + sum(map(len, tables)), cosines))
        tables.append(table.assign(label=word, about=about, purity=table["purity"].where(known)))
        tokens += _words_of(one.words, one.names)
    ids, values, histograms, *neighbours = map(np.concatenate, zip(*arrays, strict=True))
    content = {"table": pd.concat(tables, ignore_index=True), "top_ids": ids, "top_values": values, "tokens": tokens}
    content |= {"histograms": histograms, "bin_edges": BIN_EDGES, "neighbours": neighbours}
    return content | {"n_tokens": one.n_tokens}


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
