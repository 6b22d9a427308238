"""Cross-modal weights and sample scores equal their plain definitions, ties included, however the stream is cut."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.crossmodal import CrossModal, sample_scores
from mmsae_helpers.meters.features import to_csr

DELTA = 1.0


@st.composite
def streams(draw):
    """Dense z [tokens, d_sae] of few distinct values, is_image, residuals (some 0), and where the stream is cut."""
    n, d_sae = draw(st.integers(0, 120)), draw(st.sampled_from([1, 4, 90]))
    density, of_images = draw(st.sampled_from([0.1, 0.5, 0.9])), draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    z = rng.choice(np.array([0.3, 1.0, 1.5, 2.0, 7e5], np.float32), (n, d_sae)) * (rng.random((n, d_sae)) < density)
    residual = rng.standard_normal((n, 3)) * (rng.random((n, 1)) < 0.9)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return z.astype(np.float32), rng.random(n) < of_images, residual.astype(np.float32), cuts


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms else 0.0


def weights_by_definition(z, is_image, residual, reading, k):
    """METHODS C.2: lists of (activation, token) per feature, sorted (Python's sort keeps the earlier token first)."""
    found = [[] for _ in range(z.shape[1])]
    for token, values in enumerate(z):
        kept = [(feature, value) for feature, value in enumerate(values) if value > 0]
        if reading == "as_published":
            kept = sorted(kept, key=lambda pair: -pair[1])[:50]
        for feature, value in kept:
            if reading == "as_published" or value > DELTA:
                found[feature].append((value, token))
    out = []
    for tokens in found:
        tokens = [token for _, token in sorted(tokens, key=lambda pair: -pair[0])]
        if reading == "as_published":
            tokens = tokens[:30]
        text = [token for token in tokens if not is_image[token]][:k]
        image = [token for token in tokens if is_image[token]][:k]
        pairs = list(zip(text, image, strict=False))
        if reading == "as_published":
            pairs = [(t, i) for t in text for i in image] if len(text) == len(image) == k else []
        out.append(np.mean([cosine(residual[t], residual[i]) for t, i in pairs]) if pairs else np.nan)
    return np.array(out)


@pytest.mark.parametrize("reading", ["paper", "as_published"])
@settings(max_examples=120)
@given(made=streams(), k=st.sampled_from([1, 2, 5]), step=st.sampled_from([1, 7, None]))
def test_weights_equal_the_definition(reading, made, k, step):
    z, is_image, residual, cuts = made
    stream = CrossModal(z.shape[1], 3, k, DELTA, reading)
    stream._step = step or stream._step  # how many tokens are merged at a time must not matter
    for lo, hi in zip([0, *cuts], [*cuts, len(z)], strict=True):
        stream.add(to_csr(z[lo:hi]), is_image[lo:hi], residual[lo:hi])
    expected = weights_by_definition(z, is_image, residual, reading, k)
    np.testing.assert_allclose(stream.weights(), expected, atol=1e-6)


def test_ranks_pair_highest_with_highest_and_the_surplus_is_left_out():
    z = np.array([[2.0], [3.0], [5.0], [4.0], [1.0]], np.float32)  # the last is not above delta
    is_image = np.array([False, False, True, False, True])
    residual = np.array([[1, 1], [0, 1], [1, 0], [1, 0], [-1, 0]], np.float32)
    stream = CrossModal(1, 2)
    stream.add(to_csr(z), is_image, residual)
    assert stream.weights() == [1.0]  # text token 3, the highest, with image token 2
    stream.add(to_csr(np.float32([[2.5]])), [True], np.float32([[0, -2]]))
    np.testing.assert_allclose(stream.weights(), [0.0], atol=1e-7)  # and text token 1 with the new one: (1 - 1) / 2


def test_earliest_token_wins_a_tie():
    z, residual = np.full((3, 1), 2, np.float32), np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    stream = CrossModal(1, 2, k=1)
    for token in range(3):
        stream.add(to_csr(z[token : token + 1]), [token > 0], residual[token : token + 1])
    assert stream.weights() == [1.0]


@pytest.mark.parametrize("n_image", [25, 26])
def test_as_published_looks_at_thirty_tokens(n_image):
    is_image = np.arange(n_image + 5) < n_image
    stream = CrossModal(1, 2, reading="as_published")
    stream.add(to_csr(np.ones((n_image + 5, 1))), is_image, np.ones((n_image + 5, 2)))
    assert np.isnan(stream.weights()[0]) == (n_image > 25)  # else a text token is the 31st


def test_memory_is_bounded_by_the_lists():
    rng, stream = np.random.default_rng(0), CrossModal(8, 4, k=2)
    for _ in range(40):  # rising activations: every batch replaces the tops of the one before
        z = rng.random((50, 8)).astype(np.float32) + 1 + _
        stream.add(to_csr(z), rng.random(50) < 0.5, rng.standard_normal((50, 4)))
    assert stream._pool.shape == (2 * 8 * 2, 4)


@pytest.mark.filterwarnings("error")
def test_memory_that_was_never_written_is_not_reckoned_with(monkeypatch):
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, np.inf, dtype))
    stream = CrossModal(1, 2, k=3)
    monkeypatch.undo()
    stream.add(to_csr(np.full((2, 1), 2.0)), [True, False], np.ones((2, 2)))  # one token of three of each modality
    assert stream.weights() == pytest.approx([1.0])


def test_another_sae_or_model_is_refused():
    stream = CrossModal(4, 3)
    with pytest.raises(InputError, match="width 5 where 4"):
        stream.add(to_csr(np.ones((2, 5))), [True, False], np.ones((2, 3)))
    with pytest.raises(InputError, match="width 2 but .* 3"):
        stream.add(to_csr(np.ones((2, 4))), [True, False], np.ones((2, 2)))
    with pytest.raises(InputError, match="reading is 'published'"):
        CrossModal(4, 3, reading="published")
    with pytest.raises(InputError, match="width 5 where 4"):
        sample_scores(to_csr(np.ones((2, 5))), [0, 0], [True, False], np.zeros(4))


# ---------------------------------------------------------------- sample scores


def scores_by_definition(z, sample, is_image, weights):
    rows = {}
    for s in sorted(set(sample.tolist())):
        text, image, counts = set(), set(), []
        for token in np.flatnonzero(sample == s):
            active = {k for k, value in enumerate(z[token]) if value > DELTA}
            counts.append(len(active))
            (image if is_image[token] else text).update(active)
        known = [weights[k] for k in text & image if not np.isnan(weights[k])]
        n_image = int(is_image[sample == s].sum())
        rows[s] = (sum(known), np.mean(counts), len(text & image), len(counts) - n_image, n_image)
    return rows


@settings(max_examples=80)
@given(made=streams(), together=st.booleans(), seed=st.integers(0, 99))
def test_sample_scores_equal_the_definition(made, together, seed):
    z, is_image, _, _ = made
    rng = np.random.default_rng(seed)
    sample = rng.integers(3, 7, len(z))
    sample = np.sort(sample) if together else sample
    weights = np.where(rng.random(z.shape[1]) < 0.3, np.nan, rng.standard_normal(z.shape[1]))
    found = sample_scores(to_csr(z), sample, is_image, weights, DELTA)
    expected = scores_by_definition(z, sample, is_image, weights)
    assert found.index.tolist() == list(expected) and found.index.name == "sample"
    assert found.columns.tolist() == ["cosine", "l0", "cooccurrence", "n_text", "n_image"]
    np.testing.assert_allclose(found.to_numpy().reshape(-1, 5), np.array(list(expected.values())).reshape(-1, 5))


def test_a_sample_of_one_modality_scores_zero_and_is_counted():
    features = sp.csr_matrix(np.full((4, 2), 3, np.float32))
    found = sample_scores(features, [7, 7, 8, 8], [True, True, False, False], np.ones(2))
    assert found.cosine.tolist() == [0, 0] and found.cooccurrence.tolist() == [0, 0] and found.l0.tolist() == [2, 2]
    assert found.n_text.tolist() == [0, 2] and found.n_image.tolist() == [2, 0]
