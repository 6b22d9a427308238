"""Activations of all decoder blocks of the captioner against those of its last block alone, one pass each.

    python tests/benchmarks/bench_captioner.py [images] [repeats]

Captions forced, text tokens kept. The passes take turns; the ratio is that of the medians of processor time, which
a busy machine does not change. Encoding of pixels and words is done before, so it does not hide what the blocks
cost. Exit status 1 above 1.3.
"""

import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mmsae_helpers import activations, data, models

BATCH = 64


def main(n_images: int = 256, repeats: int = 7) -> None:
    adapter = models.load("tinyworld/vit-gpt2", "cpu")
    dataset = data.load("tinyworld", per_class=4).dataset.select(range(n_images))
    batches = list(data.batches(adapter, dataset, BATCH, texts=dataset["caption"]))
    layers = {"all": range(adapter.n_layers), "last": [adapter.n_layers - 1]}
    seconds = {name: [] for name in layers}
    for _ in range(repeats + 1):
        for name, chosen in layers.items():
            begun = time.process_time()
            tokens = sum(len(batch.token) for batch in activations.stream(adapter, batches, chosen, keep="text"))
            seconds[name].append(time.process_time() - begun)
    every, last = (np.array(seconds[name][1:]) for name in layers)  # the first round warms up
    ratio = np.median(every) / np.median(last)
    print(
        f"{adapter.n_layers} blocks {adapter.d_model} wide, {n_images} images, {tokens} tokens, medians of {repeats}:"
    )
    print(f"all blocks {np.median(every):.3f} s, the last alone {np.median(last):.3f} s")
    print(f"ratio {ratio:.2f} (rounds {np.min(every / last):.2f} to {np.max(every / last):.2f}); target 1.3: ", end="")
    print("holds" if ratio <= 1.3 else "FAILS")
    raise SystemExit(int(ratio > 1.3))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
