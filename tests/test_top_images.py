"""Images on which features are largest: the stream equals a full sort, in any order of arrival, ties included."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import features, top_images

# few distinct values, so that ties are everywhere; zeros, which never count; the smallest number above 0
VALUES = st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.25, 0.3, 1.0, 1e-45, 7e5]).map(np.float32)


def full_sort(maxima, ids, k):
    """Values and ids [F, k]: all images sorted by descending value, then ascending id."""
    values, chosen = np.zeros((maxima.shape[1], k), np.float32), np.full((maxima.shape[1], k), -1)
    for feature, column in enumerate(maxima.T):
        ranked = sorted((-a, i) for a, i in zip(column, ids, strict=True) if a > 0)[:k]
        for place, (a, i) in enumerate(ranked):
            values[feature, place], chosen[feature, place] = -a, i
    return values, chosen


@st.composite
def images(draw):
    """Dense maxima [S, F], distinct ids in any order, batch edges, k."""
    shape = draw(st.tuples(st.integers(0, 40), st.integers(1, 6)))
    maxima = draw(hnp.arrays(np.float32, shape, elements=VALUES))
    ids = draw(st.lists(st.integers(0, 2**31 - 2), min_size=shape[0], max_size=shape[0], unique=True))
    edges = draw(st.sets(st.integers(0, shape[0])))
    return maxima, np.array(ids, np.int64), sorted(edges | {0, shape[0]}), draw(st.integers(1, 12))


def stream(maxima, ids, edges, k, make=features.to_csr):
    top = top_images.TopImages(maxima.shape[1], k)
    for lo, hi in zip(edges[:-1], edges[1:], strict=True):
        top.add(make(maxima[lo:hi]), ids[lo:hi])
    return top


@given(images())
@settings(max_examples=300)
def test_the_stream_is_a_full_sort(data):
    maxima, ids, edges, k = data
    values, chosen = full_sort(maxima, ids, k)
    for make in (features.to_csr, lambda z: sp.csr_matrix((z.ravel(), np.indices(z.shape)[1].ravel(),
                 np.arange(len(z) + 1) * z.shape[1]), shape=z.shape)):  # fmt: skip
        top = stream(maxima, ids, edges, k, make)  # also where zeros are stored
        assert np.array_equal(top.values, values) and top.values.dtype == np.float32
        assert np.array_equal(top.ids, chosen) and top.ids.dtype == np.int64
        assert np.array_equal(top.n_images, (maxima > 0).sum(axis=0))


@given(images(), st.randoms())
def test_the_order_of_arrival_does_not_matter(data, random):
    maxima, ids, edges, k = data
    order = list(range(len(ids)))
    random.shuffle(order)
    a, b = stream(maxima, ids, edges, k), stream(maxima[order], ids[order], edges[:1] + edges[-1:], k)
    assert np.array_equal(a.values, b.values) and np.array_equal(a.ids, b.ids)


def test_at_size_with_many_batches():
    rng = np.random.default_rng(0)
    maxima = np.round(rng.random((700, 1_300), dtype=np.float32), 2)  # more features than one block of the merge
    maxima[rng.random(maxima.shape) > 0.1] = 0
    ids = rng.permutation(10_000)[:700]
    top = stream(maxima, ids, range(0, 701, 50), 9)
    values, chosen = full_sort(maxima, ids, 9)
    assert np.array_equal(top.values, values) and np.array_equal(top.ids, chosen)


def test_what_does_not_fit_is_one_line():
    top = top_images.TopImages(3, 2)
    for ids, message in (([4, 4], "id comes twice"), ([1, 2, 3], "3 ids, 3 features"), ([-1, 2], "outside 0")):
        with pytest.raises(InputError, match=message) as caught:
            top.add(features.to_csr(np.ones((2, 3))), ids)
        assert "\n" not in str(caught.value)
    assert not top.n_images.any() and (top.ids == -1).all()


@given(images(), st.data())
def test_image_maxima_is_the_definition(data, draw):
    tokens = data[0]
    sample = np.array(draw.draw(st.lists(st.integers(3, 7), min_size=len(tokens), max_size=len(tokens))), np.int64)
    ids, maxima = top_images.image_maxima(features.to_csr(tokens), sample)
    assert np.array_equal(ids, np.unique(sample)) and maxima.dtype == np.float32
    assert maxima.shape == (len(ids), tokens.shape[1]) and (maxima.data > 0).all() and maxima.has_sorted_indices
    for i, row in zip(ids, maxima.toarray(), strict=True):
        assert np.array_equal(row, tokens[sample == i].max(axis=0))


def test_image_maxima_of_many_images():
    rng = np.random.default_rng(1)
    tokens = rng.random((600, 2_000), dtype=np.float32) * (rng.random((600, 2_000)) < 0.05)  # several dense blocks
    maxima = top_images.image_maxima(features.to_csr(tokens), np.repeat(np.arange(300), 2))[1]
    assert np.array_equal(maxima.toarray(), tokens.reshape(300, 2, -1).max(axis=1))
