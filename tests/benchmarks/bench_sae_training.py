"""Speed of SAE training at the tiny profile's size: sae-lens's SAETrainer against `saes.train`.

Run: python tests/benchmarks/bench_sae_training.py [steps] [SAEs]. Synthetic activations: sparse sums of
400 random directions in 128 dimensions; explained variance and L0 are measured on unseen ones.
"""

import sys
import time
from itertools import cycle

import torch

from mmsae_helpers import saes
from mmsae_helpers.activations import TokenBatch

D_IN, D_SAE, BATCH, N_BATCHES = 128, 1024, 1024, 64


def activations(n: int, seed: int) -> torch.Tensor:
    """Sparse sums (4 directions of 400 on average) on a common offset, [n, 128]."""
    fixed, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    basis = torch.nn.functional.normalize(torch.randn(400, D_IN, generator=fixed), dim=1)
    chosen = torch.rand(n, 400, generator=own) < 0.01
    return 3 * (chosen * (torch.rand(n, 400, generator=own) + 0.5)) @ basis + 0.3


def reference(data, config) -> None:
    """The same training by sae-lens's own trainer."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

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
    SAETrainer(trainer_config, StandardTrainingSAE(sae_config), cycle(data)).fit()


def main(steps: int = 1000, n_saes: int = 6) -> None:
    data = [activations(BATCH, seed) for seed in range(N_BATCHES)]
    none = torch.zeros(8192, dtype=torch.int64)
    unseen = TokenBatch({0: activations(8192, 10_000)}, none, none, none, none.bool(), none)
    print(f"{D_IN} -> {D_SAE}, batch {BATCH}, {torch.get_num_threads()} threads")
    common = dict(d_sae=D_SAE, l1_coefficient=1.0, lr=1e-3, batch_size=BATCH, lr_decay_steps=0)
    for autocast in (False, True):
        precision = "bfloat16" if autocast else "float32"
        config = saes.TrainingConfig(steps=100, l1_warm_up_steps=20, autocast=autocast, **common)
        start = time.perf_counter()
        reference(data, config)
        seconds = time.perf_counter() - start
        print(f"SAETrainer {precision}: {100 * BATCH / seconds:,.0f} tokens/s", flush=True)
        config = saes.TrainingConfig(
            steps=steps, l1_warm_up_steps=steps // 5, autocast=autocast, b_dec_init="mean", **common
        )
        start = time.perf_counter()
        batches = ({0: x} for x in cycle(data))
        trained = saes.train(batches, d_in=D_IN, layers=[0], seeds=range(n_saes), config=config, progress=False)
        seconds = time.perf_counter() - start
        health = saes.evaluate(trained[0, 0], [unseen], 0)
        speed = n_saes * steps * BATCH / seconds
        print(f"saes.train {precision}: {speed:,.0f} tokens/s; {steps} steps in {seconds:.1f} s", flush=True)
        print(f"  so 18 SAEs in {18 / n_saes * seconds:.0f} s; on unseen tokens {health}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
