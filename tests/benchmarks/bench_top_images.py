"""Top 9 images of every feature: `features.TopImages` against sorting a Python list per neuron.

    python tests/benchmarks/bench_top_images.py

2,000 images x 4,096 features in batches of 100, features of different frequency. As published: for each neuron a
Python list with a pair (activation, image) for every image, sorted, the first 9 taken (METHODS B). A kinder form
keeps only images that fire, and is shown too. Sparse input: features fire on 6 % of the images on average (0.1 % to
60 %); dense input: every feature on every image. Activations in random order, so that pruning gets no help, and
once ascending, the worst case. Processor time of one thread each, in turn, so that a busy machine does not matter.
Then the peak of traced memory at 2,000 and 20,000 images. Exit status 1 if a target fails.
"""

import os
import time
import tracemalloc

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mmsae_helpers import features

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
    top = features.TopImages(D_SAE, K)
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


def peak_memory(images):
    """Peak MiB traced while batches are made, added and dropped."""
    tracemalloc.start()
    ours(batch(start, 0.06) for start in range(0, images, BATCH))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main():
    print(f"{IMAGES} images x {D_SAE} features in batches of {BATCH}, k = {K}; share of (image, feature) that fires:")
    sparse = speed(0.06, "random", 2)
    dense = speed(1.0, "random", 3)
    speed(0.06, "ascending", 1)
    speed(1.0, "ascending", 1)
    small, large = peak_memory(IMAGES), peak_memory(10 * IMAGES)
    print(f"peak memory: {small:.1f} MiB at {IMAGES} images, {large:.1f} MiB at {10 * IMAGES}")
    targets = {
        f"100x as published: {sparse:.0f}x sparse, {dense:.0f}x dense": min(sparse, dense) >= 100,
        f"memory at 10x the images: {large / small:.2f}x": large < 1.1 * small,
    }
    print("targets: " + "; ".join(f"{what}: {'holds' if held else 'FAILS'}" for what, held in targets.items()))
    raise SystemExit(not all(targets.values()))


if __name__ == "__main__":
    main()
