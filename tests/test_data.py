"""Data sets: the embedded world, folders, files, and what cannot be read."""

from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from mmsae_helpers import data
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
