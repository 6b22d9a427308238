"""Runs the notebooks that are out of date and renders their reports: ``python -m mmsae_helpers.runner``.

Heavy imports stay inside functions: a run with nothing to do takes well under a second of Python.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from doit.dependency import DatabaseException, Dependency, JsonDB
from doit.task import Task
from doit.tools import config_changed

from . import parameters
from .errors import InputError

PACKAGE = Path(__file__).resolve().parent
PRESENTATION = ("runner.py", "reports.py")  # change how a result is shown, never what it is


class Plan(NamedTuple):
    """Where a run reads and writes, and what it runs."""

    root: Path
    profile: str
    artifacts: Path
    reports: Path

    def notebook(self, name):
        return self.root / "notebooks" / f"{name}.ipynb"

    def params(self, name):
        return self.root / "params" / self.profile / f"{name}.yaml"

    def result(self, name):
        return self.artifacts / self.profile / name / "results.json"

    def status(self, name):
        return self.artifacts / self.profile / name / "run.json"

    def executed(self, name):
        return self.reports / self.profile / f"{name}.ipynb"

    def html(self, name):
        return self.reports / self.profile / f"{name}.html"


class Store:
    """doit's file-hash database, written after every success so that a killed run loses nothing."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.db = Dependency(JsonDB, str(path))
        except DatabaseException:  # cut off while being written: everything counts as out of date
            path.unlink()
            self.db = Dependency(JsonDB, str(path))

    def fresh(self, task):
        task.seen = {path: os.stat(path).st_mtime_ns for path in task.file_dep}
        return self.db.get_status(task, {}).status == "up-to-date"

    def done(self, task):
        """Remember a success, unless an input changed since `fresh` was asked: it is out of date again."""
        if all(os.path.exists(path) and os.stat(path).st_mtime_ns == seen for path, seen in task.seen.items()):
            task.save_extra_values()
            self.db.save_success(task)
            self.db.backend.dump()


def order(root):
    """Notebooks in running order: name -> (names it needs, True if it runs without them too).

    ``metadata.mmsae.after`` of a notebook lists the notebooks it needs; ``["*"]`` is all others, and then it runs even
    if one of them failed (the ledger shows what is not there).
    """
    names = sorted(path.stem for path in (root / "notebooks").glob("[0-9]*.ipynb"))
    if not names:
        raise InputError(f"{root / 'notebooks'}: no notebooks; give the repository's root with --root")
    needs = {}
    for name in names:
        metadata = parameters.read_notebook(root / "notebooks" / f"{name}.ipynb")["metadata"]
        after = metadata.get("mmsae", {}).get("after", [])
        if missing := set(after) - {*names, "*"}:
            raise InputError(f"{name}.ipynb: there is no '{min(missing)}'; mend its metadata.mmsae.after")
        needs[name] = ([n for n in names if n != name], True) if after == ["*"] else (after, False)
    ordered = {}
    while waiting := [name for name in needs if name not in ordered]:
        ready = [name for name in waiting if set(needs[name][0]) <= set(ordered)]
        if not ready:
            raise InputError(f"notebooks {', '.join(waiting)} wait for each other; mend metadata.mmsae.after")
        ordered[ready[0]] = needs[ready[0]]
    return ordered


def select(needs, only):
    """Names to run: all, or those whose name starts with a word of ``only``, and what these need."""
    words = re.split(r"[\s,]+", only.strip()) if only and only.strip() else []
    if unknown := [w for w in words if not any(name.startswith(w) for name in needs)]:
        raise InputError(f"no notebook starts with '{unknown[0]}'; there are {', '.join(sorted(needs))}")
    wanted = {name for name in needs if not words or any(name.startswith(w) for w in words)}
    for name in reversed(needs):
        needed, alone = needs[name]
        if name in wanted and not alone:
            wanted.update(needed)
    return [name for name in needs if name in wanted]


def execution_task(plan, name, needed):
    """What puts a notebook's results out of date: its cells, parameters, the package, pins, upstream."""
    cells = parameters.read_notebook(plan.notebook(name))["cells"]
    sources = [(c["cell_type"], parameters.source(c), c["metadata"].get("tags", [])) for c in cells]
    package = [p for p in PACKAGE.rglob("*") if p.is_file() and p.name not in PRESENTATION]
    package = [p for p in package if "__pycache__" not in p.parts and "report_template" not in p.parts]
    inputs = [plan.params(name), plan.root / "constraints.txt", *map(plan.result, needed), *package]
    cells_sha = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    return _task(name, inputs, [plan.result(name), plan.executed(name)], cells_sha)


def _task(name, inputs, targets, config):
    """A doit task that is out of date when a file or ``config`` changed or a target is gone."""
    files, targets = ([str(p) for p in paths] for paths in (filter(Path.is_file, inputs), targets))
    return Task(name, None, file_dep=files, targets=targets, uptodate=[config_changed(config)])


def run(root=None, profile="tiny", only="", single=False, artifacts=None, reports=None, out=sys.stdout):
    """Run what is out of date, render what changed, write the index page; returns how many notebooks did not complete.

    ``only``: first letters of notebook names ("03", "01,02"); what they need runs too if it is out of date. ``single``
    also writes each report as one self-contained file. ``artifacts`` and ``reports`` are in ``root`` by default.
    """
    root = Path(root or parameters.repo_root()).resolve()
    folders = [Path(artifacts or root / "artifacts").resolve(), Path(reports or root / "reports").resolve()]
    plan = Plan(root, profile, *folders)
    if not (root / "params" / profile).is_dir():
        known = ", ".join(sorted(p.name for p in (root / "params").iterdir() if p.is_dir()))
        raise InputError(f"PROFILE={profile}: no folder params/{profile}; there are {known}")
    needs = order(root)
    store = Store(plan.artifacts / profile / ".doit.json")
    plan.executed("x").parent.mkdir(parents=True, exist_ok=True)
    begun, ran, bad = time.time(), 0, {}
    chosen = select(needs, only)
    for k, name in enumerate(chosen, 1):
        needed, alone = needs[name]
        blocked = [] if alone else [n for n in needed if n in bad]
        task = execution_task(plan, name, needed)
        if blocked:
            plan.result(name).unlink(missing_ok=True)  # of a former run: it would be taken for this one's
            bad[name] = _record(plan, name, "skipped", error=f"needs {', '.join(blocked)}, which did not complete")
            print(f"[{k}/{len(chosen)}] {name}: skipped, {bad[name]['error']}", file=out, flush=True)
        elif not store.fresh(task):
            ran += 1
            status = execute(plan, name, f"[{k}/{len(chosen)}] {name}", out)
            if status["status"] == "ok":
                store.done(task)
            else:
                bad[name] = status
        _render(plan, store, name, single)
    index = plan.reports / profile / "index.html"
    _render_index(plan, store, sorted(needs), index)
    summary = f"{ran} of {len(chosen)} notebooks run" if ran or bad else f"{len(chosen)} notebooks up to date"
    print(f"{summary}, {len(bad)} failed, {_clock(time.time() - begun)}. {index}", file=out, flush=True)
    for name, status in bad.items():
        print(f"  {name}: {status['status']}: {status['error']}", file=out, flush=True)
    return len(bad)


def execute(plan, name, title, out):
    """Execute one notebook in a fresh kernel of this Python; returns its status, also in ``run.json``."""
    import papermill

    plan.result(name).unlink(missing_ok=True)
    plan.executed(name).unlink(missing_ok=True)
    progress = Progress(title, out)
    try:
        cells = parameters.read_notebook(plan.notebook(name))["cells"]
        values = parameters.load(plan.params(name), plan.notebook(name))
        profile = (parameters.defaults(plan.notebook(name)) | values).get("profile")
        if profile != plan.profile:
            raise InputError(f"{plan.params(name)}: says profile '{profile}'; write 'profile: {plan.profile}'")
        progress.total = sum(c["cell_type"] == "code" for c in cells) + bool(values)  # papermill adds one
        notebook = papermill.execute_notebook(
            plan.notebook(name),
            plan.executed(name),
            values,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=plan.notebook(name).parent,
            kernel_manager_class=_kernel_manager(plan),
            coalesce_streams=True,
            store_widget_state=False,
            on_cell_start=progress.cell,
            stderr_file=progress,
        )
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for i, cell in enumerate(code, 1):
            if cell.metadata.get("papermill", {}).get("status") != "completed":
                trace = [line for o in cell.outputs for line in o.get("traceback", [])]
                raise Stopped(f"code cell {i} of {len(code)} ended the notebook with sys.exit", "\n".join(trace))
        if not plan.result(name).is_file():
            raise Stopped("ended without results.json; its last cell must call run.save()")
    except Exception as error:
        plan.result(name).unlink(missing_ok=True)
        status = _record(plan, name, "failed", progress.begun, *_explain(error, progress))
    else:
        status = _record(plan, name, "ok", progress.begun)
    progress.end(status)
    return status


class Stopped(RuntimeError):
    """A notebook that came to no good end without raising: what happened, and where there is one a traceback."""


def _explain(error, progress):
    """One line and a traceback for the index page and the terminal."""
    if isinstance(error, InputError | Stopped):
        return error.args
    if type(error).__name__ == "DeadKernelError":
        short = f"the kernel died in code cell {progress.at} of {progress.total} (killed, out of memory, or os._exit)"
        return short, f"DeadKernelError: {error}\nin the cell\n\n{progress.source}"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return (lines[-1] if lines else repr(error)), str(error)


class Progress:
    """Terminal lines of one notebook: cell, elapsed, and on a terminal the last line of its stderr (tqdm)."""

    def __init__(self, title, out):
        self.title, self.out, self.begun = title, out, time.time()
        self.total, self.at, self.source, self.live = 0, 0, "", out.isatty()

    def cell(self, cell, cell_index):
        if cell.cell_type == "code":
            self.at, self.source = self.at + 1, cell.source
            self._show("")

    def write(self, text):
        if self.live and (tail := [line for line in re.split(r"[\r\n]", text) if line.strip()]):
            self._show(tail[-1].strip())

    def flush(self):
        pass

    def _show(self, extra):
        line = f"{self.title}: cell {self.at}/{self.total}, {_clock(time.time() - self.begun)}"
        if self.live:
            width = os.get_terminal_size(self.out.fileno()).columns
            print(f"\r\x1b[K{f'{line}  {extra}'[: width - 1]}", end="", file=self.out, flush=True)
        else:
            print(line, file=self.out, flush=True)

    def end(self, status):
        line = f"{self.title}: {status['status']} in {_clock(time.time() - self.begun)}"
        error = f": {status['error']}" if status["error"] else ""
        print(("\r\x1b[K" if self.live else "") + line + error, file=self.out, flush=True)


def _kernel_manager(plan):
    """Kernel manager class that starts this interpreter, whatever kernels the machine has registered."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    env = {
        "MMSAE_ROOT": str(plan.root),
        "MMSAE_ARTIFACTS": str(plan.artifacts),
        "MMSAE_REPORTS": str(plan.reports),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=command, env=env, language="python")

    class ThisPython(AsyncKernelManager):
        kernel_spec = property(lambda self: spec)
        transport = "tcp" if os.name == "nt" else "ipc"  # sockets only this user can read

    return ThisPython


def _record(plan, name, status, started=None, error="", trace=""):
    """Write and return the outcome of a notebook."""
    now = time.time()
    content = {"status": status, "started": started or now, "duration_s": round(now - (started or now), 1)}
    content |= {"error": error, "traceback": trace}
    path = plan.status(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return content


def _render(plan, store, name, single):
    """Render a notebook's report if it is older than what it shows."""
    source = plan.executed(name)
    if not source.is_file():
        plan.html(name).unlink(missing_ok=True)
        return
    for whole in (False, True)[: 1 + single]:
        page = plan.html(name).with_suffix(".single.html" if whole else ".html")
        task = _page_task([source, plan.status(name), plan.result(name)], page)
        if not store.fresh(task):
            from . import reports

            reports.render(source, page, _load(plan.result(name)), _load(plan.status(name)), single=whole)
            store.done(task)


def _render_index(plan, store, names, page):
    inputs = [p(name) for name in names for p in (plan.status, plan.result, plan.html)]
    task = _page_task(inputs, page, names)
    if not store.fresh(task):
        from . import reports, results

        entries = []
        for name in names:
            source = plan.executed(name) if plan.executed(name).is_file() else plan.notebook(name)
            has_page = plan.html(name).is_file()
            entries.append(reports.Entry(name, source, has_page, _load(plan.status(name)), _load(plan.result(name))))
        reports.render_index(entries, plan.profile, results.revision(plan.root), page)
        store.done(task)


def _page_task(inputs, page, names=()):
    inputs = [*inputs, PACKAGE / "reports.py", *(PACKAGE / "report_template").iterdir()]
    return _task(page.name, inputs, [page], " ".join(names))


def _load(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def main(argv=None):
    """Command line; returns the exit status: 0, 1 when a notebook failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m mmsae_helpers.runner", description=run.__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with notebooks/ and params/ (default: this repository)")
    parser.add_argument("--profile", default="tiny", help="folder of params/ (default: tiny)")
    parser.add_argument("--only", default="", help="first letters of notebook names, as in 03 or 01,02")
    parser.add_argument("--single", action="store_true", help="also write each report as one self-contained HTML file")
    args = parser.parse_args(argv)
    try:
        return 1 if run(**vars(args)) else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
