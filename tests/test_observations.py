"""Contrasts pair by what both sides share, whatever the order of rows; what has no partner is named."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite.observations import (
    Interval,
    Observations,
    bootstrap_ci,
    contrast,
    crossed_ci,
    mean_ci,
    share_ci,
)

ARMS, BLOCKS = ("trained", "random"), (0, 2, 4)


@st.composite
def tables(draw):
    n_seeds = draw(st.integers(2, 4))
    value = st.floats(-10, 10).map(lambda x: round(x, 3))
    keys = [(arm, block, seed) for arm in ARMS for block in BLOCKS for seed in range(n_seeds)]
    return {key: draw(value) for key in keys}, draw(st.permutations(keys))


@settings(deadline=None)
@given(tables())
def test_a_contrast_is_paired_whatever_the_order_of_rows(given_):
    values, order = given_
    plain, mixed = (Observations(v, "arm block seed") for v in (values, {k: values[k] for k in order}))
    found = [contrast(o.where(arm="trained"), o.where(arm="random")) for o in (plain, mixed)]
    n_seeds = max(s for *_, s in values) + 1
    by_seed = [np.mean([values["trained", b, s] - values["random", b, s] for b in BLOCKS]) for s in range(n_seeds)]
    for one in found:
        assert np.allclose(one.ci()[:3], mean_ci(by_seed)[:3]) and one.varied == f"{n_seeds} seeds"
    swapped = contrast(mixed.where(arm="random"), mixed.where(arm="trained")).ci()
    assert swapped.value == pytest.approx(-found[0].ci().value)
    by_block = found[1].ci("block")
    for b in BLOCKS:
        apart = [values["trained", b, s] - values["random", b, s] for s in range(n_seeds)]
        assert np.allclose(by_block[b][:3], mean_ci(apart)[:3])


@settings(deadline=None)
@given(tables(), st.integers(0, 11))
def test_a_missing_seed_is_a_clear_error(given_, which):
    values, order = given_
    missing = order[which]
    table = Observations({k: v for k, v in values.items() if k != missing}, "arm block seed")
    with pytest.raises(InputError, match=f"block {missing[1]}, seed {missing[2]} is measured on one side only"):
        contrast(table.where(arm="trained"), table.where(arm="random"))


def test_a_side_without_a_factor_counts_for_each_of_its_levels():
    blocks = Observations({(b, s): 10 * b + s for b in BLOCKS for s in range(3)}, "block seed")
    tower = Observations({(s,): s for s in range(3)}, "seed")
    assert [iv.value for iv in contrast(blocks, tower).ci("block")] == [0, 20, 40]
    assert [iv.value for iv in contrast(tower, blocks).ci("block")] == [0, -20, -40]
    other = Observations({("x", s): s for s in range(3)}, "arm seed")
    with pytest.raises(InputError, match="one side has block, the other arm"):
        contrast(blocks, other)


def test_images_and_seeds_are_both_in_the_interval():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 40)), rng.random((3, 40))
    table = Observations({(m, s): x[s] for m, x in (("a", a), ("b", b)) for s in range(3)}, "method seed")
    found = contrast(table.where(method="a"), table.where(method="b"))
    assert found.ci() == crossed_ci(a - b) and found.varied == "3 seeds × 40 samples"
    single = table.where(method="a", seed=[1]).ci()
    assert single.value == pytest.approx(a[1].mean()) and np.allclose(single[1:3], bootstrap_ci(a[1])[1:3], atol=0.03)


def test_slope_mean_largest_and_arithmetic():
    rows = Observations({(b, s): 3.0 * b + s for b in BLOCKS for s in range(3)}, "block seed", "share")
    assert rows.slope("block").ci().value == pytest.approx(3) and rows.slope("block").unit == "share"
    assert rows.slope("block", {0: 0, 2: 1, 4: 2}).ci().value == pytest.approx(6)
    assert rows.mean("block").frame["value"].tolist() == [6, 7, 8]
    assert rows.largest("block").frame["value"].tolist() == [12, 13, 14]
    assert (1 - rows.where(block=4) / rows.where(block=2)).frame["value"].tolist() == pytest.approx(
        [-1, -6 / 7, -6 / 8]
    )
    assert (rows.where(block=2) + 0.5).ci().value == 7.5 and (rows.where(block=2) * 2).ci().value == 14


def test_a_table_has_three_digits_and_no_empty_nan():
    rows = Observations(
        {(m, b, s): 1 / 3 + s for m, b in (("a", 0), ("a", 2), ("b", 0)) for s in range(3)}, "m block seed"
    )
    assert rows.table("block", "m").loc[2, "b"] == "" and rows.table("block", "m").loc[0, "a"] == "1.33 [-1.15, 3.82]"
    named = {(m, b, s): 1.0 for b in (2, 0) for m in ("z", "a") for s in range(2)}
    assert list(Observations(named, "m block seed").table(["m", "block"]).index) == [
        ("z", 2),
        ("z", 0),
        ("a", 2),
        ("a", 0),
    ]
    head = Observations(rows.frame, unit="nats").table("block", "m").columns
    assert head.name == "nats · m" and list(head) == ["a", "b"], "the unit is in the head"
    assert Observations({(0,): 0.5}, "seed").ci() == Interval(0.5, None, None, 1)


def test_a_wider_level_is_the_t_interval_at_that_level():
    x = [0.1, 0.4, 0.3]
    assert mean_ci(x).at(0.99) == pytest.approx(mean_ci(x, 0.99))
    assert mean_ci([0.1]).at(0.99) == mean_ci([0.1])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"arm": "a", "value": 1.0}], "no column 'seed'; they have arm, value"),
        ([{"seed": 0, "arm": "a", "value": float("nan")}], r"1 of 1 values are not finite \(seed 0, arm a\)"),
        ([{"seed": 0, "value": 1.0}, {"seed": 0, "value": 2.0}], "seed 0 is measured twice"),
        (pd.DataFrame(columns=["seed", "value"]), "there is none"),
    ],
)
def test_bad_rows_are_one_clear_line(rows, message):
    with pytest.raises(InputError, match=message):
        Observations(rows)


def test_shares_of_yes_or_no_have_an_interval_where_all_are_alike():
    told = share_ci(np.ones(50))
    assert told.value == told.hi == 1 and told.lo == pytest.approx(50 / (50 + 1.959964**2)) and told.n == 50
    assert Observations({(0,): np.ones(50)}, "seed").ci() == told
    assert share_ci(np.array([0, 1, 1, 0])).value == 0.5


def test_logarithms_give_the_geometric_mean_whose_interval_stays_positive():
    told = Observations({(0,): 0.1, (1,): 10.0, (2,): 1.0}, "seed").log().ci().exp()
    assert told.value == pytest.approx(1) and 0 < told.lo < 1 < told.hi and told.lo * told.hi == pytest.approx(1)
    assert Interval(0.0, None, None, 1).exp() == (1.0, None, None, 1)
    with pytest.raises(InputError, match="not finite"):
        Observations({(0,): 0.0}, "seed").log()


def test_bad_levels_and_names():
    rows = Observations({("a", 0): 1, ("b", 0): 2}, "arm seed")
    with pytest.raises(InputError, match="no factor 'block'; they have arm"):
        rows.where(block=1)
    with pytest.raises(InputError, match="arm has no 'c'; it has a, b"):
        rows.where(arm="c")
    with pytest.raises(InputError, match=r"key \('a', 0\) has 2 parts, but names are 'seed'"):
        Observations({("a", 0): 1}, "seed")
