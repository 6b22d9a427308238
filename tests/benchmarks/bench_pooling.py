"""Pooling token features into one vector per image: ours against the plain dense definition.

    python tests/benchmarks/bench_pooling.py

One image is 576 tokens x 16,384 features with about 55 active a token (LLaVA on Gemma-2b). The definition is
paper A's: a dense array, per token argpartition, one-hot, sum over tokens. (a) adds storing the dense
features with np.savez_compressed and reading them back, as published; (b) is the definition alone, in
memory. Ours starts once from sparse token features, which is what leaves our encoder and what (a) is judged
by, and once from the dense array; it gives the sums of activations besides the counts. All are timed in
turn, so that a busy neighbour slows all alike. Then peak memory for 1x and 10x the images, and the
throughput where features are not so sparse. Exit status 1 if a target fails.
"""

import argparse
import os
import tempfile
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from mmsae_helpers.meters import features, pooling

TOKENS, D_SAE, ACTIVE = 576, 16_384, 55


def made_features(tokens, d_sae, active, seed=0):
    """Dense features [tokens, d_sae] float32, about ``active`` of them positive in every token."""
    rng = np.random.default_rng(seed)
    z = rng.random((tokens, d_sae), dtype=np.float32) + np.float32(0.01)
    z[rng.random(z.shape, dtype=np.float32) >= active / d_sae] = 0
    return z


def definition(z, n):
    """Counts [d_sae] of the tokens that keep each feature among their n largest, densely."""
    largest = np.argpartition(z, -n, axis=1)[:, -n:]
    one_hot = np.zeros_like(z)
    np.put_along_axis(one_hot, largest, np.take_along_axis(z, largest, axis=1) > 0, axis=1)
    return one_hot.sum(axis=0)


def store_and_reload(z, folder):
    np.savez_compressed(folder / "features.npz", z)
    return np.load(folder / "features.npz")["arr_0"]


def times_in_turn(calls, rounds):
    """Median seconds of each call; one round runs all of them."""
    seconds = np.zeros((rounds, len(calls)))
    for row in seconds:
        for i, call in enumerate(calls):
            begun = time.perf_counter()
            call()
            row[i] = time.perf_counter() - begun
    return np.median(seconds, axis=0)


def speed(rounds=7):
    """Prints milliseconds and ratios per N; returns the lowest ratio of each kind."""
    z = made_features(TOKENS, D_SAE, ACTIVE)
    sparse, rows = features.to_csr(z), np.zeros(TOKENS, int)
    print(f"one image: {TOKENS} tokens x {D_SAE} features, {sparse.nnz / TOKENS:.1f} active a token; median ms")
    print("   N  disk  definition  ours: sparse   dense | (a)/sparse  (a)/dense  (b)/sparse  (b)/dense")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 3, 5, 10, 50):
            counts = pooling.pool_all(sparse, rows, 1, (n,))[n].counts.toarray()[0]
            assert np.array_equal(counts, definition(z, n)), "not equal to the definition"
            calls = (
                lambda: store_and_reload(z, Path(folder)),
                lambda n=n: definition(z, n),
                lambda n=n: pooling.pool_all(sparse, rows, 1, (n,)),
                lambda n=n: pooling.pool_all(features.to_csr(z), rows, 1, (n,)),
            )
            disk, plain, from_sparse, from_dense = times_in_turn(calls, rounds)
            ratio = [x / ours for x in (disk + plain, plain) for ours in (from_sparse, from_dense)]
            ratios.append(ratio)
            ms = [1e3 * t for t in (disk, plain, from_sparse, from_dense)]
            print("{:4d} {:5.0f} {:11.1f} {:13.2f} {:7.2f} |".format(n, *ms), end="")
            print(" {:9.0f}x {:9.0f}x {:10.0f}x {:9.0f}x".format(*ratio))
    (everything,) = times_in_turn([lambda: pooling.pool_all(sparse, rows, 1)], rounds)
    print(f"ours for all of {pooling.POOLINGS} in one pass, from sparse: {everything * 1e3:.2f} ms")
    return np.min(ratios, axis=0)


def peak_memory(images):
    """Peak MiB above the one dense input while ``images`` images are pooled, each result used and dropped."""
    z = made_features(TOKENS, D_SAE, ACTIVE)
    stream = pooling.Pooling(None, 0)
    tracemalloc.start()
    for image in range(images):
        stream.add(SimpleNamespace(sample=torch.full((TOKENS,), image)), features.to_csr(z))
        stream.result()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def throughput(tokens=640_000, chunk=32_000, active=250, d_sae=1_024):
    """Seconds to pool that many tokens of the tiny world's density for all N, dense to sparse included."""
    z = made_features(chunk, d_sae, active)
    stream, rows = pooling.Pooling(None, 0), np.repeat(np.arange(chunk // 64), 64)
    begun = time.perf_counter()
    for start in range(0, tokens, chunk):
        stream.add(SimpleNamespace(sample=torch.from_numpy(rows + start // 64)), features.to_csr(z))
    pooled = stream.result()
    seconds = time.perf_counter() - begun
    arrays = ((p.values.data, p.values.indices, p.counts.data) for p in pooled.values())
    size = sum(a.nbytes for three in arrays for a in three)
    print(f"{tokens} tokens x {active} active of {d_sae}, all N, dense to sparse included: ", end="")
    print(f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s; result {size / 2**20:.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10, help="images of the smaller memory measurement")
    images = parser.parse_args().images
    a_sparse, a_dense, b_sparse, b_dense = speed()
    once, ten = peak_memory(images), peak_memory(10 * images)
    print(f"peak memory: {once:.1f} MiB at {images} images, {ten:.1f} MiB at {10 * images}")
    throughput()
    targets = {
        f"(a) 100x: {a_sparse:.0f}x from sparse (from dense {a_dense:.0f}x)": a_sparse >= 100,
        f"(b) 10x: {b_sparse:.0f}x from sparse, {b_dense:.0f}x from dense": min(b_sparse, b_dense) >= 10,
        f"memory at 10x the images: {ten / once:.2f}x": ten < 1.1 * once,
    }
    results = [f"{what}: {'holds' if held else 'FAILS'}" for what, held in targets.items()]
    print("targets, at the worst N: " + "; ".join(results))
    raise SystemExit(not all(targets.values()))


if __name__ == "__main__":
    main()
