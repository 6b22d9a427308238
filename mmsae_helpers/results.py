"""What a notebook found, written where the ledger and the tests read it."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import parameters as _parameters
from .errors import InputError
from .parameters import repo_root

VERDICTS = ("replicated", "contradicted", "inconclusive", "not run")
PACKAGES = ("mmsae", "torch", "transformers", "sae-lens", "datasets", "scikit-learn", "numpy", "scipy")


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


_CLAIMS = """\
A1 | Retrieved features get more useful with depth | dolphin 30, 25, 88, 77, 60 % at L0, 6, 10, 12, 12-it
A2 | Text-trained features keep their meaning on image tokens | L10 dolphin: underwater animals
A3 | An SAE trained on the instruction-tuned LM works as well | 12-it: dolphin 60, skyscraper 78, boy 88
A4 | Keeping more features is better; clear drop below top-10 | sum, top-50 > top-10 > top-5 > top-3
A5 | The middle layer is best; L6 needs the larger feature sets | L10 > L6 > L17
A6 | Binarised beats raw activations, most with few features | most at top-3, top-5
A7 | Binarised middle-layer features are the most data-efficient | 1:9 split; L17 lags, gains with data
A8 | SAE features nearly recover the ViT | Macro F1: ViT .85, LLaVA .83, ResNet .75, EoI .48
A9 | It extends to ImageNet-1k | layer 6: .49
B1 | Neurons late in the decoder are clearly monosemantic | Figure 2 (block 9 of 12)
B2 | Many neurons stay polysemous | Figure 3
B3 | A larger λ gives more sparsity and monosemanticity | conjectured
B4 | The Standard Question Set separates features of question and image | proposed, not run
B5 | SAEs on every layer show how the input is transformed | proposed, not run
C1 | SAE-V reconstructs better than SAE | loss 38.3 % (MLLM), 50.6 % (LLM) of the SAE's
C2 | L0 of SAE and SAE-V | LLaVA-NeXT 94.5, 192.5; Chameleon 24,757.6, 50.1; Anole 62.1, 50.1
C3 | SAE-V transfers to the base LLM: best in every setting | Figure 4
C4 | 75 or 50 % of the patches cost almost nothing; all scores beat random | 25 %: near 70 % (Figure 6)
C5 | Filtering beats random at every proportion, full data at some | 115, 108, 120, 125 % of full data
C6 | Past a moderate proportion, more data lowers performance | Figure 7
C7 | Mean cross-modal similarity rises with capability | Figure 8
C8 | Comparable to IFD, without training another model | Figure 11
C9 | Only ~30,000 of the features ever fire | 30,000 of 65,536 and of 131,072
"""
CLAIMS = {id: Claim(text, paper) for id, text, paper in (line.split(" | ") for line in _CLAIMS.splitlines())}


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


def verdict(effect, ci, direction="greater", null=0.0):
    """Verdict on an effect from its interval ``ci`` (lo, hi); the value itself is there for the reader of the call.

    ``direction`` is the claim: the effect is "greater" than ``null``, "less", or "within" plus-minus ``null``
    (equivalence). "As good as" is "greater" with ``null`` minus the margin that would still count as equal.
    """
    if direction not in ("greater", "less", "within"):
        raise InputError(f"verdict: direction '{direction}' is none of greater, less, within")
    if ci is None or None in tuple(ci) or not np.isfinite(ci).all():
        return "inconclusive"
    lo, hi = ci
    holds, fails = {
        "greater": (lo > null, hi < null),
        "less": (hi < null, lo > null),
        "within": (-null <= lo and hi <= null, lo > null or hi < -null),
    }[direction]
    return "replicated" if holds else "contradicted" if fails else "inconclusive"


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
        root = repo_root()
        expected = _parameters.defaults(root / "notebooks" / f"{notebook}.ipynb")
        if missing := [name for name in expected if name not in namespace]:
            raise InputError(f"{notebook}: parameter '{missing[0]}' is not defined; run the parameters cell first")
        self.parameters = _parameters.check({name: namespace[name] for name in expected}, expected, notebook)
        self.notebook, self.profile = notebook, self.parameters.get("profile", "tiny")
        if not re.fullmatch(r"[\w-]+", self.profile):
            raise InputError(f"{notebook}: profile '{self.profile}' names a folder; use letters, digits, - and _")
        base = artifacts_root(root) / self.profile
        self.folder, self.cache, self.saes = base / notebook, base / "cache", base / "saes"
        self.reports = Path(os.environ.get("MMSAE_REPORTS", root / "reports"))
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
        partial = path.with_suffix(".json.part")
        partial.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)


def artifacts_root(root=None):
    """``MMSAE_ARTIFACTS`` if set, else ``artifacts/`` of the repository."""
    return Path(os.environ.get("MMSAE_ARTIFACTS") or Path(root or repo_root()) / "artifacts")


def _unpack(value, ci, n):
    if isinstance(value, Interval):
        value, ci, n = value.value, None if value.lo is None else (value.lo, value.hi), value.n
    return value, ci if ci is None else list(ci), n


def _plain(item):
    """JSON types only: numpy scalars unwrapped, not-a-number and infinities null."""
    if isinstance(item, dict):
        return {str(key): _plain(value) for key, value in item.items()}
    if isinstance(item, list | tuple | np.ndarray):
        return [_plain(value) for value in item]
    if hasattr(item, "item"):
        item = item.item()
    if isinstance(item, float) and not np.isfinite(item):
        return None
    return str(item) if isinstance(item, Path) else item


def provenance(parameters, started):
    """What a result came from: versions, revision, device, seeds, UTC start, seconds."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "revision": revision(),
        "platform": platform.platform(),
        "device": _device(parameters.get("device", "auto")),
        "seeds": parameters.get("seeds", parameters.get("seed")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "duration_s": round(time.time() - started, 1),
    }


def revision(root=None):
    """Short git revision, ``-dirty`` when tracked files differ; "unknown" outside a checkout."""
    import subprocess

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root or repo_root(), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _device(asked):
    torch = sys.modules.get("torch")  # a notebook that never imported it ran on the CPU
    if torch is None or asked == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"{asked} ({torch.cuda.get_device_name(0)})"


def read_results(profile, root=None):
    """Every ``results.json`` of a profile, by notebook name, sorted."""
    found = {}
    for path in sorted((artifacts_root(root) / profile).glob("*/results.json")):
        try:
            found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path}: not JSON; delete it and run {path.parent.name} again") from None
    return found


def ledger(profile, root=None):
    """Claims of the papers beside what the runs of a profile measured, a data frame of text.

    A row per claim and notebook that speaks to it: claim, says, paper, ours, n, verdict ("not run" where none does),
    measured, notebook.
    """
    import pandas as pd

    said = [(c, name) for name, result in read_results(profile, root).items() for c in result["claims"]]
    rows = []
    for id, claim in CLAIMS.items():
        for found, name in [(c, name) for c, name in said if c["id"] == id] or [(None, "")]:
            ours, n, verdict, note = "", "", "not run", ""
            if found:
                n, verdict, note = found["n"] or "", found["verdict"], found["note"]
                if found["effect"] is not None:
                    ours = str(Interval(found["effect"], *(found["ci"] or (None, None)), 0))
            rows.append((id, claim.text, claim.paper, ours, n, verdict, note, name))
    return pd.DataFrame(rows, columns=["claim", "says", "paper", "ours", "n", "verdict", "measured", "notebook"])


def to_markdown(frame):
    """A data frame of text as a Markdown table; what would be markup in a cell is escaped."""
    import html

    def cell(value):
        return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", " ")

    lines = [[cell(name) for name in frame.columns], ["---"] * frame.shape[1]]
    lines += [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
