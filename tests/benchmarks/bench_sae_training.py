"""A sweep of SAEs (layers x lambda x seeds) from one stream by `saes.fit` against one `SAETrainer.fit` after another.

    python tests/benchmarks/bench_sae_training.py [steps]

12 SAEs at the captioner's size: 96 -> 3,072 (expansion 32), batch 512, the same seeds, batches and schedules in both.
Three comparisons: both in float32, where the products take most of the time and there is less to gain; both with
bfloat16 products, as the notebooks train; and the notebooks' way against SAETrainer's default, float32. The last two
are the targets, the first is for information. Synthetic activations: sparse sums of 400 random directions. `fit` runs
between two halves of the SAETrainers, so that a busy machine slows both alike; the speed is judged by processor time.
Batches lie ready in memory for both: that SAETrainer would run the model once for each SAE is not counted. Then the
loss, L0 and explained variance on unseen activations: the means over seeds must differ by no more than a standard
deviation over seeds. Exit status 1 if a target fails.
"""

import os
import sys
import time
from itertools import cycle, islice, product

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from mmsae_helpers import saes
from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.meters.health import HealthMeter

D_IN, D_SAE, BATCH, HEAD = 96, 3_072, 512, 8
LAYERS, LAMBDAS, SEEDS = (0, 1), (1.0, 4.0), range(6)


def activations(n: int, seed: int, layer: int = 0) -> torch.Tensor:
    """Sparse sums (4 directions of 400 on average) on a common offset, [n, D_IN]."""
    fixed, own = torch.Generator().manual_seed(99 + layer), torch.Generator().manual_seed(seed)
    basis = torch.nn.functional.normalize(torch.randn(400, D_IN, generator=fixed), dim=1)
    chosen = torch.rand(n, 400, generator=own) < 0.01
    return 3 * (chosen * (torch.rand(n, 400, generator=own) + 0.5)) @ basis + 0.3


def sae_lens_trainer(batches, job):
    """The same training by sae-lens's own trainer, which takes the batches for the norm from the head of its stream."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = job.config
    torch.manual_seed(job.seed)
    sae_config = StandardTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        l1_coefficient=config.l1_coefficient,
        l1_warm_up_steps=config.l1_warm_up_steps,
        normalize_activations=config.normalize_activations,
    )
    trainer_config = SAETrainerConfig(
        total_training_samples=config.steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=config.lr,
        lr_end=config.lr,
        autocast=config.autocast,
        n_batches_for_norm_estimate=config.norm_batches,
    )
    sae = StandardTrainingSAE(sae_config)
    SAETrainer(trainer_config, sae, iter([*batches[:HEAD], *batches])).fit()
    return sae.eval().requires_grad_(False)


def timed(call):
    """What the call gives; its wall-clock and processor seconds."""
    begun = time.perf_counter(), time.process_time()
    out = call()
    return out, np.array([time.perf_counter() - begun[0], time.process_time() - begun[1]])


def quality(sae, job, unseen, scale):
    """Loss in the scaled units of training, L0 and explained variance."""
    f = sae.encode(unseen)
    error = (unseen - sae.decode(f)).square().sum(1).mean() * scale**2
    penalty = (f @ sae.W_dec.norm(dim=1)).mean() * scale
    none = torch.zeros(len(unseen), dtype=torch.int64)
    batch = TokenBatch({job.layer: unseen}, none, none, none, none.bool(), none)
    health = feed({0: HealthMeter(sae, job.layer)}, [batch])[0]
    return float(error + job.config.l1_coefficient * penalty), health.l0, health.explained_variance


def sweep(autocast: bool, steps: int):
    """Quality [2, layers x lambda, seeds, 3] and seconds [2, (clock, processor)], of `fit` and of the SAETrainers."""

    def config(l1):
        return saes.TrainingConfig(D_SAE, l1, 2e-3, steps, BATCH, l1_warm_up_steps=steps // 5, norm_batches=HEAD,
                                   autocast=autocast)  # fmt: skip

    data = {layer: list(islice(cycle([activations(BATCH, i, layer) for i in range(64)]), steps)) for layer in LAYERS}
    jobs = {key: saes.Job(key[0], key[2], config(key[1])) for key in product(LAYERS, LAMBDAS, SEEDS)}
    ours, theirs, seconds = {}, {}, np.zeros((2, 2))
    for i, (key, job) in enumerate(jobs.items()):
        if i == len(jobs) // 2:
            stream = (dict(zip(LAYERS, xs, strict=True)) for xs in zip(*data.values(), strict=True))
            ours, seconds[0] = timed(lambda stream=stream: saes.fit(stream, jobs, d_in=D_IN, progress=False))
        theirs[key], spent = timed(lambda job=job: sae_lens_trainer(data[job.layer], job))
        seconds[1] += spent
    unseen = {layer: activations(4096, 10_000, layer) for layer in LAYERS}
    scale = {layer: D_IN**0.5 / torch.cat(data[layer][:HEAD]).norm(dim=1).mean().item() for layer in LAYERS}
    found = [[quality(of[k], jobs[k], unseen[k[0]], scale[k[0]]) for k in jobs] for of in (ours, theirs)]
    return np.array(found).reshape(2, -1, len(SEEDS), 3), seconds


def compare(title: str, a, b, seconds_a, seconds_b) -> bool:
    """Prints one comparison; whether fit is twice as fast and every mean over seeds within a deviation over seeds."""
    wall, cpu = seconds_b / seconds_a
    clock, processor = zip(seconds_a, seconds_b, strict=True)
    print(f"{title}: {clock[0]:.1f} against {clock[1]:.1f} s by the clock ({wall:.2f}x),", end=" ")
    print(f"{processor[0]:.1f} against {processor[1]:.1f} s of processor: {cpu:.2f}x")
    spread = b.std(axis=1, ddof=1)
    within = np.abs(a.mean(axis=1) - b.mean(axis=1)) <= spread
    for (layer, l1), *rows in zip(product(LAYERS, LAMBDAS), a.mean(1), b.mean(1), spread, within, strict=True):
        parts = zip(("loss", "L0", "EV"), *rows, strict=True)
        text = (f"{n} {x:.4f} / {y:.4f} (seeds {s:.4f}){'' if ok else ' APART'}" for n, x, y, s, ok in parts)
        print(f"  layer {layer} lambda {l1:g}: " + "; ".join(text), flush=True)
    return cpu >= 2 and bool(within.all())


def main(steps: int = 100) -> None:
    n_saes = len(LAYERS) * len(LAMBDAS) * len(SEEDS)
    print(f"{n_saes} SAEs {D_IN} -> {D_SAE}, {steps} steps of {BATCH}, {torch.get_num_threads()} threads.")
    print("loss, L0, explained variance: fit / SAETrainer (deviation over seeds)")
    (single, theirs_single), seconds = sweep(False, steps)
    compare("float32, both", single, theirs_single, *seconds)
    (half, theirs_half), seconds_half = sweep(True, steps)
    held = compare("bfloat16, both", half, theirs_half, *seconds_half)
    held &= compare(
        "fit in bfloat16, SAETrainer in float32, its default", half, theirs_single, seconds_half[0], seconds[1]
    )
    print(f"targets 2x as the notebooks train, and equal within the spread over seeds: {'hold' if held else 'FAIL'}")
    raise SystemExit(not held)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
