"""First view of the feature browser against the same page with every image inside it.

    python tests/benchmarks/bench_browser.py

24,576 features x 9 images, all different, 64 pixels. Both pages have one and the same script, table and heat maps, so
both can search and filter; one embeds all details and a JPEG data URI an image, ours loads sprite sheets and details
on demand. Timed in headless Chromium from disk with the network off, in turn: from the start of navigation until the
first feature stands there with its images decoded. (A plain page of 221,184 <img>, without a script, is no rival: it
paints its first lines while it is still being read, cannot be searched, and had not loaded after four minutes.)
Making the pages takes about a minute and 0.7 GB of disk. Exit status 1 if ours takes more than a tenth.
"""

import argparse
import base64
import io
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from playwright.sync_api import sync_playwright

from mmsae_helpers.suite import browser

K, BINS, SIZE = 9, 24, 64
MARK = "performance.getEntriesByName('mmsae-first-view')[0]"


class Images:
    """So many different small scenes, drawn when asked for."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        pixels = np.full((SIZE, SIZE, 3), rng.integers(0, 256, 3), np.uint8)
        top, left, height, width = rng.integers(4, 30, 4)
        pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
        return Image.fromarray(pixels)


def write_ours(folder, rows):
    rng = np.random.default_rng(0)
    n_images = rng.integers(K, 2000, rows)
    table = pd.DataFrame({"layer": 9, "feature": np.arange(rows), "n_images": n_images, "frequency": n_images / 2000})
    table["label"] = [f"word{i}" for i in rng.integers(0, 500, rows)]
    table["about"] = [f"color {i}" for i in rng.integers(0, 8, rows)]
    table[["similarity", "purity", "max"]] = rng.random((rows, 3))
    return browser.write(
        folder,
        table,
        np.arange(rows * K).reshape(rows, K),
        -np.sort(-rng.random((rows, K))),
        rng.integers(0, 256, (rows, K, 8, 8), dtype=np.uint8),
        Images(rows * K),
        rng.integers(0, 1000, (rows, BINS)),
        np.linspace(0, 1, BINS + 1),
        [[(f"word{j}", 1.0, 9) for j in range(8)]] * rows,
        ((np.arange(rows)[:, None] + np.arange(1, 7)) % rows, rng.random((rows, 6))),
        title="Benchmark",
        note="Made up.",
        heat_note="made up",
        n_tokens=10**6,
    )


def uris(rows):
    """The data URIs of each feature's images."""
    images = Images(rows * K)
    for row in range(rows):
        packed = (io.BytesIO() for _ in range(K))
        files = [images[row * K + i].save(file, "JPEG", quality=85) or file.getvalue() for i, file in enumerate(packed)]
        yield ["data:image/jpeg;base64," + base64.b64encode(file).decode() for file in files]


def write_embedded(ours, everything, rows):
    """Our page with its files and all images inside."""
    with open(everything, "w") as page:
        page.write(ours.read_text().split('<script src="table.js')[0])
        page.write("<script>mmsae.uris = []; mmsae.source = slot => [mmsae.uris[slot], 0, 0]</script>\n")
        for some in uris(rows):
            page.write(f"<script>mmsae.uris.push(...{json.dumps(some)})</script>\n")
        for details in sorted((ours.parent / "details").iterdir()):
            page.write(f"<script>{details.read_text()}</script>\n")
        page.write(f"<script>{(ours.parent / 'table.js').read_text()}</script></body></html>")


def first_view(chromium, path):
    """Seconds from navigation to the first feature, to the load event, and bytes asked for."""
    page = chromium.new_context(offline=True).new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url.split("?")[0]))
    page.goto(path.as_uri(), timeout=600_000)
    page.wait_for_function(f"{MARK} !== undefined", timeout=600_000)
    seen = page.evaluate(f"{MARK}.startTime") / 1000
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    page.context.close()
    files = [Path(url.removeprefix("file://")) for url in asked if url.startswith("file:")]
    return seen, loaded, sum(file.stat().st_size for file in files)


def time_pages(pages, chromium, rounds):
    """Results of `first_view` by page, in turn, each in a fresh Chromium."""
    times = {name: [] for name in pages}
    for _ in range(rounds):
        for name, path in pages.items():
            running = chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            times[name].append(first_view(running, path))
            running.close()
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=24_576)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        ours = write_ours(Path(folder) / "browser", arguments.features)
        everything = Path(folder) / "everything.html"
        write_embedded(ours, everything, arguments.features)
        pages = {"ours": ours, "all images embedded": everything}
        times = time_pages(pages, playwright.chromium, arguments.rounds)
    for name, several in times.items():
        seen, loaded, read = map(statistics.median, zip(*several, strict=True))
        print(
            f"{name:20} first feature after {seen:7.2f} s, loaded after {loaded:7.2f} s, {read / 2**20:7.1f} MiB read"
        )
    first, embedded = (statistics.median(t[0] for t in times[name]) for name in ("ours", "all images embedded"))
    print(f"ours takes {first / embedded:.4f} of the time, 1/{embedded / first:.0f} (target 1/10 at most)")
    return first > embedded / 10


if __name__ == "__main__":
    sys.exit(main())
