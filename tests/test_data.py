"""Data sets: the embedded world, folders, files, documents of the web, and what cannot be read."""

import errno
import io
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

from mmsae_helpers import cache, data, models
from mmsae_helpers.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images each: plain colours, one grey, one RGBA."""
    for name, color in (("cat", (200, 0, 0)), ("<script>dog", (0, 0, 200))):
        (tmp_path / name).mkdir()
        for i, mode in enumerate(("RGB", "L", "RGBA")):
            Image.new("RGB", (16, 16), color).convert(mode).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_the_embedded_world_is_balanced_and_named():
    images = data.load("tinyworld", "test", 2)
    assert np.bincount(images.labels).tolist() == [2] * 100
    assert images.class_names[0] == "red circle" and images.skipped == []
    assert images.fingerprint != data.load("tinyworld", "validation", 2).fingerprint


def test_pictures_of_several_shapes_and_where_their_object_is():
    images = data.load("tinyworld-aspects", "test", 2)
    sizes = [image.size for image in images.dataset["image"]]
    assert sorted({size: sizes.count(size) for size in sizes}.items()) == [
        ((64, 64), 100),
        ((64, 128), 50),
        ((128, 64), 50),
    ]
    assert images.fingerprint != data.load("tinyworld", "test", 2).fingerprint
    for grid in [(8, 8), (7, 5)]:
        for mask, cover in zip(images.dataset["mask"][:4], images.object_cover(grid)[:4], strict=True):
            pixels = np.asarray(mask) >= 128
            rows, columns = (np.arange(n + 1) * size // n for n, size in zip(grid, pixels.shape, strict=True))
            parts = [pixels[a:b, c:d].mean() for a, b in pairwise(rows) for c, d in pairwise(columns)]
            assert np.allclose(cover, parts)


def test_a_folder_by_class(folder):
    images = data.load(str(folder))
    assert images.class_names == ["<script>dog", "cat"] and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.load(str(folder), per_class=2).labels.tolist() == [0, 0, 1, 1]
    before = images.fingerprint
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "cat" / "0.png")
    assert data.load(str(folder)).fingerprint != before


def test_a_folder_with_splits(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    folder.rename(root / "test")
    assert len(data.load(str(root), "test").dataset) == 6


def test_a_bad_image_stops_with_its_name_or_is_counted(folder):
    bad = folder / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:45])
    with pytest.raises(InputError, match="cat/1.png.*cannot be decoded"):
        data.load(str(folder))
    images = data.load(str(folder), on_bad_image="skip")
    assert len(images.dataset) == 5 and images.skipped == [str(bad)]
    assert all(image.size == (16, 16) for image in images.dataset["image"])


def test_a_class_folder_without_images(folder):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no images"):
        data.load(str(folder))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files(tmp_path, kind):
    source = (
        data.load("tinyworld", "test", 1)
        .dataset.select(range(4))
        .rename_columns({"image": "img", "fine_label": "label"})
    )
    path = tmp_path / f"set.{kind}"
    if kind == "parquet":
        source.to_parquet(path)
    else:
        source.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    images = data.load(str(path))
    assert images.labels.tolist() == [0, 1, 2, 3] and images.dataset[0]["image"].size == (64, 64)


@pytest.mark.parametrize(
    ("name", "says"),
    [("/nowhere/set", "does not exist"), ("set.parquet", "does not exist"), ("./images", "does not exist")],
)
def test_what_is_missing_gets_one_line(name, says):
    with pytest.raises(InputError, match=says) as caught:
        data.load(name)
    assert "\n" not in str(caught.value)


def test_wrong_columns_and_splits(tmp_path):
    rows = Dataset.from_dict(
        {"picture": ["a"], "label": [0]}, features=Features({"picture": Value("string"), "label": Value("int64")})
    )
    rows.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column image or img"):
        data.load(str(tmp_path / "x.parquet"))
    with pytest.raises(InputError, match="no split"):
        data.load("tinyworld", "dev")
    with pytest.raises(InputError, match="on_bad_image"):
        data.load("tinyworld", on_bad_image="ignore")


def test_too_few_images_a_class(folder):
    with pytest.raises(InputError, match="fewer than 4"):
        data.load(str(folder), per_class=4)


def test_documents(tmp_path):
    assert data.documents("tinyworld", 5, 1) == data.documents("tinyworld", 5, 1) != data.documents("tinyworld", 5, 2)
    (tmp_path / "t.txt").write_text("one\n\ntwo\nthree\n")
    assert sorted(data.documents(str(tmp_path / "t.txt"), 3)) == ["one", "three", "two"]
    with pytest.raises(InputError, match="has 3 documents but 4"):
        data.documents(str(tmp_path / "t.txt"), 4)


def test_answers_are_read_as_class_names():
    features = Features({"fine_label": data.ClassLabel(names=["cat", "big cat", "sweet_pepper"])})
    images = data.ImageData(Dataset.from_dict({"fine_label": [0]}, features=features), [], "")
    texts = ["A cat.", "the big cat", "Sweet pepper!", "a catalogue", "a cat on a sweet pepper", ""]
    assert images.named_in(texts).tolist() == [0, 1, 2, -1, -1, -1]


def png(color=(1, 2, 3), size=(6, 4)):
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, "png")
    return content.getvalue()


@pytest.fixture
def rows_of_images(tmp_path):
    """Function (images, kind) -> path of a file with a column of these."""

    def make(images, kind):
        features = Features({"image": kind, "label": ClassLabel(names=["a", "b"])})
        rows = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    return make


def test_rows_without_an_image_are_named_or_counted(rows_of_images):
    one = {"bytes": png(), "path": None}
    path = rows_of_images([one, None, one], datasets.Image())
    with pytest.raises(InputError, match=r"image row 1 of .* cannot be decoded \(there is none\)"):
        data.load(path)
    images = data.load(path, on_bad_image="skip")
    assert images.skipped == ["row 1"] and images.labels.tolist() == [0, 0]


def test_two_images_a_row_are_refused(rows_of_images):
    path = rows_of_images([[{"bytes": png(), "path": None}] * 2], List(datasets.Image()))
    for how in ("stop", "skip"):
        with pytest.raises(InputError, match="column image of .* has no image a row but List.*: give one") as caught:
            data.load(path, on_bad_image=how)
        assert "\n" not in str(caught.value)


def test_a_set_with_named_classes_is_read_until_each_has_its_images(rows_of_images, monkeypatch):
    path = rows_of_images([{"bytes": png((i, 0, 0)), "path": None} for i in range(40)], datasets.Image())
    asked = []
    monkeypatch.setattr(
        data, "_loaded", lambda *a, real=data._loaded, **k: asked.append(k["streaming"]) or real(*a, **k)
    )
    first, again, other = (data.load(path, per_class=3, seed=seed) for seed in (0, 0, 1))
    assert np.bincount(first.labels).tolist() == [3, 3] and asked == [True] * 3
    assert first.fingerprint == again.fingerprint != other.fingerprint
    with pytest.raises(InputError, match="fewer than 21 images"):
        data.load(path, per_class=21)


@pytest.fixture
def server():
    """A site on this machine with a picture, a page, and nothing else; it serves only who says who they are."""
    pages, asked = {"/a.png": png(size=(30, 20)), "/page": b"<html>"}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = pages.get(self.path) if "mmsae" in self.headers["User-Agent"] else None
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_):
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.asked, site.url = asked, f"http://127.0.0.1:{site.server_port}"
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.server_close()


def test_images_of_the_web_are_kept_so_that_dead_links_change_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    good, missing, page = (f"{server.url}/{name}" for name in ("a.png", "gone.png", "page"))
    texts = [["see", None, "<image> it"], ["no", None], [None, "page"], [None, None], [None, "x"]]
    images = [[None, good, None], [None, missing], [page, None], [good, good], [good, None]]
    Dataset.from_dict({"texts": texts, "images": images}).to_parquet(tmp_path / "o.parquet")
    with pytest.raises(InputError, match=r"has 3 documents .* but 4 are needed \(2 left out\)"):
        data.interleaved(str(tmp_path / "o.parquet"), 4)
    read = partial(data.interleaved, str(tmp_path / "o.parquet"), 3, seed=0)
    first = read()
    wanted = ["<image> <image>", "<image> x", "see <image> < image> it"]
    assert sorted(d.text for d in first) == wanted and all(i.size == (30, 20) for d in first for i in d.opened())
    assert len(list((tmp_path / "cache" / "mmsae_images").glob("*.gone"))) == 2
    server.shutdown()
    asked = len(server.asked)
    again = read()
    assert again == first and again.skipped == first.skipped and len(server.asked) == asked
    assert all("404" in line or "cannot identify" in line for line in first.skipped)
    adapter = models.load("tinyworld/llava-next", "cpu")
    about = partial(cache.of_texts, None, adapter, layers=[1], batch_size=3)
    assert about(texts=first).description == about(texts=again).description
    (batch,) = data.interleaved_batches(adapter, first, 3)
    assert len(batch.inputs["image_sizes"]) == 4
    first[0].images[0].write_bytes(png((9, 9, 9)))
    assert about(texts=first).description != about(texts=first[1:]).description


def test_images_in_the_file_are_kept_as_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = Features({"texts": List(Value("string")), "images": List(datasets.Image())})
    rows = [{"texts": [None, "it"], "images": [{"bytes": content, "path": None}, None]} for content in (png(), b"no")]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "o.parquet")
    (document,) = data.interleaved(str(tmp_path / "o.parquet"), 1, seed=3)
    assert document.images[0].parent.name == "mmsae_images" and document.opened()[0].size == (6, 4)
    with pytest.raises(InputError, match=r"but 2 are needed \(1 left out\)"):
        data.interleaved(str(tmp_path / "o.parquet"), 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="disk full: .*mmsae_images.* make room"):
        data.interleaved(str(tmp_path / "o.parquet"), 1)
    assert not list((tmp_path / "other" / "mmsae_images").iterdir())


@pytest.mark.parametrize("name", ["llava-next", "chameleon"])
def test_raw_documents_name_no_image(name):
    adapter = models.load(f"tinyworld/{name}", "cpu")
    words = ["<image>", "<bos>"] + ["<racm3:break>", "<eoss>", "IMGIMGAZ"] * (name == "chameleon")
    texts = ["red circle", *(f"{word} red {word}{word} circle" for word in words)]
    (batch,) = data.text_batches(adapter, texts, len(texts))
    ids = batch.inputs["input_ids"]
    assert not adapter.image_mask(ids).any() and (ids == adapter.tokenizer.bos_token_id).sum(1).tolist() == [1] * len(
        ids
    )
    assert not np.isin(ids, adapter.tokenizer.convert_tokens_to_ids(words[2:])).any()
    mixed = [
        data.Interleaved(f"{word} a <image> b", [Image.new("RGB", (64, 64))]) for word in words if word != "<image>"
    ]
    (batch,) = data.interleaved_batches(adapter, mixed, len(mixed))
    assert adapter.image_mask(batch.inputs["input_ids"]).sum(1).unique().tolist() == [adapter.image_tokens((64, 64))]
    assert data.cut(adapter, texts) == data.cut(adapter, mixed) == (0, 0, 0)


@pytest.mark.parametrize(("name", "limit"), [("llava-next", 150), ("chameleon", 75), ("chameleon", 140)])
def test_what_is_cut_is_counted(name, limit):
    adapter = models.load(f"tinyworld/{name}", "cpu")
    mixed, plain = data.interleaved("tinyworld-aspects", 12, seed=1), data.documents("tinyworld", 12, seed=1)
    for some, make in ((mixed, data.interleaved_batches), (plain, data.text_batches)):
        limit = limit if some is mixed else 20
        whole, short = (
            [next(make(adapter, some, 1, start=i, stop=i + 1, max_tokens=n)).inputs for i in range(12)]
            for n in (10_000, limit)
        )
        tokens = [int(a["attention_mask"].sum() - b["attention_mask"].sum()) for a, b in zip(whole, short, strict=True)]
        pictures = [sum(len(one.get("pixel_values", ())) for one in part) for part in (whole, short)]
        counted = data.cut(adapter, some, limit)
        assert counted == (np.count_nonzero(tokens), pictures[0] - pictures[1], sum(tokens)) and counted.tokens > 0
        assert counted.images > 0 or some is plain or name == "llava-next"
