"""The analysis of variance: against plain loops, statsmodels, and cases whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import anova

SHAPE = (12, 5, 3)


def made(image=0.0, question=0.0, both=0.0, phrasing=0.0, rest=0.0, shape=SHAPE, n=1, seed=0):
    """Activations with these standard deviations of the five sources, [I, S, R, n]."""
    rng = np.random.default_rng(seed)
    i, s, r = shape
    sizes = (i, 1, 1, n), (1, s, 1, n), (i, s, 1, n), (1, s, r, n), (i, s, r, n)
    sources = zip((image, question, both, phrasing, rest), sizes, strict=True)
    return sum(sd * rng.standard_normal(size) for sd, size in sources) + np.zeros((i, s, r, n))


def plain(y):
    """Sums of squares of image, question, interaction, phrasing in question, rest, of one feature [I, S, R]."""
    n_i, n_s, n_r = y.shape
    grand, out = y.mean(), np.zeros(5)
    for i in range(n_i):
        for s in range(n_s):
            for r in range(n_r):
                a, b, c, p = y[i].mean(), y[:, s].mean(), y[i, s].mean(), y[:, s, r].mean()
                parts = a - grand, b - grand, c - a - b + grand, p - b, y[i, s, r] - c - p + b
                out += np.square(parts)
    return out


@settings(max_examples=40)
@given(st.tuples(*[st.integers(2, 5)] * 3), st.integers(0, 2**31), st.floats(0.0, 0.95))
def test_shares_sum_to_one_and_equal_the_plain_definition(shape, seed, sparse):
    rng = np.random.default_rng(seed)
    y = rng.exponential(size=(*shape, 3)) * (rng.random((*shape, 3)) > sparse)
    eta, component = anova.two_way(y)
    for f in range(3):
        if np.ptp(y[..., f]) == 0:
            assert np.isnan(eta[f]).all() and np.isnan(component[f]).all()
            continue
        squares = plain(y[..., f])
        wanted = np.array([*squares[:3], squares[3:].sum()]) / np.square(y[..., f] - y[..., f].mean()).sum()
        np.testing.assert_allclose(eta[f], wanted, atol=1e-10)
        np.testing.assert_allclose([eta[f].sum(), component[f].sum()], 1)
        assert (component[f] >= 0).all()


def test_sums_of_squares_equal_statsmodels():
    sm = pytest.importorskip("statsmodels.formula.api")
    from statsmodels.stats.anova import anova_lm

    y = made(1, 1, 1, 1, 1, shape=(6, 4, 3))
    i, s, r = np.indices(y.shape[:3]).reshape(3, -1)
    frame = pd.DataFrame({"y": y.reshape(-1), "i": i, "s": s, "r": s * 3 + r})
    table = anova_lm(sm.ols("y ~ C(i) * C(s)", frame).fit())["sum_sq"]
    np.testing.assert_allclose(anova.two_way(y).eta[0], table / table.sum(), rtol=1e-8)


@pytest.mark.parametrize("part", range(3))
def test_a_pure_source_is_all_of_the_variance(part):
    sizes = [0.0] * 5
    sizes[part] = 2.0
    eta, component = anova.two_way(made(*sizes))
    if part < 2:
        np.testing.assert_allclose(eta[0], np.eye(4)[part], atol=1e-12)
        np.testing.assert_allclose(component[0], np.eye(4)[part], atol=1e-12)
    else:  # a random interaction has means of its own, which the correction takes off again
        assert component[0, 2] > 0.8 > eta[0, 0] and eta[0, 3] < 1e-12


def test_phrasing_alone_is_residual_and_not_question():
    y = made(phrasing=1.0, shape=(20, 7, 3), n=400)
    eta, component = anova.two_way(y)
    assert eta[:, 1].mean() == pytest.approx(6 / 20, abs=0.02)  # raw: by degrees of freedom
    assert np.median(component[:, 1]) == pytest.approx(0, abs=0.1) and component[:, 3].mean() > 0.8


def test_components_recover_what_the_features_were_made_with():
    sizes = np.array([1.0, 0.8, 0.9, 0.5, 0.7])
    component = anova.two_way(made(*sizes, shape=(60, 40, 3), n=60)).component
    parts = np.square(sizes)
    wanted = np.array([*parts[:3], parts[3:].sum()]) / parts.sum()
    np.testing.assert_allclose(component.mean(0), wanted, atol=0.03)


def test_sparse_batches_equal_the_dense_whole_and_shuffles_are_the_same_for_all_features():
    rng = np.random.default_rng(0)
    y = made(1, 0.5, 0.5, 0.1, 0.5, n=9).clip(0)
    pooled = sp.csr_matrix(y.reshape(-1, 9))
    wanted = rng.permutation(9)[:7]
    found = anova.split(pooled, SHAPE, wanted, n_shuffles=3, seed=5, batch=2)
    np.testing.assert_allclose(found.shares.component, anova.two_way(y[..., wanted]).component)
    for k in range(3):
        whole = anova.two_way(anova.shuffle(y, [5, k])).component[wanted]
        np.testing.assert_allclose(found.shuffled[k], whole)
    assert anova.split(pooled, SHAPE, []).shares.eta.shape == (0, 4)
    with pytest.raises(InputError, match="do not fill"):
        anova.split(pooled, (12, 5, 2), [0])


def test_a_shuffle_keeps_each_phrasing_and_loses_image_and_question():
    y = made(1, 1, 0.3, 0, 0.2, shape=(40, 6, 3), n=5)
    dealt = anova.shuffle(y, 0)
    before, after = (np.sort(np.sort(v.reshape(40, 18, 5), 0), 1) for v in (y, dealt))
    np.testing.assert_array_equal(before, after)
    assert anova.two_way(dealt).component[:, [0, 2]].max() < 0.2


def test_followers_are_found_against_the_shuffles():
    sources = {"image": 1, "rest": 0.2}, {"question": 1, "rest": 0.2}, {"both": 1, "rest": 0.2}, {"rest": 1}
    y = np.concatenate([made(**sizes, n=10) for sizes in sources], axis=3)
    table = sp.csr_matrix(y.reshape(-1, 40))
    split = anova.split(table, SHAPE, np.arange(40), n_shuffles=40)
    found, by_chance = split.followers()
    counts = found.reshape(4, 10, 4).sum(1)
    assert counts[0, 0] == counts[1, 1] == counts[2, 2] == 10 and counts.trace() + counts[3, 3] == counts.sum()
    assert (by_chance <= 0.05).all()
    whole = [np.arange(n) for n in SHAPE]
    picks = [whole, (whole[0][::-1].repeat(2), *whole[1:]), (whole[0][:1].repeat(2), *whole[1:])]
    again = np.array([(anova.two_way(y[np.ix_(*pick)]).component > split.bar()).mean(0) for pick in picks])
    np.testing.assert_allclose(again[0], found.mean(0))
    assert again[1, 0] >= 0.25 and again[2, 0] == 0, "one image twice: no variance is the image's"


def test_explained_finds_the_attribute_and_gives_chance_nothing():
    rng = np.random.default_rng(0)
    color = rng.integers(0, 4, 200)
    effects = np.stack([rng.standard_normal(4)[color], rng.standard_normal(200), np.full(200, 3.0)], 1)
    found = anova.explained(effects, color)
    assert found[0] == pytest.approx(1) and abs(found[1]) < 0.1 and np.isnan(found[2])


def test_an_unbalanced_or_unrepeated_design_is_refused():
    with pytest.raises(InputError, match="at least 2"):
        anova.two_way(np.zeros((3, 4, 1, 2)))


def test_a_crossed_table_tells_image_and_question_apart_and_own_questions_do_not():
    rng = np.random.default_rng(0)
    image, kind = np.repeat(np.arange(30), 6), np.tile(np.arange(6), 30)
    noise = rng.normal(0, 0.1, (180, 3))
    crossed = np.stack([rng.normal(size=30)[image], rng.normal(size=6)[kind], np.zeros(180)], 1) + noise
    assert anova.told_apart(crossed, image, kind) == pytest.approx(
        {"image alone": 1 / 3, "question alone": 1 / 3, "not told apart": 0}
    )
    own = image % 6  # all questions about an image are of the kind that fits it
    by_kind = rng.normal(size=(6, 1))[own] + noise
    assert anova.told_apart(by_kind, image, own)["not told apart"] == 1
    once = anova.told_apart(by_kind, np.arange(180), own)
    assert once["image alone"] == 0 == once["not told apart"], "an image seen once explains nothing"
    assert anova.told_apart(np.zeros((180, 0)), image, kind)["image alone"] == 0
