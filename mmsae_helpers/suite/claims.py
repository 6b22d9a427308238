"""A claim of a paper, what decides it, and what a run says about it.

All that a person needs to judge a verdict stands in ``claims.yaml``: the notebooks give effects and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import yaml

from mmsae_helpers.errors import InputError
from mmsae_helpers.suite.observations import Interval, Observations

VERDICTS = ("replicated", "contradicted", "inconclusive", "not run")
FILE = Path(__file__).with_name("claims.yaml")


@functools.cache
def definitions() -> dict[str, SimpleNamespace]:
    """The claims of ``claims.yaml`` by id, in its order.

    Each has ``id``, ``says``, ``paper``, ``section``, ``figure``, ``contrast`` (the primary effect in words), ``unit``,
    ``direction`` ("greater" or "less" than ``level``), ``margin``, ``beyond_margin``, ``control`` ("" for none),
    ``decides`` (what the embedded world can tell) and ``because``, ``sentences`` and ``beyond`` {verdict: text},
    ``version``, ``history``.
    """
    shared = {"direction": "greater", "level": 0.0, "margin": 0.0, "beyond_margin": 0.0, "control": "", "beyond": {}}
    found = yaml.load(FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {id: SimpleNamespace(id=id, **{**shared, "history": [], **about}) for id, about in found.items()}


def verdict(effect: Interval, direction: str = "greater", null: float = 0.0) -> str:
    """Verdict on an effect by its interval alone: which side of ``null`` all of it lies on."""
    if effect.lo is None or not all(map(math.isfinite, effect[:3])):
        return "inconclusive"
    above, below = ("replicated", "contradicted") if direction == "greater" else ("contradicted", "replicated")
    return above if effect.lo > null else below if effect.hi < null else "inconclusive"


class Claim:
    """What a run says about one claim; built by ``run.claim(id)``, it shows itself and goes to results.json.

    Effects are `Observations` or `Interval`s, in the claim's unit. The primary effect alone gives the two verdicts, *as
    stated*, and *beyond control*: the effect minus the control's. Parts inform, at Holm's levels. ``not_asked`` is why
    the run's models or data cannot decide it: then it shows that, and no verdict.
    """

    def __init__(self, id: str, not_asked: str = ""):
        if id not in definitions():
            raise InputError(f"there is no claim '{id}'; known are {', '.join(definitions())}")
        self.about, self.not_asked, self._primary = definitions()[id], not_asked, None
        self._parts, self._readings, self._sensitivity = {}, {}, {}

    def primary(self, effect, control=None) -> Claim:
        """The one effect that decides, and the same effect of the control. Raises InputError where given twice."""
        if self._primary:
            raise InputError(f"claim {self.about.id}: the primary effect is given twice; further ones are parts")
        if bool(self.about.control) != (control is not None):
            raise InputError(f"claim {self.about.id}: its control is '{self.about.control or 'none'}'; give that alone")
        self._primary = self._with_control(effect, control)
        return self

    def part(self, name: str, effect, control=None) -> Claim:
        """A further effect, which informs and decides nothing."""
        self._parts[name] = self._with_control(effect, control)
        return self

    def reading(self, name: str, effect) -> Claim:
        """The primary effect in another reading of the paper, as by its published code."""
        self._readings[name] = self._interval(effect)
        return self

    def sensitivity(self, name: str, effects: Mapping) -> Claim:
        """The primary effect at other values of a parameter, {value: effect}."""
        self._sensitivity[name] = {str(value): self._interval(effect) for value, effect in effects.items()}
        return self

    def as_dict(self) -> dict:
        """For results.json. Raises InputError where the primary effect was never given."""
        if not self._primary:
            raise InputError(f"claim {self.about.id}: no primary effect was given; call primary() before saving")
        about, (effect, control, beyond, varied) = self.about, self._primary
        null = about.level - about.margin if about.direction == "greater" else about.level + about.margin
        said = {"id": about.id, "version": about.version}
        said["as_stated"] = _told(effect, verdict(effect, about.direction, null), about.unit, varied) | {"null": null}
        if beyond:
            null = -about.beyond_margin if about.direction == "greater" else about.beyond_margin
            told = _told(beyond, verdict(beyond, about.direction, null), about.unit, varied)
            said["beyond_control"] = told | {"null": null, "control": _plain(control) | {"what": about.control}}
        numbers = {"effect": effect, "control": control, "beyond": beyond, "varied": varied, "unit": about.unit}
        said["sentence"] = about.sentences[said["as_stated"]["verdict"]].format(**numbers)
        if beyond:
            said["sentence"] += " " + about.beyond[said["beyond_control"]["verdict"]].format(**numbers)
        said["parts"] = self._corrected()
        said["readings"] = {name: _plain(effect) for name, effect in self._readings.items()}
        said["sensitivity"] = {
            name: {value: _plain(effect) for value, effect in by.items()} for name, by in self._sensitivity.items()
        }
        return said

    def _corrected(self) -> dict:
        """Parts, and what they are beyond their controls, each of the two families with intervals at Holm's levels."""
        effects = _holm({name: part[0] for name, part in self._parts.items()})
        beyonds = _holm({name: part[2] for name, part in self._parts.items() if part[2]})
        return {
            name: {"effect": effects[name].value, "ci_holm": _ends(effects[name]), "n": effects[name].n}
            | {"control": control and _plain(control), "beyond": beyond and _plain(beyonds[name])}
            for name, (_, control, beyond, _) in self._parts.items()
        }

    def _with_control(self, effect, control) -> tuple:
        interval = self._interval(effect)
        varied = effect.varied if isinstance(effect, Observations) else f"n = {interval.n}"
        if control is None:
            return interval, None, None, varied
        if not (isinstance(effect, Observations) and isinstance(control, Observations)):
            raise InputError(f"claim {self.about.id}: give effect and control as observations, so that they are paired")
        return interval, self._interval(control), self._interval(effect - control), varied

    def _interval(self, effect) -> Interval:
        effect = effect.ci() if isinstance(effect, Observations) else effect
        if not isinstance(effect, Interval):
            raise InputError(f"claim {self.about.id}: an effect is observations or an interval, not {effect!r}")
        if not all(math.isfinite(x) for x in effect[:3] if x is not None):
            raise InputError(
                f"claim {self.about.id}: an effect is not finite ({effect}); leave out what failed, counted"
            )
        return effect

    def _ipython_display_(self):
        if not self.not_asked:
            return show(self.as_dict())
        from IPython.display import Markdown, display

        display(Markdown(f"**{self.about.id}. {self.about.says}** Not asked here: {self.not_asked}."))


def show(said: dict) -> None:
    """A claim as `Claim.as_dict` gives it: its sentence with both verdicts, and the forest plot of what it rests on."""
    from IPython.display import Markdown, display

    from mmsae_helpers.suite import figures

    about = definitions()[said["id"]]
    display(Markdown(f"**{about.id}. {about.says}** {badges(said)}  \n{said['sentence']}"))
    figure = figures.forest(said, about)
    beside = "Rings: the control" if "beyond_control" in said else "There is no control"
    what = f"{about.contrast[:1].upper()}{about.contrast[1:]}; {said['as_stated']['varied']}, 95 % intervals"
    what += ", of parts at Holm's levels (wider, for there are many)" if len(said["parts"]) > 1 else ""
    beside += "; parts with a unit in brackets are in that unit" if any("(" in name for name in said["parts"]) else ""
    figures.caption(figure, f"{what}. Dashed: what decides. {beside}; arrows: beyond the axis.")


def story(about, said: dict | None, notebook: str = "") -> None:
    """A claim's section of the ledger: the paper's figure beside ours, why this world can tell or not, its history."""
    import pandas as pd
    from IPython.display import Markdown, display

    where = f" [{notebook}]({notebook}.ipynb)" if notebook else ""
    of = "" if about.paper == "X" else f"Paper {about.paper}, "
    display(Markdown(f"### {about.id} · {about.says}\n\n{of}{about.section}: {about.figure}.{where}"))
    if said:
        show(said)
    display(Markdown(f"Can this world tell? *{about.decides}*: {about.because}."))
    if about.history:
        former = pd.DataFrame(about.history).reindex(
            columns=["date", "definition", "verdict", "beyond", "effect", "gone"]
        )
        display(former.fillna("").style.hide(axis="index").set_caption("Former definitions").format(escape="html"))


def badges(said: dict) -> str:
    """Both verdicts in words."""
    words = f"As stated: *{said['as_stated']['verdict']}*"
    return words + (f"; beyond control: *{said['beyond_control']['verdict']}*." if "beyond_control" in said else ".")


def _holm(effects: Mapping[str, Interval]) -> dict[str, Interval]:
    """Each with its interval at Holm's level: the clearest at 1 - .05 / m, the next at 1 - .05 / (m - 1), ..."""

    def unclear(name: str) -> float:
        value, lo, hi, _ = effects[name]
        return 0.0 if lo is None else -abs(value) / max(hi - lo, 1e-300)

    order = sorted(effects, key=unclear)
    return {name: effects[name].at(1 - 0.05 / (len(order) - rank)) for rank, name in enumerate(order)}


def _ends(effect: Interval) -> list | None:
    return None if effect.lo is None else [effect.lo, effect.hi]


def _plain(effect: Interval) -> dict:
    return {"effect": effect.value, "ci": _ends(effect), "n": effect.n}


def _told(effect: Interval, said: str, unit: str, varied: str) -> dict:
    return {"verdict": said, **_plain(effect), "unit": unit, "varied": varied}
