"""Every notebook: its shape, its parameter files, and a run of it at profile smoke."""

import json
import re
from pathlib import Path

import papermill
import pytest
from test_reports import visit

from mmsae_helpers.suite import parameters, runner
from mmsae_helpers.suite.claims import VERDICTS, definitions

CLAIMS_OF = {"01": "A1 A2 A3 X1", "02": "A4 A5 A6 A7 A8", "03": "B1 B2 B3 B5", "04": "C1 C2 C3 C9", "05": "C4"}
CLAIMS_OF |= {"06": "C5 C6 C7 C8", "07": "B4"}
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
    return [(c["cell_type"], parameters.source(c), c) for c in parameters.read_notebook(path)["cells"]]


def test_there_are_notebooks():
    assert NOTEBOOKS and all(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) for path in NOTEBOOKS)


@each_notebook
def test_shape(path):
    kinds = [kind for kind, _, _ in cells(path)]
    code = [text for kind, text, _ in cells(path) if kind == "code"]
    own = [
        text for kind, text, c in cells(path) if kind == "code" and "parameters" not in c["metadata"].get("tags", [])
    ]
    lengths = sorted(sum(bool(line.strip()) for line in text.splitlines()) for text in own)
    assert lengths[len(lengths) // 2] <= 8 and lengths[-1] <= 25, f"median at most 8 lines, longest 25: {lengths}"
    assert not [line for text in code for line in text.splitlines() if len(line) > 120]
    assert not [line for text in own for line in text.splitlines() if "note" in line and "+=" in line]
    lines = [line for text in own for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    books = [line for line in lines if re.search(r"run\.(metrics?|claim|save)\(|\.(part|reading|sensitivity)\(", line)]
    assert len(books) <= max(0.1 * len(lines), 4), f"bookkeeping in {len(books)} of {len(lines)} lines"
    assert kinds.count("markdown") >= 0.75 * len(code), "three prose cells for every four code cells"
    assert "code code code code" not in " ".join(kinds), "never more than three code cells without prose"
    text = "\n".join(code)
    assert not re.search(r"^class ", text, re.M) and len(re.findall(r"^\s*def ", text, re.M)) <= 2
    importing = [c for c in code if re.search(r"^(import|from) ", c, re.M)]
    assert len(importing) == 1, "one import cell"
    assert not re.search(r"""["'](/|~|[A-Z]:\\)[\w/]""", text) and "cuda:0" not in text
    assert not any(c.get("outputs") or c.get("execution_count") for _, _, c in cells(path)), "stored outputs"
    assert re.match(r"# \S", cells(path)[0][1]), "starts with its title"
    assert "import *" not in text and "run.save()" in code[-1]
    assert f'Run("{path.stem}", globals())' in text


@each_notebook
def test_nothing_asks_which_profile_it_runs_in(path):
    for _, text, cell in cells(path):
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []):
            assert not re.search(r"""profile\s*[!=]=|[!=]=\s*["'](smoke|tiny|paper)["']""", text)


@each_notebook
def test_parameters(path):
    known = parameters.defaults(path)
    assert set(papermill.inspect_notebook(path)) == set(known), "papermill must see every parameter"
    assert known["profile"] == "tiny"
    for profile in parameters.profiles(ROOT):
        file = ROOT / "params" / profile / f"{path.stem}.yaml"
        if profile not in ("tiny", "smoke", "paper") and not file.is_file():
            continue  # the others have the notebooks that they are for
        values = parameters.load(file, path)
        assert values["profile"] == profile
        if profile == "tiny":
            assert values.items() <= known.items(), "the defaults are the tiny profile"
    kernel = parameters.read_notebook(path)["metadata"]["kernelspec"]
    assert kernel["name"] == "python3" and kernel["language"] == "python"


def test_no_parameter_file_without_its_notebook():
    names = {path.stem for path in NOTEBOOKS}
    assert {p.stem for p in (ROOT / "params").glob("*/*.yaml")} == names


def test_running_order():
    needs = runner.order(ROOT)
    names = list(needs)
    assert names[-1] == "08_claims_ledger" and needs["08_claims_ledger"][1]
    if "02_classification_ablations" in needs:
        assert needs["02_classification_ablations"][0] == ["01_llava_transfer_signal"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Artifacts, reports and number of failures of the whole suite at profile smoke."""
    folder = tmp_path_factory.mktemp("smoke")
    failed = runner.run(ROOT, "smoke", artifacts=folder / "artifacts", reports=folder / "reports")
    return folder / "artifacts/smoke", folder / "reports", failed


@each_notebook
def test_runs_at_profile_smoke(smoke, path):
    artifacts, reports, _ = smoke
    status = json.loads((artifacts / path.stem / "run.json").read_text())
    assert status["status"] == "ok", f"{status['error']}\n{status['traceback']}"
    assert (reports / "smoke" / f"{path.stem}.html").stat().st_size > 5000
    written = json.loads((artifacts / path.stem / "results.json").read_text())
    assert written["notebook"] == path.stem and written["profile"] == "smoke" and written["metrics"]
    for name, metric in written["metrics"].items():
        assert set(metric) == {"value", "ci", "n", "unit"}, name
        assert isinstance(metric["value"], int | float), f"{name} is {metric['value']}"
    for claim in written["claims"]:
        said = [claim["as_stated"], *([claim["beyond_control"]] if definitions()[claim["id"]].control else [])]
        assert all(one["verdict"] in VERDICTS and one["varied"] and one["unit"] for one in said) and claim["sentence"]
        assert {"id", "version", "as_stated", "sentence", "parts", "readings", "sensitivity"} <= set(claim)
    assert {claim["id"] for claim in written["claims"]} == set(CLAIMS_OF.get(path.stem[:2], "").split())


def test_suite_ends_well_and_writes_the_ledger(smoke):
    artifacts, reports, failed = smoke
    assert failed == 0 and (reports / "smoke/index.html").is_file()
    assert not (reports / "smoke_ledger.md").exists(), "a run leaves what is committed alone"
    assert runner.run(ROOT, "smoke", ledger=True, artifacts=artifacts.parent, reports=reports) == 0
    table = (reports / "smoke_ledger.md").read_text()
    assert all(f"| {id} {about.says}" in table for id, about in definitions().items())


def test_the_reports_open_offline_without_complaint(smoke, chromium):
    folder = smoke[1] / "smoke"
    for path in sorted(folder.glob("*.html")):
        page, requests, complaints = visit(chromium, path)
        assert complaints == [] and set(requests) <= {path.as_uri(), (folder / "plotly.min.js").as_uri()}, path
        plots = page.locator(".plotly-figure")
        for plot in plots.all():
            plot.locator(".main-svg").first.wait_for(state="attached")
        page.context.close()
