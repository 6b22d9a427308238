"""What a notebook found, written where the ledger and the tests read it."""

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

from mmsae_helpers import __version__, files
from mmsae_helpers.errors import InputError
from mmsae_helpers.suite.claims import Claim, definitions
from mmsae_helpers.suite.observations import Interval, Observations
from mmsae_helpers.suite.parameters import check, defaults, repo_root

PACKAGES = ("torch", "transformers", "sae-lens", "datasets", "scikit-learn", "numpy", "scipy")


class Run:
    """One run of one notebook: its checked parameters, its folders, its metrics and claims.

    ``namespace`` is ``globals()`` of the notebook right after its parameters cell. Attributes: ``parameters``,
    ``profile``; ``folder`` artifacts/<profile>/<notebook>; ``cache`` and ``saes``, shared within a profile.
    """

    def __init__(self, notebook, namespace):
        expected = defaults(repo_root() / "notebooks" / f"{notebook}.ipynb")
        if missing := [name for name in expected if name not in namespace]:
            raise InputError(f"{notebook}: parameter '{missing[0]}' is not defined; run the parameters cell first")
        injected = [text for text in namespace.get("In", []) if text.startswith("# Parameters\n")]  # by papermill
        given = re.findall(r"^(\w+) = ", injected[-1] if injected else "", re.M)
        self.parameters = check({name: namespace[name] for name in [*expected, *given]}, expected, notebook)
        self.notebook, self.profile = notebook, self.parameters.get("profile", "tiny")
        if not re.fullmatch(r"[\w-]+", self.profile):
            raise InputError(f"{notebook}: profile '{self.profile}' names a folder; use letters, digits, - and _")
        base = artifacts_root() / self.profile
        self.folder, self.cache, self.saes = base / notebook, base / "cache", base / "saes"
        self.folder.mkdir(parents=True, exist_ok=True)
        not_asked = self.parameters.get("not_asked", {})
        if unknown := set(not_asked) - set(definitions()):
            raise InputError(f"{notebook}: not_asked names {sorted(unknown)}; claims are {', '.join(definitions())}")
        self._claims = {id: Claim(id, why) for id, why in not_asked.items()}
        self._metrics, self._started = {}, time.time()

    def metric(self, name, value, n=None, unit=""):
        """Record a number (or an `Interval`); again under the same name replaces it."""
        ci = None
        if isinstance(value, Interval):
            value, ci, n = value.value, None if value.lo is None else [value.lo, value.hi], value.n
        self._metrics[name] = {"value": value, "ci": ci, "n": n, "unit": unit}

    def metrics(self, prefix, values, unit="", by=()):
        """`metric` for each of ``values`` {what: number or `Interval`}, named prefix_what in letters, digits and _.

        Of `Observations` it records the interval at each combination of the levels of the factors ``by``.
        """
        if isinstance(values, Observations):
            values, unit = values.ci(by) if by else {"": values.ci()}, unit or values.unit
        for what, value in values.items():
            what = "_".join(map(str, what)) if isinstance(what, tuple) else what
            self.metric(re.sub(r"\W+", "_", f"{prefix}_{what}").strip("_"), value, unit=unit)

    def claim(self, id):
        """What this run says about a claim of claims.yaml: a `Claim` to give effects to, the same one each time.

        Parameter ``not_asked`` {id: why} names those that the run's models cannot decide; they are not saved.
        """
        return self._claims.setdefault(id, Claim(id))

    def save(self):
        """Write ``results.json`` into the run's folder, whole or not at all."""
        path = self.folder / "results.json"
        content = {
            "notebook": self.notebook,
            "profile": self.profile,
            "parameters": self.parameters,
            "metrics": self._metrics,
            "claims": [claim.as_dict() for claim in self._claims.values() if not claim.not_asked],
            "provenance": provenance(self.parameters, self._started),
        }
        text = json.dumps(content, default=lambda item: item.tolist() if hasattr(item, "tolist") else str(item))
        content = json.loads(text, parse_constant=lambda _: None)  # not-a-number and infinities are null
        files.write(path, (json.dumps(content, indent=1) + "\n").encode())


def artifacts_root():
    """``MMSAE_ARTIFACTS`` if set, else ``artifacts/`` of the repository."""
    return Path(os.environ.get("MMSAE_ARTIFACTS") or repo_root() / "artifacts")


def provenance(parameters, started):
    """What a result came from: versions, revision, device, seeds, UTC start, seconds."""
    versions = {"python": platform.python_version(), "mmsae": __version__}
    return {
        "versions": versions | {package: version(package) for package in PACKAGES},
        "revision": revision(repo_root()),
        "platform": platform.platform(),
        **_machine(parameters.get("device", "auto")),
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


def _machine(asked):
    """Device, the type that the CPU multiplies fast and its instructions, on which the last digits of a result hang; a
    notebook that never imported torch ran on the CPU."""
    torch = sys.modules.get("torch")  # which takes seconds to import
    if torch is None:
        return {"device": "cpu"}
    from mmsae_helpers.workers import products

    on_cpu = asked == "cpu" or not torch.cuda.is_available()
    instructions = torch.backends.cpu.get_cpu_capability() + " AMX" * torch.cpu._is_amx_tile_supported()
    where = "cpu" if on_cpu else f"{asked} ({torch.cuda.get_device_name(0)})"
    return {"device": where, "products": products(), "instructions": instructions}


def ledger(profile):
    """What the runs of a profile say about every claim: a list of (definition, what `Claim.as_dict` gave, notebook).

    A claim that no notebook speaks to stands there once, with None and "".
    """
    paths = sorted((artifacts_root() / profile).glob("*/results.json"))
    said = [(path.parent.name, c) for path in paths for c in json.loads(path.read_text(encoding="utf-8"))["claims"]]
    return [
        (about, found, name)
        for id, about in definitions().items()
        for name, found in [(name, c) for name, c in said if c["id"] == id] or [("", None)]
    ]


def ledger_table(entries):
    """A `ledger` as a data frame of text: both verdicts, effect with its unit and the threshold that decides, the same
    less its control, what varied, what can be told here, and the verdicts of the definition before (``explored``)."""
    import pandas as pd

    rows = []
    for about, said, name in entries:
        stated, beyond = (said or {}).get("as_stated"), (said or {}).get("beyond_control")
        told = [f"{Interval.told(one)} ({one['null'] + 0.0:.3g})" for one in (stated, beyond) if one]
        effect = f"{'; less control '.join(told)} {about.unit}".replace(", ", ",\xa0") if told else ""
        row = {"claim": f"{about.id} {about.says}", "as stated": stated["verdict"] if stated else "not run"}
        row["beyond control"] = beyond["verdict"] if beyond else "no control" if stated else "not run"
        row |= {"effect": effect, "varied": stated["varied"] if stated else "", "this world can tell": about.decides}
        former = about.history[-1] if about.history else {}
        row["explored"] = " / ".join(former[way] for way in ("verdict", "beyond") if way in former)
        rows.append(row | {"notebook": name})
    return pd.DataFrame(rows)


def sae_table(profile):
    """The trained SAEs that a profile's runs measured (metrics ``sparsity``), and how sparse, faithful and alive they
    are, as a data frame of text."""
    import pandas as pd

    measures = {"L0_d_model": "L0 / d_model", "explained_variance": "explained variance"}
    measures |= {"share_of_features_alive": "share of features alive"}
    rows = {}
    for path in sorted((artifacts_root() / profile).glob("*/results.json")):
        read = json.loads(path.read_text(encoding="utf-8"))
        number, architecture = path.parent.name.split("_")[0], read["parameters"].get("architecture", "standard")
        for name, metric in read["metrics"].items():
            named = re.fullmatch(rf"sparsity_({'|'.join(measures)})_?(.*)", name)
            if named and not {"matched", "even"} & {*name.split("_")}:
                which = re.sub(r"^(?!.*block)(.*?)_?(\d+)$", r"\1_block_\2", named[2]).strip("_").replace("_", " ")
                row = {"notebook": number, "SAEs": which, "architecture": architecture, "seeds": metric["n"]}
                rows.setdefault((number, which), row)[measures[named[1]]] = f"{metric['value']:.3g}"
    columns = ["notebook", "SAEs", "architecture", "seeds", *measures.values()]
    return pd.DataFrame(rows.values(), columns=columns).fillna("")


def to_markdown(frame):
    """A data frame of text as a Markdown table; what would be markup in a cell is escaped."""

    def cell(value):
        return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", " ")

    lines = [[cell(name) for name in frame.columns], ["---"] * frame.shape[1]]
    lines += [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
