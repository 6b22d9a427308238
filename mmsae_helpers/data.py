"""Data sets: the embedded world, a hub data set, a folder of images by class, parquet or arrow files; and texts."""

import errno
import hashlib
import io
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from threading import get_ident
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Image, IterableDataset, load_dataset

from mmsae_helpers.activations import Inputs
from mmsae_helpers.errors import InputError, first_line

EMBEDDED = "tinyworld"
EMBEDDED_ASPECTS = "tinyworld-aspects"  # the same world in pictures of three shapes
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
PLACEHOLDER = "<image>"
_TEXTS = ("caption", "question", "answer")
_ALIASES = {"image": ("image", "img"), "fine_label": ("fine_label", "label"), "caption": ("caption", "text")}


class ImageData(NamedTuple):
    """Images with labels, and what became of those that could not be read."""

    dataset: Dataset  # columns image, fine_label, and coarse_label, caption, question, answer, ... where there are any
    skipped: list[str]  # images left out because they cannot be decoded
    fingerprint: str  # changes whenever the content does

    @property
    def labels(self) -> np.ndarray:
        """Fine labels, int [N]."""
        return np.asarray(self.dataset["fine_label"])

    @property
    def class_names(self) -> list[str]:
        """Names of the fine classes, by label."""
        return self.dataset.features["fine_label"].names

    def concepts(self) -> pd.DataFrame:
        """Which words are true of which image, bool [N, words]: the words of its class name, and attribute columns."""
        columns = {}
        for label, name in enumerate(self.class_names):
            for word in re.split(r"[\s_,]+", name.lower()):
                columns[word] = columns.get(word, False) | (self.labels == label)
        for name, kind in self.dataset.features.items():
            if name not in _TEXTS and getattr(kind, "dtype", None) == "string":
                values = np.asarray(self.dataset[name])
                columns |= {value: values == value for value in np.unique(values).tolist()}
        return pd.DataFrame(columns)

    def named_in(self, texts: Iterable[str]) -> np.ndarray:
        """The class whose name occurs in each text, int [N]; -1 where none does, or several do.

        Case and punctuation do not matter; a name inside a longer one that is there does not count.
        """
        names = [_words(name) for name in self.class_names]
        out = []
        for text in map(_words, texts):
            found = [name for name in names if f" {name} " in f" {text} "]
            found = [n for n in found if not any(n != other and f" {n} " in f" {other} " for other in found)]
            out.append(names.index(found[0]) if len(found) == 1 else -1)
        return np.array(out, dtype=int)

    def object_cover(self, grid: tuple[int, int], crop=lambda mask: mask) -> np.ndarray | None:
        """Fraction of each patch that the object's mask covers, [N, rows * columns]; None where there are no masks.

        The grid spans the whole picture, or what ``crop`` (`Adapter.crop`) leaves of it, whatever its size: edges are
        rounded down to pixels, as in `patches.paint`.
        """
        if "mask" not in self.dataset.column_names:
            return None
        out = []
        for mask in self.dataset["mask"]:
            cover = (np.asarray(crop(mask).convert("L")) >= 128).astype(np.float64)
            for axis, n in enumerate(grid):
                edges = np.arange(n + 1) * cover.shape[axis] // n
                area = np.expand_dims(np.maximum(np.diff(edges), 1), 1 - axis)
                cover = np.add.reduceat(cover, edges[:-1], axis=axis) / area
            out.append(cover.reshape(-1))
        return np.array(out)


class Interleaved(NamedTuple):
    """A document whose text has one `PLACEHOLDER` an image."""

    text: str
    images: list[PIL.Image.Image | Path]  # or the file with it

    def opened(self) -> list[PIL.Image.Image]:
        """The images; of a file no more than its header is read until the pixels are asked for."""
        return [PIL.Image.open(image) if isinstance(image, Path) else image for image in self.images]


class Documents(list):
    """A list of `Interleaved`, and in ``skipped`` what was left out because an image could not be had."""

    def __init__(self, documents=(), skipped=()):
        super().__init__(documents)
        self.skipped: list[str] = list(skipped)


class Cut(NamedTuple):
    """What a context leaves out of documents."""

    documents: int  # that are longer
    images: int
    tokens: int


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def load(name: str, split="test", per_class: int | None = None, *, seed=0, on_bad_image="stop") -> ImageData:
    """Load labelled images.

    ``name`` is ``tinyworld``, ``tinyworld-aspects`` (half of its pictures wide or tall), a folder with one subfolder of
    images a class (or with ``split`` between), a ``.parquet`` or ``.arrow`` file, or a hub id. ``per_class`` keeps that
    many images of each class, drawn with ``seed``; a hub data set that names its classes is then read only until they
    are there. An image that cannot be decoded stops with its name, or with ``on_bad_image="skip"`` is left out and
    listed in ``skipped``. Raises InputError for what is missing or unreadable.
    """
    if on_bad_image not in ("stop", "skip"):
        raise InputError(f"on_bad_image is {on_bad_image!r}: it must be stop or skip")
    if sizes := _embedded_sizes(name, split):
        from mmsae_helpers.tinyworld.dataset import SPLITS, make_dataset

        count = per_class or SPLITS[split]
        return ImageData(make_dataset(split, count, seed, sizes), [], f"{name}/{split}/{count}/{seed}/1")
    dataset = _open(name, split, streaming=per_class is not None)
    if isinstance(dataset, IterableDataset):
        dataset = _drawn(dataset, per_class, seed) or _open(name, split)
    dataset = _normalised(dataset, name)
    if per_class is not None:
        dataset = dataset.select(_per_class(np.asarray(dataset["fine_label"]), per_class, seed))
    dataset, skipped, digest = _decodable(dataset, name, on_bad_image)
    return ImageData(dataset, skipped, digest)


def documents(name: str, count: int, seed: int = 0) -> list[str]:
    """``count`` text-only documents: ``tinyworld``, a ``.txt`` file (one a line), a ``.parquet`` file or a hub id with
    a ``text`` column. Raises InputError where there are fewer or none."""
    if name == EMBEDDED:
        from mmsae_helpers.tinyworld.language import documents as make

        return [document.text for document in make(count, seed)]
    path = Path(name).expanduser()
    if path.suffix == ".txt":
        if not path.is_file():
            raise InputError(f"text file {path} does not exist")
        texts = [line for line in path.read_text().splitlines() if line.strip()]
    else:
        rows = _open(name, "train", streaming=True).shuffle(seed=seed, buffer_size=10_000)
        if "text" not in (rows.column_names or ["text"]):
            raise InputError(f"{name} has no column text: it has {', '.join(rows.column_names)}")
        texts = [row["text"] for row in rows.take(count)]
    if len(texts) < count:
        few = f"{name} has {len(texts)} documents but {count} are needed"
        raise InputError(f"{few}: lower the number in the parameters")
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:count]]


def interleaved(name: str, count: int, seed: int = 0, split: str = "train") -> Documents:
    """``count`` documents of text and images: ``tinyworld``, ``tinyworld-aspects``, or a hub id or ``.parquet`` file
    laid out as OBELICS.

    There, columns ``texts`` and ``images`` have equally long rows with None in one where the other has an item; an
    image is a URL, a path or the file itself. Documents with an image that cannot be had, or with none at all, are left
    out and listed in ``skipped``. Images that are no files yet are kept in ``mmsae_images`` of the datasets cache
    (``HF_DATASETS_CACHE``), with a ``.gone`` file for each URL without one, so that another run has the same documents
    whatever became of the links; delete these to ask again. Raises InputError where there are fewer than ``count``.
    """
    if sizes := _embedded_sizes(name, split):
        from mmsae_helpers.tinyworld.dataset import interleaved as make

        return Documents(Interleaved(*document) for document in make(count, seed, split, sizes))
    rows = _open(name, split, streaming=True).shuffle(seed=seed, buffer_size=10_000)
    if missing := {"texts", "images"} - set(rows.column_names or ["texts", "images"]):
        raise InputError(f"{name} has no column {' and '.join(sorted(missing))}: it has {', '.join(rows.column_names)}")
    found, numbered = Documents(), enumerate(rows.decode(False))
    with ThreadPoolExecutor(32) as pool:
        while chunk := list(islice(numbered, min(256, count - len(found)))):
            for (i, row), images in zip(chunk, pool.map(lambda item: _kept(item[1]["images"]), chunk), strict=True):
                if not images or isinstance(images, str):
                    found.skipped.append(f"row {i}: {images or 'no image'}")
                    continue
                parts = [(t, s) for t, s in zip(row["texts"], row["images"], strict=True) if t or s]
                texts = [PLACEHOLDER if s else t.replace(PLACEHOLDER, "< image>") for t, s in parts]
                found.append(Interleaved(" ".join(texts), images))
    if len(found) < count:
        few = f"{name} has {len(found)} documents with all their images but {count} are needed"
        raise InputError(f"{few} ({len(found.skipped)} left out): lower the number in the parameters")
    return found


def interleaved_batches(adapter, documents: list[Interleaved], batch_size: int, *, start=0, stop=None, max_tokens=None):
    """Model inputs for documents ``start`` to ``stop``, cut at ``max_tokens`` (the model's context by default).

    An image that does not fit whole is left out with all that follows it; `cut` counts. Raises InputError where nothing
    is left.
    """
    stop = len(documents) if stop is None else stop
    limit = max_tokens or adapter.config.max_position_embeddings
    for first in range(start, stop, batch_size):
        rows = range(first, min(first + batch_size, stop))
        texts, images, _ = zip(*(_fitted(adapter, documents[i], limit, i) for i in rows), strict=True)
        inputs = adapter.encode(texts, images, fits=False)
        shape = inputs["input_ids"].shape
        yield Inputs(torch.tensor(rows), {k: v[:, :limit] if v.shape == shape else v for k, v in inputs.items()})


def cut(adapter, documents, max_tokens: int | None = None) -> Cut:
    """What `text_batches` or `interleaved_batches` leave out of ``documents``, counted without reading pixels."""
    total, limit = np.zeros(3, int), max_tokens or adapter.config.max_position_embeddings
    for i, document in enumerate(documents):
        _, images, beyond = _fitted(adapter, document, limit, i)
        total += beyond > 0, len(getattr(document, "images", [])) - len(images), beyond
    return Cut(*total.tolist())


def _fitted(adapter, document, limit: int, at: int) -> tuple[str, list[PIL.Image.Image], int]:
    """Text and images of document number ``at`` before the first image that exceeds ``limit`` tokens; tokens cut."""
    before, token, after = adapter.image_words
    pieces, images = [document], []
    if isinstance(document, Interleaved):
        pieces, images = document.text.split(PLACEHOLDER), document.opened()
    pieces = [adapter.raw(piece) for piece in pieces]
    ids = np.array(adapter.tokenizer(f"{before}{token}{after}".join(pieces))["input_ids"])
    places, length = np.flatnonzero(ids == adapter.image_token_id), np.ones(len(ids), int)
    for place, image in zip(places, images, strict=False):  # encode compares the counts
        length[place] = adapter.image_tokens(image.size[::-1])
    ends = length.cumsum()
    fit, kept = int((ends[places] <= limit).sum()), limit
    if fit < len(places):
        kept = min(limit, int(length[: places[fit] - bool(before)].sum()))
        if kept < 2:  # no more than BOS
            raise InputError(
                f"document {at} begins with an image that is longer than {limit} tokens: allow more tokens"
            )
        pieces, images = pieces[: fit + 1], images[:fit]
    return token.join(pieces), images, max(0, int(ends[-1]) - kept)


def _kept(sources: list) -> list[Path] | str:
    """Files with the images of a row, or why one of them cannot be had."""
    try:
        return [_file((s["bytes"] or s["path"]) if isinstance(s, dict) else s) for s in filter(None, sources)]
    except InputError:  # the disk is full
        raise
    except Exception as error:  # the network, the file system and Pillow raise dozens of kinds
        return first_line(error)


def _file(source: str | bytes) -> Path:
    """The file with the image at a path, or else the one that an image in bytes or at a URL is kept in."""
    is_url = isinstance(source, str) and source.startswith(("http://", "https://"))
    if isinstance(source, str) and not is_url:
        PIL.Image.open(source).convert("RGB")
        return Path(source)
    name = hashlib.sha256(source.encode() if is_url else source).hexdigest()
    file = Path(datasets.config.HF_DATASETS_CACHE) / "mmsae_images" / name
    gone = file.with_suffix(".gone")
    if gone.exists():
        raise OSError(gone.read_text())
    if not file.exists():
        try:
            content = _fetched(source) if is_url else source
            PIL.Image.open(io.BytesIO(content)).convert("RGB")
        except Exception as error:
            write(gone, first_line(error).encode())
            raise
        write(file, content)
    return file


def _fetched(url: str) -> bytes:
    """What a URL answers; raises TimeoutError for what takes longer than a minute, however steadily it comes."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (compatible; mmsae)"})
    content, end = b"", time.monotonic() + 60
    with urllib.request.urlopen(request, timeout=20) as answer:
        while part := answer.read1():
            content += part
            if time.monotonic() > end:
                raise TimeoutError("took longer than a minute")
    return content


def write(path: Path, content: bytes) -> None:
    """Write atomically: a reader sees the whole file or none, and a failure leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needs = f"{len(content) / 2**20:.1f} MiB"
        kept = "make room and run again (what is finished is kept)"
        raise InputError(f"disk full: {path} needs {needs}; {kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def batches(
    adapter, dataset: Dataset, batch_size: int, *, question="", texts=None, start=0, stop=None
) -> Iterator[Inputs]:
    """Model inputs for samples ``start`` to ``stop``, the image before ``question`` in the chat template.

    ``texts``, one a sample, are forced as they are instead, such as the captions of a captioner.
    """
    if texts is None:
        texts = [adapter.prompt(question)] * len(dataset)
    elif len(texts) != len(dataset):
        raise InputError(f"{len(texts)} texts but {len(dataset)} images: give one text an image")
    stop = len(dataset) if stop is None else stop
    for first in range(start, stop, batch_size):
        rows = range(first, min(first + batch_size, stop))
        images = dataset[first : rows.stop]["image"]
        yield Inputs(torch.tensor(rows), adapter.encode(texts[first : rows.stop], images))


def text_batches(adapter, texts: list[str], batch_size: int, *, start=0, stop=None, max_tokens=None):
    """Model inputs for documents ``start`` to ``stop``, cut at ``max_tokens`` (the model's context by default)."""
    stop = len(texts) if stop is None else stop
    limit = max_tokens or adapter.config.max_position_embeddings
    for first in range(start, stop, batch_size):
        rows = range(first, min(first + batch_size, stop))
        inputs = adapter.encode([adapter.raw(texts[i]) for i in rows])
        yield Inputs(torch.tensor(rows), {k: v[:, :limit] for k, v in inputs.items()})


def _embedded_sizes(name: str, split: str) -> tuple | None:
    """The picture sizes of an embedded data set, None for another name; raises InputError for a split it lacks."""
    if name not in (EMBEDDED, EMBEDDED_ASPECTS):
        return None
    from mmsae_helpers.tinyworld.dataset import ASPECTS, SPLITS, SQUARE

    if split not in SPLITS:
        raise InputError(f"the embedded world has no split {split!r}: there are {', '.join(SPLITS)}")
    return ASPECTS if name == EMBEDDED_ASPECTS else (SQUARE,)


def _open(name: str, split: str, streaming: bool = False):
    path = Path(name).expanduser()
    if path.suffix in (".parquet", ".arrow"):
        if not path.is_file():
            raise InputError(f"data file {path} does not exist")
        return _loaded(name, path.suffix[1:], data_files=str(path), split="train", streaming=streaming)
    if path.is_dir():
        return _folder(path / split if (path / split).is_dir() else path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        known = "tinyworld, a folder, a .parquet or .arrow file, or a hub id"
        raise InputError(f"data set {name} does not exist: give {known}")
    return _loaded(name, name, split=split, streaming=streaming)


def _drawn(rows: IterableDataset, per_class: int, seed: int) -> Dataset | None:
    """``per_class`` rows of each class, or all there are, shuffled in a buffer; None where classes have no names."""
    known = rows.features or {}
    label = next((a for a in _ALIASES["fine_label"] if isinstance(known.get(a), ClassLabel)), None)
    if label is None:
        return None
    found, counts, wanted = [], Counter(), per_class * known[label].num_classes
    for row in rows.decode(False).shuffle(seed=seed, buffer_size=1_000):
        if counts[row[label]] < per_class:
            counts[row[label]] += 1
            found.append(row)
            if len(found) == wanted:
                break
    return Dataset.from_list(found, features=known)


def _loaded(name: str, *args, **options):
    try:
        return load_dataset(*args, **options)
    except Exception as error:  # the hub, pyarrow and datasets each raise their own
        raise InputError(f"cannot load data set {name}: {first_line(error)}") from error


def _folder(root: Path) -> Dataset:
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir())
    if not classes:
        raise InputError(f"{root} has no class folders: put the images of each class in a folder of its own")
    paths, labels = [], []
    for label, folder in enumerate(classes):
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise InputError(f"class folder {folder} has no images: add some or remove the folder")
        paths += map(str, images)
        labels += [label] * len(images)
    dataset = Dataset.from_dict({"image": paths, "fine_label": labels})
    return dataset.cast_column("fine_label", ClassLabel(names=[folder.name for folder in classes]))


def _normalised(dataset: Dataset, name: str) -> Dataset:
    for wanted, aliases in _ALIASES.items():
        found = next((a for a in aliases if a in dataset.column_names), None)
        if found is None and wanted != "caption":
            raise InputError(f"{name} has no column {' or '.join(aliases)}: it has {', '.join(dataset.column_names)}")
        if found not in (None, wanted):
            dataset = dataset.rename_column(found, wanted)
    if not isinstance(dataset.features["fine_label"], ClassLabel):
        dataset = dataset.class_encode_column("fine_label")
    try:
        return dataset.cast_column("image", Image())
    except Exception as error:  # whatever converting the column's kind leads to
        what = f"column image of {name} has no image a row but {dataset.features['image']}"
        raise InputError(f"{what}: give one image, its path or its bytes") from error


def _per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        chosen.append(rng.permutation(np.flatnonzero(labels == label))[:count])
        if len(chosen[-1]) < count:
            raise InputError(
                f"class {label} has fewer than {count} images: lower the images per class in the parameters"
            )
    return np.sort(np.concatenate(chosen))


def _decodable(dataset: Dataset, name: str, on_bad_image: str) -> tuple[Dataset, list[str], str]:
    """Decode every image once, so that a bad one is found before a long pass; returns what is left and its digest."""
    good, skipped, digest = [], [], hashlib.sha256()
    for i, raw in enumerate(dataset.cast_column("image", Image(decode=False))["image"]):
        where = (raw or {}).get("path") or f"row {i}"
        try:
            if raw is None:
                raise ValueError("there is none")
            content = raw["bytes"] if raw["bytes"] is not None else Path(raw["path"]).read_bytes()
            PIL.Image.open(io.BytesIO(content)).convert("RGB")
        except Exception as error:  # Pillow raises half a dozen kinds for a damaged file
            if on_bad_image == "stop":
                what = f"image {where} of {name} cannot be decoded ({error})"
                raise InputError(f"{what}: mend it, or set on_bad_image: skip") from error
            skipped.append(str(where))
            continue
        good.append(i)
        digest.update(hashlib.sha256(content).digest())
    digest.update(np.asarray(dataset["fine_label"])[good].tobytes())
    return dataset.select(good) if skipped else dataset, skipped, digest.hexdigest()
