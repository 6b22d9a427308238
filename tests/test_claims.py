"""Claims are data: both verdicts follow from the primary contrast alone, and what cannot be is one clear line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import figures
from mmsae_helpers.suite.claims import VERDICTS, Claim, definitions, verdict
from mmsae_helpers.suite.observations import Interval, Observations, mean_ci

NUMBERS = st.floats(-1, 1).map(lambda x: round(x, 3))


def seeds(*values):
    return Observations({(s,): v for s, v in enumerate(values)}, "seed", "Macro F1")


def test_claims_are_those_of_the_papers():
    known = [id for id in definitions() if id[0] in "ABC"]
    assert len(known) == 23
    assert [id for id in known if id.startswith("A")] == [f"A{i}" for i in range(1, 10)]


@pytest.mark.parametrize("id", definitions())
def test_every_definition_is_whole(id):
    about = definitions()[id]
    words = (about.says, about.section, about.figure, about.contrast, about.unit, about.because)
    assert all(words) and about.decides in ("yes", "partly", "no")
    assert set(about.sentences) == set(VERDICTS[:3]) and about.direction in ("greater", "less")
    assert set(about.beyond) == (set(VERDICTS[:3]) if about.control else set())
    places = {"effect": 1, "control": 2, "beyond": 3, "varied": 4, "unit": 5}
    assert all("{effect}" in text and text.format(**places) for text in about.sentences.values())
    assert all("{beyond}" in text and text.format(**places) for text in about.beyond.values())
    assert about.history or id[0] not in "AB" or id == "A9"
    for former in about.history:
        assert {"date", "definition", "verdict"} <= set(former) and former["verdict"] in (*VERDICTS, "unknown")


@pytest.mark.parametrize(
    "ci, direction, null, said",
    [
        ((0.1, 0.3), "greater", 0, "replicated"),
        ((-0.1, 0.3), "greater", 0, "inconclusive"),
        ((-0.3, -0.1), "greater", 0, "contradicted"),
        ((-0.3, -0.1), "less", 0, "replicated"),
        ((-0.02, 0.3), "greater", -0.05, "replicated"),
        ((None, None), "greater", 0, "inconclusive"),
        ((float("nan"), 1), "greater", 0, "inconclusive"),
    ],
)
def test_verdict_from_the_interval(ci, direction, null, said):
    assert verdict(Interval(0.1, *ci, 3), direction, null) == said


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=2, max_size=6))
def test_both_verdicts_follow_from_the_primary_contrast_alone(rows):
    ours, control, other = (seeds(*column) for column in zip(*rows, strict=True))
    claim = Claim("A6").primary(ours, control=control)
    alone = claim.as_dict()
    said = claim.part("x", other, control=other).part("y", other - 5).reading("z", other).as_dict()
    for verdicts in (alone, said):
        assert verdicts["as_stated"]["verdict"] == verdict(ours.ci())
        assert verdicts["beyond_control"]["verdict"] == verdict((ours - control).ci())
    assert alone["sentence"] == said["sentence"]
    json.dumps(said)


def test_levels_and_margins_move_what_a_verdict_is_judged_against():
    near = seeds(-0.02, -0.021, -0.019)
    said = Claim("A8").primary(near, control=seeds(-0.01, -0.012, -0.008)).as_dict()
    assert said["as_stated"]["verdict"] == "replicated" and said["as_stated"]["null"] == pytest.approx(-0.05)
    assert said["beyond_control"]["verdict"] == "contradicted"
    ratio = Claim("C9").primary(seeds(1.1, 1.2, 1.15), control=seeds(1.8, 1.9, 1.85)).as_dict()
    assert ratio["as_stated"]["verdict"] == "replicated" and ratio["beyond_control"]["verdict"] == "replicated"
    alone = Claim("C2").primary(mean_ci([0.3, 0.5, 0.4])).as_dict()
    assert "beyond_control" not in alone and alone["as_stated"]["verdict"] == "replicated"


def test_parts_stand_at_holms_levels():
    clear, vague = seeds(0.50, 0.51, 0.52), seeds(0.1, -0.1, 0.05)
    parts = Claim("C2").primary(seeds(1, 2, 3)).part("vague", vague).part("clear", clear).as_dict()["parts"]
    assert list(parts) == ["vague", "clear"]
    assert parts["vague"]["ci_holm"] == pytest.approx(list(vague.ci()[1:3]))
    assert parts["clear"]["ci_holm"] == pytest.approx(list(clear.ci(level=0.975)[1:3]))
    said = (
        Claim("A6")
        .primary(clear, control=vague)
        .part("ours", clear, vague)
        .part("plain", clear)
        .part("none", vague, clear)
    )
    less = said.as_dict()["parts"]
    assert less["plain"]["beyond"] is None, "what is beyond controls is a family of its own"
    assert less["ours"]["beyond"]["ci"] == pytest.approx(list((clear - vague).ci(level=0.975)[1:3]))
    assert less["none"]["beyond"]["ci"] == pytest.approx(list((vague - clear).ci()[1:3]))


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_forest_plot_keeps_a_far_off_part_at_its_edge_and_prints_every_effect():
    claim = Claim("A2").primary(seeds(0.2, 0.4, 0.3), control=seeds(0.1, 0.1, 0.2))
    ax = figures.forest(claim.part("far off", seeds(-20, -22, -21)).as_dict(), claim.about).axes[0]
    low, high = ax.get_xlim()
    assert -3 < low < 0 < 0.4 < high < 3 and any("-21 [" in text.get_text() for text in ax.texts)
    assert [line.get_marker() for line in ax.lines].count("<") == 1 and len(ax.texts) == 3
    ratio = Claim("C9").primary(seeds(1.6, 1.8, 1.7), control=seeds(1.9, 1.8, 2.0)).as_dict()
    dashed = [line.get_xdata()[0] for line in figures.forest(ratio, claim.about).axes[0].lines if line.get_ls() == "--"]
    assert dashed == [ratio["as_stated"]["null"], ratio["beyond_control"]["null"]] == [1.5, 0]
    still = Claim("A2").primary(seeds(0, 0, 0), control=seeds(0, 0, 0))
    figures.forest(still.as_dict(), still.about).canvas.draw()


def test_what_cannot_be_is_one_clear_line():
    with pytest.raises(InputError, match="no claim 'Z1'; known are A1"):
        Claim("Z1")
    with pytest.raises(InputError, match="A6: no primary effect was given"):
        Claim("A6").part("x", seeds(1, 2)).as_dict()
    claim = Claim("A6").primary(seeds(1, 2), control=seeds(0, 1))
    with pytest.raises(InputError, match="A6: the primary effect is given twice"):
        claim.primary(seeds(1, 2), control=seeds(0, 1))
    with pytest.raises(InputError, match="A6: its control is 'random"):
        Claim("A6").primary(seeds(1, 2))
    with pytest.raises(InputError, match="C2: an effect is not finite"):
        Claim("C2").primary(Interval(float("nan"), None, None, 0))
    with pytest.raises(InputError, match="C2: an effect is not finite"):
        Claim("C2").primary(Interval(0.1, 0.0, float("inf"), 3))
    with pytest.raises(InputError, match="C2: an effect is observations or an interval, not 0.3"):
        Claim("C2").primary(0.3)
    with pytest.raises(InputError, match="seed 2 is measured on one side only"):
        Claim("A6").primary(seeds(1, 2, 3), control=seeds(0, 1))
