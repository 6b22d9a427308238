"""Probes against scikit-learn, for every way they can be called."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import probes


def world(n=600, d=40, k=6, seed=0):
    """Sparse non-negative features [n, d] that depend on the class, with a dead and a constant column."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % k)
    rate = rng.random((k, d)) * 0.3
    X = (rng.random((n, d)) < rate[y]) * rng.exponential(3.0, (n, d))
    X[:, 0], X[:, 1] = 0, 4
    return X.astype(np.float32), y


@pytest.mark.parametrize("d", [40, 500], ids=["primal", "dual"])
@pytest.mark.parametrize("sparse", [False, True])
def test_ridge_equals_sklearn(d, sparse):
    X, y = world(d=d)
    train, test = probes.splits(y, 3, 7, 0)
    got = probes.predict(sp.csr_matrix(X) if sparse else X, y, train, test, classifier="ridge", alpha=5.0)
    reference = make_pipeline(StandardScaler(), RidgeClassifier(alpha=5.0)).fit(X[train], y[train])
    expected = reference.predict(X[test])
    assert np.mean(got == expected) > 0.995
    assert probes.macro_f1(y[test], got) == pytest.approx(f1_score(y[test], got, average="macro"), abs=1e-9)
    assert probes.macro_f1(y[test], got) > 0.3


def test_standardised_before_the_split_as_published():
    X, y = world()
    X[:, 2] *= 1 + 9 * (np.arange(len(X)) % 7 == 0)
    train, test = probes.splits(y, 1, 9, 0)
    scaled = StandardScaler().fit_transform(X)
    expected = RidgeClassifier(alpha=30.0).fit(scaled[train], y[train]).predict(scaled[test])
    for features in (X, sp.csr_matrix(X)):
        got = probes.predict(features, y, train, test, classifier="ridge", standardise="all", alpha=30.0)
        assert np.mean(got == expected) > 0.995
    corrected = probes.predict(X, y, train, test, classifier="ridge", alpha=30.0)
    assert not np.array_equal(corrected, expected)


@pytest.mark.parametrize("k", [2, 5])
def test_logistic_equals_sklearn(k):
    X, y = world(k=k, n=300)
    train, test = probes.splits(y, 1, 1, 0)
    got = probes.predict(sp.csr_matrix(X), y, train, test, classifier="logistic", alpha=2.0)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000))
    expected = reference.fit(X[train], y[train]).predict(X[test])
    assert np.mean(got == expected) > 0.99


@pytest.mark.parametrize("classifier", ["lda", "ridge", "logistic"])
def test_two_classes_are_enough(classifier):
    X, y = world(k=2, n=200)
    train, test = probes.splits(y, 1, 1, 0)
    assert probes.probe(X, y, train, test, classifier=classifier) > 0.6  # half of it by chance


@pytest.mark.parametrize("d", [40, 500])
def test_auto_alpha_is_from_the_grid_and_good(d):
    X, y = world(d=d)
    train, test = probes.splits(y, 1, 4, 3)
    auto = probes.probe(X, y, train, test, classifier="ridge")
    tried = [a * len(train) for a in probes.RELATIVE_ALPHAS]
    assert auto > max(probes.probe(X, y, train, test, classifier="ridge", alpha=a) for a in tried) - 0.05


def test_classes_need_not_be_contiguous_or_all_predicted():
    X, y = world()
    ids = np.array([2, 3, 5, 8, 13, 21])[y]
    train, test = probes.splits(ids, 1, 1, 0)
    renamed, plain = probes.predict(X, ids, train, test), probes.predict(X, y, train, test)
    assert np.array_equal(renamed, np.array([2, 3, 5, 8, 13, 21])[plain])
    truth, guess = np.array([0, 0, 1, 4]), np.array([0, 2, 2, 4])
    assert probes.macro_f1(truth, guess) == pytest.approx(f1_score(truth, guess, average="macro"))


def test_splits_are_stratified_disjoint_nested_and_seeded():
    y = np.repeat(np.arange(10), 30)
    small, large = probes.splits(y, 1, 9, 5), probes.splits(y, 5, 5, 5)
    assert np.all(np.bincount(y[small[0]]) == 3) and np.all(np.bincount(y[large[0]]) == 15)
    for train, test in (small, large):
        assert np.array_equal(np.sort(np.r_[train, test]), np.arange(300))
    assert set(small[0]) <= set(large[0])
    assert np.array_equal(small[0], probes.splits(y, 1, 9, 5)[0])
    assert not np.array_equal(small[0], probes.splits(y, 1, 9, 6)[0])
    with pytest.raises(InputError, match="class 0 has 1 rows"):
        probes.splits(np.arange(5), 1, 9, 0)


def test_grid_runs_all_and_repeats_exactly():
    X, y = world(n=300)
    features = {
        ("sum", "raw"): sp.csr_matrix(X),
        ("sum", "binary"): sp.csr_matrix((X > 0).astype(np.float32)),
    }
    table = probes.grid(features, y, [(1, 9), (5, 5)], [0, 1, 2])
    assert len(table) == 12 and table.value.between(0.1, 1).all()
    row = table.iloc[7]
    train, test = probes.splits(y, row.train_parts, row.test_parts, row.seed)
    assert probes.probe(features[row["name"]], y, train, test) == row.value
    assert table.equals(probes.grid(features, y, [(1, 9), (5, 5)], [0, 1, 2]))
    named = probes.grid(features, y, [(1, 9), (5, 5)], [0, 1, 2], names="pooling form")
    assert [*zip(named.pooling, named.form, strict=True)] == table.name.tolist() and named.value.equals(table.value)


def test_unknown_option():
    X, y = world(n=60)
    with pytest.raises(InputError, match="forest"):
        probes.probe(X, y, *probes.splits(y, 1, 1, 0), classifier="forest")


def test_an_answer_that_names_no_class_is_missed_but_no_class():
    truth, guess = np.array([0, 0, 1, 1, 2]), np.array([0, -1, 1, 2, -1])
    expected = f1_score(truth, guess, labels=[0, 1, 2], average="macro", zero_division=0)
    assert probes.macro_f1(truth, guess) == pytest.approx(expected)


def test_variance_between_classes_by_definition():
    X, y = world(n=90)
    X[:, 0], X[:, 1] = 2.5, y
    classes = [X[y == k] for k in np.unique(y)]
    between = sum(len(part) * (part.mean(0) - X.mean(0)) ** 2 for part in classes)
    for given_as in (X, sp.csr_matrix(X)):
        share = probes.between_classes(given_as, y)
        assert np.isnan(share[0]) and share[1] == pytest.approx(1)
        np.testing.assert_allclose(share[2:], between[2:] / (X.var(0) * len(y))[2:], rtol=1e-4)


@pytest.mark.parametrize("d", [12, 400])
def test_lda_equals_sklearn(d):
    """Both the d x d and the n x n form; scikit-learn's shrinkage is relative to the covariance's mean variance."""
    X, y = world(n=300, d=d)
    train = np.concatenate([np.flatnonzero(y == k)[:20] for k in np.unique(y)])
    test = np.setdiff1d(np.arange(300), train)
    Z = StandardScaler().fit_transform(X[train])
    within = Z - np.stack([Z[y[train] == k].mean(0) for k in y[train]])
    shrinkage = 0.2
    alpha = shrinkage / (1 - shrinkage) * within.var(0).mean()
    reference = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage))
    expected = reference.fit(X[train], y[train]).predict(X[test])
    got = probes.predict(sp.csr_matrix(X), y, train, test, classifier="lda", alpha=alpha)
    assert np.mean(got == expected) > 0.99
    assert probes.probe(X, y, train, test, classifier="lda") > probes.macro_f1(y[test], got) - 0.1


def test_features_that_do_not_vary_in_training_do_not_matter():
    X, y = world(n=200)
    train, test = probes.splits(y, 1, 1, 0)
    wide = np.hstack([X, np.zeros((200, 300)), np.ones((200, 5))])
    wide[test, -1] = 7.0
    for classifier in ("ridge", "lda", "logistic"):
        same = [probes.predict(x, y, train, test, classifier=classifier) for x in (X, wide)]
        assert np.mean(same[0] == same[1]) > 0.99
    assert len(probes.predict(np.ones((200, 3)), y, train, test)) == len(test)


def test_the_cell_chosen_is_best_on_the_other_seeds():
    rows = [(0, "a", 1.0), (0, "b", 0.2), (1, "a", 0.3), (1, "b", 0.9), (2, "a", 0.5), (2, "b", 0.6)]
    table = pd.DataFrame(rows, columns=["seed", "cell", "value"])
    found = probes.chosen(table, ["cell"])
    score, cell = found["value"], dict(zip(found["seed"], found["cell"], strict=True))
    assert cell == {0: "b", 1: "a", 2: "a"} and score.tolist() == [0.2, 0.3, 0.5]
    assert probes.chosen(table[table["seed"] == 1], ["cell"])["cell"].tolist() == ["b"]
    both = pd.concat([table.assign(arm="as is"), table.assign(arm="mirrored", value=1 - table["value"])])
    apart = probes.chosen(both, ["cell"])
    assert apart[apart["arm"] == "as is"]["value"].tolist() == score.tolist()
    assert apart[apart["arm"] == "mirrored"]["cell"].tolist() == ["a", "b", "b"]


def plain_lda(Z, target, alpha):
    """By definition, through the inverse in float64: scores of rows [m, k] as a function."""
    means = np.stack([Z[target == c].mean(0) for c in np.unique(target)]).astype(float)
    within = (Z - means[target]).T.astype(float) @ (Z - means[target])
    weights = np.linalg.inv(within / len(Z) + alpha * np.eye(Z.shape[1])) @ means.T
    bias = np.log(np.bincount(target) / len(Z)) - 0.5 * (means.T * weights).sum(0)
    return lambda rows: rows @ weights + bias


@pytest.mark.parametrize("d", [30, 150, 700], ids=["narrow", "a little wider than rows", "wide"])
@pytest.mark.parametrize("alpha", [1.0, 0.03])
def test_lda_from_sums_is_the_plain_definition(d, alpha):
    """Scores within 2e-3 of their spread, whichever way the equations are set up."""
    X, y = world(n=300, d=d)
    Z = StandardScaler().fit_transform(X[:150][:, np.ptp(X[:150], axis=0) > 0]).astype(np.float32)
    weights, bias = probes._lda(Z, y[:150], alpha)
    expected = plain_lda(Z, y[:150], alpha)(Z)
    assert np.abs(Z @ weights + bias - expected).max() < 2e-3 * expected.std()


@pytest.mark.parametrize("d", [30, 700])
@pytest.mark.parametrize("seed", range(4))
def test_the_shrinkage_climbed_to_is_as_good_as_the_best_of_all(d, seed):
    """On the rows that choose it: within .02 of the best, found by trying all through the plain definition."""
    X, y = world(n=600, d=d, seed=seed)
    Z = StandardScaler().fit_transform(X[:, np.ptp(X, axis=0) > 0]).astype(np.float32)
    held = probes._every_fifth(y)
    right = [np.mean(plain_lda(Z[~held], y[~held], a)(Z[held]).argmax(1) == y[held]) for a in probes.SHRINKAGES]
    weights, bias = probes._lda(Z, y, "auto")
    close = [np.allclose(weights, probes._lda(Z, y, a)[0], rtol=1e-4, atol=1e-5) for a in probes.SHRINKAGES]
    assert sum(close) == 1 and right[close.index(True)] > max(right) - 0.02


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=9))
def test_a_climb_ends_where_no_neighbour_is_better(scores):
    end = probes._climb(scores.__getitem__, len(scores))
    assert scores[end] == max(scores[max(end - 1, 0) : end + 2])
    assert end == 0 or scores[end - 1] < scores[end], "the stronger shrinkage of equals"


@pytest.mark.parametrize("classifier", ["lda", "ridge", "logistic"])
@pytest.mark.parametrize("d", [5, 500], ids=["primal", "dual"])
def test_of_features_that_never_fire_the_commonest_class_is_guessed(classifier, d):
    y = np.array([0, 1, 1, 1, 2] * 8)
    guessed = probes.predict(
        sp.csr_matrix((40, d), dtype=np.float32), y, *probes.splits(y, 5, 5, 0), classifier=classifier
    )
    assert (guessed == 1).all()


def test_rows_that_differ_in_one_direction_alone_are_classified():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 30)
    shared = rng.standard_normal((300, 1)) * np.ones((1, 800)) + 1e-3 * rng.standard_normal((300, 800))
    scores = probes._lda((shared - shared.mean(0)).astype(np.float32), labels, "auto")
    assert all(np.isfinite(part).all() for part in scores)
