"""Data sets: the embedded world, folders, files, documents of the web, and what cannot be read."""

import base64
import errno
import io
import os
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import datasets
import numpy as np
import pytest
import zstandard
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
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
    few = data.load(str(folder), per_class=2)
    assert few.labels.tolist() == [0, 0, 1, 1] and few.unlabelled == 0
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


@pytest.mark.parametrize("inside", ["", "cat"])
def test_folders_of_splits_are_no_classes(folder, tmp_path_factory, inside):
    root = tmp_path_factory.mktemp("splits")
    for split in ("Train", "Test"):
        shutil.copytree(folder / "cat", root / inside / split / ("" if inside else "cat"))
        shutil.copytree(folder / "cat", root / ("dog/" + split if inside else split + "/dog"))
    if inside:
        with pytest.raises(InputError, match="splits where classes are wanted, or inside"):
            data.load(str(root))
        return
    images = data.load(str(root), "test")
    assert images.class_names == ["cat", "dog"] and len(images.dataset) == 6
    for old, new in (("Train", "training"), ("Test", "testing")):
        (root / old).rename(root / new)
    with pytest.raises(InputError, match="splits where classes are wanted"):
        data.load(str(root))


def test_a_lone_class_folder_without_images_is_no_split(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="class folder .*cat has no images"):
        data.load(str(tmp_path))


def test_a_class_without_an_image_in_the_part_is_named(tmp_path):
    for name, n in (("many", 30), ("one", 1)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(InputError, match=r"class one of .*, test, has fewer than 1 images, 0: lower"):
        data.load(str(tmp_path), "test", 1)


def test_a_source_that_is_nowhere_says_where_was_looked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(InputError, match=f"no folder of that name is in {tmp_path}"):
        data.load("imgs/plain")
    with pytest.raises(InputError, match="name is empty"):
        data.load("")


@pytest.mark.parametrize("limit", [-5, 1])
def test_documents_are_not_cut_to_nothing(limit):
    model = models.load("tinyworld/gemma", "cpu")
    for call in (
        lambda: list(data.document_batches(model, ["a red circle"], 1, max_tokens=limit)),
        lambda: data.cut(model, ["a red circle"], limit),
    ):
        with pytest.raises(InputError, match=f"max_tokens is {limit}: give at least 2"):
            call()


def test_too_few_images_a_class(folder):
    with pytest.raises(InputError, match="fewer than 4"):
        data.load(str(folder), per_class=4)


def test_documents(tmp_path):
    some, again, others = (list(data.documents("tinyworld", 5, seed)) for seed in (1, 1, 2))
    assert some == again != others
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
    assert list(again) == list(first) and again.skipped == first.skipped and len(server.asked) == asked
    assert all("404" in line or "cannot identify" in line for line in first.skipped)
    adapter = models.load("tinyworld/llava-next", "cpu")
    about = partial(cache.of_texts, None, adapter, layers=[1], batch_size=3)
    assert about(texts=first).description == about(texts=again).description
    (batch,) = data.document_batches(adapter, first, 3)
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
    (batch,) = data.document_batches(adapter, texts, len(texts))
    ids = batch.inputs["input_ids"]
    assert not adapter.image_mask(ids).any() and (ids == adapter.tokenizer.bos_token_id).sum(1).tolist() == [1] * len(
        ids
    )
    assert not np.isin(ids, adapter.tokenizer.convert_tokens_to_ids(words[2:])).any()
    mixed = [
        data.Interleaved(f"{word} a <image> b", [Image.new("RGB", (64, 64))]) for word in words if word != "<image>"
    ]
    (batch,) = data.document_batches(adapter, mixed, len(mixed))
    assert adapter.image_mask(batch.inputs["input_ids"]).sum(1).unique().tolist() == [adapter.image_tokens((64, 64))]
    assert data.cut(adapter, texts) == data.cut(adapter, mixed) == (0, 0, 0)


@pytest.mark.parametrize(("name", "limit"), [("llava-next", 150), ("chameleon", 75), ("chameleon", 140)])
def test_what_is_cut_is_counted(name, limit):
    adapter = models.load(f"tinyworld/{name}", "cpu")
    mixed, plain = data.interleaved("tinyworld-aspects", 12, seed=1), data.documents("tinyworld", 12, seed=1)
    for some in (mixed, plain):
        limit = limit if some is mixed else 20
        whole, short = (
            [next(data.document_batches(adapter, some, 1, start=i, stop=i + 1, max_tokens=n)).inputs for i in range(12)]
            for n in (10_000, limit)
        )
        tokens = [int(a["attention_mask"].sum() - b["attention_mask"].sum()) for a, b in zip(whole, short, strict=True)]
        pictures = [sum(len(one.get("pixel_values", ())) for one in part) for part in (whole, short)]
        counted = data.cut(adapter, some, limit)
        assert counted == (np.count_nonzero(tokens), pictures[0] - pictures[1], sum(tokens)) and counted.tokens > 0
        assert counted.images > 0 or some is plain or name == "llava-next"


PARTS = ("train", "validation", "test")


def rows_file(path, labels, kind="int64", images=None):
    """A parquet file with an image, another for each row, and a label a row."""
    images = [png((i, 0, 0)) for i in range(len(labels))] if images is None else images
    kind = kind if not isinstance(kind, str) else Value(kind)
    features = Features({"image": Value("binary"), "label": kind})
    rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    Dataset.from_list(rows, features=features).to_parquet(path, batch_size=7)
    return str(path)


def reds(images):
    return [np.asarray(image)[0, 0, 0].item() for image in images.dataset["image"]]


@pytest.mark.parametrize("how", ["class folders", "rows", "streamed rows"])
def test_a_source_without_splits_is_divided_into_disjoint_parts(tmp_path, how):
    labels = [i % 2 for i in range(60)]
    if how == "class folders":
        for i, label in enumerate(labels):
            (tmp_path / "set" / f"c{label}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / f"c{label}" / f"{i}.png").write_bytes(png((i, 0, 0)))
        name, per_class = str(tmp_path / "set"), None
    else:
        name = rows_file(tmp_path / "x.parquet", labels, ClassLabel(names=["a", "b"]))
        per_class = 1 if how == "streamed rows" else None
    found = {part: data.load(name, part) for part in PARTS}
    assert [len(images.dataset) for images in found.values()] == [48, 6, 6]
    assert sorted(red for images in found.values() for red in reds(images)) == list(range(60))
    assert [images.part for images in found.values()] == list(PARTS) and data.load(name).part == ""
    assert len(data.load(name).dataset) == 60 and reds(data.load(name, "val")) == reds(found["validation"])
    for seed in range(5) if per_class else ():
        for part in PARTS:
            images = data.load(name, part, per_class, seed=seed)
            assert set(reds(images)) <= set(reds(found[part])) and images.labels.tolist().count(0) == per_class
    with pytest.raises(InputError, match="has no split 'dev': there are train, validation, test"):
        data.load(name, "dev")


def test_rows_keep_their_part_when_more_follow_and_too_few_are_refused(tmp_path):
    few, more = (rows_file(tmp_path / f"{n}.parquet", [0, 1] * n) for n in (10, 25))
    assert set(reds(data.load(few, "test"))) == {red for red in reds(data.load(more, "test")) if red < 20}
    part = next(part for part in PARTS if part not in data._ten(0)[:4])
    with pytest.raises(InputError, match=f"no image of .* {part} is left of 0"):
        data.load(rows_file(tmp_path / "4.parquet", [0, 1, 0, 1]), part)


def test_classes_are_the_same_in_every_part(tmp_path):
    name = rows_file(tmp_path / "x.parquet", [0] * 19 + [5] + [7] * 20)
    assert {tuple(data.load(name, part).class_names) for part in PARTS} == {("0", "5", "7")}


def test_a_folder_with_splits_has_no_others(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    for split in ("train", "val"):
        (root / split / "cat").mkdir(parents=True)
        (root / split / "cat" / "1.png").write_bytes(png((7 if split == "val" else 8, 0, 0)))
    for asked in ("test", None, "dev"):
        with pytest.raises(InputError, match="has no split .*: there are train, val"):
            data.load(str(root), asked)
    for asked in ("val", "valid", "validation"):
        assert reds(data.load(str(root), asked)) == [7] and data.load(str(root), asked).class_names == ["cat"]
    assert data.load("tinyworld", "val", 1).fingerprint == data.load("tinyworld", "validation", 1).fingerprint


def test_a_data_set_of_the_hub_lacks_a_split(tmp_path, monkeypatch):
    for split in ("train", "val"):
        rows_file(tmp_path / f"{split}.parquet", [0, 1])
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "val")}
    real = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda name, **k: real("parquet", data_files=files, **k))
    assert len(data.load("me/set", "train").dataset) == len(data.load("me/set", "valid").dataset) == 2
    for per_class in (None, 1):
        with pytest.raises(InputError, match="cannot load data set me/set: .*train.*val") as caught:
            data.load("me/set", "test", per_class)
        assert "\n" not in str(caught.value)


def test_one_table_of_documents_has_disjoint_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"texts": [[None, f"t{i}"] for i in range(30)], "images": [[str(tmp_path / "a.png"), None]] * 30}
    (tmp_path / "a.png").write_bytes(png())
    Dataset.from_dict(rows).to_parquet(tmp_path / "o.parquet")
    read = partial(data.interleaved, str(tmp_path / "o.parquet"))
    parts = [{d.text for d in read(n, split=split)} for n, split in ((24, "train"), (3, "val"), (3, "test"))]
    assert [len(part) for part in parts] == [24, 3, 3] and len(set.union(*parts)) == 30 == len(read(30))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("int64", [0, -1, 1, None, 1, 0]),
        ("float64", [0.0, float("nan"), 1.0, None, 1.0, 0.0]),
        ("string", ["0", "", "1", None, "1", "0"]),
        (ClassLabel(names=["0", "1"]), [0, -1, 1, None, 1, 0]),
    ],
)
def test_rows_without_a_label_stop_or_are_counted(tmp_path, kind, labels, streamed):
    name, per_class = rows_file(tmp_path / "x.parquet", labels, kind), 2 if streamed else None
    with pytest.raises(InputError, match=r"\d of \d rows .* have no label .*set on_bad_label: skip") as caught:
        data.load(name, per_class=per_class)
    assert "\n" not in str(caught.value)
    images = data.load(name, per_class=per_class, on_bad_label="skip")
    assert sorted(zip(reds(images), images.labels.tolist(), strict=True)) == [(0, 0), (2, 1), (4, 1), (5, 0)]
    assert images.class_names == ["0", "1"] and images.left_out()["not decoded"] == 0
    assert images.left_out()["unlabelled"] == 2 or streamed and isinstance(kind, ClassLabel)  # read until all are there
    with pytest.raises(InputError, match="on_bad_label is 'ignore'"):
        data.load(name, on_bad_label="ignore")


def test_nothing_left_is_no_data_set(tmp_path, folder):
    for kind in ("int64", ClassLabel(names=["a"])):
        for per_class in (None, 1):
            with pytest.raises(InputError, match="no image of .* is left of 2: 2 rows have no label"):
                data.load(rows_file(tmp_path / "x.parquet", [-1, None], kind), None, per_class, on_bad_label="skip")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="is left of 6: 0 rows have no label, 6 images cannot be decoded"):
        data.load(str(folder), on_bad_image="skip")


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=12))
def test_classes_that_are_numbers_are_in_their_order(numbers):
    images = [{"bytes": b"", "path": None}] * len(numbers)
    for labels in (list(numbers), [str(n) for n in numbers], [float(n) for n in numbers]):
        dataset, coded = data._normalised(Dataset.from_dict({"image": images, "label": labels}), "x")
        names = dataset.features["fine_label"].names
        assert names == [str(n) for n in sorted(numbers)] and [int(names[i]) for i in coded] == list(numbers)


def test_several_labels_a_row_are_refused(tmp_path):
    with pytest.raises(InputError, match="no label a row but List"):
        data.load(rows_file(tmp_path / "x.parquet", [[0, 1], [1]], List(Value("int64"))))


GRADIENT = np.linspace(0, 1, 24).reshape(4, 6)


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        ((GRADIENT * 65535).round().astype(np.uint16), "png"),
        ((GRADIENT * 65535).round().astype(np.uint16), "tiff"),
        ((GRADIENT * 65535).round().astype(np.int32), "tiff"),
        (GRADIENT.astype(np.float32), "tiff"),
        ((GRADIENT * 255).astype(np.float32), "tiff"),
    ],
)
def test_grey_of_many_bits_is_scaled(tmp_path, pixels, suffix):
    (tmp_path / "set" / "a").mkdir(parents=True)
    path = tmp_path / "set" / "a" / f"0.{suffix}"
    Image.fromarray(pixels).save(path)
    (image,) = data.load(str(tmp_path / "set")).dataset["image"]
    wanted = np.repeat((GRADIENT * 255).round()[..., None], 3, 2)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), wanted)
    assert np.array_equal(np.asarray(data.Interleaved("<image>", [path]).opened()[0].convert("RGB")), wanted)
    assert np.array_equal(np.asarray(data.upright(Image.fromarray(pixels)).convert("RGB")), wanted)


@pytest.mark.parametrize("value", [-1.0, 300.0, float("nan"), float("inf")])
def test_floats_of_another_range_are_refused_by_name(tmp_path, value):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a" / "0.tiff")
    with pytest.raises(InputError, match=r"a/0.tiff of .* cannot be decoded \(mode F with values from"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
def test_images_are_upright_everywhere(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "a").mkdir(parents=True)
    path, exif = tmp_path / "set" / "a" / f"0.{suffix}", Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 32))  # white on the left: then above
    picture.save(path, exif=exif)
    features = Features({"texts": List(Value("string")), "images": List(datasets.Image())})
    for i, image in enumerate([{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]):
        rows = [{"texts": [None, "it"], "images": [image, None]}]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{i}.parquet")
    documents = [data.interleaved(str(tmp_path / f"{i}.parquet"), 1)[0] for i in range(2)]
    rows = rows_file(tmp_path / "rows.parquet", [0], images=[path.read_bytes()])
    seen = [data.load(str(tmp_path / "set")).dataset[0]["image"], data.load(rows).dataset[0]["image"]]
    for image in seen + [document.opened()[0] for document in documents]:
        pixels = np.asarray(image.convert("L")).astype(int)
        assert pixels.shape == (64, 32) and pixels[:28].min() > 200 and pixels[36:].max() < 50
    adapter = models.load("tinyworld/llava-next", "cpu")
    (batch,) = data.document_batches(adapter, documents, 2)
    assert batch.inputs["image_sizes"].tolist() == [[64, 32]] * 2


def test_hidden_entries_are_no_classes_and_no_images(folder):
    before = data.load(str(folder))
    (folder / ".ipynb_checkpoints").mkdir()
    for place in ("__MACOSX/cat/0.png", ".git/x/0.png", "cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(b"no picture")
    after = data.load(str(folder))
    assert after.class_names == before.class_names and after.fingerprint == before.fingerprint


def test_text_files_in_other_encodings(tmp_path):
    (tmp_path / "t.txt").write_bytes("one\ntwo\n".encode("utf-8-sig"))
    assert sorted(data.documents(str(tmp_path / "t.txt"), 2)) == ["one", "two"]
    for content in ("café\n".encode("latin-1"), "one\n".encode("utf-16")):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(InputError, match="t.txt as a text file in UTF-8") as caught:
            data.documents(str(tmp_path / "t.txt"), 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="none.txt .*No such file"):
        data.documents(str(tmp_path / "none.txt"), 1)


@pytest.mark.parametrize("place", [b"caf\xe9/0.png", b"cat/caf\xe9.png"])
def test_names_that_are_not_utf8(folder, place):
    path = os.fsencode(folder) + b"/" + place
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(png())
    with pytest.raises(InputError, match=r"caf\\udce9.* is not UTF-8: rename it") as caught:
        data.load(str(folder))
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize("length", [200, 20_000])
def test_images_in_base64_get_a_short_line(tmp_path, length, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = base64.b64encode(os.urandom(length)).decode()
    Dataset.from_dict({"image": [text], "label": [0]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        data.load(str(tmp_path / "x.parquet"))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    rows = {"texts": [[None], [None]], "images": [[text], [str(tmp_path / "a.png")]]}
    (tmp_path / "a.png").write_bytes(png())
    Dataset.from_dict(rows).to_parquet(tmp_path / "o.parquet")
    skipped = [data.interleaved(str(tmp_path / "o.parquet"), 1, seed).skipped for seed in range(6)]
    assert any(skipped) and all(len(line) < 250 for lines in skipped for line in lines)


def test_asked_columns_are_there_or_named():
    images = data.load("tinyworld", "test", 1)
    images.need("image", "color")
    with pytest.raises(InputError, match="has no column hue and mood: it has image, .*color"):
        images.need("image", "hue", "mood")


def test_an_image_has_one_digest(tmp_path):
    square, wide = (Image.new("RGB", size, (1, 2, 3)) for size in ((4, 4), (8, 2)))
    square.save(tmp_path / "a.png")
    wide.save(tmp_path / "b.png")
    square.save(tmp_path / "c.png")
    a, b, c = (data.image_digest(tmp_path / f"{name}.png") for name in "abc")
    assert a == c != b and data.image_digest(square) == data.image_digest(square.copy()) != data.image_digest(wide)


def test_texts_in_zstandard(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    real = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda name, **k: real("json", data_files=str(path), **k))
    assert sorted(data.documents("me/texts", 2)) == ["one", "two"]


def test_a_configuration_is_named_after_a_colon(tmp_path, monkeypatch):
    rows_file(tmp_path / "x.parquet", [0, 1])
    real, asked = data.load_dataset, []
    monkeypatch.setattr(data, "load_dataset", lambda *a, **k: asked.append(a) or real("parquet", data_files=files, **k))
    files = {"train": str(tmp_path / "x.parquet")}
    for name, args in (("me/set", ("me/set",)), ("me/set:large", ("me/set", "large"))):
        data.load(name, "train")
        assert asked.pop() == args and not asked


def test_what_is_drawn_from_tables_lies_on_disk(tmp_path, monkeypatch):
    """More than 2 GiB of pictures in one table in memory ended in "offset overflow"."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.png").write_bytes(png())
    rows_file(tmp_path / "x.parquet", [0, 1] * 20, ClassLabel(names=["a", "b"]))
    rows = {"texts": [[None, f"t{i}"] for i in range(30)], "images": [[str(tmp_path / "a.png"), None]] * 30}
    Dataset.from_dict(rows).to_parquet(tmp_path / "o.parquet")
    Dataset.from_dict({"text": [f"t{i}" for i in range(30)]}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    found = [data.load(str(tmp_path / "x.parquet"), per_class=5).dataset]
    found += [data.interleaved(str(tmp_path / "o.parquet"), 20)._rows]
    found += [data.documents(str(tmp_path / name), 2)._rows for name in ("t.parquet", "t.txt")]
    for one in found:
        (file,) = {entry["filename"] for entry in one.cache_files}
        assert file.startswith(str(tmp_path / "cache" / "mmsae_drawn-"))


def test_documents_are_read_as_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Dataset.from_dict({"text": [f"t{i}" for i in range(30)]}).to_parquet(tmp_path / "t.parquet")
    some = data.documents(str(tmp_path / "t.parquet"), 20)
    assert len(some) == 20 and len(set(some)) == 20 and some[-1] == list(some)[-1]
    assert list(some[5:]) == list(some)[5:] and list(some[::-7].select([1, 0])) == [some[12], some[19]]
    adapter = models.load("tinyworld/gemma", "cpu")
    about = [cache.of_texts(None, adapter, t, [1], batch_size=3).description["texts"] for t in (some, list(some), [])]
    assert about[0] == about[1] == cache.fingerprint(list(some)) and about[2] == cache.fingerprint([])


def test_a_shuffled_draw_opens_one_shard_after_the_other(tmp_path):
    (tmp_path / ".gitattributes").write_text("")
    for shard in range(3):
        texts = [f"{shard} {i}" for i in range(40)]
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"train-{shard}.parquet", batch_size=10)
    rows = data._shuffled(data._open(str(tmp_path), None, streaming=True, otherwise="train")[0], 0, 10)
    drawn = [row["text"] for row in rows]
    shards = [text.split()[0] for text in drawn]
    assert len(set(shards[:30])) == 1 and len(set(drawn)) == 120
    assert drawn != sorted(drawn)


@pytest.mark.parametrize("metadata", [True, False])
def test_a_copy_of_a_hub_repository_is_read_as_the_hub_would(tmp_path, metadata):
    """By its folder and configuration, streamed or not, whatever else lies there."""
    for config, reds_of in (("small", 4), ("large", 9)):
        (tmp_path / config).mkdir()
        for split in ("train", "test"):
            rows_file(
                tmp_path / config / f"{split}-00000-of-00001.parquet", [0, 1] * reds_of, ClassLabel(names=["a", "b"])
            )
    if metadata:
        (tmp_path / ".gitattributes").write_text("")
        Image.new("RGB", (4, 4)).save(tmp_path / "logo.png")
        files = "".join(
            f"- config_name: {c}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {c}/{s}-*\n" for s in ("train", "test"))
            for c in ("small", "large")
        )
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    for per_class in (None, 2):
        images = data.load(f"{tmp_path}:large" if metadata else str(tmp_path / "large"), "train", per_class)
        assert len(images.dataset) == (per_class or 9) * 2
    with pytest.raises(InputError, match="cannot load data set .*dev"):
        data.load(f"{tmp_path}:small" if metadata else str(tmp_path / "small"), "dev")


def test_a_table_beside_class_folders_is_none_of_the_data(folder):
    (folder / "metadata.csv").write_text("file_name\n")
    assert len(data.load(str(folder)).dataset) == 6


def test_copies_of_one_name_are_told_apart_and_so_is_what_changes(tmp_path):
    """datasets caches a folder by its last name and configuration, and hands out another's rows."""

    def copy(owner, color):
        (folder := tmp_path / owner / "set").mkdir(parents=True, exist_ok=True)
        rows_file(
            folder / "test-0.parquet", [0, 1], ClassLabel(names=["a", "b"]), [png((color + i, 0, 0)) for i in (0, 1)]
        )
        files = "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: test-*\n"
        (folder / "README.md").write_text(f"---\n{files}---\n")
        return str(folder)

    for owner, color in (("me", 10), ("you", 20), ("me", 30)):
        for per_class in (None, 1):
            assert reds(data.load(copy(owner, color), per_class=per_class)) == [color, color + 1]


def test_another_draw_of_the_world_shares_no_picture_and_no_text():
    first, other, again = (data.load(name, "test", 1) for name in ("tinyworld", "tinyworld:1", "tinyworld:1"))
    assert first.fingerprint != other.fingerprint == again.fingerprint and first.class_names == other.class_names
    pictures = [{image.tobytes() for image in some.dataset["image"]} for some in (first, other, again)]
    assert not pictures[0] & pictures[1] and pictures[1] == pictures[2]
    texts = [[*data.documents(name, 50)] for name in ("tinyworld", "tinyworld:1")]
    assert sum(a == b for a, b in zip(*texts, strict=True)) < 5
    mixed = [data.interleaved(name, 3)[0].text for name in ("tinyworld-aspects", "tinyworld-aspects:2")]
    assert mixed[0] != mixed[1]
    with pytest.raises(InputError, match="tinyworld:one: a draw of the embedded world is a number"):
        data.load("tinyworld:one")
