"""The ledger as a reader sees it: a forest of all claims, a table, and a section a claim with its history."""

import io
import json
from pathlib import Path

import pytest
from test_reports import visit

from mmsae_helpers.suite import figures, results, runner
from mmsae_helpers.suite.claims import Claim, definitions, verdict
from mmsae_helpers.suite.observations import Observations


def seeds(*values):
    return Observations({(s,): v for s, v in enumerate(values)}, "seed")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("ledger")
    said = []
    for id in ("A1", "A8", "B1", "C2", "C9"):
        control = seeds(0.1, 0.11, 0.12) if definitions()[id].control else None
        claim = Claim(id).primary(seeds(0.2, 0.21, 0.22), control=control)
        said.append(claim.part("late blocks", seeds(0.1, 0.2, 0.3)).as_dict())
    folder = root / "artifacts" / "tiny" / "01_llava_transfer_signal"
    folder.mkdir(parents=True)
    metrics = {"sparsity_L0_d_model_trained_4": {"value": 0.0731, "ci": [0.07, 0.08], "n": 5, "unit": ""}}
    (folder / "results.json").write_text(json.dumps({"claims": said, "metrics": metrics, "parameters": {}}))
    given = {"artifacts": root / "artifacts", "reports": root / "reports"}
    assert runner.run(None, "tiny", "08", out=io.StringIO(), **given) == 0
    return root / "reports" / "tiny"


def test_the_page_has_a_forest_a_table_and_a_section_a_claim(chromium, pages):
    page, _, complaints = visit(chromium, pages / "08_claims_ledger.html", viewport={"width": 1280, "height": 800})
    assert not complaints and page.locator("#head figure img").bounding_box()["y"] < 400
    shown = page.locator("main").inner_text()
    for id in ("A1", "A8", "B1", "C2", "C9"):
        about = definitions()[id]
        assert f"{id} · {about.says}" in shown and about.figure[:30] in shown and about.because[:40] in shown
    assert definitions()["A8"].history[0]["definition"] in shown, "former definitions stand there"
    assert "not run" in shown and "no control" in shown and "NaN" not in shown and "trained block 4" in shown
    link = page.locator("main table a").first
    assert link.inner_text() == "01" and link.get_attribute("href") == "01_llava_transfer_signal.html"
    assert page.locator("main table").first.bounding_box()["width"] <= 900, "the table fits the page"
    page.context.close()
    phone, _, _ = visit(chromium, pages / "08_claims_ledger.html", viewport={"width": 390, "height": 800})
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    phone.context.close()


def test_its_short_form_is_markdown_in_the_runs_folder(pages):
    path = Path(pages).parents[1] / "artifacts" / "tiny" / "08_claims_ledger" / "ledger.md"
    claims, saes = (table.splitlines() for table in path.read_text().split("\n\n"))
    assert len(claims) == len(definitions()) + 2 and "beyond control" in claims[0]
    assert max(map(len, claims)) < 400
    assert len(saes) == 3 and "| trained block 4 | standard | 5 | 0.0731 |" in saes[2]


def test_distances_from_the_threshold_say_what_the_verdicts_say():
    for values, direction in [((0.2, 0.21, 0.22), "greater"), ((-0.3, 0.1, 0.2), "less"), ((1, 2, 1.5), "less")]:
        effect = seeds(*values).ci()
        told = {"effect": effect.value, "ci": [effect.lo, effect.hi], "null": 0.0}
        far = figures._half_widths(told, direction)
        said = verdict(effect, direction)
        assert said == ("replicated" if far > 1 else "contradicted" if far < -1 else "inconclusive")
    assert results.ledger_table([]).empty
