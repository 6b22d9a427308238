"""What a notebook found, written where the ledger and the tests read it."""

import csv
import html
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsae_helpers import __version__
from mmsae_helpers.errors import InputError

from .parameters import check, defaults, repo_root

VERDICTS = ("replicated", "contradicted", "inconclusive", "not run")
PACKAGES = ("torch", "transformers", "sae-lens", "datasets", "scikit-learn", "numpy", "scipy")


class Claim(NamedTuple):
    """A paper's claim and the figure it prints."""

    text: str
    paper: str


class Interval(NamedTuple):
    """An estimate, the ends of its confidence interval (None for a single repetition), repetitions."""

    value: float
    lo: float | None
    hi: float | None
    n: int

    def __str__(self):
        return f"{self.value:.3g}" + ("" if self.lo is None else f" [{self.lo:.3g}, {self.hi:.3g}]")


with open(Path(__file__).with_name("claims.csv"), encoding="utf-8", newline="") as _file:
    CLAIMS = {row["id"]: Claim(row["text"], row["paper"]) for row in csv.DictReader(_file)}


def mean_ci(values, level=0.95):
    """Mean over repetitions with its t-interval; lo and hi are None for a single one."""
    from scipy import stats

    values = np.asarray(values, dtype=float).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise InputError(f"mean_ci needs finite numbers, one per seed, got {values.tolist()}")
    if values.size == 1:
        return Interval(float(values[0]), None, None, 1)
    half = stats.t.ppf((1 + level) / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half), values.size)


def bootstrap_ci(values, statistic=np.mean, seed=0, level=0.95, resamples=2000):
    """``statistic`` of ``values`` (resampled along the first axis) with its percentile bootstrap interval."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(values)), float(lo), float(hi), len(values))


def crossed_ci(plus, minus=0.0, seed=0, level=0.95, resamples=2000):
    """Mean of ``plus`` [seeds, samples] less that of ``minus``, with its percentile bootstrap interval.

    ``minus`` is a number, or [other seeds or draws, the same samples]. Samples are resampled jointly, the repetitions
    of each side on their own, so the interval covers both. n is the number of samples.
    """
    sides = [np.atleast_2d(np.asarray(side, float)) for side in (plus, minus)]
    rng, n = np.random.default_rng(seed), sides[0].shape[1]

    def mean(side, samples=slice(None), resampled=False):
        rows = rng.integers(0, len(side), len(side)) if resampled else slice(None)
        return side[rows][:, samples if side.shape[1] == n else slice(None)].mean()

    draws = []
    for _ in range(resamples):
        samples = rng.integers(0, n, n)
        draws.append(mean(sides[0], samples, True) - mean(sides[1], samples, True))
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean(sides[0]) - mean(sides[1])), float(lo), float(hi), n)


def verdict(effect, ci, direction="greater", null=0.0):
    """Verdict on an effect from its interval ``ci`` (lo, hi); the value itself is there for the reader of the call.

    ``direction`` is the claim: the effect is "greater" than ``null``, or "less". "As good as" is "greater" with
    ``null`` minus the margin that would still count as equal.
    """
    if direction not in ("greater", "less"):
        raise InputError(f"verdict: direction '{direction}' is neither greater nor less")
    if ci is None or None in tuple(ci) or not np.isfinite(ci).all():
        return "inconclusive"
    lo, hi = ci
    above, below = ("replicated", "contradicted") if direction == "greater" else ("contradicted", "replicated")
    return above if lo > null else below if hi < null else "inconclusive"


def weakest(parts):
    """Of ``parts`` {what: `Interval` of an effect that should be above 0}, the one that holds least: (what, Interval).

    A claim of several parts stands only as far as this one: an intersection-union test, without correction.
    """
    order = ("contradicted", "inconclusive", "replicated")
    said = {what: verdict(part.value, (part.lo, part.hi)) for what, part in parts.items()}
    return min(parts.items(), key=lambda item: (order.index(said[item[0]]), item[1].value))


class Run:
    """One run of one notebook: its checked parameters, its folders, its metrics and claims.

    ``namespace`` is ``globals()`` of the notebook right after its parameters cell. Attributes: ``parameters``,
    ``profile``; ``folder`` artifacts/<profile>/<notebook>; ``cache`` and ``saes``, shared within a profile;
    ``reports``, for what is committed.
    """

    def __init__(self, notebook, namespace):
        expected = defaults(repo_root() / "notebooks" / f"{notebook}.ipynb")
        if missing := [name for name in expected if name not in namespace]:
            raise InputError(f"{notebook}: parameter '{missing[0]}' is not defined; run the parameters cell first")
        self.parameters = check({name: namespace[name] for name in expected}, expected, notebook)
        self.notebook, self.profile = notebook, self.parameters.get("profile", "tiny")
        if not re.fullmatch(r"[\w-]+", self.profile):
            raise InputError(f"{notebook}: profile '{self.profile}' names a folder; use letters, digits, - and _")
        base = artifacts_root() / self.profile
        self.folder, self.cache, self.saes = base / notebook, base / "cache", base / "saes"
        self.reports = Path(os.environ.get("MMSAE_REPORTS", repo_root() / "reports"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._claims, self._started = {}, {}, time.time()

    def metric(self, name, value, ci=None, n=None, unit=""):
        """Record a number (or an `Interval`); again under the same name replaces it."""
        value, ci, n = _unpack(value, ci, n)
        self._metrics[name] = {"value": value, "ci": ci, "n": n, "unit": unit}

    def metrics(self, prefix, values, unit=""):
        """`metric` for each of ``values`` {what: number or `Interval`}, named prefix_what in letters, digits and _."""
        for what, value in values.items():
            self.metric(re.sub(r"\W+", "_", f"{prefix}_{what}"), value, unit=unit)

    def claim(self, id, verdict=None, effect=None, ci=None, n=None, note=""):
        """Record what this run says about a claim of `CLAIMS`; ``effect`` may be an `Interval`.

        ``verdict`` None takes `verdict` of the effect against 0; ``note`` says what the effect is, with its unit.
        """
        if id not in CLAIMS:
            raise InputError(f"{self.notebook}: no claim '{id}'; known are {', '.join(CLAIMS)}")
        effect, ci, n = _unpack(effect, ci, n)
        said = globals()["verdict"](effect, ci) if verdict is None else verdict
        if said not in VERDICTS:
            raise InputError(f"{self.notebook}: verdict '{said}' of {id} is none of {', '.join(VERDICTS)}")
        self._claims[id] = {"id": id, "verdict": said, "effect": effect, "ci": ci, "n": n, "note": note}

    def save(self):
        """Write ``results.json`` into the run's folder, whole or not at all."""
        path = self.folder / "results.json"
        content = {
            "notebook": self.notebook,
            "profile": self.profile,
            "parameters": self.parameters,
            "metrics": self._metrics,
            "claims": list(self._claims.values()),
            "provenance": provenance(self.parameters, self._started),
        }
        text = json.dumps(content, default=lambda item: item.tolist() if hasattr(item, "tolist") else str(item))
        content = json.loads(text, parse_constant=lambda _: None)  # not-a-number and infinities are null
        partial = path.with_suffix(".json.part")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def artifacts_root():
    """``MMSAE_ARTIFACTS`` if set, else ``artifacts/`` of the repository."""
    return Path(os.environ.get("MMSAE_ARTIFACTS") or repo_root() / "artifacts")


def _unpack(value, ci, n):
    if isinstance(value, Interval):
        value, ci, n = value.value, None if value.lo is None else (value.lo, value.hi), value.n
    return value, ci if ci is None else list(ci), n


def provenance(parameters, started):
    """What a result came from: versions, revision, device, seeds, UTC start, seconds."""
    versions = {"python": platform.python_version(), "mmsae": __version__}
    return {
        "versions": versions | {package: version(package) for package in PACKAGES},
        "revision": revision(repo_root()),
        "platform": platform.platform(),
        "device": _device(parameters.get("device", "auto")),
        "seeds": parameters.get("seeds", parameters.get("seed")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "duration_s": round(time.time() - started, 1),
    }


def revision(root):
    """Short git revision, ``-dirty`` when tracked files differ; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def _device(asked):
    torch = sys.modules.get("torch")  # a notebook that never imported it ran on the CPU
    if torch is None or asked == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"{asked} ({torch.cuda.get_device_name(0)})"


def ledger(profile):
    """Claims of the papers beside what the runs of a profile measured, a data frame of text.

    A row per claim and notebook that speaks to it: claim, says, paper, ours, n, verdict ("not run" where none does),
    measured, notebook.
    """
    import pandas as pd

    paths = sorted((artifacts_root() / profile).glob("*/results.json"))
    said = [(path.parent.name, c) for path in paths for c in json.loads(path.read_text(encoding="utf-8"))["claims"]]
    nothing = {"effect": None, "n": "", "verdict": "not run", "note": ""}
    rows = []
    for id, claim in CLAIMS.items():
        for name, found in [(name, c) for name, c in said if c["id"] == id] or [("", nothing)]:
            known = found["effect"] is not None
            ours = str(Interval(found["effect"], *(found["ci"] or (None, None)), 0)) if known else ""
            rows.append((id, *claim, ours, found["n"] or "", found["verdict"], found["note"], name))
    return pd.DataFrame(rows, columns=["claim", "says", "paper", "ours", "n", "verdict", "measured", "notebook"])


def to_markdown(frame):
    """A data frame of text as a Markdown table; what would be markup in a cell is escaped."""

    def cell(value):
        return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", " ")

    lines = [[cell(name) for name in frame.columns], ["---"] * frame.shape[1]]
    lines += [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
