import io
import json
import os

import nbformat
import pytest
import throwaway

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import runner


def go(root, **kw):
    out = io.StringIO()
    failed = runner.run(root, out=out, **kw)
    return failed, out.getvalue()


def ran(log):
    """Names of the notebooks that were executed."""
    return sorted({line.split()[1].rstrip(":") for line in log.splitlines() if ": ok in" in line})


def status(root, name):
    return json.loads((root / f"artifacts/tiny/{name}/run.json").read_text())


@pytest.fixture
def chain(tmp_path):
    throwaway.write(tmp_path, "00_alone", ["# Alone", "run.metric('x', 1)"])
    throwaway.write(tmp_path, "01_first", ["# First", "run.claim('A1', 'replicated', 1.0)"])
    parameters = 'profile = "tiny"\nlr = 0.1'
    throwaway.write(tmp_path, "02_second", ["# Second"], parameters, ["01_first"])
    throwaway.write(tmp_path, "08_all", ["# All"], after=["*"])
    return tmp_path


def test_only_what_is_out_of_date_runs(chain):
    failed, log = go(chain)
    assert failed == 0 and ran(log) == ["00_alone", "01_first", "02_second", "08_all"]
    assert "cell 3/" in log and (chain / "reports/tiny/index.html").is_file()

    written = {p: p.stat().st_mtime_ns for p in (chain / "reports").rglob("*") if p.is_file()}
    failed, log = go(chain)
    assert failed == 0 and ran(log) == [] and "4 notebooks up to date" in log
    assert written == {p: p.stat().st_mtime_ns for p in (chain / "reports").rglob("*") if p.is_file()}

    (chain / "params/tiny/02_second.yaml").write_text("profile: tiny\nlr: 0.2\n")
    failed, log = go(chain)
    assert ran(log) == ["02_second", "08_all"]
    assert json.loads((chain / "artifacts/tiny/02_second/results.json").read_text())["parameters"]["lr"] == 0.2

    path = chain / "notebooks/01_first.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="ran in JupyterLab")]
    nbformat.write(notebook, path)
    assert ran(go(chain)[1]) == []
    notebook.cells[-1].source += "  # changed"
    nbformat.write(notebook, path)
    assert ran(go(chain)[1]) == ["01_first", "02_second", "08_all"]


def test_only_and_missing_results(chain):
    assert ran(go(chain, only="02")[1]) == ["01_first", "02_second"]
    assert ran(go(chain, only="00,02")[1]) == ["00_alone"]
    (chain / "artifacts/tiny/01_first/results.json").unlink()
    assert ran(go(chain, only="02")[1]) == ["01_first", "02_second"]
    with pytest.raises(InputError, match="no notebook starts with '07'"):
        go(chain, only="07")
    with pytest.raises(InputError, match="no folder params/none; there are tiny"):
        go(chain, profile="none")


def test_failures_do_not_stop_the_rest(tmp_path, capsys):
    write = throwaway.write
    write(tmp_path, "01_raises", ["raise ValueError('boom <script>alert(1)</script>')"])
    write(tmp_path, "02_needs_it", after=["01_raises"])
    write(tmp_path, "03_exits", ["import sys\n\nsys.exit(0)"])
    write(tmp_path, "04_dies", ["import os\n\nos._exit(0)  # the kernel is gone"])
    write(tmp_path, "05_unknown", yaml="profile: {profile}\nlearning_rate: 1\n")
    write(tmp_path, "06_text", parameters='profile = "tiny"\nlr = 0.1', yaml="profile: {profile}\nlr: 1e-4\n")
    write(tmp_path, "07_fine", ["# Fine"])
    write(tmp_path, "08_all", ["# All"], after=["*"])
    failed, log = go(tmp_path)
    assert failed == 6 and ran(log) == ["07_fine", "08_all"]
    errors = {
        "01_raises": "ValueError: boom",
        "02_needs_it": "needs 01_raises, which did not complete",
        "03_exits": "code cell 4 ended the notebook with sys.exit",
        "04_dies": "the kernel died in code cell 4 (",
        "05_unknown": "unknown parameter 'learning_rate'",
        "06_text": "lr is the text '1e-4'",
    }
    index = (tmp_path / "reports/tiny/index.html").read_text()
    for name, error in errors.items():
        assert error in status(tmp_path, name)["error"]
        assert error.replace("'", "&#39;") in index, name
        assert not (tmp_path / f"artifacts/tiny/{name}/results.json").exists()
    assert status(tmp_path, "02_needs_it")["status"] == "skipped"
    assert "Traceback (most recent call last)" in index and "&lt;script&gt;alert(1)" in index
    assert "SystemExit" in index and "# the kernel is gone" in index and "<script>alert" not in index
    assert runner.main(["--root", str(tmp_path)]) == 1

    # a failed notebook is tried again, and what waited for it then runs
    write(tmp_path, "01_raises", ["print('mended')"])
    assert {"01_raises", "02_needs_it", "08_all"} <= set(ran(go(tmp_path, only="01,02,08")[1]))


def test_a_result_from_before_is_not_taken_for_this_runs(chain):
    go(chain)
    throwaway.write(chain, "01_first", ["raise ValueError('now')"])
    failed, log = go(chain)
    assert failed == 2 and ran(log) == ["08_all"]
    assert not (chain / "artifacts/tiny/02_second/results.json").exists()


def test_wrong_arguments_are_one_line(chain, capsys):
    assert runner.main(["--root", str(chain), "--only", "9"]) == 2
    assert capsys.readouterr().err.startswith("error: no notebook starts with '9'")
    (chain / "params/tiny/00_alone.yaml").write_text("profile: paper\n")
    assert go(chain, only="00")[0] == 1
    assert "write 'profile: tiny'" in status(chain, "00_alone")["error"]


def test_only_an_earlier_notebook_can_be_needed(tmp_path):
    for wanted in ("00_none", "02_b"):
        throwaway.write(tmp_path, "01_a", after=[wanted])
        throwaway.write(tmp_path, "02_b")
        with pytest.raises(InputError, match=f"01_a.ipynb: no earlier notebook '{wanted}'"):
            runner.order(tmp_path)


def test_kernel_is_this_interpreter_and_folders_are_given(tmp_path):
    cells = ["import os, sys\n\nopen(os.environ['MMSAE_ARTIFACTS'] + '/who', 'w').write(sys.executable)"]
    throwaway.write(tmp_path, "01_a", cells)
    assert go(tmp_path, artifacts=tmp_path / "a", reports=tmp_path / "r")[0] == 0
    assert os.path.samefile((tmp_path / "a/who").read_text(), runner.sys.executable)
    assert (tmp_path / "r/tiny/01_a.html").is_file() and not (tmp_path / "artifacts").exists()


def test_input_changed_during_the_run_stays_out_of_date(tmp_path):
    late = f"open({str(tmp_path / 'params/tiny/01_a.yaml')!r}, 'a').write('# later\\n')"
    throwaway.write(tmp_path, "01_a", [late])
    assert ran(go(tmp_path)[1]) == ["01_a"]
    assert ran(go(tmp_path)[1]) == ["01_a"]


def test_a_feature_browser_follows_its_notebook(tmp_path):
    write = "(run.folder / 'browser').mkdir()\n(run.folder / 'browser/index.html').write_text('<!--back-->{}')"
    throwaway.write(tmp_path, "03_sae", [write.format("one")])
    page, index = tmp_path / "reports/tiny/03_sae_browser/index.html", tmp_path / "reports/tiny/index.html"
    go(tmp_path)
    assert page.read_text() == '<a href="../03_sae.html">← the report</a>one'
    assert 'href="03_sae_browser/index.html"' in index.read_text()
    before = page.stat().st_mtime_ns
    go(tmp_path)
    assert page.stat().st_mtime_ns == before
    page.unlink()
    _, log = go(tmp_path)
    assert ran(log) == [] and page.is_file()
    throwaway.write(tmp_path, "03_sae", [write.format("two")])
    go(tmp_path)
    assert page.read_text().endswith("two")
    throwaway.write(tmp_path, "03_sae", ["print('no browser any more')"])
    assert go(tmp_path)[0] == 0
    assert not page.parent.exists() and "03_sae_browser" not in index.read_text()
