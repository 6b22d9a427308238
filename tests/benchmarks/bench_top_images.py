"""Top 9 images of every feature: `top_images.TopImages` against sorting a Python list per neuron.

    python tests/benchmarks/bench_top_images.py

2,000 images x 4,096 features in batches of 100, features of different frequency. As published: for each neuron a
Python list with a pair (activation, image) for every image, sorted, the first 9 taken (METHODS B). A kinder form
keeps only images that fire, and is shown too. Sparse input: features fire on 6 % of the images on average (0.1 % to
60 %); dense input: every feature on every image. Activations in random order, so that pruning gets no help, and
once ascending, the worst case. Processor time of one thread each, in turn, so that a busy machine does not matter.
Then the peak of traced memory at 2,000 and 20,000 images, of the top images and of the whole `survey.Survey` of an SAE
(top images, words, similarity and purity with their controls; 10 tokens an image, embeddings 64 wide, 60 attribute
values, both made before). Exit status 1 if a target fails.
"""

import os
import time
import tracemalloc

os.environ.setdefault("OMP_NUM_THREADS", "1")

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.meters import features, top_images
from mmsae_helpers.meters.survey import Survey

IMAGES, D_SAE, K, BATCH = 2_000, 4_096, 9, 100


def batch(start, density, order="random", size=BATCH):
    """Maxima csr [size, D_SAE] of images start to start + size."""
    rng = np.random.default_rng([start, 1])
    z = rng.random((size, D_SAE), dtype=np.float32) + np.float32(0.01)
    if order == "ascending":
        z += np.arange(start, start + size, dtype=np.float32)[:, None]
    if density < 1:
        rate = np.minimum(0.6, density * np.random.default_rng(0).lognormal(-0.5, 1.05, D_SAE)).astype(np.float32)
        z[rng.random(z.shape, dtype=np.float32) >= rate] = 0
    return features.to_csr(z), np.arange(start, start + size)


def ours(batches):
    top = top_images.TopImages(D_SAE, K)
    for maxima, ids in batches:
        top.add(maxima, ids)
    return top.values, top.ids


def python_lists(batches, only_firing=False):
    """Every neuron's list of (activation, image), sorted."""
    lists = [[] for _ in range(D_SAE)]
    for maxima, ids in batches:
        if only_firing:
            of_image = maxima.tocoo()
            for i, neuron, a in zip(of_image.row.tolist(), of_image.col.tolist(), of_image.data.tolist(), strict=True):
                lists[neuron].append((-a, int(ids[i])))
        else:
            for i, row in zip(ids.tolist(), (-maxima.toarray()).tolist(), strict=True):
                for pairs, a in zip(lists, row, strict=True):
                    pairs.append((a, i))
    values, chosen = np.zeros((D_SAE, K), np.float32), np.full((D_SAE, K), -1)
    for neuron, pairs in enumerate(lists):
        pairs.sort()
        for place, (a, i) in enumerate(pairs[:K]):
            if a < 0:
                values[neuron, place], chosen[neuron, place] = -a, i
    return values, chosen


def seconds(call):
    begun = time.process_time()
    out = call()
    return time.process_time() - begun, out


def speed(density, order, rounds):
    """Prints a line; the ratio of the medians, as published over ours."""
    batches = [batch(start, density, order) for start in range(0, IMAGES, BATCH)]
    times = []
    for _ in range(rounds):
        published, expected = seconds(lambda: python_lists(batches))
        kinder = seconds(lambda: python_lists(batches, True))[0]
        fast = []
        for _ in range(9):
            fast.append(seconds(lambda: ours(batches)))
        for _, found in fast:
            assert all(map(np.array_equal, found, expected)), "not equal to the full sort"
        times.append((published, kinder, np.median([t for t, _ in fast])))
    published, kinder, mine = np.median(times, axis=0)
    share = sum(m.nnz for m, _ in batches) / IMAGES / D_SAE
    print(
        f"{share:7.1%} {order:>9}: lists {published:6.2f} s, only firing {kinder:6.2f} s, ours {1e3 * mine:6.1f} ms;",
        end="",
    )
    print(f" {published / mine:5.0f}x and {kinder / mine:4.0f}x", flush=True)
    return published / mine


def tokens(start, size=BATCH, each=10, d_in=32, n_words=200):
    """A TokenBatch of images start to start + size, ``each`` tokens an image."""
    rng, n = np.random.default_rng([start, 2]), size * each
    sample = torch.arange(start, start + size).repeat_interleave(each)
    word, place = torch.from_numpy(rng.integers(0, n_words, n)), torch.arange(each).repeat(size)
    acts = torch.from_numpy(rng.standard_normal((n, d_in), dtype=np.float32))
    return TokenBatch({0: acts}, sample, place, word, torch.zeros(n, dtype=torch.bool), torch.full((n,), -1))


def surveyed(one, images):
    for start in range(0, images, BATCH):
        one.add(batch := tokens(start), features.encode(one.sae, batch.acts[0]))
    return one.table()


def a_survey(images, d_in=32):
    """A Survey of ``images`` images to come, of an SAE of random directions that fire on a twentieth of the tokens."""
    rng = np.random.default_rng(0)
    directions = torch.from_numpy(rng.standard_normal((d_in, D_SAE), dtype=np.float32)) / d_in**0.5
    sae = SimpleNamespace(
        encode=lambda x: (x @ directions - 1.6).relu(), cfg=SimpleNamespace(d_sae=D_SAE), device="cpu"
    )
    kinds = pd.DataFrame({f"attribute {i}": rng.integers(0, 10, images).astype(str) for i in range(6)})
    return Survey(sae, 0, rng.standard_normal((images, 64)), kinds, {i: str(i) for i in range(200)})


def peak_memory(call):
    """Peak MiB traced during the call."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main():
    print(f"{IMAGES} images x {D_SAE} features in batches of {BATCH}, k = {K}; share of (image, feature) that fires:")
    sparse = speed(0.06, "random", 2)
    dense = speed(1.0, "random", 3)
    speed(0.06, "ascending", 1)
    speed(1.0, "ascending", 1)
    sizes, peaks = (IMAGES, 10 * IMAGES), {}
    for n in sizes:
        stream = (batch(start, 0.06) for start in range(0, n, BATCH))
        peaks.setdefault("top images", []).append(peak_memory(lambda stream=stream: ours(stream)))
        one = a_survey(n)
        peaks.setdefault("survey", []).append(peak_memory(lambda one=one, n=n: surveyed(one, n)))
    for what, (small, large) in peaks.items():
        print(f"peak memory of {what}: {small:.1f} MiB at {sizes[0]} images, {large:.1f} MiB at {sizes[1]}")
    targets = {
        f"100x as published: {sparse:.0f}x sparse, {dense:.0f}x dense": min(sparse, dense) >= 100,
    }
    for what, (small, large) in peaks.items():
        targets[f"memory of {what} at 10x the images: {large / small:.2f}x"] = large < 1.1 * small
    print("targets: " + "; ".join(f"{what}: {'holds' if held else 'FAILS'}" for what, held in targets.items()))
    raise SystemExit(not all(targets.values()))


if __name__ == "__main__":
    main()
