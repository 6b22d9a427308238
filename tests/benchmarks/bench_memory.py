"""Memory at one and at ten times the images and documents: python tests/benchmarks/bench_memory.py [IMAGES] [DOCUMENTS]

Each measurement is a process of its own that does what 03, or 04 and 05, do with their data: draw it, then go over it
twice, decoding every picture, and hash the documents. Measured is memory that is the process's own (RssAnon: pages of
mapped files, which the kernel drops when it needs room, left out), the largest less that before the first row.
"""

import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures

BYTES = 115_000  # a picture of ImageNet, on average
TEXT = 6_000  # a document of the Pile


def anonymous() -> int:
    """The process's own memory, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def picture(i: int) -> bytes:
    """A JPEG file of about BYTES, unlike all others: what follows its end is no part of the picture."""
    file = io.BytesIO()
    Pictures.new("RGB", (256, 256), (i % 256, i // 256 % 256, 0)).save(file, "JPEG")
    return file.getvalue() + np.random.default_rng(i).bytes(BYTES)


def make(folder: Path, kind: str, n: int) -> None:
    """A copy of a hub repository of ``n`` rows, 2,000 a shard: a reader holds a shard, which has 500 MB on the hub."""
    text, image = List(Value("string")), folder / "a.jpg"
    folder.mkdir()
    (folder / ".gitattributes").write_text("")
    Pictures.new("RGB", (16, 16)).save(image)
    features = {"text": Value("string"), "texts": text, "images": text}
    if kind == "images":
        features = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    for start in range(0, n, 500):
        if not start % 2000:
            writer = pq.ParquetWriter(folder / f"train-{start:06d}.parquet", Features(features).arrow_schema)
        at = range(start, min(start + 500, n))
        if kind == "images":
            rows = [{"image": {"bytes": picture(i), "path": None}, "label": i % 2} for i in at]
        else:
            words = [np.random.default_rng(i).bytes(TEXT // 2).hex() for i in at]
            rows = [{"text": w, "texts": [w, None], "images": [None, str(image)]} for w in words]
        writer.write_table(Dataset.from_list(rows, features=Features(features)).data.table)
        if at.stop % 2000 == 0 or at.stop == n:
            writer.close()


def measure(folder: Path, kind: str, n: int) -> float:
    """GiB that going over the source takes."""
    from mmsae_helpers import cache, data, models

    adapter = models.load("tinyworld/gemma", "cpu")
    peak, before, ended = [anonymous()], anonymous(), threading.Event()

    def watch():
        while not ended.wait(0.02):
            peak.append(anonymous())

    threading.Thread(target=watch, daemon=True).start()
    if kind == "images":
        images = data.load(str(folder), "train", n // 2 * 9 // 10)
        for _ in range(2):
            for start in range(0, len(images.dataset), 64):
                images.dataset[start : start + 64]["image"]
    else:
        texts, mixed = data.documents(str(folder), n * 9 // 10), data.interleaved(str(folder), n * 9 // 10)
        for some in (texts, mixed):
            cache.of_texts(None, adapter, some[10:], [0], batch_size=1)
            sum(len(document if isinstance(document, str) else document.opened()) for document in some)
    ended.set()
    return (max(peak) - before) / 2**30


if __name__ == "__main__":
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if sys.argv[1:2] == ["measure"]:
        print(f"{measure(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])):.3f}")
        sys.exit()
    sizes = dict(zip(("images", "documents"), [*map(int, sys.argv[1:]), 2000, 10_000][:2], strict=True))
    for kind, n in sizes.items():
        for times in (1, 10) if n else ():
            with tempfile.TemporaryDirectory() as place:
                make(folder := Path(place) / "source", kind, n * times)
                environment, begin = os.environ | {"HF_DATASETS_CACHE": place}, time.time()
                command = [sys.executable, __file__, "measure", str(folder), kind, str(n * times)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                said = (done.stderr if done.returncode else done.stdout).splitlines()[-1]
                on_disk = sum(file.stat().st_size for file in folder.iterdir()) / 2**30
                size = f"{n * times:7,} {kind}, {on_disk:.2f} GiB on disk"
                print(f"{size}: {said[:150]} GiB in memory, {time.time() - begin:.0f} s", flush=True)
