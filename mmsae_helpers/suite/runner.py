"""Runs the notebooks that are out of date and renders their reports: ``python -m mmsae_helpers.suite.runner``.

Heavy imports stay inside functions: a run with nothing to do takes well under a second of Python.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mmsae_helpers.errors import InputError

from . import parameters

PACKAGE = Path(__file__).resolve().parents[1]
PRESENTATION = {"runner.py", "reports.py", "report_template", "__pycache__"}  # how a result is shown, not what it is


ANSI = r"\x1b\[[0-9;]*m"


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

    def result(self, name):
        return self.artifacts / self.profile / name / "results.json"

    def status(self, name):
        return self.artifacts / self.profile / name / "run.json"

    def executed(self, name):
        return self.reports / self.profile / f"{name}.ipynb"

    def made_browser(self, name):
        return self.result(name).with_name("browser") / "index.html"

    def browser(self, name):
        return self.reports / self.profile / f"{name}_browser" / "index.html"

    def outcome(self, name):
        """Contents of run.json and results.json, empty where there is none or it was cut off while being written."""
        found = []
        for path in (self.status(name), self.result(name)):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except (FileNotFoundError, ValueError):
                found.append({})
        return found


def order(root):
    """Notebooks in running order, that of their numbers: name -> (names it needs, True if it runs without them too).

    ``metadata.mmsae.after`` of a notebook lists the earlier notebooks it needs; ``["*"]`` is all of them, and then it
    runs even if one of them failed (the ledger shows what is not there).
    """
    needs = {}
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
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


def digest(files, *more):
    """SHA-256 over the names and contents of those ``files`` that are there, and over JSON values."""
    sha = hashlib.sha256(json.dumps(more).encode())
    for path in filter(Path.is_file, files):
        with open(path, "rb") as file:
            sha.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return sha.hexdigest()


def run(root=None, profile="tiny", only="", single=False, artifacts=None, reports=None, out=sys.stdout):
    """Run what is out of date, render what changed, write the index page; returns how many notebooks did not complete.

    ``only``: first letters of notebook names ("03", "01,02"); what they need runs too if it is out of date. ``single``
    also writes each report as one self-contained file. ``artifacts`` and ``reports`` are in ``root`` by default.
    A notebook is out of date when its cells, parameters, the results it needs, the package or the pins are not those
    of its last good run, whose ``digest`` is in its ``run.json``.
    """
    root = Path(root or parameters.repo_root()).resolve()
    folders = [Path(artifacts or root / "artifacts").resolve(), Path(reports or root / "reports").resolve()]
    plan = Plan(root, profile, *folders)
    if not (root / "params" / profile).is_dir():
        known = ", ".join(sorted(p.name for p in (root / "params").iterdir() if p.is_dir()))
        raise InputError(f"PROFILE={profile}: no folder params/{profile}; there are {known}")
    needs = order(root)
    chosen = select(needs, only)
    plan.executed("x").parent.mkdir(parents=True, exist_ok=True)
    package = digest(p for p in sorted(PACKAGE.rglob("*")) if not PRESENTATION & set(p.relative_to(PACKAGE).parts))
    begun, ran, bad = time.time(), 0, {}
    for k, name in enumerate(chosen, 1):
        needed, alone = needs[name]
        cells = parameters.read_notebook(plan.notebook(name))["cells"]
        cells = [(c["cell_type"], parameters.source(c), c["metadata"].get("tags", [])) for c in cells]
        inputs = digest([plan.params(name), root / "constraints.txt", *map(plan.result, needed)], cells, package)
        status, title = plan.outcome(name)[0], f"[{k}/{len(chosen)}] {name}"
        if blocked := [n for n in needed if n in bad and not alone]:
            plan.result(name).unlink(missing_ok=True)  # of a former run: it would be taken for this one's
            status = _record(plan, name, "skipped", f"needs {', '.join(blocked)}, which did not complete")
            print(f"{title}: skipped, {status['error']}", file=out, flush=True)
        elif status.get("inputs") != inputs or not (plan.result(name).is_file() and plan.executed(name).is_file()):
            ran += 1
            status = execute(plan, name, inputs, title, out)
        if status["status"] != "ok":
            bad[name] = status
        _render(plan, name, single)
    index = plan.reports / profile / "index.html"
    _render_index(plan, needs, index)
    summary = f"{ran} of {len(chosen)} notebooks run" if ran or bad else f"{len(chosen)} notebooks up to date"
    print(f"{summary}, {len(bad)} failed, {time.time() - begun:.0f} s. {index}", file=out, flush=True)
    for name, status in bad.items():
        print(f"  {name}: {status['status']}: {status['error']}", file=out, flush=True)
    return len(bad)


class Stopped(RuntimeError):
    """A notebook that came to no good end without raising: what happened, and where there is one a traceback."""


def execute(plan, name, inputs, title, out):
    """Execute one notebook in a fresh kernel of this Python; returns its status, also in ``run.json``.

    A terminal ``out`` shows cell, elapsed time, and the notebook's own progress bars.
    """
    plan.result(name).unlink(missing_ok=True)
    plan.executed(name).unlink(missing_ok=True)
    shutil.rmtree(plan.made_browser(name).parent, ignore_errors=True)
    begun, reached = time.time(), []
    try:
        _execute(plan, name, title, out, reached)
        status = _record(plan, name, "ok", begun=begun, inputs=inputs)
    except Exception as error:
        plan.result(name).unlink(missing_ok=True)
        status = _record(plan, name, "failed", *_explain(error, reached), begun=begun)
    seconds, error = status["duration_s"], status["error"] and f": {status['error']}"
    print(f"{title}: {status['status']} in {seconds:.0f} s{error}", file=out, flush=True)
    return status


def _execute(plan, name, title, out, reached):
    """Run a notebook or raise; ``reached`` is filled with the sources of the code cells that began."""
    import papermill

    values = parameters.load(plan.params(name), plan.notebook(name))
    profile = (parameters.defaults(plan.notebook(name)) | values).get("profile")
    if profile != plan.profile:
        raise InputError(f"{plan.params(name)}: says profile '{profile}'; write 'profile: {plan.profile}'")
    bar = {"desc": title, "bar_format": "{desc}: cell {n}/{total}, {elapsed}", "mininterval": 0, "leave": False}
    notebook = papermill.execute_notebook(
        plan.notebook(name),
        plan.executed(name),
        values,
        kernel_name="python3",
        language="python",
        progress_bar={**bar, "file": out},
        cwd=plan.notebook(name).parent,
        kernel_manager_class=_kernel_manager(plan),
        coalesce_streams=True,
        store_widget_state=False,
        on_cell_execute=lambda cell, cell_index: reached.append(cell.source),
        stderr_file=out if out.isatty() else None,
    )
    for i, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        if cell.metadata.get("papermill", {}).get("status") != "completed":
            trace = [line for output in cell.outputs for line in output.get("traceback", [])]
            raise Stopped(f"code cell {i} ended the notebook with sys.exit", "\n".join(trace))
    if not plan.result(name).is_file():
        raise Stopped("ended without results.json; its last cell must call run.save()")


def _explain(error, reached):
    """One line and a traceback for the index page and the terminal."""
    if isinstance(error, InputError | Stopped):
        return error.args
    if type(error).__name__ == "DeadKernelError":
        short = f"the kernel died in code cell {len(reached)} (killed, out of memory, or os._exit)"
        return short, f"DeadKernelError: {error}\nin the cell\n\n{reached[-1] if reached else ''}"
    lines = re.sub(ANSI, "", str(error)).strip().splitlines()
    return (lines[-1] if lines else repr(error)), str(error)


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
        transport = "ipc"  # sockets only this user can read

    return ThisPython


def _record(plan, name, status, error="", trace="", begun=None, inputs=None):
    """Write and return the outcome of a notebook."""
    seconds = round(time.time() - begun, 1) if begun else 0.0
    trace = re.sub(ANSI, "", trace).strip()
    content = {"status": status, "duration_s": seconds, "error": error, "traceback": trace, "inputs": inputs}
    plan.status(name).parent.mkdir(parents=True, exist_ok=True)
    plan.status(name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return content


def _render(plan, name, single):
    """Render a notebook's report, and copy the feature browser it may have written, where older than what it shows."""
    if not (plan.made_browser(name).is_file() and plan.result(name).is_file()):
        shutil.rmtree(plan.browser(name).parent, ignore_errors=True)
    elif _older(plan.browser(name), [plan.made_browser(name)]):
        from . import reports

        reports.place_browser(plan.made_browser(name).parent, plan.browser(name).parent, name)
    source = plan.executed(name)
    if not source.is_file():
        source.with_suffix(".html").unlink(missing_ok=True)
        return
    for whole in (False, True)[: 1 + single]:
        page = source.with_suffix(".single.html" if whole else ".html")
        if _older(page, [source, plan.status(name), plan.result(name)]):
            from . import reports

            reports.render(source, page, *plan.outcome(name), single=whole)


def _render_index(plan, names, page):
    shown = {name: plan.executed(name).with_suffix(".html") for name in names}
    inputs = [[plan.status(name), plan.result(name), shown[name], plan.browser(name)] for name in names]
    if _older(page, [plan.root / "notebooks", *sum(inputs, [])]):
        from . import reports

        reports.render_index(plan, names, page)


def _older(page, inputs):
    """Whether ``page`` is missing or older than one of ``inputs`` or the code that renders it."""
    inputs = [*inputs, PACKAGE / "suite" / "reports.py", *(PACKAGE / "suite" / "report_template").iterdir()]
    newest = max(path.stat().st_mtime_ns for path in inputs if path.exists())
    return not page.is_file() or page.stat().st_mtime_ns < newest


def main(argv=None):
    """Command line; returns the exit status: 0, 1 when a notebook failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m mmsae_helpers.suite.runner", description=run.__doc__.splitlines()[0]
    )
    parser.add_argument("--root", help="folder with notebooks/ and params/ (default: this repository)")
    parser.add_argument("--profile", default="tiny", help="folder of params/ (default: tiny)")
    parser.add_argument("--only", default="", help="first letters of notebook names, as in 03 or 01,02")
    parser.add_argument("--single", action="store_true", help="also write each report as one self-contained HTML file")
    try:
        return 1 if run(**vars(parser.parse_args(argv))) else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
