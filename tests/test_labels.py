"""Labels from text alone and detection scores, against the plain definitions."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import average_precision_score

from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.meters import words as labels
from mmsae_helpers.meters.feed import feed

WORDS = {2: "red", 3: "blue", 4: "crimson", 5: "circle", 6: "the"}


def text(n=4000, n_features=12, seed=0):
    """Token ids 2..6 and sparse random features [n, F]; feature 0 reads 2, feature 1 fires before 5."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 7, n)
    features = rng.random((n, n_features)) * (rng.random((n, n_features)) < 0.1)
    following = np.r_[ids[1:], -1]
    features[:, 0], features[:, 1], features[:, 2] = ids == 2, 2.0 * (following == 5), 0
    return sp.csr_matrix(features.astype(np.float32)), ids, following


def gathered(features, ids, following, chunk=700):
    means = labels.WordMeans(8, features.shape[1])
    for i in range(0, len(ids), chunk):
        means.add(features[i : i + chunk], ids[i : i + chunk], following[i : i + chunk])
    return means


def test_means_equal_the_definition():
    features, ids, following = text()
    means = gathered(features, ids, following)
    dense = features.toarray()
    for kind, of in (("reads", ids), ("predicts", following)):
        for word in range(2, 7):
            assert np.allclose(means.sums[kind][word].toarray()[0], dense[of == word].sum(0), rtol=1e-5)
            assert means.counts[kind][word] == (of == word).sum()


def test_label_names_what_a_feature_stands_for():
    features, ids, following = text()
    found = labels.label(gathered(features, ids, following), WORDS, min_purity=0.9).set_index("feature")
    assert list(found.index) == [0, 1]
    assert (found.label[0], found.kind[0], found.label[1], found.kind[1]) == (
        "red",
        "reads",
        "circle",
        "predicts",
    )
    assert found.purity[0] == pytest.approx(1) and found["count"][0] == (ids == 2).sum()
    everything = labels.label(gathered(features, ids, following), WORDS, min_purity=0)
    assert 2 not in set(everything.feature), "a feature that never fires has no label"
    dense = features.toarray()[:, 7]
    mean = {
        kind: np.array([dense[of == w].mean() for w in WORDS]) for kind, of in (("reads", ids), ("predicts", following))
    }
    expected = max(m.max() / m.sum() for m in mean.values())
    assert everything.set_index("feature").purity[7] == pytest.approx(expected, rel=1e-5)


def test_synonyms_are_one_word_and_rare_or_nameless_words_do_not_name():
    features, ids, following = text()
    merged = labels.label(
        gathered(sp.csr_matrix((ids == 4) + 1.0 * (ids == 2)).T.tocsr(), ids, following),
        {**WORDS, 4: "red"},
        min_purity=0.9,
    )
    assert list(merged.label) == ["red"] and merged["count"][0] == ((ids == 2) | (ids == 4)).sum()
    means = gathered(features, ids, following)
    assert labels.label(means, WORDS, min_purity=0.9, min_count=10_000).empty
    nameless = {i: w for i, w in WORDS.items() if i != 2}
    assert 0 not in set(labels.label(means, nameless, min_purity=0.5).feature)


def test_next_tokens_stop_at_samples_and_gaps():
    token, sample, position = [5, 6, 7, 8, 9], [0, 0, 1, 1, 1], [1, 2, 1, 2, 4]
    assert list(labels.next_tokens(token, sample, position)) == [6, -1, 8, -1, -1]


@pytest.mark.parametrize("seed", range(5))
def test_detection_equals_sklearn_with_ties(seed):
    rng = np.random.default_rng(seed)
    scores = np.maximum(rng.integers(-3, 6, (300, 8)), 0).astype(np.float32)
    truth = rng.random((300, 8)) < 0.2 + 0.1 * (scores > 3)
    found = labels.detection(scores, truth)
    for j, row in found.iterrows():
        assert row.average_precision == pytest.approx(average_precision_score(truth[:, j], scores[:, j]))
        assert row.base_rate == truth[:, j].mean()


def test_detection_without_a_contrast_is_undefined():
    found = labels.detection(np.ones((4, 2)), np.array([[1, 0]] * 4))
    assert found.average_precision.isna().all() and list(found.base_rate) == [1, 0]


def test_shuffle_keeps_the_words():
    features, ids, following = text()
    found = labels.label(gathered(features, ids, following), WORDS, min_purity=0)
    control = labels.shuffle(found, 1)
    assert sorted(control.label) == sorted(found.label) and list(control.feature) == list(found.feature)
    assert control.equals(labels.shuffle(found, 1)) and not control.equals(found)


class IdentitySAE:
    """Features are the positive coordinates of the residual: what they do can be read off the input."""

    cfg, W_enc = SimpleNamespace(d_sae=6), torch.eye(6)

    def encode(self, x):
        return torch.relu(x)

    def process_sae_in(self, x):
        return x


class Words:
    """A tokenizer of four words."""

    def __len__(self):
        return 4

    def decode(self, ids):
        return {1: " Red", 2: "ring", 3: "on"}[ids[0]]


def token_batch(acts, sample, position, token=None, patch=None):
    sample, position = torch.as_tensor(sample), torch.as_tensor(position)
    token = torch.zeros_like(sample) if token is None else torch.as_tensor(token)
    patch = torch.full_like(sample, -1) if patch is None else torch.as_tensor(patch)
    return TokenBatch({3: torch.as_tensor(acts, dtype=torch.float32)}, sample, position, token, patch >= 0, patch)


def test_labels_from_text_are_the_words_features_read_or_predict():
    token = np.tile([1, 2, 3], 40)
    acts = np.zeros((120, 6))
    acts[token == 1, 0] = 1.0  # feature 0 reads "red"
    acts[token == 2, 1] = 1.0  # feature 1 reads "ring", and so predicts "on"
    acts[:, 2] = 1.0  # feature 2 means nothing
    batch = token_batch(acts, np.repeat(range(40), 3), np.tile([0, 1, 2], 40), token)
    means = feed({(3, 0): labels.Words(IdentitySAE(), 3, len(Words()))}, [batch])
    found = labels.named(means, Words(), min_purity=0.6)[3, 0].set_index("feature")
    assert found.loc[0, "label"] == "red" and found.loc[0, "kind"] in ("reads", "predicts")
    assert found.loc[1, "label"] in ("ring", "on") and 2 not in found.index and 3 not in found.index


def test_a_scan_in_parts_equals_the_definition():
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.normal(size=(8 * 4, 6)) - 0.3, 0).astype(np.float32)
    sample, patch = np.repeat(range(8), 4), np.tile(range(4), 8)
    cover, classes = rng.random((8, 4)), np.arange(8) % 2
    one = labels.ImageScan(IdentitySAE(), 3, [4, 1], classes, 2, cover, scale=2.0)
    parts = [
        token_batch(acts[i : i + 8], sample[i : i + 8], patch[i : i + 8], patch=patch[i : i + 8])
        for i in range(0, 32, 8)
    ]
    feed({"a": one}, parts)
    dense = 2 * acts.reshape(8, 4, 6)
    assert np.allclose(one.maxima, dense.max(1)[:, [4, 1]])
    on_object = (dense * cover[..., None]).sum((0, 1)) / dense.sum((0, 1))
    assert np.allclose(one.share(), on_object[[4, 1]])
    assert np.allclose(one.pointing, one.maxima), "these features fire as far as they point"
    top = np.where(dense.max(2) > 0, dense.argmax(2), -1)
    expected = np.array(
        [[sum(f in set(top[i]) for i in range(8) if classes[i] == c) for f in range(6)] for c in (0, 1)]
    )
    assert (one.retrieved == expected).all()


def test_a_silent_feature_points_nevertheless():
    """Average precision of the projection is that of what enters the ReLU, whatever the thresholds."""
    rng = np.random.default_rng(1)
    acts, sample = rng.normal(size=(20 * 4, 6)).astype(np.float32) - 3, np.repeat(range(20), 4)
    batch = token_batch(acts, sample, np.tile(range(4), 20), patch=np.tile(range(4), 20))
    one = labels.ImageScan(IdentitySAE(), 3, [2], np.zeros(20, int), 1)
    feed({"a": one}, [batch])
    assert not one.maxima.any() and np.allclose(one.pointing[:, 0], acts[:, 2].reshape(20, 4).max(1))
    truth = pd.DataFrame({"red": one.pointing[:, 0] > np.median(one.pointing), "the": True})
    found = pd.DataFrame({"label": ["red"]})
    assert labels.lift(one.pointing, found, truth) == pytest.approx([0.5])
    assert labels.lift(one.maxima, found, truth) == pytest.approx([0.0]), "silent: all images tie"


def test_lift_is_precision_above_the_base_rate_and_chance_without_a_label():
    rng = np.random.default_rng(2)
    scores, truth = rng.random((50, 3)), pd.DataFrame({"red": rng.random(50) < 0.3, "star": rng.random(50) < 0.5})
    found = pd.DataFrame({"label": ["star", "red", "on"]})
    expected = [
        average_precision_score(truth[w], scores[:, i]) - truth[w].mean() for i, w in enumerate(["star", "red"])
    ]
    assert labels.lift(scores, found, truth) == pytest.approx(expected), "no image is said to be 'on' or not"
    assert labels.lift(scores, found, truth, among={"red"}) == pytest.approx(expected[1:])
    assert labels.lift(scores[:, :0], found[:0], truth).tolist() == [0.0]


def test_top_features_and_whether_their_labels_describe_the_classes():
    counts = np.array([[5, 9, 3, 0], [0, 9, 4, 4], [0, 8, 0, 0]])
    tops, found = labels.top_features(counts, max_images=10)
    assert tops.tolist() == [0, 2, -1] and found.tolist() == [5, 4, 0]
    assert labels.top_features(counts, np.inf)[0].tolist() == [1, 1, 1], "without a limit"
    names = [{"red", "circle"}, {"red", "star"}, {"blue", "star"}]
    true, chance = labels.described(tops, {0: "red", 2: "circle", 1: "blue"}, names)
    assert true.tolist() == [1, 0, 0], "a wrong label and no label are misses"
    assert chance == pytest.approx([2 / 3, 1 / 3, 0])
