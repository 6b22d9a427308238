"""How far bfloat16 is from float32 on a language model with trained weights: its residuals, and what SAEs make of them.

    python tests/benchmarks/bench_bfloat16.py artifacts/real/saes/<those of notebook 01>

SmolLM2-135M (extra [real]) reads WordNet's definitions in both types, and the SAEs of the folder, trained on residuals
in float32, encode both. Features in common: of those active on a token in either type, the share active in both, mean
over tokens. Nothing is timed, and nothing needs a GPU.
"""

import argparse
from pathlib import Path

import torch

from mmsae_helpers import data, models, saes
from mmsae_helpers.activations import stream
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.meters.health import HealthMeter


def read(dtype: str, texts, layers) -> list:
    """Residuals, in float32, of all words of ``texts`` after each of ``layers``."""
    adapter = models.load("real/smollm2", "cpu", dtype)
    return list(stream(adapter, data.document_batches(adapter, texts, 16, max_tokens=256), layers, "text"))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("saes", type=Path)
    parser.add_argument("--documents", type=int, default=100)
    options = parser.parse_args()
    found = {int(folder.name.split("_")[1]): saes.load(folder) for folder in options.saes.glob("layer_*_seed_10")}
    texts = data.documents("real/glosses", options.documents)
    both = [read(dtype, texts, sorted(found)) for dtype in ("float32", "bfloat16")]
    health = [feed({layer: HealthMeter(sae, layer) for layer, sae in found.items()}, batches) for batches in both]
    print("| block | relative error | median token's | L0 | explained variance | features in common |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layer, sae in sorted(found.items()):
        single, half = (torch.cat([batch.acts[layer] for batch in batches]) for batches in both)
        apart, active = (half - single).norm(dim=1), [sae.encode(x) > 0 for x in (single, half)]
        either, common = (active[0] | active[1]).sum(1), (active[0] & active[1]).sum(1)
        shared = float((common / either)[either > 0].mean())
        error, median = float(apart.norm() / single.norm()), float((apart / single.norm(dim=1)).median())
        l0, explained = (
            ", ".join(f"{getattr(h[layer], what):.{n}f}" for h in health)
            for what, n in (("l0", 1), ("explained_variance", 3))
        )
        print(f"| {layer} | {error:.4f} | {median:.4f} | {l0} | {explained} | {shared:.3f} |")


if __name__ == "__main__":
    main()
