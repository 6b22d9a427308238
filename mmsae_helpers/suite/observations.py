"""Repeated measurements as one tidy table, contrasts between them, and intervals.

One row a measurement: ``value``, ``seed``, perhaps ``sample`` (an image), and the factors that it was taken at (arm,
block, ...). A thin layer over pandas: what pairs, what is averaged, and what varies is said by the columns' names.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # quantiles of Student's t: scipy.stats takes a second to import

from mmsae_helpers.errors import InputError

REPEATS = ("seed", "sample")  # what an interval is over


class Interval(NamedTuple):
    """An estimate, the ends of its confidence interval (None for a single repetition), repetitions."""

    value: float
    lo: float | None
    hi: float | None
    n: int

    def __str__(self):
        value, *ends = (round(x, 12) + 0.0 for x in self[:3] if x is not None)  # 0, not what rounding left of it
        return f"{value:.3g}" + (" [{:.3g}, {:.3g}]".format(*ends) if ends else "")

    @classmethod
    def told(cls, effect: Mapping) -> Interval:
        """The interval of an effect as `claims.Claim.as_dict` has it."""
        return cls(effect["effect"], *(effect["ci"] or (None, None)), effect["n"])

    def exp(self) -> Interval:
        """Of logarithms, the interval of their values' geometric mean."""
        return Interval(*(None if x is None else float(np.exp(x)) for x in self[:3]), self.n)

    def at(self, level: float) -> Interval:
        """The interval at another confidence level than .95: its sides scaled as those of a t-interval over n."""
        if self.lo is None:
            return self
        wider = stdtrit(self.n - 1, (1 + level) / 2) / stdtrit(self.n - 1, 0.975)
        ends = (self.value + wider * (end - self.value) for end in (self.lo, self.hi))
        return Interval(self.value, *map(float, ends), self.n)


def mean_ci(values, level=0.95):
    """Mean over repetitions with its t-interval; lo and hi are None for a single one."""
    values = np.asarray(values, dtype=float).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise InputError(f"mean_ci needs finite numbers, one per seed, got {values.tolist()}")
    if values.size == 1:
        return Interval(float(values[0]), None, None, 1)
    half = stdtrit(values.size - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(values.size)
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half), values.size)


def share_ci(hits, level=0.95):
    """Share of ``hits`` (0 or 1 each) with Wilson's interval, which does not shrink to a point where all are alike."""
    from scipy.stats import binomtest

    hits = np.asarray(hits)
    ends = binomtest(int(hits.sum()), hits.size).proportion_ci(level, "wilson")
    return Interval(float(hits.mean()), float(ends.low), float(ends.high), hits.size)


def bootstrap_ci(values, statistic=np.mean, seed=0, level=0.95, resamples=2000):
    """``statistic`` of ``values`` (resampled along the first axis) with its percentile bootstrap interval."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(values)), float(lo), float(hi), len(values))


def crossed_ci(values, level=0.95, resamples=2000):
    """Mean of ``values`` [seeds, samples] with its percentile bootstrap interval, of seeds and samples both.

    n is the number of samples.
    """
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    n_seeds, n = values.shape
    draws = []
    for _ in range(resamples):
        samples = rng.integers(0, n, n)
        draws.append(values[rng.integers(0, n_seeds, n_seeds)][:, samples].mean())
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(lo), float(hi), n)


def redrawn_ci(values, level=0.95):
    """Mean of ``values`` [seeds, draws], each draw a bootstrap sample of the images, the same for every seed, with a
    t-interval over seeds to whose variance that over the draws is added; n is the number of seeds."""
    over_seeds, over_draws = (np.asarray(values, float).mean(axis) for axis in (1, 0))
    alone = mean_ci(over_seeds, level)
    if alone.lo is None:
        return alone
    half = np.hypot(alone.hi - alone.value, stdtrit(alone.n - 1, (1 + level) / 2) * over_draws.std(ddof=1))
    return Interval(alone.value, float(alone.value - half), float(alone.value + half), alone.n)


class Observations:
    """A tidy table of measurements and their ``unit``.

    ``rows``: a data frame (or list of dicts) with columns ``seed``, ``value`` and any factors; or a mapping from keys
    (tuples, named by ``names`` in one string) to values, where an array becomes one row a ``sample``.
    Raises InputError without a seed column, for a value that is not finite, and for a measurement given twice.
    """

    def __init__(self, rows, names: str = "", unit: str = ""):
        if isinstance(rows, Mapping):
            rows = _from_mapping(rows, names.split())
        frame = pd.DataFrame(rows).reset_index(drop=True)
        if missing := [column for column in ("seed", "value") if column not in frame]:
            raise InputError(f"observations have no column '{missing[0]}'; they have {', '.join(map(str, frame))}")
        bad = ~np.isfinite(frame["value"].to_numpy(float))
        if bad.any() or not len(frame):
            where = _say(frame.drop(columns="value").iloc[bad.argmax()]) if len(frame) else "there is none"
            raise InputError(f"observations: {bad.sum()} of {len(frame)} values are not finite ({where})")
        if (twice := frame.duplicated([c for c in frame if c != "value"])).any():
            where = _say(frame.drop(columns="value").iloc[twice.to_numpy().argmax()])
            raise InputError(f"observations: {where} is measured twice; name what differs in a column of its own")
        self.frame, self.unit = frame, unit

    @property
    def factors(self) -> list[str]:
        """The columns that are neither the value nor what is repeated."""
        return [c for c in self.frame if c not in ("value", *REPEATS)]

    @property
    def varied(self) -> str:
        """What the interval is over, in words: "5 seeds", or "3 seeds × 150 samples"."""
        counts = [(self.frame[c].nunique(), c) for c in REPEATS if c in self.frame]
        return " × ".join(f"{n:,} {what}{'s' * (n > 1)}" for n, what in counts)

    def where(self, **levels) -> Observations:
        """The rows at ``levels`` {factor: value, or list of values}; a factor held at one value is dropped.

        Raises InputError for a factor or a level that is not there.
        """
        frame = self.frame
        for factor, level in levels.items():
            if factor not in frame:
                raise InputError(f"observations have no factor '{factor}'; they have {', '.join(self.factors)}")
            wanted = level if isinstance(level, list | tuple | set | range) else [level]
            if missing := [one for one in wanted if not (frame[factor] == one).any()]:
                known = ", ".join(map(str, frame[factor].unique()[:12]))
                raise InputError(f"observations: {factor} has no {missing[0]!r}; it has {known}")
            frame = frame[frame[factor].isin(list(wanted))]
            if not isinstance(level, list | tuple | set | range):
                frame = frame.drop(columns=factor)
        return Observations(frame, unit=self.unit)

    def log(self) -> Observations:
        """The natural logarithms of the values. Raises InputError where one is not positive."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._at(self.frame.assign(value=np.log(self.frame["value"])))

    def mean(self, *factors: str) -> Observations:
        """Averaged over ``factors``, every combination of the others counting once."""
        return self._reduced(factors, lambda values: values.mean())

    def largest(self, *factors: str) -> Observations:
        """The largest value over ``factors``: the strictest of several controls."""
        return self._reduced(factors, lambda values: values.max())

    def _reduced(self, factors, how) -> Observations:
        keys = [c for c in self.frame if c not in ("value", *factors)]
        return Observations(how(self.frame.groupby(keys, sort=False)["value"]).reset_index(), unit=self.unit)

    def slope(self, factor: str, values: Mapping | None = None) -> Observations:
        """Least-squares slope of the value over the levels of ``factor`` (as numbers, or as ``values`` maps them)."""

        def fit(part: pd.DataFrame) -> float:
            x = part[factor].map(values) if values else part[factor].astype(float)
            x = x - x.mean()
            return float((x * part["value"]).sum() / (x * x).sum())

        keys = [c for c in self.frame if c not in ("value", factor)]
        rows = [
            {**dict(zip(keys, key, strict=True)), "value": fit(part)}
            for key, part in self.frame.groupby(keys, sort=False)
        ]
        return Observations(rows, unit=self.unit)

    def ci(self, by=(), level: float = 0.95):
        """`Interval` over seeds (t), or over seeds and samples (both resampled), of the mean over all factors; of what
        is 0 or 1 at one seed, over samples (Wilson).

        ``by`` (a factor or several): a Series of intervals, one a combination of their levels.
        """
        if by:
            by = [by] if isinstance(by, str) else list(by)
            parts = self.frame.groupby(by[0] if len(by) == 1 else by, sort=False)
            return pd.Series({k: self._at(part).ci(level=level) for k, part in parts}, dtype=object).rename_axis(by)
        if "sample" not in self.frame:
            return mean_ci(self.frame.groupby("seed")["value"].mean(), level)
        wide = self.frame.pivot_table(index="seed", columns="sample", values="value")
        if wide.isna().any(axis=None):
            raise InputError(f"observations: sample {wide.columns[wide.isna().any()][0]} is not measured at every seed")
        yes_or_no = len(wide) == 1 and np.isin(wide, (0, 1)).all()
        return share_ci(wide.to_numpy()[0], level) if yes_or_no else crossed_ci(wide.to_numpy(), level=level)

    def _at(self, frame) -> Observations:
        return Observations(frame, unit=self.unit)

    def table(self, rows, columns=None) -> pd.DataFrame:
        """Intervals as text to three digits by the factors ``rows`` and ``columns``, their levels in the order of the
        measurements, the unit in the head; what is not there is empty."""
        by = [*([rows] if isinstance(rows, str) else rows), *([columns] if isinstance(columns, str) else columns or [])]
        place = {c: {level: i for i, level in enumerate(self.frame[c].unique())} for c in by}
        said = self.ci(by).map(str).sort_index(key=lambda levels: levels.map(place[levels.name]))
        if not columns:
            return said.to_frame(self.unit or "value")
        wide = said.unstack(columns, fill_value="", sort=False)
        first, *others = wide.columns.names
        return wide.rename_axis(columns=[f"{self.unit} · {first}" if self.unit else first, *others])

    def _paired(self, other, how) -> Observations:
        if not isinstance(other, Observations):
            return self._at(self.frame.assign(value=how(self.frame["value"], other)))
        keys = [c for c in self.frame if c in other.frame and c != "value"]
        extra = [[c for c in one.frame if c not in ("value", *keys)] for one in (self, other)]
        if all(extra):
            raise InputError(
                f"contrast: one side has {', '.join(extra[0])}, the other {', '.join(extra[1])}; choose or average"
            )
        left, right = (one.frame.set_index(keys) for one in (self, other))
        for a, b in ((left, right), (right, left)):
            if len(alone := a.index.difference(b.index)):
                where = _say(pd.Series(np.atleast_1d(np.array(alone[0], dtype=object)), keys))
                raise InputError(
                    f"contrast: {where} is measured on one side only; both need the same {', '.join(keys)}"
                )
        both = left.join(right, lsuffix="", rsuffix="_other", how="inner").reset_index()
        both["value"] = how(both["value"], both.pop("value_other"))
        return self._at(both)

    def __sub__(self, other):
        return self._paired(other, operator.sub)

    def __add__(self, other):
        return self._paired(other, operator.add)

    def __truediv__(self, other):
        return self._paired(other, operator.truediv)

    def __mul__(self, factor):
        return self._paired(factor, operator.mul)

    def __rsub__(self, number):
        return self._paired(number, lambda x, y: y - x)


def contrast(a: Observations, b: Observations) -> Observations:
    """``a`` less ``b``, paired by all they share: seeds, samples, blocks, ...

    A side without a factor that the other has counts for each of its levels. Raises InputError where a pair is
    incomplete (a seed that one side lacks), or where each side has a factor that the other lacks.
    """
    return a - b


def _from_mapping(values: Mapping[Hashable, object], names: list[str]) -> pd.DataFrame:
    keys = [key if isinstance(key, tuple) else (key,) for key in values]
    if wrong := [key for key in keys if len(key) != len(names)]:
        raise InputError(f"observations: key {wrong[0]} has {len(wrong[0])} parts, but names are '{' '.join(names)}'")
    arrays = [np.atleast_1d(np.asarray(value, float)) for value in values.values()]
    frame = pd.DataFrame(keys, columns=names).loc[np.repeat(np.arange(len(keys)), [a.size for a in arrays])]
    if any(np.ndim(value) for value in values.values()):
        frame["sample"] = np.concatenate([np.arange(a.size) for a in arrays])
    return frame.assign(value=np.concatenate(arrays) if arrays else [])


def _say(row: pd.Series) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())
