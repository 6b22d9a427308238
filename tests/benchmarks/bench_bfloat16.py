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


def residuals(dtype: str, texts, layers) -> dict[int, torch.Tensor]:
    """Residuals [N, d_model] of all words of ``texts`` after each of ``layers``, in float32."""
    adapter = models.load("real/smollm2", "cpu", dtype)
    batches = list(stream(adapter, data.document_batches(adapter, texts, 16, max_tokens=256), layers, "text"))
    return {layer: torch.cat([batch.acts[layer] for batch in batches]) for layer in layers}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("saes", type=Path)
    parser.add_argument("--documents", type=int, default=100)
    options = parser.parse_args()
    found = {int(folder.name.split("_")[1]): saes.load(folder) for folder in options.saes.glob("layer_*_seed_10")}
    texts = data.documents("real/glosses", options.documents)
    both = [residuals(dtype, texts, sorted(found)) for dtype in ("float32", "bfloat16")]
    print("| block | relative error | median token's | L0 | explained variance | features in common |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layer, sae in sorted(found.items()):
        single, half = (acts[layer] for acts in both)
        apart, features = (half - single).norm(dim=1), [sae.encode(x) for x in (single, half)]
        l0 = [float((f > 0).sum(1).float().mean()) for f in features]
        left = [(x - sae.decode(f)).square().sum() for x, f in zip((single, half), features, strict=True)]
        explained = [1 - float(e / (x - x.mean(0)).square().sum()) for x, e in zip((single, half), left, strict=True)]
        either, common = ((features[0] > 0) | (features[1] > 0)).sum(1), ((features[0] > 0) & (features[1] > 0)).sum(1)
        shared = float((common / either)[either > 0].mean())
        error, median = float(apart.norm() / single.norm()), float((apart / single.norm(dim=1)).median())
        print(f"| {layer} | {error:.4f} | {median:.4f} | {l0[0]:.1f}, {l0[1]:.1f} | ", end="")
        print(f"{explained[0]:.3f}, {explained[1]:.3f} | {shared:.3f} |")


if __name__ == "__main__":
    main()
