"""How well an SAE fits activations, and how often its features fire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.feed import Meter


class Health(NamedTuple):
    """How well an SAE fits activations; sums go over tokens t and coordinates, x^ is the reconstruction.

    explained_variance = 1 - sum ||x_t - x^_t||^2 / sum ||x_t - mean_t x||^2
    normalised_mse = sum ||x_t - x^_t||^2 / sum ||x_t||^2
    l0: mean number of active features per token; alive: features that are ever active; mean_norm: of x_t, unscaled;
    firing_rate: share of the tokens on which each feature is active, float64 [d_sae].
    """

    l0: float
    explained_variance: float
    normalised_mse: float
    alive: int
    n_tokens: int
    mean_norm: float
    firing_rate: np.ndarray

    def numbers(self) -> dict[str, float]:
        """All but the firing rates, for a row of a table."""
        return {name: value for name, value in self._asdict().items() if name != "firing_rate"}


def sparsity(healths: Mapping[tuple, Health], d_in: int) -> dict[tuple, float]:
    """How sparse SAEs of residuals ``d_in`` wide are, what they explain, and how many of their features ever fire, by
    (measure, *key)."""
    found = {}
    for key, one in healths.items():
        found["L0 / d_model", *key], found["explained variance", *key] = one.l0 / d_in, one.explained_variance
        found["share of features alive", *key] = one.alive / len(one.firing_rate)
    return found


def at_equal_l0(ours: np.ndarray, theirs: np.ndarray) -> float:
    """ln of how many times as large the error of ``ours`` is as that of ``theirs``, where as many features are active.

    Each is [penalties, 2], the L0 and the error of SAEs that differ in their sparsity alone; their curves are linear
    between these points, both axes logarithmic, and nowhere else: the answer is the mean over the ln L0 that both
    reach, and NaN where there is none. An SAE whose features never fire is no point of a curve.
    """
    curves = []
    for points in (ours, theirs):
        points = np.array(sorted(tuple(np.log(point)) for point in points if min(point) > 0)).reshape(-1, 2)
        curves.append(points.T)
    if not all(x.size for x, _ in curves):
        return float("nan")
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if not low < high:
        return float("nan")
    at = np.unique(np.clip(np.concatenate([x for x, _ in curves]), low, high))  # every kink of either
    mine, other = (np.interp(at, x, y) for x, y in curves)
    return float(np.trapezoid(mine - other, at) / (high - low))


def published(source: str, layers: Iterable[int], d_in: int, sae_id: str) -> dict[tuple, float]:
    """What sae-lens's registry says of a release's SAEs on their own text, in measures of `sparsity`, by (measure,
    layer); nothing where ``source`` is no release, or where it says nothing (then it has L0 0 and a variance of 1)."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    found, release = {}, source != "train" and get_pretrained_saes_directory().get(source)
    for layer in layers if release else ():
        one = sae_id.format(layer=layer)
        l0, explained = release.expected_l0.get(one, 0), release.expected_var_explained.get(one, 1)
        found |= {("L0 / d_model", layer): l0 / d_in} if l0 else {}
        found |= {("explained variance", layer): explained} if explained != 1 else {}
    return found


class HealthMeter(Meter):
    """`Health` of one SAE on a stream of tokens of one modality. Raises InputError where there were none."""

    def __init__(self, sae, layer: int, scale: float = 1.0):
        super().__init__(sae, layer, scale)
        self.n = self.error = self.energy = self.norm = self.sum = 0
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.device)

    def chunk(self, raw: torch.Tensor, x: torch.Tensor, features: torch.Tensor) -> None:
        fires = features > 0
        self.fired = self.fired.to(fires.device) + fires.sum(0)
        self.n += len(x)
        self.error += (x - self.sae.decode(features)).square().sum(dtype=torch.float64)
        self.energy += x.square().sum(dtype=torch.float64)
        self.sum += x.sum(0, dtype=torch.float64)
        self.norm += raw.norm(dim=1).sum(dtype=torch.float64)

    def __add__(self, other: HealthMeter) -> HealthMeter:
        """The meter of both streams of tokens together."""
        both = HealthMeter(self.sae, self.layer, self.scale)
        for name in ("n", "error", "energy", "norm", "sum", "fired"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def result(self) -> Health:
        if not self.n:
            raise InputError(f"no tokens to evaluate the SAE of layer {self.layer} on")
        variance = self.energy - self.sum.square().sum() / self.n
        ratios = (self.fired.sum() / self.n, 1 - self.error / variance, self.error / self.energy)
        rate = self.fired.double().cpu().numpy() / self.n
        alive = int((self.fired > 0).sum())
        return Health(*map(float, ratios), alive, self.n, float(self.norm / self.n), rate)
