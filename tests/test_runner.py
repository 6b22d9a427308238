import copy
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis
import nbformat
import psutil
import pytest
import throwaway
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import results, runner


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
    throwaway.write(tmp_path, "01_first", ["# First", "run.metric('y', 2)"])
    parameters = 'profile = "tiny"\nlr = 0.1'
    throwaway.write(tmp_path, "02_second", ["# Second"], parameters, ["01_first"])
    throwaway.write(tmp_path, "08_all", ["# All"], after=["*"])
    return tmp_path


def test_only_what_is_out_of_date_runs(chain):
    failed, log = go(chain)
    assert failed == 0 and ran(log) == ["00_alone", "01_first", "02_second", "08_all"]
    assert (chain / "reports/tiny/index.html").is_file()
    lines = [line for line in log.splitlines() if "02_second" in line]
    assert lines[0] == "[3/4] 02_second: begun" and ": ok in" in lines[1] and len(lines) == 2 and "\r" not in log

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


def test_a_terminal_shows_the_cell(chain):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    assert runner.run(chain, only="00", out=terminal) == 0
    assert "cell 3/" in terminal.getvalue() and "begun" not in terminal.getvalue()


def test_only_and_missing_results(chain):
    assert ran(go(chain, only="02")[1]) == ["01_first", "02_second"]
    assert ran(go(chain, only="00,02")[1]) == ["00_alone"]
    (chain / "artifacts/tiny/01_first/results.json").unlink()
    assert ran(go(chain, only="02")[1]) == ["01_first", "02_second"]
    with pytest.raises(InputError, match="no notebook starts with '07'"):
        go(chain, only="07")
    for profile in ("none", "../params/tiny", "", "tiny/", ".", ".."):
        with pytest.raises(InputError, match=f"no folder params/{profile}; there are tiny"):
            go(chain, profile=profile)


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


WAITING = """import os, time
from pathlib import Path

(run.folder / "seen").write_text(f"{os.getpid()} {sorted(os.listdir())}")
(run.folder / "seen").rename(run.folder / "begun")
while not Path("../go").exists():
    time.sleep(0.05)"""


@pytest.fixture
def waiting(tmp_path):
    """A root whose notebook 01 waits for the file ``go``, and a function (profile) that starts a runner there."""
    throwaway.write(tmp_path, "00_before", ["print('once')"])
    throwaway.write(tmp_path, "01_slow", [WAITING])
    temporary = tempfile.mkdtemp(prefix="t-")
    begun = []

    def start(profile="tiny", hangup=signal.SIG_DFL):
        command = [sys.executable, "-m", "mmsae_helpers.suite.runner", "--root", tmp_path, "--profile", profile]
        environment = os.environ | {"TMPDIR": temporary, "PYTHONPATH": str(runner.PACKAGE.parent)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        inherited = {signal.SIGINT: signal.SIG_DFL, signal.SIGHUP: hangup}  # whatever these tests run under
        before = {number: signal.signal(number, action) for number, action in inherited.items()}
        begun.append(subprocess.Popen(command, env=environment, **pipes))
        for number, action in before.items():
            signal.signal(number, action)
        seen = tmp_path / f"artifacts/{profile}/01_slow/begun"
        while not seen.exists():
            assert begun[-1].poll() is None, begun[-1].communicate()
            time.sleep(0.05)
        pid, listing = seen.read_text().split(" ", 1)
        assert listing == "['00_before.ipynb', '01_slow.ipynb']", "nothing is written beside the sources"
        return begun[-1], int(pid), Path(temporary)

    yield tmp_path, start
    for process in begun:
        process.kill()
        process.communicate()
    shutil.rmtree(temporary)


def test_runs_of_two_profiles_do_not_meet_and_one_profile_runs_once(waiting):
    root, start = waiting
    shutil.copytree(root / "params/tiny", root / "params/other")
    for path in (root / "params/other").iterdir():
        path.write_text("profile: other\n")
    (one, *_), (other, *_) = start(), start("other")
    with pytest.raises(InputError) as caught:
        go(root)
    says = rf"profile tiny is being run by process {one.pid} on \S+ since [-0-9]+ [:0-9]+; wait .* kill"
    assert re.fullmatch(says, str(caught.value))
    (root / "go").touch()
    for process in (one, other):
        out, err = process.communicate()
        assert process.returncode == 0 and "2 of 2 notebooks run, 0 failed" in out and err == "", err
    assert "up to date" in go(root)[1]


def test_what_an_ending_kernel_finds_closed_is_not_the_readers_business(tmp_path, capfd):
    late = "logging.getLogger('tornado.general').error('Uncaught exception in ZMQStream callback')"
    said = [
        "import atexit, logging, sys",
        "logging.basicConfig(stream=sys.__stderr__)",
        f"atexit.register(lambda: {late})",
    ]
    throwaway.write(tmp_path, "00_alone", ["\n".join([*said, "logging.getLogger('mine').error('to be seen')"])])
    assert go(tmp_path)[0] == 0
    seen = capfd.readouterr()
    assert "ZMQStream" not in seen.out + seen.err and "to be seen" in seen.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_ended_run_leaves_nothing_and_a_rerun_continues(waiting, number):
    root, start = waiting
    process, kernel, temporary = start()
    assert len(list(temporary.glob("mmsae-*/*"))) > 5, "connection file and sockets"
    process.send_signal(number)
    out, err = process.communicate()
    while psutil.pid_exists(kernel) and psutil.Process(kernel).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert sorted(os.listdir(root / "notebooks")) == ["00_before.ipynb", "01_slow.ipynb"]
    found = status(root, "01_slow")
    assert found["status"] == "interrupted" and not (root / "artifacts/tiny/01_slow/results.json").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 130 and not list(temporary.glob("mmsae-*"))
        assert err == "interrupted: 01_slow in code cell 4; the same command continues\n"
        index = (root / "reports/tiny/index.html").read_text()
        assert index.count("✓ done") == 1 and found["error"] == "in code cell 4"
    (root / "go").touch()
    assert ran(go(root)[1]) == ["01_slow"]


def test_nohup_keeps_its_meaning(waiting):
    root, start = waiting
    process, *_ = start(hangup=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    (root / "go").touch()
    assert process.wait() == 0


@pytest.mark.parametrize("kind", ["reports", "artifacts"])
def test_a_folder_that_cannot_be_written_is_one_line(chain, capsys, monkeypatch, kind):
    (chain / kind).write_text("in the way")
    assert runner.main(["--root", str(chain), "--only", "00"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {chain / kind}") and "MMSAE_REPORTS" in err and "MMSAE_ARTIFACTS" in err
    assert err.count("\n") == 1
    monkeypatch.setenv(f"MMSAE_{kind.upper()}", str(chain / "elsewhere"))
    assert runner.main(["--root", str(chain), "--only", "00"]) == 0
    assert (chain / "elsewhere/tiny").is_dir()


def test_what_a_full_disk_cut_off_is_made_anew(chain, monkeypatch):
    go(chain, only="00")
    page, executed = chain / "reports/tiny/00_alone.html", chain / "reports/tiny/00_alone.ipynb"
    executed.write_text(executed.read_text()[:300])
    page.unlink()
    assert go(chain, only="00")[0] == 0 and not executed.is_file() and not page.is_file()
    failed, log = go(chain, only="00")
    assert failed == 0 and ran(log) == ["00_alone"] and page.is_file()


def test_a_page_is_written_whole_or_not_at_all(chain, monkeypatch, capsys):
    go(chain, only="00")
    page = chain / "reports/tiny/00_alone.html"
    whole = page.read_text()
    (chain / "reports/tiny/00_alone.ipynb").touch()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mmsae_helpers.files.os.fsync", full)
        assert runner.main(["--root", str(chain), "--only", "00"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: disk full") and "make room" in err and err.count("\n") == 1
    assert page.read_text() == whole and not list(page.parent.glob("*.tmp-*"))


def test_the_committed_ledger_is_renewed_by_its_own_step_alone(chain, capsys):
    throwaway.write(chain, "08_all", ["(run.folder / 'ledger.md').write_text('new')"], after=["*"])
    committed = chain / "reports/tiny_ledger.md"
    committed.parent.mkdir()
    committed.write_text("old")
    renew = ["--root", str(chain), "--ledger"]
    for only in ("08", "00"):
        go(chain, only=only)
        assert runner.main(renew) == 2 and committed.read_text() == "old"
    assert "error: 01_first has not run or is out of date" in capsys.readouterr().err
    go(chain)
    assert committed.read_text() == "old"
    assert runner.main(renew) == 0 and committed.read_text() == "new"
    committed.write_text("old")
    (chain / "params/tiny/02_second.yaml").write_text("profile: tiny\nlr: 0.2\n")
    assert runner.main(renew) == 2 and committed.read_text() == "old"
    throwaway.write(chain, "08_all", after=["*"])
    (chain / "artifacts/tiny/08_all/ledger.md").unlink()
    go(chain)
    assert runner.main(renew) == 2 and "08_all, the last notebook, wrote no" in capsys.readouterr().err


def test_a_broken_notebook_fails_alone_and_a_copy_is_passed_over(chain):
    good = (chain / "notebooks/00_alone.ipynb").read_text()
    broken = {
        "03_conflict": good.replace('"cells"', '<<<<<<< HEAD\n"cells"').encode(),
        "04_empty": b"",
        "05_old": json.dumps({"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}).encode(),
        "06_utf16": good.encode("utf-16"),
        "07_list": b"[]",
    }
    for name, content in broken.items():
        throwaway.write(chain, name)
        (chain / f"notebooks/{name}.ipynb").write_bytes(content)
    (chain / "notebooks/01_first-Copy1.ipynb").write_text(good)
    (chain / "notebooks/Untitled.ipynb").write_text("")
    failed, log = go(chain)
    assert failed == len(broken) and ran(log) == ["00_alone", "01_first", "02_second", "08_all"]
    assert log.splitlines()[0].endswith(": 01_first-Copy1.ipynb, Untitled.ipynb")
    index = (chain / "reports/tiny/index.html").read_text()
    for name in broken:
        assert f"{name}.ipynb: is no notebook" in status(chain, name)["error"] and name in index
    (chain / "notebooks/03_conflict.ipynb").write_text(good.replace("00_alone", "03_conflict"))
    assert ran(go(chain, only="03")[1]) == ["03_conflict"]


def test_a_long_line_takes_linear_time(tmp_path):
    """A line of 2 MB: quadratic, it would take most of an hour."""
    throwaway.write(tmp_path, "01_long", ["print('x' * 2_000_000)\nprint('1 %\\r2 %\\r\\n3 %\\r4 %')"])
    assert go(tmp_path)[0] == 0
    executed = nbformat.read(tmp_path / "reports/tiny/01_long.ipynb", 4)
    (text,) = [o.text for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    assert text == "x" * 2_000_000 + "\n2 %\r\n4 %\n"


@hypothesis.given(hypothesis.strategies.text("ab\r\n"))
def test_the_linear_pattern_removes_what_theirs_does(text):
    assert re.sub(runner.OVERWRITTEN, "", text) == re.sub(r".*\r(?=[^\n])", "", text)


def test_plain_papermill_refuses_a_misspelt_parameter(tmp_path, monkeypatch):
    """It warns and goes on with the default; `Run` sees the cell that it put in."""
    throwaway.write(tmp_path, "01_a", parameters='profile = "tiny"\nrates = [0.1]')
    monkeypatch.setenv("MMSAE_ROOT", str(tmp_path))
    notebook = load_notebook_node(str(tmp_path / "notebooks/01_a.ipynb"))
    for names, says in (["rate"], "unknown parameter 'rate'; did you mean 'rates'"), (["rates"], None):
        values = dict.fromkeys(names, [0.5] * 60)
        cells = parameterize_notebook(copy.deepcopy(notebook), values, kernel_name="python3", language="python").cells
        cells = [cell.source for cell in cells[:2]]
        namespace = {"In": ["", *cells]}
        exec("\n".join(cells), namespace)
        if says:
            with pytest.raises(InputError, match=says):
                results.Run("01_a", namespace)
        else:
            assert results.Run("01_a", namespace).parameters["rates"] == [0.5] * 60


def test_a_notebook_without_parameters_takes_no_part_in_a_profile(chain):
    shutil.copytree(chain / "params/tiny", chain / "params/real")
    for path in (chain / "params/real").iterdir():
        path.write_text("profile: real\n")
    (chain / "params/real/00_alone.yaml").unlink()
    failed, said = go(chain, profile="real")
    assert not failed and ran(said) == ["01_first", "02_second", "08_all"]
    assert "not in params/real: 00_alone.ipynb" in said
    assert "00_alone" not in (chain / "reports/real/index.html").read_text()
    with pytest.raises(
        InputError, match="no parameter file in params/real for '00'; there are 01_first, 02_second, 08_all"
    ):
        go(chain, profile="real", only="00")
