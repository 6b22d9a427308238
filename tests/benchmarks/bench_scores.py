"""All scores of 06 together against one plain forward pass over the same samples.

    python tests/benchmarks/bench_scores.py

In turns, five times each, in one process: the ratio of the medians is the share of a plain pass's samples a second.
Scores are those of one SAE (cosine, L0, co-occurrence), loss, length, similarity and, by a second pass without the
image, what the image lowers the loss by; then the same with the SAE's control beside it, as 06 has them. Pictures are
new to the frozen tower each time.
"""

import argparse
import time
from functools import partial
from statistics import median

import numpy as np
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from mmsae_helpers import data, models
from mmsae_helpers.meters import samples

parser = argparse.ArgumentParser()
parser.add_argument("--samples", type=int, default=400)
parser.add_argument("--features", type=int, default=1024)
parser.add_argument("--batch-size", type=int, default=40)
asked = parser.parse_args()
LAYER = 4


def an_sae(acts: torch.Tensor, active: float = 0.008) -> StandardSAE:
    """Random directions, each active on this share of ``acts``."""
    sae = StandardSAE(StandardSAEConfig(d_in=acts.shape[1], d_sae=asked.features)).requires_grad_(False)
    sae.b_enc.data = -(acts @ sae.W_enc).quantile(1 - active, dim=0)
    return sae


def seconds(what) -> float:
    begin = time.perf_counter()
    what()
    return time.perf_counter() - begin


def scores(adapter, rows, saes) -> None:
    at = samples.starts(adapter, rows["question"], rows["image"])
    weights = np.ones(asked.features)
    meters = {i: samples.SampleScores(sae, LAYER, weights, at, 0.0) for i, sae in enumerate(saes)}
    samples.scored(adapter, rows, meters, at, LAYER, asked.batch_size)
    samples.answer_losses(adapter, rows, asked.batch_size, after="question")


def plain(adapter, rows) -> None:
    for _ in samples.passing(adapter, rows, [LAYER], asked.batch_size, see=lambda *_: None):
        pass


for name in ("tinyworld/chameleon", "tinyworld/llava-next"):
    adapter, rows = models.load(name, "cpu"), data.preferences("tinyworld", asked.samples, 0).dataset
    acts = next(samples.passing(adapter, rows, [LAYER], asked.batch_size)).acts[LAYER]
    saes = [an_sae(acts), an_sae(acts)]
    ways = partial(plain, adapter, rows), partial(scores, adapter, rows, saes[:1]), partial(scores, adapter, rows, saes)
    forward, one, two = map(median, zip(*([seconds(way) for way in ways] for _ in range(5)), strict=True))
    print(f"{name}: a plain pass takes {1000 * forward / asked.samples:.1f} ms a sample; all scores reach", end=" ")
    print(f"{forward / one:.2f} of its samples a second with one SAE, {forward / two:.2f} with a control beside it")
