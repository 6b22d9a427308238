"""The feature browser: one page that opens from disk, and beside it sprite sheets and details it loads on demand."""

import base64
import hashlib
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from mmsae_helpers.errors import InputError

TEMPLATE = Path(__file__).resolve().parent / "browser_template"
COLUMNS = ("layer", "feature", "label", "frequency", "n_images", "similarity", "purity", "about", "max")
CHUNK = 64  # features in a file of details
SIDE = 8  # thumbnails in a row, and rows, of a sprite sheet


def write(
    folder, table, top_ids, top_values, heat, images, histograms, bin_edges, tokens, neighbours, *,
    title, note, heat_note, n_tokens, thumbnail=64,
):  # fmt: skip
    """Write the browser of R features into ``folder``, replacing what is there; returns the path of its index.html.

    ``table``: DataFrame, a row a feature, columns `COLUMNS`: layer (number or name) and feature, together unique; label
    ("" for none); frequency, the share of images it fires on, and their number n_images (0: dead); similarity
    (similarity-weighted monosemanticity) and purity of the attribute value named in about, nan where undefined; max,
    the largest activation. ``top_ids`` [R, k]: indices into ``images``, -1 for none, and ``top_values`` [R, k] their
    activations. ``heat``: uint8 [R, k, rows, cols] over the image's patches; ``heat_note`` says what it is.
    ``images``: all images measured, PIL of any mode, shown stretched to squares of ``thumbnail`` pixels.
    ``histograms`` [R, bins]: tokens with a positive activation, between ``bin_edges`` [bins + 1] or [R, bins + 1].
    ``tokens``: R lists of (word, mean activation, tokens of that word).
    ``neighbours``: row numbers [R, m], -1 for none, and decoder cosines [R, m]. ``n_tokens``: tokens measured. Raises
    InputError where shapes do not agree.
    """
    top_ids, top_values, histograms = np.asarray(top_ids), np.asarray(top_values), np.asarray(histograms)
    near, cosines = map(np.asarray, neighbours)
    edges = np.atleast_2d(np.asarray(bin_edges, dtype=float))
    _check(table, top_ids, top_values, histograms, edges, tokens, near, cosines, len(images))
    if heat.dtype != np.uint8 or heat.ndim != 4 or heat.shape[:2] != top_ids.shape:
        expected = f"uint8 {[*top_ids.shape, 'rows', 'cols']}"
        raise InputError(f"browser: heat is {heat.dtype} {list(heat.shape)}; give {expected}")
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for sub in ("details", "sprites"):
        (part / sub).mkdir(parents=True)

    used = pd.unique(top_ids[top_ids >= 0].ravel())  # by first use, so that a feature's images share a sheet
    slots = np.full(len(images) + 1, -1)  # the last one, reached by -1, stays "none"
    slots[used] = np.arange(len(used))
    for number, start in enumerate(range(0, len(used), SIDE**2)):
        sheet = _sheet(images, used[start : start + SIDE**2], thumbnail)
        sheet.save(part / "sprites" / f"{number:05d}.jpg", quality=85, subsampling=0)
    for number, start in enumerate(range(0, len(table), CHUNK)):
        rows = np.arange(start, min(start + CHUNK, len(table)))
        content = {
            "start": start,
            "ids": top_ids[rows].tolist(),
            "slots": slots[top_ids[rows]].tolist(),
            "values": _rounded(top_values[rows]),
            "histogram": histograms[rows].tolist(),
            "edges": _rounded(edges[rows] if len(edges) > 1 else edges),
            "tokens": [[[str(w), _rounded(mean), int(n)] for w, mean, n in tokens[row]] for row in rows],
            "near": near[rows].tolist(),
            "cosines": _rounded(cosines[rows]),
        }
        content |= {"grid": heat.shape[2:], "heat": base64.b64encode(heat[rows].tobytes()).decode()}
        (part / "details" / f"{number:05d}.js").write_text(f"mmsae.chunk({number},{_json(content)})", encoding="utf-8")

    columns = {name: table[name].tolist() for name in ("feature", "n_images")}
    columns |= {name: _rounded(table[name].to_numpy(float)) for name in ("frequency", "similarity", "purity", "max")}
    for name in ("layer", "label", "about"):
        codes, values = pd.factorize(table[name].fillna("").astype(str))
        columns |= {name: codes.tolist(), f"{name}s": list(values)}
    (part / "table.js").write_text(f"mmsae.table(JSON.parse({_json(_json(columns))}))", encoding="utf-8")
    content = b"".join(path.read_bytes() for path in sorted(part.rglob("*")) if path.is_file())
    version = hashlib.sha256(content).hexdigest()[:12]  # in the addresses, so that no reader's cache shows older files
    meta = {"title": title, "note": note, "heat_note": heat_note, "n_images": len(images), "n_tokens": int(n_tokens)}
    meta |= {"thumbnail": thumbnail, "side": SIDE, "chunk": CHUNK, "rare": top_ids.shape[1], "version": version}
    fills = {"title": html.escape(title), "meta": _json(meta), "version": version}
    fills |= {k: (TEMPLATE / name).read_text("utf-8") for k, name in (("style", "style.css"), ("script", "app.js"))}
    page = (TEMPLATE / "index.html").read_text("utf-8")
    page = re.sub(r"\{(title|meta|version|style|script)\}", lambda found: fills[found[1]], page)
    (part / "index.html").write_text(page, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder / "index.html"


def _check(table, top_ids, top_values, histograms, edges, tokens, near, cosines, n_images):
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(f"browser: table has no column '{missing[0]}'; it needs {', '.join(COLUMNS)}")
    if not len(table):
        raise InputError("browser: table has no rows; give a row a feature")
    if twice := table.duplicated(["layer", "feature"]).to_numpy().nonzero()[0].tolist():
        layer, feature = table[["layer", "feature"]].iloc[twice[0]]
        raise InputError(f"browser: feature {feature} of layer {layer} is in the table twice; give each one row")
    rows, k, bins = len(table), top_ids.shape[-1], histograms.shape[-1]
    shapes = {
        "top_ids": (top_ids, [(rows, k)]),
        "top_values": (top_values, [(rows, k)]),
        "histograms": (histograms, [(rows, bins)]),
        "bin_edges": (edges, [(rows, bins + 1), (1, bins + 1)]),
        "neighbours' rows": (near, [(rows, near.shape[-1])]),
        "neighbours' cosines": (cosines, [(rows, near.shape[-1])]),
    }
    for name, (array, allowed) in shapes.items():
        if array.shape not in allowed:
            raise InputError(f"browser: {name} is {list(array.shape)}; for this table it must be {list(allowed[0])}")
    if len(tokens) != rows:
        raise InputError(f"browser: tokens has {len(tokens)} lists; give one for each of the {rows} rows of the table")
    for name, array, end in (("top_ids", top_ids, n_images), ("neighbours' rows", near, rows)):
        if array.size and (array.dtype.kind not in "iu" or array.min() < -1 or array.max() >= end):
            raise InputError(f"browser: {name} must be whole numbers from -1 (none) to {end - 1}")


def _sheet(images, ids, size):
    """Up to SIDE x SIDE thumbnails of ``size`` pixels side by side; what is transparent is white."""
    sheet = Image.new("RGB", (SIDE * size, -(-len(ids) // SIDE) * size), "white")
    for at, index in enumerate(ids):
        small = images[int(index)].convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        sheet.paste(small, (at % SIDE * size, at // SIDE * size), small)
    return sheet


def _rounded(values):
    """Floats of any shape as lists with four significant digits, None where not finite."""
    flat = [float(f"{x:.4g}") if np.isfinite(x) else None for x in np.ravel(values).tolist()]
    return np.array(flat, dtype=object).reshape(np.shape(values)).tolist()


def _json(content):
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
