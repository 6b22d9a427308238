"""A sweep of SAEs (layers x lambda x seeds) from one stream by `saes.fit` against one `SAETrainer.fit` after another.

    python tests/benchmarks/bench_sae_training.py [steps]

12 SAEs at the captioner's size: 96 -> 3,072 (expansion 32), batch 512, the same seeds, batches and schedules in both,
first both in float32, then both with bfloat16 products. Synthetic activations: sparse sums of 400 random directions.
`fit` runs between two halves of the SAETrainers, so that a busy machine slows both alike; the speed is judged by
processor time. Batches lie ready in memory for both: that SAETrainer would run the model once for each SAE is not
counted. Then the loss, L0 and explained variance on unseen activations: the means over seeds must differ by no more
than a standard deviation over seeds. Exit status 1 if a target fails.
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

D_IN, D_SAE, BATCH, HEAD = 96, 3_072, 512, 8
LAYERS, LAMBDAS, SEEDS = (0, 1), (1.0, 4.0), (0, 1, 2)


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
    health = saes.evaluate(sae, [batch], job.layer)
    return float(error + job.config.l1_coefficient * penalty), health.l0, health.explained_variance


def sweep(autocast: bool, steps: int) -> tuple[float, bool]:
    """Prints the comparison; the ratio of processor times, and whether all results agree within the seeds' spread."""

    def config(l1):
        return saes.TrainingConfig(D_SAE, l1, 2e-3, steps, BATCH, l1_warm_up_steps=steps // 5, norm_batches=HEAD,
                                   autocast=autocast)  # fmt: skip

    data = {layer: list(islice(cycle([activations(BATCH, i, layer) for i in range(64)]), steps)) for layer in LAYERS}
    jobs = {key: saes.Job(key[0], key[2], config(key[1])) for key in product(LAYERS, LAMBDAS, SEEDS)}
    theirs, spent = {}, np.zeros((2, 2))
    ours = None
    for i, (key, job) in enumerate(jobs.items()):
        if i == len(jobs) // 2:
            stream = (dict(zip(LAYERS, xs, strict=True)) for xs in zip(*data.values(), strict=True))
            ours, spent[0] = timed(lambda stream=stream: saes.fit(stream, jobs, d_in=D_IN, progress=False))
        theirs[key], seconds = timed(lambda job=job: sae_lens_trainer(data[job.layer], job))
        spent[1] += seconds
    wall, cpu = spent[1] / spent[0]
    precision = "bfloat16" if autocast else "float32"
    print(
        f"{precision}: {len(jobs)} SAEs, {steps} steps, {torch.get_num_threads()} threads; seconds by the clock ",
        end="",
    )
    print("and of processor: SAETrainer {:.1f}, {:.1f}; fit {:.1f}, {:.1f}".format(*spent[1], *spent[0]))
    print(f"  {cpu:.2f}x by processor time, {wall:.2f}x by the clock", flush=True)
    agree = True
    for layer, l1 in product(LAYERS, LAMBDAS):
        unseen = activations(4096, 10_000, layer)
        scale = D_IN**0.5 / torch.cat(data[layer][:HEAD]).norm(dim=1).mean().item()
        a, b = (
            np.array([quality(saes_of[layer, l1, s], jobs[layer, l1, s], unseen, scale) for s in SEEDS])
            for saes_of in (ours, theirs)
        )
        spread = b.std(axis=0, ddof=1)
        within = np.abs(a.mean(0) - b.mean(0)) <= spread
        agree &= bool(within.all())
        print(f"  layer {layer} lambda {l1:g}:", end="")
        for name, x, y, s, ok in zip(("loss", "L0", "EV"), a.mean(0), b.mean(0), spread, within, strict=True):
            print(f" {name} {x:.4f} / {y:.4f} (seeds {s:.4f}){'' if ok else ' APART'};", end="")
        print(flush=True)
    return cpu, agree


def main(steps: int = 100) -> None:
    print(f"{D_IN} -> {D_SAE}, batch {BATCH}: loss, L0, explained variance are fit / SAETrainer (deviation over seeds)")
    results = [sweep(autocast, steps) for autocast in (False, True)]
    held = all(ratio >= 2 and agree for ratio, agree in results)
    print(f"targets 2x, and equal within the spread over seeds: {'hold' if held else 'FAIL'}")
    raise SystemExit(not held)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
