"""Labels for features from text alone, and how well a labelled feature detects what it names.

Shapes: S samples, N tokens, F features, V words. A label is a word: the one on which (kind "reads") or before
which (kind "predicts") a feature's mean activation is largest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.sparse as sp

from mmsae_helpers.meters.features import retrieve_top1
from mmsae_helpers.meters.feed import Meter
from mmsae_helpers.meters.patches import share_on_object
from mmsae_helpers.meters.top_images import image_maxima

KINDS = ("reads", "predicts")
LABEL_COLUMNS = ["feature", "label", "purity", "kind", "count"]


def next_tokens(token, sample, position) -> np.ndarray:
    """The input id after each token of a TokenBatch, -1 where its sample kept none. [N] int64"""
    token, sample, position = (np.asarray(column) for column in (token, sample, position))
    result = np.full(len(token), -1, dtype=np.int64)
    follows = (sample[1:] == sample[:-1]) & (position[1:] == position[:-1] + 1)
    result[:-1][follows] = token[1:][follows]
    return result


class WordMeans:
    """Running sums of activations per (word, feature), for the current and for the next token of held-out text."""

    def __init__(self, n_words: int, d_sae: int):
        self.sums = {kind: sp.csr_matrix((n_words, d_sae), dtype=np.float64) for kind in KINDS}
        self.counts = {kind: np.zeros(n_words, dtype=np.int64) for kind in KINDS}

    def add(self, features: sp.csr_matrix, current, following) -> WordMeans:
        """Token features [N, F], the ids of the tokens [N] and of those that follow (-1: none)."""
        for kind, ids in zip(KINDS, (np.asarray(current), np.asarray(following)), strict=True):
            n_words = len(self.counts[kind])
            rows = np.flatnonzero(ids >= 0)
            of_word = sp.csr_matrix((np.ones(len(rows)), (ids[rows], rows)), shape=(n_words, len(ids)))
            self.sums[kind] = self.sums[kind] + of_word @ features
            self.counts[kind] += np.bincount(ids[rows], minlength=n_words)
        return self


def label(means: WordMeans, words: Mapping[int, str], min_purity: float = 0.5, min_count: int = 20) -> pd.DataFrame:
    """Name features by the word they stand for: columns feature, label, purity, kind, count.

    purity = mean activation on the word / sum over all words of the mean activation on each. The better of both is
    kept; features below min_purity are left out, and words seen fewer than min_count times take no part. Ids that
    `words` maps to the same string count as one word; ids that it lacks compete but never name a feature. `count`:
    occurrences of the word.
    """
    best = []
    for kind in KINDS:
        sums, counts = means.sums[kind], means.counts[kind]
        names = [words.get(i, f"<id {i}>") for i in range(len(counts))]
        vocabulary, group = np.unique(names, return_inverse=True)
        merge = sp.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))))
        counts, sums = merge @ counts, (merge @ sums).tocsr()
        mean = sp.diags(np.where(counts >= min_count, 1 / np.maximum(counts, 1), 0)) @ sums
        total = np.asarray(mean.sum(0)).ravel()
        nameable = sp.diags(np.isin(vocabulary, list(words.values())).astype(float)) @ mean
        word = np.asarray(nameable.argmax(0)).ravel()
        top = nameable.max(0).toarray().ravel()
        purity = np.divide(top, total, out=np.zeros_like(top), where=total > 0)
        columns = (np.arange(len(purity)), vocabulary[word], purity, kind, counts[word])
        best.append(pd.DataFrame(dict(zip(LABEL_COLUMNS, columns, strict=True))))
    both = pd.concat(best).sort_values(["feature", "purity"], ascending=[True, False], kind="stable")
    found = both.drop_duplicates("feature").query("purity >= @min_purity and purity > 0")
    return found.astype({"count": int}).reset_index(drop=True)[LABEL_COLUMNS]


class Words(Meter):
    """`WordMeans` of one SAE on held-out text, of a vocabulary of ``n_words`` ids."""

    def __init__(self, sae, layer: int, n_words: int, scale: float = 1.0):
        super().__init__(sae, layer, scale)
        self.means = WordMeans(n_words, sae.cfg.d_sae)

    def add(self, batch, features: sp.csr_matrix) -> None:
        self.means.add(features, batch.token, next_tokens(batch.token, batch.sample, batch.position))

    def result(self) -> WordMeans:
        return self.means


def named(means: Mapping, tokenizer, min_purity: float = 0.5, min_count: int = 20) -> dict:
    """`label` of each `WordMeans` of one pass, by its key; two tokens that decode to the same word are one word."""
    seen = np.flatnonzero(next(iter(means.values())).counts["reads"])
    words = {int(i): tokenizer.decode([int(i)]).strip().lower() for i in seen}
    return {key: label(of, words, min_purity, min_count) for key, of in means.items()}


class ImageScan(Meter):
    """What one pass over image tokens says about one SAE.

    ``retrieved`` [n_classes, d_sae]: images of each class that retrieve each feature (METHODS A.1). Of the features
    ``wanted``: ``maxima`` [S, F], the largest activation over each image's tokens; ``pointing`` [S, F], the largest
    projection on the feature's encoder direction, however far below its threshold (a constant less than what enters the
    ReLU, to which ranks are blind); and ``share()`` [F], how much of the activation falls on the object (``cover``
    [S, patches] from `data.ImageData.object_cover`, or None).
    """

    def __init__(self, sae, layer: int, wanted, class_labels, n_classes: int, cover=None, scale: float = 1.0):
        super().__init__(sae, layer, scale)
        self.cover, self.wanted, self.labels = cover, np.array(wanted, np.int64), np.asarray(class_labels, np.int64)
        self.retrieved = np.zeros((n_classes, sae.cfg.d_sae), np.int64)
        self.maxima, self.pointing = np.zeros((2, len(class_labels), len(self.wanted)), np.float32)
        self.on_object, self.total = np.zeros((2, len(self.wanted)))

    def add(self, batch, features: sp.csr_matrix) -> None:
        """Take in a TokenBatch of whole images, each one's tokens together."""
        sample, top1 = batch.sample.numpy(), retrieve_top1(features)
        image, feature = np.unique(np.stack([sample, top1])[:, top1 >= 0], axis=1)  # an image retrieves it or does not
        np.add.at(self.retrieved, (self.labels[image], feature), 1)
        ids, starts = np.unique(sample, return_index=True)
        self.maxima[ids] = image_maxima(features[:, self.wanted], sample)[1].toarray()
        directions = self.sae.W_enc[:, self.wanted]
        projected = self.sae.process_sae_in(batch.acts[self.layer].to(directions) * self.scale) @ directions
        self.pointing[ids] = np.maximum.reduceat(projected.float().cpu().numpy(), starts)
        if self.cover is not None:
            on_object, total = share_on_object(features, sample, batch.patch.numpy(), self.cover, self.wanted)
            self.on_object += on_object
            self.total += total

    def share(self) -> np.ndarray:
        """Share of each wanted feature's activation that falls on the object; nan where it never fires."""
        return np.divide(self.on_object, self.total, out=np.full(len(self.total), np.nan), where=self.total > 0)


def top_features(counts, max_images: float) -> tuple[np.ndarray, np.ndarray]:
    """Each class's top feature and the number of its images that retrieve it, both [classes]; paper A, retrieval.

    ``counts`` [classes, d_sae] as `ImageScan.retrieved`. Features that more than ``max_images`` images retrieve take
    no part; of equal ones the lowest is the top, and -1 with 0 images where none is retrieved.
    """
    left = counts * (counts.sum(0) <= max_images)
    found = left.max(1)
    return np.where(found > 0, left.argmax(1), -1), found


def described(tops, label_of: Mapping, names: list[set]) -> tuple[np.ndarray, np.ndarray]:
    """Whether the label of a class's top feature is true of the class, and by how many classes it is: [classes] each.

    ``tops`` [classes] feature or -1; ``label_of`` maps features to labels; ``names``: the words of each class. A class
    whose top feature has no label is a miss. The second is the share of all classes of which the label is true: what
    labels would hit if they were dealt out among the classes at random.
    """
    said = [label_of.get(feature) for feature in tops]
    true = [word in own for word, own in zip(said, names, strict=True)]
    return np.array(true, float), np.array([np.mean([word in own for own in names]) for word in said])


def shuffle(labels: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The control: the same features and words, the words dealt out at random."""
    return labels.assign(label=np.random.default_rng(seed).permutation(labels["label"].to_numpy()))


def detection(max_acts: np.ndarray, truth: np.ndarray) -> pd.DataFrame:
    """Each column of `max_acts` [S, F] as a detector of that of `truth` [S, F] bool: a row of measures.

    average_precision is scikit-learn's (whose calls take far longer), tied scores counting as one threshold, nan where
    none or all samples are true; base_rate is the share that is true.
    """
    columns = zip(np.asarray(max_acts).T, np.asarray(truth, dtype=bool).T, strict=True)
    rows = [(_average_precision(score, true), true.mean()) for score, true in columns]
    return pd.DataFrame(rows, columns=["average_precision", "base_rate"], dtype=float)


def lift(maxima, labels: pd.DataFrame, concepts: pd.DataFrame, among=None) -> np.ndarray:
    """Average precision less the base rate of every labelled feature, of those whose label is ``among`` (all), [F].

    ``maxima`` [S, F] and ``labels`` in the same order, ``concepts`` from `data.ImageData.concepts`. Where no feature
    is labelled with a word that is true of some images and false of others, a single 0: as good as chance.
    """
    known = labels["label"].isin(concepts.columns if among is None else among).to_numpy()
    found = detection(maxima[:, known], concepts[labels["label"][known]].to_numpy())
    gain = (found["average_precision"] - found["base_rate"]).dropna().to_numpy()
    return gain if len(gain) else np.zeros(1)


def _average_precision(score: np.ndarray, true: np.ndarray) -> float:
    n_true = int(true.sum())
    if n_true in (0, len(true)):
        return np.nan
    order = np.argsort(-score, kind="stable")
    score, true = score[order], true[order]
    last_of_tie = np.r_[np.flatnonzero(np.diff(score)), len(true) - 1]
    hits = np.cumsum(true)[last_of_tie]
    return np.sum(np.diff(hits, prepend=0) * hits / (last_of_tie + 1)) / n_true
