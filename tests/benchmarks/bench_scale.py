"""Extraction by Ray's workers against one process: seconds of a pass that keeps its shards.

    python tests/benchmarks/bench_scale.py

The embedded LLaVA reads images, one core a worker. Timed are passes over new rows by workers that Ray has started (its
own start and the import of torch by workers are measured apart, by a pass over two images).
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TQDM_DISABLE"] = "1"

import torch

from mmsae_helpers import cache, data, models


def seconds(workers: int, n: int, images, adapter) -> float:
    """Of one pass over ``n`` images, all blocks kept."""
    os.environ["MMSAE_WORKERS"] = str(workers)
    with tempfile.TemporaryDirectory() as folder:
        tokens = cache.of_images(folder, adapter, images, range(adapter.n_layers), batch_size=50, stop=n)
        tokens.shard_samples = 100
        begun = time.perf_counter()
        for _ in tokens:
            pass
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6000)
    n = parser.parse_args().images
    torch.set_num_threads(1)
    adapter, images = models.load("tinyworld/llava", "cpu"), data.load("tinyworld", "train", -(-n // 100))
    print(f"{n} images, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the beginning")
    print("| workers | start, s | pass, s | speed |\n| --- | --- | --- | --- |")
    one = None
    for workers in (0, 1, 2):
        seconds(workers, 2, images, adapter)  # Ray's own start
        start, whole = seconds(workers, 2, images, adapter), seconds(workers, n, images, adapter)
        one = one or whole - start
        print(f"| {workers or 'none'} | {start:.1f} | {whole:.1f} | {one / (whole - start):.2f}x |", flush=True)
        if workers:
            import ray

            ray.shutdown()


if __name__ == "__main__":
    main()
