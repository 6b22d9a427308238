"""Every reduction equals its plain dense definition, ties and short tokens included, at once or in chunks."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import features, patches, pooling, top_images, words
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.meters.health import HealthMeter

NS = (None, 1, 2, 3, 7)
# few distinct values, so that ties are everywhere; zeros, so that tokens have fewer active features than N
VALUES = st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.25, 0.3, 1.0, 1e-30, 7e5])


@st.composite
def token_features(draw):
    """Dense z [tokens, d_sae] and the row of each token's sample, ascending."""
    shape = draw(st.tuples(st.integers(0, 40), st.integers(1, 12)))
    z = draw(hnp.arrays(np.float32, shape, elements=VALUES.map(np.float32)))
    rows = draw(st.lists(st.integers(0, 5), min_size=shape[0], max_size=shape[0]).map(sorted))
    return z, np.array(rows, np.int64)


def kept_by_definition(z, n):
    """Dense one-hot of the n largest per token: ties by lowest index, active ones only."""
    if n is None:
        return z > 0
    order = np.argsort(-z, axis=1, kind="stable")[:, :n]
    one_hot = np.zeros(z.shape, bool)
    np.put_along_axis(one_hot, order, True, axis=1)
    return one_hot & (z > 0)


def pooled_by_definition(z, rows, n_samples, n):
    kept = kept_by_definition(z, n)
    values = [np.where(kept, z, 0)[rows == s].sum(axis=0, dtype=np.float64) for s in range(n_samples)]
    counts = [kept[rows == s].sum(axis=0) for s in range(n_samples)]
    return np.array(values).astype(np.float32), np.array(counts)


def of_samples(rows):
    """A batch as far as pooling reads it."""
    return SimpleNamespace(sample=torch.as_tensor(rows))


def same(a, b):
    return all(np.array_equal(x.toarray(), y.toarray()) for x, y in zip(a, b, strict=True))


@given(token_features())
def test_sparse_is_dense(data):
    z, _ = data
    for given_as in (z, torch.from_numpy(z), -z, np.asfortranarray(z)):
        out = features.to_csr(given_as)
        assert np.array_equal(out.toarray(), np.maximum(np.asarray(given_as), 0))
        assert out.has_sorted_indices and out.dtype == np.float32 and (out.data > 0).all()


@given(token_features())
def test_retrieval_is_the_definition(data):
    z, _ = data
    csr = features.to_csr(z)
    expected = np.where((z > 0).any(axis=1), z.argmax(axis=1), -1)
    assert np.array_equal(features.retrieve_top1(csr), expected)


@given(token_features())
@settings(max_examples=200)
def test_pooling_is_the_definition(data):
    z, rows = data
    out = pooling.pool_all(features.to_csr(z), rows, 6, NS)
    for n in NS:
        values, counts = pooled_by_definition(z, rows, 6, n)
        assert np.array_equal(out[n].values.toarray(), values)
        assert np.array_equal(out[n].counts.toarray(), counts)
        assert same(pooling.pool_all(features.to_csr(z), rows, 6, (n,))[n], out[n])


@given(token_features(), st.data())
def test_pooling_in_chunks_is_pooling_at_once(data, draw):
    z, rows = data
    csr = features.to_csr(z)
    whole, stream = pooling.Pooling(None, 0, NS), pooling.Pooling(None, 0, NS)
    whole.add(of_samples(rows), csr)
    edges = sorted(draw.draw(st.sets(st.integers(0, 6))) | {0, 6})
    for lo, hi in zip(np.searchsorted(rows, edges[:-1]), np.searchsorted(rows, edges[1:]), strict=True):
        stream.add(of_samples(rows[lo:hi]), csr[lo:hi])
    a, b = whole.result(), stream.result()
    assert np.array_equal(whole.sample, stream.sample) and np.array_equal(whole.sample, np.unique(rows))
    assert all(same(a[n], b[n]) for n in NS)


@given(token_features(), st.randoms())
def test_token_order_of_samples_does_not_matter(data, random):
    z, rows = data
    by_sample = list(range(6))
    random.shuffle(by_sample)
    order = np.concatenate([np.flatnonzero(rows == s) for s in by_sample])
    a = pooling.pool_all(features.to_csr(z), rows, 6, NS)
    b = pooling.pool_all(features.to_csr(z[order]), rows[order], 6, NS)
    assert all(same(a[n], b[n]) for n in NS)


def test_pooling_at_size_with_many_blocks_and_ties():
    rng = np.random.default_rng(0)
    z = rng.random((60 * 20, 4_000), dtype=np.float32)
    z[rng.random(z.shape) > 0.02] = 0
    z[::3] = np.round(z[::3], 1)
    rows = np.repeat(np.arange(60), 20)
    out = pooling.pool_all(features.to_csr(z), rows, 60)
    for n in pooling.POOLINGS:
        values, counts = pooled_by_definition(z, rows, 60, n)
        assert np.array_equal(out[n].values.toarray(), values)
        assert np.array_equal(out[n].counts.toarray(), counts)


def test_argpartition_gives_the_same_counts_where_nothing_ties():
    """The published way: argpartition, one-hot, sum over tokens."""
    z = np.random.default_rng(1).random((50, 200), dtype=np.float32)
    one_hot = np.zeros_like(z)
    np.put_along_axis(one_hot, np.argpartition(z, -10, axis=1)[:, -10:], 1, axis=1)
    counts = pooling.pool_all(features.to_csr(z), np.zeros(50, int), 1, (10,))[10].counts
    assert np.array_equal(counts.toarray()[0], one_hot.sum(axis=0))


def test_a_sample_split_between_chunks_is_refused():
    stream = pooling.Pooling(None, 0, (1,))
    stream.add(of_samples([4, 5]), features.to_csr(np.ones((2, 3))))
    with pytest.raises(ValueError, match="sample 5 came twice"):
        stream.add(of_samples([5]), features.to_csr(np.ones((1, 3))))
    assert len(stream.result()[1].values.toarray()) == 2 and stream.sample == [4, 5]
    with pytest.raises(ValueError, match="nothing was pooled"):
        stream.result()
    with pytest.raises(ValueError, match="outside 0 to 1"):
        pooling.pool_all(features.to_csr(np.ones((2, 3))), [0, 2], 2)
    with pytest.raises(ValueError, match="2 tokens but 1"):
        pooling.pool_all(features.to_csr(np.ones((2, 3))), [0], 2)


def test_encode_is_dense_encode_in_chunks():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 40)
    sae = SimpleNamespace(encode=lambda x: layer(x).relu(), parameters=layer.parameters)
    x = torch.randn(100, 8)
    dense = layer(2 * x).relu().detach().numpy()
    for chunk in (7, 100, 1000):
        out = features.encode(sae, x, scale=2.0, chunk=chunk)
        assert out.shape == (100, 40) and np.allclose(out.toarray(), dense, atol=1e-6)
    assert features.encode(sae, x[:0]).shape == (0, 40)
    large = torch.full((2, 8), 3e38)  # their sum is not finite, they are
    assert features.encode(sae, large, scale=1e-30).shape == (2, 40)
    for bad in ([torch.nan, 0.0], [torch.inf, -torch.inf]):
        with pytest.raises(InputError, match="tokens 14 to 20 hold NaN"):
            x[15, 3:5] = torch.tensor(bad)
            features.encode(sae, x, chunk=7)


@given(token_features())
def test_a_class_retrieves_a_feature_as_often_as_its_images_not_their_tokens(data):
    z, rows = data
    csr, labels = features.to_csr(z), np.array([2, 0, 1, 2, 2, 0])
    top1 = features.retrieve_top1(csr)
    expected = np.zeros((3, z.shape[1]), int)
    for sample in range(6):
        for feature in set(top1[rows == sample].tolist()) - {-1}:
            expected[labels[sample], feature] += 1
    d = z.shape[1]
    sae = SimpleNamespace(cfg=SimpleNamespace(d_sae=d), W_enc=torch.eye(d), process_sae_in=lambda x: x)
    scan = words.ImageScan(sae, 0, [], labels, 3)
    for sample in np.unique(rows):
        at = np.flatnonzero(rows == sample)
        scan.add(SimpleNamespace(acts={0: torch.zeros(len(at), d)}, sample=torch.as_tensor(rows[at])), csr[at])
    assert np.array_equal(scan.retrieved, expected)


@given(token_features(), st.lists(st.integers(0, 11), max_size=8))
def test_maximum_and_share_on_object_are_the_definition(data, wanted):
    z, rows = data
    wanted = [w for w in wanted if w < z.shape[1]]  # repeated and unordered too
    csr = features.to_csr(z)
    largest = top_images.image_maxima(csr[:, wanted], rows)[1].toarray()
    assert largest.shape == (len(np.unique(rows)), len(wanted)) and largest.dtype == np.float32
    for row, sample in zip(largest, np.unique(rows), strict=True):
        assert np.array_equal(row, z[rows == sample][:, wanted].max(axis=0))
    rng = np.random.default_rng(len(z))
    patch, cover = rng.integers(-1, 4, len(z)), rng.random((6, 4))
    for mask in (cover, cover > 0.5):
        share, total = patches.share_on_object(csr, rows, patch, mask, wanted)
        weight = np.where(patch >= 0, mask[rows, patch], 0)
        on_object = (z[:, wanted].astype(float) * weight[:, None]).sum(axis=0)
        assert np.allclose(share, on_object)
        assert np.allclose(total, z[patch >= 0][:, wanted].astype(float).sum(axis=0))


def test_one_kept_feature_is_one_entry_of_both_matrices():
    pooled = pooling.pool_all(features.to_csr(np.eye(3)), [0, 0, 1], 2, (1,))[1]
    assert isinstance(pooled.values, sp.csr_matrix)
    assert np.shares_memory(pooled.values.indices, pooled.counts.indices)
    assert pooled.values.dtype == np.float32 and pooled.counts.dtype == np.int32


def test_a_pass_is_pooled_under_every_sae_at_its_scale(llava, image_batches):
    from mmsae_helpers.activations import stream

    weights = {key: torch.randn(32, 12, generator=torch.Generator().manual_seed(sum(key))) for key in [(1, 0), (3, 5)]}
    saes = {key: SimpleNamespace(encode=lambda x, w=w: torch.relu(x @ w)) for key, w in weights.items()}

    def tokens(size):
        return stream(llava, image_batches(0, 7, size), [1, 3])

    scales = {(3, 5): 0.5}
    meters = {k: pooling.Pooling(sae, k[0], (None, 2), scales.get(k, 1.0)) for k, sae in saes.items()}
    out = feed(meters, tokens(3))
    batch = next(tokens(7))
    for key, scale in (((1, 0), 1.0), ((3, 5), 0.5)):
        z = torch.relu(batch.acts[key[0]] * scale @ weights[key]).numpy()
        for n in (None, 2):
            values, counts = pooled_by_definition(z, batch.sample.numpy(), 7, n)
            np.testing.assert_allclose(out[key][n].values.toarray(), values, rtol=1e-4, atol=1e-6)
            assert np.array_equal(out[key][n].counts.toarray(), counts)


def test_matrices_in_both_readings():
    z = np.array([[3, 2, 1], [0, 5, 0], [1, 0, 0]], np.float32)
    pooled = pooling.pool_all(features.to_csr(z), [0, 0, 1], 2, (None, 1))
    own, published = pooling.matrices(pooled), pooling.matrices(pooled, "as_published")
    assert set(own) == {(p, f) for p in ("sum", "top-1") for f in ("raw", "binarised")}
    assert own["sum", "raw"].toarray().tolist() == [[3, 7, 1], [1, 0, 0]]
    assert own["top-1", "raw"].toarray().tolist() == [[3, 5, 0], [1, 0, 0]]
    assert published["top-1", "raw"].toarray().tolist() == [[1, 1, 0], [1, 0, 0]]
    assert published["sum", "raw"].toarray().tolist() == own["sum", "raw"].toarray().tolist()
    assert own["sum", "binarised"].toarray().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_meters_of_two_streams_add_up_to_that_of_both():
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    sae = SimpleNamespace(
        encode=lambda x: torch.relu(x @ weight),
        decode=lambda f: f @ weight.T,
        cfg=SimpleNamespace(d_sae=12),
        device="cpu",
    )
    parts = [SimpleNamespace(acts={2: torch.randn(n, 8, generator=torch.Generator().manual_seed(n))}) for n in (5, 30)]
    one, other, both = (HealthMeter(sae, 2) for _ in range(3))
    feed({0: one}, parts[:1])
    feed({0: other}, parts[1:])
    whole, summed = feed({0: both}, parts)[0], (one + other).result()
    assert summed.numbers() == pytest.approx(whole.numbers()) and summed.n_tokens == 35
    assert np.array_equal(summed.firing_rate, whole.firing_rate)
    assert one.result().n_tokens == 5, "neither is changed"
