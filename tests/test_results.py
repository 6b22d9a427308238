import json

import IPython.display
import numpy as np
import pytest
import throwaway
from scipy import stats

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import results
from mmsae_helpers.suite.claims import definitions
from mmsae_helpers.suite.observations import Interval, Observations, bootstrap_ci, crossed_ci, mean_ci, redrawn_ci
from mmsae_helpers.suite.results import Run


@pytest.fixture
def root(tmp_path, monkeypatch):
    throwaway.write(tmp_path, "01_x", parameters='profile = "tiny"\nlr = 0.1\nseeds = [0, 1, 2]\nnot_asked = {}')
    monkeypatch.setenv("MMSAE_ROOT", str(tmp_path))
    monkeypatch.delenv("MMSAE_ARTIFACTS", raising=False)
    monkeypatch.delenv("MMSAE_REPORTS", raising=False)
    return tmp_path


def values(**given):
    return {"profile": "tiny", "lr": 0.1, "seeds": [0, 1, 2], "not_asked": {}, "other": 3} | given


def test_mean_ci_is_the_t_interval():
    got, x = mean_ci([0.1, 0.4, 0.3]), [0.1, 0.4, 0.3]
    low, high = stats.t.interval(0.95, 2, np.mean(x), stats.sem(x))
    assert np.allclose(got[:3], [np.mean(x), low, high]) and got.n == 3
    assert mean_ci([0.5]) == Interval(0.5, None, None, 1)
    assert str(Interval(-5e-19, -0.00386, 1e-17, 5)) == "0 [-0.00386, 0]" and str(Interval(0.5, None, None, 1)) == "0.5"
    with pytest.raises(InputError, match="finite"):
        mean_ci([0.1, float("nan")])


def test_bootstrap_is_seeded_and_covers_the_estimate():
    x = np.random.default_rng(0).normal(size=100)
    got = bootstrap_ci(x, np.median, seed=1)
    assert got == bootstrap_ci(x, np.median, seed=1)
    assert got.lo < got.value < got.hi


def test_crossed_interval_covers_repetitions_and_samples():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 1))
    got = crossed_ci(5 + a + 0.01 * rng.normal(size=200))  # all that varies is the seeds
    assert got.value == pytest.approx(5 + a.mean(), abs=0.01) and got.n == 200
    only_seeds = [5 + a[rng.integers(0, 4, 4)].mean() for _ in range(2000)]
    assert np.allclose(got[1:3], np.quantile(only_seeds, [0.025, 0.975]), atol=0.1)
    samples = 20 * rng.normal(size=200)
    one, plain = crossed_ci(samples[None]), bootstrap_ci(samples)  # one repetition: the bootstrap over samples
    assert one.value == pytest.approx(plain.value) and np.allclose(one[1:3], plain[1:3], atol=0.4)


def seeds(*values):
    return Observations({(s,): v for s, v in enumerate(values)}, "seed")


def test_draws_of_the_images_widen_the_interval_over_seeds():
    seeds_alone = np.array([0.1, 0.4, 0.3])
    assert redrawn_ci(np.tile(seeds_alone[:, None], 6)) == pytest.approx(mean_ci(seeds_alone))
    both, t = redrawn_ci(seeds_alone[:, None] + np.array([-0.2, 0.0, 0.2])), 4.3027
    assert both.hi - both.value == pytest.approx(t * np.sqrt(seeds_alone.var(ddof=1) / 3 + 0.04), rel=1e-4)
    assert redrawn_ci([[0.1, 0.3]]) == pytest.approx((0.2, None, None, 1))


def test_run_writes_the_contract(root):
    run = Run("01_x", values())
    run.metric("f1", mean_ci([0.7, 0.8, 0.9]), unit="Macro F1")
    run.metric("tokens", np.int64(7))
    run.metric("broken", float("nan"))
    run.claim("A1").primary(seeds(0.1, 0.2, 0.15), control=seeds(0.5, 0.61, 0.55))
    assert run.claim("A1").part("late", seeds(0.1, 0.2, 0.3)) is run.claim("A1")
    run.save()
    written = json.loads((root / "artifacts/tiny/01_x/results.json").read_text())
    assert set(written) == {"notebook", "profile", "parameters", "metrics", "claims", "provenance"}
    assert written["parameters"] == {"profile": "tiny", "lr": 0.1, "seeds": [0, 1, 2], "not_asked": {}}
    assert written["metrics"]["f1"]["n"] == 3 and len(written["metrics"]["f1"]["ci"]) == 2
    assert written["metrics"]["tokens"] == {"value": 7, "ci": None, "n": None, "unit": ""}
    assert written["metrics"]["broken"]["value"] is None
    (said,) = written["claims"]
    assert said["as_stated"]["verdict"] == "replicated" and said["as_stated"]["varied"] == "3 seeds"
    assert said["beyond_control"]["verdict"] == "contradicted" and said["beyond_control"]["control"]["n"] == 3
    assert list(said["parts"]["late"]) == ["effect", "ci_holm", "n", "control", "beyond"]
    assert "fewer" not in said["sentence"] and "0.15 [" in said["sentence"]
    assert {"versions", "revision", "device", "seeds", "duration_s"} <= set(written["provenance"])
    assert not list(run.folder.glob("*.part"))


def test_run_refuses_what_it_cannot_use(root):
    with pytest.raises(InputError, match="lr is the text '1e-4'"):
        Run("01_x", values(lr="1e-4"))
    with pytest.raises(InputError, match="names a folder"):
        Run("01_x", values(profile="../x"))
    with pytest.raises(InputError, match="run the parameters cell first"):
        Run("01_x", {})
    with pytest.raises(InputError, match="no such notebook"):
        Run("02_y", values())
    run = Run("01_x", values())
    with pytest.raises(InputError, match="no claim 'Z1'"):
        run.claim("Z1")
    run.claim("A1")
    with pytest.raises(InputError, match="A1: no primary effect"):
        run.save()


def test_ledger_has_every_claim_and_says_not_run(root):
    run = Run("01_x", values())
    run.claim("A1").primary(seeds(0.1, 0.2, 0.15), control=seeds(0.1, 0.2, 0.1))
    run.save()
    ledger = results.ledger("tiny")
    assert list(dict.fromkeys(about.id for about, *_ in ledger)) == list(definitions())
    about, said, name = ledger[0]
    assert about.id == "A1" and name == "01_x" and said["as_stated"]["verdict"] == "replicated"
    assert {said for _, said, _ in ledger[1:]} == {None}
    table = results.ledger_table(ledger)
    effect, control = table.loc[0, "effect"].replace("\xa0", " ").split("; less control ")
    assert effect == "0.15 [0.0258, 0.274] (0)" and "] (0) share" in control
    assert table.loc[0, "varied"] == "3 seeds"
    assert set(table["as stated"][1:]) == {"not run"} and table.loc[0, "beyond control"] == "inconclusive"
    table.loc[0, "varied"] = "a | <script>"
    text = results.to_markdown(table)
    assert "a \\| &lt;script&gt;" in text and len(text.splitlines()) == len(table) + 2


def test_the_saes_behind_the_verdicts_have_a_row_each(root):
    run = Run("01_x", values())
    l0 = {("L0 / d_model", arm, 4, s): 0.05 + s / 100 for arm in ("trained", "matched") for s in (0, 1)}
    run.metrics("sparsity", Observations(l0, "of arm block seed"), by=["of", "arm", "block"])
    run.save()
    (row,) = results.sae_table("tiny").to_dict("records")  # random directions are no SAEs
    assert row == {
        "notebook": "01", "SAEs": "trained block 4", "architecture": "standard", "seeds": 2, "L0 / d_model": "0.055",
        "explained variance": "", "share of features alive": "",
    }  # fmt: skip
    assert results.sae_table("none").empty


def test_a_claim_that_the_models_cannot_decide_has_no_verdict(root, monkeypatch):
    with pytest.raises(InputError, match=r"01_x: not_asked names \['A99'\]; claims are A1"):
        Run("01_x", values(not_asked={"A99": "why"}))
    run = Run("01_x", values(not_asked={"A1": "there is no base model"}))
    run.claim("A1").primary(seeds(0.1, 0.2, 0.15), control=seeds(0.1, 0.2, 0.1))
    run.save()
    assert results.ledger("tiny")[0][1:] == (None, "")
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    run.claim("A1")._ipython_display_()
    assert [one.data.split("** ")[1] for one in shown] == ["Not asked here: there is no base model."]


def test_many_metrics_at_once_get_plain_names(root):
    run = Run("01_x", values())
    run.metrics("f1", {"top-3, raw": Interval(0.5, 0.4, 0.6, 3), 7: 2}, unit="Macro F1")
    run.save()
    metrics = json.loads((run.folder / "results.json").read_text())["metrics"]
    assert set(metrics) == {"f1_top_3_raw", "f1_7"} and metrics["f1_top_3_raw"]["ci"] == [0.4, 0.6]


def test_observations_are_recorded_in_one_call(root):
    run = Run("01_x", values())
    rows = Observations({(m, b, s): b + s for m in "xy" for b in (0, 2) for s in range(3)}, "m block seed", "F1")
    run.metrics("score", rows, by=["m", "block"])
    run.metrics("whole", rows)
    run.save()
    metrics = json.loads((run.folder / "results.json").read_text())["metrics"]
    assert set(metrics) == {"score_x_0", "score_x_2", "score_y_0", "score_y_2", "whole"}
    assert metrics["score_x_2"]["value"] == 3 and metrics["score_x_2"]["unit"] == "F1" and metrics["whole"]["n"] == 3
