"""Runs the notebooks that are out of date and renders their reports: ``python -m mmsae_helpers.suite.runner``.

Heavy imports stay inside functions: a run with nothing to do takes well under a second of Python.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mmsae_helpers import files
from mmsae_helpers.errors import InputError

from . import parameters

PACKAGE = Path(__file__).resolve().parents[1]
PRESENTATION = {"runner.py", "reports.py", "report_template", "__pycache__"}  # how a result is shown, not what it is
ANSI = r"\x1b\[[0-9;]*m"
OVERWRITTEN = re.compile(r"^.*\r(?=[^\n])", re.M)  # what a progress bar printed over


class Plan(NamedTuple):
    """Where a run reads and writes."""

    root: Path
    profile: str
    artifacts: Path
    reports: Path

    def notebook(self, name):
        return self.root / "notebooks" / f"{name}.ipynb"

    def params(self, name):
        return self.root / "params" / self.profile / f"{name}.yaml"

    def made(self, name, file="results.json"):
        return self.artifacts / self.profile / name / file

    def executed(self, name):
        return self.reports / self.profile / f"{name}.ipynb"

    def browser(self, name):
        return self.reports / self.profile / f"{name}_browser" / "index.html"

    def outcome(self, name):
        """Contents of run.json and results.json, empty where there is none or it was cut off while being written."""
        found = []
        for path in (self.made(name, "run.json"), self.made(name)):
            found.append({})
            with contextlib.suppress(FileNotFoundError, ValueError):
                found[-1] = json.loads(path.read_text(encoding="utf-8"))
        return found


def order(root):
    """Notebooks in running order, that of their numbers: name -> (names it needs, True if it runs without them too).

    ``metadata.mmsae.after`` of a notebook lists the earlier notebooks it needs; ``["*"]`` is all of them, and then it
    runs even if one of them failed (the ledger shows what is not there). JupyterLab's copies, no 01_name, are left out.
    """
    needs = {}
    for path in sorted(path for path in (root / "notebooks").glob("*.ipynb") if re.fullmatch(r"\d\w*", path.stem)):
        after = []
        with contextlib.suppress(InputError):  # one that cannot be read fails when its turn comes
            after = parameters.read_notebook(path)["metadata"].get("mmsae", {}).get("after", [])
        if unknown := set(after) - {*needs, "*"}:
            raise InputError(f"{path.name}: no earlier notebook '{min(unknown)}'; mend its metadata.mmsae.after")
        needs[path.stem] = (list(needs), True) if after == ["*"] else (after, False)
    if not needs:
        raise InputError(f"{root / 'notebooks'}: no notebooks; give the repository's root with --root")
    return needs


def select(needs, only):
    """Names to run: all, or those whose name starts with a word of ``only``, and what these need."""
    words = re.findall(r"[^\s,]+", only) or [""]
    if unknown := [w for w in words if not any(name.startswith(w) for name in needs)]:
        raise InputError(f"no notebook starts with '{unknown[0]}'; there are {', '.join(needs)}")
    wanted = {name for name in needs if name.startswith(tuple(words))}
    for name, (needed, alone) in reversed(needs.items()):
        if name in wanted and not alone:
            wanted.update(needed)
    return [name for name in needs if name in wanted]


def of_profile(needs, root, profile):
    """Of notebooks as in `order`, those that the profile has a parameter file for: the others take no part in it.
    `InputError` for a profile that is not there."""
    if profile not in (known := parameters.profiles(root)):
        raise InputError(f"PROFILE={profile}: no folder params/{profile}; there are {', '.join(known)}")
    return {name: need for name, need in needs.items() if (root / "params" / profile / f"{name}.yaml").is_file()}


def digest(paths, *more):
    """SHA-256 over the names and contents of those files ``paths`` that are there, and over JSON values."""
    found = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths if path.is_file()]
    return hashlib.sha256(json.dumps([found, more]).encode()).hexdigest()


def _lock(plan):
    """Make the profile's folders; returns an open file that keeps other runs of the profile out until it is closed."""
    try:
        for path in (plan.executed("run"), lock := plan.artifacts / plan.profile / "run.lock"):
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        file = open(lock, "a+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        way = "wait until that ends, or end it there with kill"
        raise InputError(f"profile {plan.profile} is being run by process {file.read()}; {way}") from None
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; give other MMSAE_ARTIFACTS, MMSAE_REPORTS") from None
    file.truncate(0)
    print(os.getpid(), "on", os.uname().nodename, time.strftime("since %F %T"), file=file, end="", flush=True)
    return file


def run(root=None, profile="tiny", only="", single=False, ledger=False, artifacts=None, reports=None, out=sys.stdout):
    """Run what is out of date, render what changed, write the index page; returns how many notebooks did not complete.

    ``only``: first letters of notebook names ("03", "01,02"); what they need runs too if it is out of date. ``single``
    also writes each report as one self-contained file. ``ledger`` runs nothing: it copies ``ledger.md`` of the last
    notebook to reports/<profile>_ledger.md, which is committed; `InputError` where anything is out of date.
    ``artifacts`` and ``reports`` are MMSAE_ARTIFACTS and MMSAE_REPORTS, else in ``root``. A notebook is out of date
    when its cells, parameters, the results it needs, the package or the pins are not those of its last good run, whose
    ``digest`` is in its ``run.json``. `InputError` where another run holds the profile.
    """
    root = Path(root or parameters.repo_root()).resolve()
    needs = order(root)
    chosen = select(needs, "" if ledger else only)
    needs = of_profile(needs, root, profile)
    given = {"artifacts": artifacts, "reports": reports}
    folders = [Path(path or os.environ.get(f"MMSAE_{k.upper()}") or root / k).resolve() for k, path in given.items()]
    plan = Plan(root, profile, *folders)
    if not (chosen := [name for name in chosen if name in needs]):
        raise InputError(f"no parameter file in params/{profile} for '{only}'; there are {', '.join(needs) or 'none'}")
    with _lock(plan):
        return _run(plan, needs, chosen, single, ledger, out)


def _run(plan, needs, chosen, single, ledger, out):
    if strays := sorted(p.name for p in (plan.root / "notebooks").glob("*.ipynb") if p.stem not in needs):
        why = f"not named as in 01_name, or not in params/{plan.profile}"
        print(f"passed over, {why}: {', '.join(strays)}", file=out, flush=True)
    package = digest(p for p in sorted(PACKAGE.rglob("*")) if not PRESENTATION & set(p.relative_to(PACKAGE).parts))
    begun, ran, bad = time.time(), 0, {}
    for k, name in enumerate(chosen, 1):
        needed, alone = needs[name]
        cells = []
        with contextlib.suppress(InputError):
            cells = parameters.read_notebook(plan.notebook(name))["cells"]
        cells = [(c["cell_type"], parameters.source(c), c["metadata"].get("tags", [])) for c in cells]
        inputs = digest([plan.params(name), plan.root / "constraints.txt", *map(plan.made, needed)], cells, package)
        status, title = plan.outcome(name)[0], f"[{k}/{len(chosen)}] {name}"
        stale = status.get("inputs") != inputs or not (plan.made(name).is_file() and plan.executed(name).is_file())
        if stale and ledger:
            raise InputError(f"{name} has not run or is out of date; first 'make reports PROFILE={plan.profile}'")
        if blocked := [n for n in needed if n in bad and not alone]:
            plan.made(name).unlink(missing_ok=True)  # of a former run: it would be taken for this one's
            status = _record(plan, name, "skipped", f"needs {', '.join(blocked)}, which did not complete")
        elif stale:
            ran += 1
            status = execute(plan, name, inputs, title, out)
        _render(plan, name, single)
        if status["status"] == "interrupted":
            break
        if status["status"] != "ok":
            bad[name] = status
        if blocked or stale:
            said = f"{status['status']} in {status['duration_s']:.0f} s{status['error'] and ': ' + status['error']}"
            print(f"{title}: {said}", file=out, flush=True)
    index = plan.reports / plan.profile / "index.html"
    shown = [
        (plan.made(n, "run.json"), plan.made(n), plan.executed(n).with_suffix(".html"), plan.browser(n)) for n in needs
    ]
    _renew(index, [plan.root / "notebooks", *sum(shown, ())], "render_index", plan, needs, index)
    if status["status"] == "interrupted":  # said last: a closed terminal takes no more lines
        raise KeyboardInterrupt(f"{name} {status['error']}")
    summary = f"{ran} of {len(chosen)} notebooks run" if ran or bad else f"{len(chosen)} notebooks up to date"
    print(f"{summary}, {len(bad)} failed, {time.time() - begun:.0f} s. {index}", file=out, flush=True)
    for name, status in bad.items():
        print(f"  {name}: {status['status']}: {status['error']}", file=out, flush=True)
    if ledger:
        if not (made := plan.made(name, "ledger.md")).is_file():
            raise InputError(f"{name}, the last notebook, wrote no ledger.md")
        print(shutil.copyfile(made, plan.reports / f"{plan.profile}_ledger.md"), file=out, flush=True)
    return len(bad)


def execute(plan, name, inputs, title, out):
    """Execute one notebook in a fresh kernel of this Python; returns its status, also in ``run.json``."""
    _record(plan, name, "interrupted", "began and did not end")  # stays where the runner is killed
    plan.made(name).unlink(missing_ok=True)
    plan.executed(name).unlink(missing_ok=True)
    shutil.rmtree(plan.made(name, "browser"), ignore_errors=True)
    begun, reached = time.time(), []
    try:
        values = parameters.load(plan.params(name), plan.notebook(name))
        if (profile := (parameters.defaults(plan.notebook(name)) | values).get("profile")) != plan.profile:
            raise InputError(f"{plan.params(name)}: says profile '{profile}'; write 'profile: {plan.profile}'")
        _execute(plan, name, values, title, out, reached)
        return _record(plan, name, "ok", begun=begun, inputs=inputs)
    except (Exception, KeyboardInterrupt) as error:
        plan.made(name).unlink(missing_ok=True)
        said = "failed" if isinstance(error, Exception) else "interrupted"
        return _record(plan, name, said, *_explain(error, reached), begun=begun)


def _execute(plan, name, values, title, out, reached):
    """Run a notebook or raise; ``reached`` is filled with the sources of the code cells that began."""
    import nbclient.client
    import papermill

    nbclient.client._RGX_CARRIAGERETURN = OVERWRITTEN  # theirs lacks the ^ and takes quadratic time in a long line
    shown = {"kernel_name": "python3", "language": "python", "coalesce_streams": True, "store_widget_state": False}
    shown |= {"progress_bar": False, "on_cell_execute": lambda cell, cell_index: reached.append(cell.source)}
    if out.isatty():
        bar = {"desc": title, "bar_format": "{desc}: cell {n}/{total}, {elapsed}", "mininterval": 0, "leave": False}
        shown |= {"progress_bar": {**bar, "file": out}, "stderr_file": out}
    else:
        print(f"{title}: begun", file=out, flush=True)
    short = "/tmp" if len(tempfile.gettempdir()) > 70 else None  # a socket's path has at most 107 characters
    with tempfile.TemporaryDirectory(prefix="mmsae-", dir=short, ignore_cleanup_errors=True) as sockets:
        shown |= {"kernel_manager_class": _kernel_manager(plan, sockets), "cwd": plan.notebook(name).parent}
        notebook = papermill.execute_notebook(plan.notebook(name), plan.executed(name), values, **shown)
    for i, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        if cell.metadata.get("papermill", {}).get("status") != "completed":
            trace = [line for output in cell.outputs for line in output.get("traceback", [])]
            raise InputError(f"code cell {i} ended the notebook with sys.exit", re.sub(ANSI, "", "\n".join(trace)))
    if not plan.made(name).is_file():
        raise InputError("ended without results.json; its last cell must call run.save()")


def _explain(error, reached):
    """One line and a traceback for the index page and the terminal."""
    where = f"in code cell {len(reached)}" if reached else "before its first cell"
    if isinstance(error, InputError | KeyboardInterrupt):
        return error.args or (where,)
    if type(error).__name__ == "DeadKernelError":
        short = f"the kernel died {where} (killed, out of memory, or os._exit)"
        return short, f"DeadKernelError: {error}\nin the cell\n\n{reached[-1] if reached else ''}"
    text = re.sub(ANSI, "", str(error)).strip() or repr(error)
    return text.splitlines()[-1], text


def _kernel_manager(plan, folder):
    """Kernel manager that starts this interpreter, whatever the machine has registered, its sockets in ``folder``."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    env = {f"MMSAE_{name.upper()}": str(value) for name, value in plan._asdict().items()}
    env["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    # A kernel told to end may find its sockets closed, and would write that to the terminal.
    quiet = {"log_level": 50, "logging_config": {"loggers": {"tornado": {"level": "CRITICAL"}}}}
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command += [f"--IPKernelApp.{name}={value}" for name, value in quiet.items()]
    spec = KernelSpec(argv=command, env=env, language="python")
    own = {"kernel_spec": property(lambda self: spec), "connection_file": f"{folder}/kernel.json"}
    return type("ThisPython", (AsyncKernelManager,), own | {"transport": "ipc"})  # which only this user can read


def _record(plan, name, status, error="", trace="", begun=None, inputs=None):
    """Write and return the outcome of a notebook."""
    seconds = round(time.time() - begun, 1) if begun else 0.0
    content = {"status": status, "duration_s": seconds, "error": error, "traceback": trace, "inputs": inputs}
    files.write(plan.made(name, "run.json"), json.dumps(content, indent=1).encode())
    return content


def _render(plan, name, single):
    """Render a notebook's report, and copy the feature browser it may have written, where older than what it shows."""
    made, browser, source = plan.made(name, "browser/index.html"), plan.browser(name), plan.executed(name)
    if made.is_file() and plan.made(name).is_file():
        _renew(browser, [made], "place_browser", made.parent, browser.parent, name)
    else:
        shutil.rmtree(browser.parent, ignore_errors=True)
    for suffix in (".html", ".single.html")[: 1 + single]:
        page, inputs = source.with_suffix(suffix), [source, plan.made(name, "run.json"), plan.made(name)]
        if source.is_file():
            _renew(page, inputs, "render", source, page, *plan.outcome(name), suffix != ".html")
        else:
            page.unlink(missing_ok=True)


def _renew(page, inputs, function, *args):
    """Call a function of `reports` where ``page`` is missing or older than ``inputs`` or the code that renders it."""
    inputs = [*inputs, PACKAGE / "suite" / "reports.py", *(PACKAGE / "suite" / "report_template").iterdir()]
    if not page.is_file() or page.stat().st_mtime_ns < max(p.stat().st_mtime_ns for p in inputs if p.exists()):
        from . import reports

        getattr(reports, function)(*args)


def main(argv=None):
    """Command line; returns the exit status: 0, 1 when a notebook failed, 2 for bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser("python -m mmsae_helpers.suite.runner", description=run.__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with notebooks/ and params/ (default: this repository)")
    parser.add_argument("--profile", default="tiny", help="folder of params/ (default: tiny)")
    parser.add_argument("--only", default="", help="first letters of notebook names, as in 03 or 01,02")
    parser.add_argument("--single", action="store_true", help="also write each report as one self-contained HTML file")
    parser.add_argument("--ledger", action="store_true", help="run nothing: renew the committed ledger of what has run")
    try:
        return 1 if run(**vars(parser.parse_args(argv))) else 0
    except (InputError, OSError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        print(f"interrupted: {error}; the same command continues" if stopped else f"error: {error}", file=sys.stderr)
        return 130 if stopped else 2


def _stop(number, frame):
    """End the run, kernel first, in silence and once: make sends a signal twice."""
    signal.signal(number, signal.SIG_IGN)
    logging.disable()
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _stop)
    sys.exit(main())
