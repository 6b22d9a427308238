"""Both measures equal their plain definitions; a pure feature is 1, the permuted control is not."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import purity as monosemanticity
from mmsae_helpers.meters.features import to_csr

VALUES = st.sampled_from([0.0, 0.0, 0.1, 0.25, 1.0, 3.0, 70.0]).map(np.float32)


def by_pairs(activations, embeddings):
    """The score of each feature by a double loop over pairs of different images, activations min-max normalised."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = []
    for a in activations.T.astype(float):
        a = a - a.min()
        a = a / a.max() if a.max() > 0 else a
        pairs = [(n, m) for n in range(len(a)) for m in range(len(a)) if n != m]
        weight = sum(a[n] * a[m] for n, m in pairs)
        total = sum(a[n] * a[m] * (unit[n] @ unit[m]) for n, m in pairs)
        scores.append(total / weight if weight else np.nan)
    return np.array(scores)


@given(st.data())
@settings(max_examples=200)
def test_closed_form_is_the_loop_over_pairs(data):
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 5)))
    activations = data.draw(hnp.arrays(np.float32, shape, elements=VALUES))
    activations[:, data.draw(st.integers(0, shape[1] - 1))] += np.float32(0.3)  # fires on every image
    embeddings = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((shape[0], 4))
    edges = sorted(data.draw(st.sets(st.integers(0, shape[0]))) | {0, shape[0]})
    score = monosemanticity.Similarity(shape[1], 4)
    for lo, hi in zip(edges[:-1], edges[1:], strict=True):
        score.add(to_csr(activations[lo:hi]), embeddings[lo:hi])
    np.testing.assert_allclose(score.score(), by_pairs(activations, embeddings), atol=1e-6)


def test_similarity_of_alike_and_of_opposite_images():
    score = monosemanticity.Similarity(3, 2)
    assert np.isnan(score.score()).all()
    score.add(to_csr(np.array([[2, 1, 0], [5, 0, 0], [0, 4, 1]])), np.array([[1, 0], [3, 0], [-2, 0]]))
    np.testing.assert_allclose(score.score(), [1, -1, np.nan])
    with pytest.raises(InputError, match="none of them zero"):
        score.add(to_csr(np.ones((1, 3))), np.zeros((1, 2)))
    with pytest.raises(InputError, match="as many embeddings"):
        score.add(to_csr(np.ones((2, 3))), np.ones((1, 2)))


def purity(z, attributes, parts=1, **options):
    one = monosemanticity.Purity(attributes, z.shape[1], **options)
    for ids in np.array_split(np.arange(len(z)), parts):
        one.add(to_csr(z[ids]), ids)
    return one.score()


def purity_by_definition(z, attributes):
    best = []
    for a in z.T.astype(float):
        found = [np.nan]
        for _, column in attributes.items():
            means = [a[column == value].mean() for value in sorted(set(column))]
            if len(means) > 1 and sum(means):
                found += [(m / sum(means) * len(means) - 1) / (len(means) - 1) for m in means]
        best.append(np.nanmax(found) if len(found) > 1 else np.nan)
    return np.array(best)


@given(hnp.arrays(np.float32, st.tuples(st.integers(6, 20), st.integers(1, 5)), elements=VALUES), st.integers(0, 99))
def test_purity_is_the_definition(z, seed):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"color": rng.choice(list("rgb"), len(z)), "same": "x", "size": rng.choice(["a", "b"], len(z))}
    )
    table.loc[:1, "size"] = ["a", "b"]
    out = purity(z, table, parts=3)
    np.testing.assert_allclose(out["purity"], purity_by_definition(z, table), atol=1e-6)
    assert (out["attribute"] != "same").all() and ((out["value"] == "") == (z == 0).all(axis=0)).all()


def test_pure_mixed_and_silent_features_and_the_control():
    color = np.repeat(["blue", "red", "navy", "pink"], 100)
    table = pd.DataFrame({"color": color, "size": np.tile(["big", "small"], 200)})
    z = np.stack([(color == "red") * 2.0, np.ones(400), np.zeros(400)], axis=1)
    out = purity(z, table)
    assert out["purity"][:2].tolist() == pytest.approx([1, 0]) and np.isnan(out["purity"][2])
    assert out.loc[0, ["attribute", "value"]].tolist() == ["color", "red"]
    assert out.loc[2, ["attribute", "value"]].tolist() == ["", ""]
    control = purity(z, table, seed=3)
    assert control["purity"][0] < 0.3
    pd.testing.assert_frame_equal(control, purity(z, table, parts=4, seed=3))
    assert control["purity"][0] != purity(z, table, seed=4)["purity"][0]


def test_bootstrap_is_purity_of_images_drawn_again():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"color": rng.choice(list("rgb"), 60), "size": rng.choice(["a", "b"], 60)})
    z = np.maximum(rng.standard_normal((60, 4)), 0).astype(np.float32)
    one = monosemanticity.Purity(table, 4, draws=3)
    for ids in np.split(np.arange(60), 4):
        one.add(to_csr(z[ids]), ids)
    drawn = np.random.default_rng(0).poisson(1.0, (3, 60))
    for weight, found in zip(drawn, one.bootstrap(), strict=True):
        again = np.repeat(np.arange(60), weight)
        np.testing.assert_allclose(found, purity_by_definition(z[again], table.iloc[again]), atol=1e-6)

    assert monosemanticity.Purity(table, 4).bootstrap().shape == (0, 4)


def test_beyond_chance_compares_like_with_like():
    n = pd.Series([10] * 100 + [1000] * 100)
    control = pd.Series(np.r_[np.linspace(0.5, 1, 100), np.linspace(0, 0.5, 100)])
    found = monosemanticity.beyond_chance(pd.Series([0.7] * 199 + [np.nan]), control, n)
    assert not found[:100].any() and found[100:199].all() and not found[199]
    apart = monosemanticity.beyond_chance(pd.Series([0.7] * 200), control, n * 0 + 1, [n])
    assert apart.equals(n > 10)


def test_bad_tables_are_one_line():
    with pytest.raises(InputError, match="no attribute takes two values"):
        monosemanticity.Purity(pd.DataFrame({"a": ["x", "x"]}), 1)
