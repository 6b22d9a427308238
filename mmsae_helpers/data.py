"""Data sets: the embedded world, a hub data set, a folder of images by class, parquet or arrow files; and texts."""

import errno
import hashlib
import io
import os
import re
import time
import urllib.request
from collections import Counter, namedtuple
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory, mkstemp
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageOps
import requests
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.arrow_writer import ArrowWriter
from torch.utils.data import BatchSampler
from urllib3.util import Retry

from mmsae_helpers.activations import Inputs
from mmsae_helpers.errors import InputError, first_line
from mmsae_helpers.files import write
from mmsae_helpers.tinyworld import dataset as world
from mmsae_helpers.tinyworld import language
from mmsae_helpers.tinyworld import preferences as world_preferences

WORLDS = {"tinyworld": (world.SQUARE,), "tinyworld-aspects": world.ASPECTS}  # sizes of their pictures
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
PLACEHOLDER = "<image>"
PREFERENCE = ("image", "question", "chosen", "rejected")
_TEXTS = ("caption", "question", "answer")
_ALIASES = {"image": ("image", "img"), "fine_label": ("fine_label", "label"), "caption": ("caption", "text")}
_ANSWERED = {"gpt_answer": "reference", "multiple_choice_answer": "reference", "question_type": "category"}
_VALIDATION = ("validation", "val", "valid")  # one split
_SPLITS = ("train", "test", *_VALIDATION)
_HIDDEN = (".", "__MACOSX")
_TEXT = {"text": Value("string")}
_TABLES = re.compile(r"\.(parquet|arrow|csv|jsonl?)(\.(zst|gz|bz2|xz))?$")  # of a hub repository, as in its folder


class World(NamedTuple):
    """A draw of the embedded world: the sizes of its pictures, and what is added to every seed."""

    sizes: tuple
    seed: int


def _world(name: str) -> World | None:
    """``tinyworld`` and ``tinyworld-aspects`` themselves, or with ``:N`` their draw N, which shares no scene."""
    kind, _, draw = name.partition(":")
    if kind not in WORLDS:
        return None
    if draw and not draw.isdigit():
        raise InputError(f"{name}: a draw of the embedded world is a number, as in {kind}:1")
    return World(WORLDS[kind], 1000 * int(draw or 0))


class ImageData(NamedTuple):
    """Images with labels, and what became of those that could not be read."""

    dataset: Dataset  # columns image, fine_label, and coarse_label, caption, question, answer, ... where there are any
    skipped: list[str]  # images left out because they cannot be decoded
    fingerprint: str  # changes whenever the content does
    unlabelled: int = 0  # rows left out because they have no label
    part: str = ""  # which part of a source without splits, if it was divided

    def need(self, *columns: str) -> None:
        """Raises InputError for columns that the data lacks."""
        _need("the data set", self.dataset.column_names, *columns)

    def left_out(self) -> dict[str, int]:
        """Why how many images were left out, to be recorded."""
        return {"not decoded": len(self.skipped), "unlabelled": self.unlabelled}

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
        """The class whose name occurs in each text, int [N], -1 where none or several do; case and punctuation do not
        matter, and a name inside a longer one that is there does not count."""
        names = [_words(name) for name in self.class_names]
        out = []
        for text in map(_words, texts):
            found = [name for name in names if f" {name} " in f" {text} "]
            found = [n for n in found if not any(n != other and f" {n} " in f" {other} " for other in found)]
            out.append(names.index(found[0]) if len(found) == 1 else -1)
        return np.array(out, dtype=int)

    def object_cover(self, grid: tuple[int, int], crop=lambda mask: mask) -> np.ndarray | None:
        """Fraction of each patch that the object's mask covers, [N, rows * columns]; None where there are no masks.
        The grid spans what ``crop`` (`Adapter.crop`) leaves, edges rounded down to pixels as in `patches.paint`."""
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
        """The images, `upright`; of most files no more than the header is read until the pixels are asked for."""
        return [upright(image) for image in self.images]


class Documents(Sequence):
    """Texts or `Interleaved`, of a list or read from disk as they are asked for, and in ``skipped`` what was left out
    because an image could not be had. A slice is another."""

    def __init__(self, rows: Sequence | Dataset, skipped=()):
        self._rows, self.skipped = rows, list(skipped)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return self.select(range(len(self))[at])
        row = self._rows[at]
        if not isinstance(row, dict):
            return row
        return Interleaved(row["text"], [Path(file) for file in row["images"]]) if "images" in row else row["text"]

    def select(self, at: Sequence[int]) -> "Documents":
        """Those at these places."""
        on_disk = isinstance(self._rows, Dataset)
        return Documents(self._rows.select(at) if on_disk else [self._rows[i] for i in at], self.skipped)


Cut = namedtuple("Cut", "documents images tokens")  # documents longer than a context, and what it leaves out of them


class Upright(Image):
    """An image column whose images are `upright` RGB."""

    def decode_example(self, value, token_per_repo_id=None) -> PIL.Image.Image:
        return upright(super().decode_example(value, token_per_repo_id)).convert("RGB")


def upright(image: PIL.Image.Image | bytes | str | Path) -> PIL.Image.Image:
    """An image, or that of a file or its bytes, turned as its EXIF says, with 8 bits a channel: 16-bit values divided
    by 257, floats from 0 to 1 multiplied by 255, to 255 rounded; ValueError for others. Else no pixels are read."""
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        pixels = np.asarray(image, dtype=np.float64)
        low, high = pixels.min(), pixels.max()
        top = 65535 if image.mode != "F" else 1 if high <= 1 else 255
        if not 0 <= low <= high <= top:
            raise ValueError(f"mode {image.mode} with values from {low:g} to {high:g}, not 0 to {top}")
        image = PIL.Image.fromarray((pixels * (255 / top)).round().astype(np.uint8))
    return image


def image_digest(image: PIL.Image.Image | Path) -> str:
    """SHA-256 of an image of a document: of its pixels, or of the file that it is in."""
    content = [str((image.mode, image.size)).encode(), image.tobytes()] if not isinstance(image, Path) else []
    return hashlib.sha256(b"".join(content) or image.read_bytes()).hexdigest()


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def _need(name: str, available: Iterable[str], *columns: str) -> None:
    if missing := [column for column in columns if column not in available]:
        raise InputError(f"{name} has no column {' and '.join(missing)}: it has {', '.join(available)}")


def load(name: str, split=None, per_class=None, *, seed=0, on_bad_image="stop", on_bad_label="stop") -> ImageData:
    """Load labelled images.

    ``name`` is ``tinyworld``, ``tinyworld-aspects`` (half of its pictures wide or tall; ``:1`` after either is
    another draw, of scenes that no model was trained on), a folder with one subfolder of images a class (or with
    splits between), a ``.parquet`` or ``.arrow`` file, a hub id, or a folder with a copy of its repository
    (tables). A file, or a folder without splits, is read whole if ``split`` is None; otherwise, of each ten rows in
    a row eight are ``train``, one is ``validation`` and one ``test``, by a fixed draw. Elsewhere None is ``test``.
    ``per_class`` keeps that many images of each class, drawn with ``seed``; a hub data set that names its classes
    is then read only until they are there. With "skip", images that cannot be decoded are left out and listed in
    ``skipped``, and labels that are None, NaN, empty or negative counted in ``unlabelled``. Raises InputError for
    what is missing, and where nothing is left.
    """
    for key, value in (("on_bad_image", on_bad_image), ("on_bad_label", on_bad_label)):
        if value not in ("stop", "skip"):
            raise InputError(f"{key} is {value!r}: it must be stop or skip")
    if drawn := _world(name):
        split = _named(split or "test", world.SPLITS, "the embedded world")
        count = per_class or world.SPLITS[split]
        dataset = world.make_dataset(split, count, seed + drawn.seed, drawn.sizes)
        return ImageData(dataset, [], f"{name}/{split}/{count}/{seed}/1")
    rows, part = _open(name, split, streaming=per_class is not None)
    undivided = part
    if isinstance(rows, IterableDataset):
        few = _drawn(rows, per_class, seed, on_bad_label)
        rows, undivided = _open(name, split) if few is None else (few, None)
    dataset, labels = _normalised(rows, name)
    own = _within(len(dataset), undivided and part)
    good = own[labels[own] >= 0]
    if (unlabelled := len(own) - len(good)) and on_bad_label == "stop":
        raise InputError(f"{unlabelled} of {len(own)} rows of {name} have no label (or < 0): set on_bad_label: skip")
    if per_class is not None:
        names = dataset.features["fine_label"].names
        counts = np.bincount(labels[good], minlength=len(names))
        if len(good) and (few := counts.min()) < per_class:
            where = f"class {names[counts.argmin()]} of {name}{f', {part},' if part else ''}"
            raise InputError(f"{where} has fewer than {per_class} images, {few}: lower their number")
        classes = pd.Series(good).groupby(labels[good])
        good = classes.sample(per_class, random_state=seed).sort_values().to_numpy()
    images = ImageData(*_decodable(dataset.select(good), good, name, on_bad_image), unlabelled, part or "")
    if not len(images.dataset):
        why = f"{unlabelled} rows have no label, {len(images.skipped)} images cannot be decoded"
        raise InputError(f"no image of {name} {images.part} is left of {len(own)}: {why}")
    return images


def documents(name: str, count: int, seed: int = 0) -> Documents:
    """``count`` text-only documents: ``tinyworld`` (or a draw of it, as in `load`), ``real/glosses``
    (`tinyworld.real.obtain`), a ``.txt`` file in UTF-8 (one a line), a ``.parquet`` file, a hub id or a copy of its
    repository with a ``text`` column. Raises InputError where there are fewer or none."""
    if drawn := _world(name):
        return Documents([document.text for document in language.documents(count, seed + drawn.seed)])
    if name.startswith("real/"):
        from mmsae_helpers.tinyworld import real

        name = str(real.obtain(name))
    path = Path(name).expanduser()
    if path.suffix == ".txt":
        try:
            with open(path, encoding="utf-8-sig") as lines:
                texts = _stored(({"text": line.rstrip("\n")} for line in lines if line.strip()), _TEXT)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path} as a text file in UTF-8: {first_line(error)[:200]}") from error
    else:
        rows = _shuffled(_open(name, None, streaming=True, otherwise="train")[0], seed, 10_000)
        _need(name, rows.column_names or ["text"], "text")
        texts = _stored(({"text": row["text"]} for row in rows.take(count)), _TEXT)
    if len(texts) < count:
        raise InputError(f"{name} has {len(texts)} documents but {count} are needed: lower their number")
    return Documents(texts.select(np.random.default_rng(seed).permutation(len(texts))[:count]))


def interleaved(name: str, count: int, seed: int = 0, split: str | None = None) -> Documents:
    """``count`` documents of text and images: ``tinyworld``, ``tinyworld-aspects``, or a hub id or ``.parquet`` file
    laid out as OBELICS. ``split`` is ``train`` if None; a file is read whole then and else divided as in `load`.

    There, columns ``texts`` and ``images`` have equally long rows with None in one where the other has an item; an
    image is a URL, a path or the file itself. Documents without an image, or with one that cannot be had, are left out
    and listed in ``skipped``. Images that are no files yet are kept in ``mmsae_images`` of the datasets cache, with a
    ``.gone`` file for each URL without one, so that another run has the same documents whatever became of the links;
    delete these to ask again. Raises InputError where there are fewer than ``count``.
    """
    if drawn := _world(name):
        split = _named(split or "train", world.SPLITS, "the embedded world")
        return Documents([Interleaved(*d) for d in world.interleaved(count, seed + drawn.seed, split, drawn.sizes)])
    rows = _shuffled(_open(name, split, streaming=True, otherwise="train")[0], seed, 10_000)
    _need(name, rows.column_names or ["images", "texts"], "images", "texts")
    skipped, numbered = [], enumerate(rows.decode(False))

    def complete():
        left = count
        with ThreadPoolExecutor(32) as pool:
            while chunk := list(islice(numbered, min(256, left))):
                made = list(pool.map(_document, *zip(*chunk, strict=True)))
                skipped.extend(one for one in made if isinstance(one, str))
                for one in (one for one in made if isinstance(one, Interleaved)):
                    yield {"text": one.text, "images": [str(file) for file in one.images]}
                    left -= 1

    found = Documents(_stored(complete(), _TEXT | {"images": List(Value("string"))}), skipped)
    if len(found) < count:
        few = f"{name} has {len(found)} documents with all their images but {count} are needed"
        raise InputError(f"{few} ({len(skipped)} left out): lower their number")
    return found


class Preferences(NamedTuple):
    """Rows to align a model with, and what became of the others."""

    dataset: Dataset  # image, question, chosen, rejected
    left_out: dict[str, int]  # why: how many
    kinds: np.ndarray | None  # of each row of the embedded world, how it is damaged, "" where not; for evaluation alone
    fingerprint: str  # changes whenever the content does


def preferences(
    name: str, count: int | None = None, seed: int = 0, split: str | None = None, *, damage=0.4, columns=None
) -> Preferences:
    """``count`` preference rows in an order drawn from ``seed``: ``tinyworld`` or ``tinyworld-aspects``, a share
    ``damage`` of it damaged, a ``.parquet`` file, or a hub id, laid out as RLAIF-V (image, question, chosen, rejected)
    or Align-Anything (image, question, response_1, response_2, overall_response); ``columns`` {ours: theirs} renames
    others.

    Rows whose image cannot be read, whose question or answer is missing or empty, or whose answers are equal are left
    out and counted (of the embedded world the question may be empty), as are those of which no response is better.
    ``split`` is ``train`` if None; a file is read whole then and else divided as in `load`. Raises InputError for a
    missing column or one without text or images, for fewer rows than ``count``, and where nothing is left.
    """
    if drawn := _world(name):
        if count is None or not 0 <= damage <= 1:
            raise InputError(f"no preference rows of count {count}, damage {damage}: a number of them, damage 0 to 1")
        split = _named(split or "train", world.SPLITS, "the embedded world")
        rows = world_preferences.preferences(count, seed + drawn.seed, damage, split, sizes=drawn.sizes)
        order = range(count)
    else:
        rows, part = _open(name, split, otherwise="train")
        order = np.random.default_rng([seed, 22]).permutation(len(rows))
        order = order[np.isin(order, _within(len(rows), part))]
        _need(name, rows.column_names, *(columns or {}).values())
        changed = {theirs: ours for ours, theirs in (columns or {}).items() if ours != theirs}
        rows = rows.remove_columns(
            [ours for ours in changed.values() if ours in rows.column_names and ours not in changed]
        )
        rows = rows.rename_columns(changed)
        if "chosen" not in rows.column_names and "overall_response" in rows.column_names:
            _need(name, rows.column_names, "response_1", "response_2")
            rows = rows.map(_better, remove_columns=["response_1", "response_2", "overall_response"])
    _need(name, rows.column_names, *PREFERENCE)
    for key in PREFERENCE[1:]:
        if getattr(kind := rows.features[key], "dtype", None) not in ("string", "large_string", "null"):
            raise InputError(f"column {key} of {name} has no text a row but {kind}: give one")
    rows = rows if isinstance(rows.features["image"], Image) else _of_images(rows, name, Image())
    good, left_out, stored = [], Counter(), rows.cast_column("image", Image(decode=False))
    for i in order:
        if count is not None and len(good) == count:
            break
        why = _unfit(stored[int(i)], asked=not _world(name))
        left_out.update([why] if why else [])
        good += [] if why else [int(i)]
    if not good or count is not None and len(good) < count:
        few = f"{name} has {len(good)} rows fit to tune on" + (f" but {count} are needed" if count else "")
        raise InputError(f"{few} (left out: {dict(left_out)}): lower their number, or mend them")
    kinds = np.array(rows["kind"])[good] if _world(name) else None  # a user's column of that name is another thing
    kept = rows.select(good).select_columns(list(PREFERENCE)).cast_column("image", Upright())
    return Preferences(kept, dict(left_out), kinds, f"{name}/{count}/{seed}/{split}/{damage}/{rows._fingerprint}")


def benchmark(name: str, count: int, seed: int = 0, split: str | None = None) -> Dataset:
    """``count`` questions about images with a reference answer: image, question, category, reference. ``tinyworld``
    (with the scenes' attributes), or a ``.parquet`` file or hub id laid out as LLaVA-Bench (gpt_answer, caption) or
    VQAv2 (question_type and multiple_choice_answer), of which the first are read."""
    if drawn := _world(name):
        split = _named(split or "test", world.SPLITS, "the embedded world")
        return world_preferences.benchmark(count, seed + drawn.seed, split)
    rows, part = _open(name, split, otherwise="train")
    rows = rows.select(_within(len(rows), part)) if part else rows
    for theirs, ours in _ANSWERED.items():
        if theirs in rows.column_names and ours not in rows.column_names:
            rows = rows.rename_column(theirs, ours)
    _need(name, rows.column_names, "image", "question", "category", "reference")
    return rows.select(range(min(count, len(rows)))).cast_column("image", Upright())


def _better(row: dict) -> dict:
    """The two responses of an Align-Anything row by which is better, None where neither is said to be."""
    one, two = row["response_1"], row["response_2"]
    pairs = {"1": (one, two), "1.0": (one, two), "2": (two, one), "2.0": (two, one)}
    return dict(zip(("chosen", "rejected"), pairs.get(str(row["overall_response"]).strip(), (None, None)), strict=True))


def _unfit(row: dict, asked: bool) -> str | None:
    """Why a preference row is left out, or None."""
    if row["chosen"] is row["rejected"] is None:
        return "no preference"
    if any(not (row[key] or "").strip() for key in ("chosen", "rejected")):
        return "empty answer"
    if asked and not (row["question"] or "").strip():
        return "empty question"
    if row["chosen"].strip() == row["rejected"].strip():
        return "equal answers"
    try:
        _content(row["image"])
    except Exception:  # as in `_decodable`
        return "image cannot be read"
    return None


def _document(at: int, row: dict) -> Interleaved | str:
    """Row ``at`` of a file like OBELICS, or a line on why an image of it cannot be had; InputError for a full disk."""
    parts = [(text, source) for text, source in zip(row["texts"], row["images"], strict=True) if text or source]
    text = " ".join(PLACEHOLDER if source else text.replace(PLACEHOLDER, "< image>") for text, source in parts)
    try:
        files = [_file(source) for _, source in parts if source]
        return Interleaved(text, files) if files else f"row {at}: no image"
    except InputError:
        raise
    except Exception as error:  # the network, the file system and Pillow raise dozens of kinds
        return f"row {at}: {first_line(error)[:200]}"


def document_batches(adapter, documents, batch_size: int, *, start=0, stop=None, max_tokens=None):
    """Model inputs for documents (texts, or `Interleaved`) ``start`` to ``stop``, cut at ``max_tokens``, by default the
    context, or before an image that does not fit whole; `cut` counts. Raises InputError where nothing is left."""
    limit = _limit(adapter, max_tokens)
    for rows in BatchSampler(range(start, len(documents) if stop is None else stop), batch_size, drop_last=False):
        some = [(documents[i], i) for i in rows]  # text alone is cut without being tokenized twice
        some = [(adapter.raw(d), []) if isinstance(d, str) else _fitted(adapter, d, limit, i)[:2] for d, i in some]
        texts, images = zip(*some, strict=True)
        inputs = adapter.encode(texts, images, fits=False)
        shape = inputs["input_ids"].shape
        yield Inputs(torch.tensor(rows), {k: v[:, :limit] if v.shape == shape else v for k, v in inputs.items()})


def _limit(adapter, max_tokens: int | None) -> int:
    if (limit := max_tokens or adapter.config.max_position_embeddings) < 2:
        raise InputError(f"max_tokens is {max_tokens}: give at least 2, or 0 for the model's context")
    return limit


def cut(adapter, documents, max_tokens: int | None = None) -> Cut:
    """What `document_batches` leaves out of ``documents``, counted without reading pixels."""
    total, limit = np.zeros(3, int), _limit(adapter, max_tokens)
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
            raise InputError(f"document {at} begins with an image that is longer than {limit} tokens: allow more")
        pieces, images = pieces[: fit + 1], images[:fit]
    return token.join(pieces), images, max(0, int(ends[-1]) - kept)


def _file(source: str | bytes | dict) -> Path:
    """The file with the image at a path, or else the one that an image in bytes or at a URL is kept in."""
    source = (source["bytes"] or source["path"]) if isinstance(source, dict) else source
    is_text = isinstance(source, str)
    if is_text and not source.startswith(("http://", "https://")):
        upright(source).convert("RGB")
        return Path(source)
    name = hashlib.sha256(source.encode() if is_text else source).hexdigest()
    file = Path(datasets.config.HF_DATASETS_CACHE) / "mmsae_images" / name
    gone = file.with_suffix(".gone")
    if gone.exists():
        raise OSError(gone.read_text())
    if not file.exists():
        try:
            content = _fetched(source) if is_text else source
            upright(content).convert("RGB")
        except Exception as error:
            write(gone, first_line(error)[:200].encode())
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


def session(tries: int = 5, wait: float = 2.0, **headers: str) -> requests.Session:
    """A session that tries again ``tries`` times after connection errors, 429 and 5xx, ``wait`` seconds later and then
    twice as long."""
    again = Retry(tries, backoff_factor=wait, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)
    made = requests.Session()
    made.headers.update(headers)
    for kind in ("http://", "https://"):
        made.mount(kind, requests.adapters.HTTPAdapter(max_retries=again))
    return made


def batches(adapter, dataset, batch_size: int, *, question="", texts=None, start=0, stop=None) -> Iterator[Inputs]:
    """Model inputs for samples ``start`` to ``stop``, the image before ``question`` in the chat template, or with
    ``texts``, one a sample, as they are."""
    texts = [adapter.prompt(question)] * len(dataset) if texts is None else texts
    if len(texts) != len(dataset):
        raise InputError(f"{len(texts)} texts but {len(dataset)} images: give one text an image")
    for rows in BatchSampler(range(start, len(dataset) if stop is None else stop), batch_size, drop_last=False):
        yield Inputs(torch.tensor(rows), adapter.encode([texts[i] for i in rows], dataset[rows]["image"]))


def _named(split: str, available: Iterable[str], where) -> str:
    """What a split is called there; raises InputError where there is none of it."""
    for one in _VALIDATION if split in _VALIDATION else (split,):
        if one in available:
            return one
    raise InputError(f"{where} has no split {split!r}: there are {', '.join(available)}")


@lru_cache(2)
def _ten(block: int) -> np.ndarray:
    """Which parts ten rows of a source without splits are in, whatever else there is."""
    return np.random.default_rng([0, block]).permutation(("train",) * 8 + ("validation", "test"))


def _within(n: int, part: str | None) -> np.ndarray:
    """Which of ``n`` rows without splits are in ``part``, int; all where it is None."""
    return np.array([i for i in range(n) if not part or _ten(i // 10)[i % 10] == part], int)


def _open(name: str, split: str | None, streaming: bool = False, otherwise: str = "test"):
    """Rows, and the part of them asked for where the source has no splits (rows that are streamed are that part). A hub
    id is owner/name, or owner/name:configuration; so is a folder with a copy of its repository."""
    hub, _, config = name.partition(":")
    path = Path(name).expanduser()
    if not name:
        raise InputError("the data set's name is empty: give a hub id, a file or a folder")
    is_file = path.suffix in (".parquet", ".arrow")
    if (copy := Path(hub).expanduser()).is_dir() and _is_of_hub(copy):
        args, options = filter(None, [str(copy), config]), {"cache_dir": _cache_of(copy), "streaming": streaming}
        return _loaded(name, *args, split=split or otherwise, **options), None
    if is_file and path.is_file():
        rows = _loaded(name, path.suffix[1:], data_files=str(path), split="train", streaming=streaming)
    elif path.is_dir():
        named = {p.name.lower() if p.name.lower() in _SPLITS else p.name: p for p in _folders(path)}
        splits = {name: p for name, p in named.items() if name in (*_SPLITS, split) and _folders(p)}
        if splits:
            return _folder(splits[_named(split or otherwise, splits, path)]), None
        rows = _folder(path)
    elif is_file or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"data set {name} does not exist: give a folder, a .parquet or .arrow file, or a hub id")
    else:
        return _loaded(name, *filter(None, (hub, config)), split=split or otherwise, streaming=streaming), None
    part = split and _named(split, ("train", "validation", "test"), f"{path}, divided as it has no splits,")
    if part and isinstance(rows, IterableDataset):
        rows = rows.decode(False).filter(lambda i: _ten(i // 10)[i % 10] == part, with_indices=True, input_columns=[])
    return rows, part


def _is_of_hub(folder: Path) -> bool:
    """Whether a folder is a copy of a hub repository: it has tables, and no images unless the hub's own file is."""
    names = [file.name for file in chain(folder.glob("*"), folder.glob("*/*"))]
    images = any(name.lower().endswith(tuple(IMAGE_SUFFIXES)) for name in names)
    return any(map(_TABLES.search, names)) and (".gitattributes" in names or not images)


def _cache_of(folder: Path) -> str:
    """A cache for a folder as it is now: datasets tells copies apart by their last name and configuration alone."""
    files = sorted((str(file), file.stat()) for file in folder.resolve().rglob("*") if file.is_file())
    now = "".join(f"{name} {about.st_size} {about.st_mtime_ns}\n" for name, about in files)
    digest = hashlib.sha256(now.encode(errors="surrogateescape")).hexdigest()
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"mmsae_copy-{digest[:16]}")


def _shuffled(rows: IterableDataset, seed: int, buffer_size: int) -> IterableDataset:
    """Shuffled in a buffer that is filled from one shard after the other: ten at a time, as is usual, are in memory."""
    return rows.shuffle(seed=seed, buffer_size=buffer_size, max_buffer_input_shards=1)


def _drawn(rows: IterableDataset, per_class: int, seed: int, on_bad_label: str) -> Dataset | None:
    """``per_class`` rows of each class, or all there are, shuffled in a buffer; None where classes have no names.

    Beside them an empty row for each without a label, the first of which is the last if that stops."""
    known = rows.features or {}
    label = next((a for a in _ALIASES["fine_label"] if isinstance(known.get(a), ClassLabel)), None)
    if label is None:
        return None

    def drawn():
        counts, missing = Counter(), per_class * known[label].num_classes
        for row in _shuffled(rows.decode(False), seed, 1_000):
            if row[label] is None or row[label] < 0:
                yield dict.fromkeys(row)
                missing *= on_bad_label == "skip"
            elif counts[row[label]] < per_class:
                counts[row[label]] += 1
                yield row
                missing -= 1
            if not missing:
                break

    return _stored(drawn(), known)


@lru_cache
def _scratch(cache: str) -> TemporaryDirectory:
    """A folder of this process in the datasets cache, which goes with it."""
    Path(cache).mkdir(parents=True, exist_ok=True)
    return TemporaryDirectory(prefix="mmsae_drawn-", dir=cache, ignore_cleanup_errors=True)


def _stored(rows: Iterable[dict], features: dict) -> Dataset:
    """The rows in a file that is mapped into memory, so that they take none; InputError where the disk is full."""
    descriptor, file = mkstemp(".arrow", dir=_scratch(str(datasets.config.HF_DATASETS_CACHE)).name)
    os.close(descriptor)
    try:
        with ArrowWriter(path=file, features=Features(features), writer_batch_size=100) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"disk full: {file}; make room, or set HF_DATASETS_CACHE to a larger disk") from error
    return Dataset.from_file(file)


def _loaded(name: str, *args, split: str, **options):
    try:
        return load_dataset(*args, split=split, **options)
    except Exception as error:  # the hub, pyarrow and datasets each raise their own
        there = [one for one in _VALIDATION if f"'{one}'" in str(error)]
        if split in set(_VALIDATION).difference(there) and there:
            return _loaded(name, *args, split=there[0], **options)
        here = "" if Path(name).is_absolute() else f" (and no folder of that name is in {Path.cwd()})"
        raise InputError(f"cannot load data set {name}: {first_line(error)}{here}") from error


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(_HIDDEN))


def _folder(root: Path) -> Dataset:
    classes = _folders(root)
    if not classes:
        raise InputError(f"{root} has no class folders: put the images of each class in a folder of its own")
    files = [path.relative_to(root) for folder in classes for path in sorted(folder.rglob("*"))]
    files = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and not any(p.startswith(_HIDDEN) for p in f.parts)]
    labels = [file.parts[0] for file in files]
    if empty := [folder for folder in classes if folder.name not in set(labels)]:
        raise InputError(f"class folder {empty[0]} has no images: add some or remove the folder")
    parts, inner = {*_SPLITS, "training", "testing", "dev"}, {f.parts[1].lower() for f in files if len(f.parts) > 2}
    if {label.lower() for label in labels} <= parts or inner and inner <= parts:
        where = f"{root} seems to have its splits where classes are wanted, or inside of them"
        raise InputError(f"{where}: give folders train, validation, test, each with a folder a class")
    try:
        return Dataset.from_dict({"image": [str(root / file) for file in files], "fine_label": labels})
    except UnicodeEncodeError as error:
        raise InputError(f"the name of {ascii(error.object)} is not UTF-8: rename it") from error


def _normalised(dataset: Dataset, name: str) -> tuple[Dataset, np.ndarray]:
    """The columns by our names, and labels, int [N], -1 for none."""
    for wanted, aliases in _ALIASES.items():
        found = next((a for a in aliases if a in dataset.column_names), None)
        if found is None and wanted != "caption":
            _need(name, dataset.column_names, " or ".join(aliases))
        if found not in (None, wanted):
            dataset = dataset.rename_column(found, wanted)
    dataset = _of_images(dataset, name, Upright())
    kind = dataset.features["fine_label"]
    if not hasattr(kind, "dtype"):
        raise InputError(f"column fine_label or label of {name} has no label a row but {kind}: give one")
    texts = pd.Series(dataset["fine_label"][:]).convert_dtypes().astype("string")  # NA for None and NaN, 1 for 1.0
    if isinstance(kind, ClassLabel):
        return dataset, pd.Index([str(label) for label in range(kind.num_classes)]).get_indexer(texts)
    known = {text for text in texts.dropna() if text.strip() and not re.match(r"-\d", text)}
    known = sorted(known, key=lambda t: (len(t) if t.isdecimal() else np.inf, t))  # numbers by size
    labels = pd.Index(known).get_indexer(texts)
    dataset = dataset.remove_columns("fine_label")
    return dataset.add_column("fine_label", labels, feature=ClassLabel(names=known)), labels


def _of_images(rows: Dataset, name: str, feature: Image) -> Dataset:
    """The rows with column image as ``feature``."""
    try:
        return rows.cast_column("image", feature)
    except Exception as error:  # whatever converting the column's kind leads to
        kind = rows.features["image"]
        raise InputError(f"column image of {name} has no image a row but {kind}: give one, or its path") from error


def _content(stored: dict | None) -> bytes:
    """The file of an image as `datasets` stores it; raises whatever Pillow does where it cannot be decoded."""
    if stored is None:
        raise ValueError("there is none")
    content = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
    upright(content).convert("RGB")
    return content


def _decodable(dataset: Dataset, rows, name: str, on_bad_image: str) -> tuple[Dataset, list[str], str]:
    """Decode every image once, so that a bad one is found before a long pass; returns what is left and its digest."""
    good, skipped, digest = [], [], hashlib.sha256(b"upright")
    for i, raw in enumerate(dataset.cast_column("image", Image(decode=False))["image"]):
        where = (raw and raw["path"] or f"row {rows[i]}")[-255:]  # which may be an image in base64
        try:
            content = _content(raw)
        except Exception as error:  # Pillow raises half a dozen kinds for a damaged file
            if on_bad_image == "stop":
                what = f"image {where} of {name} cannot be decoded ({first_line(error)[:200]})"
                raise InputError(f"{what}: mend it, or set on_bad_image: skip") from error
            skipped.append(where)
            continue
        good.append(i)
        digest.update(hashlib.sha256(content).digest())
    digest.update(np.asarray(dataset["fine_label"])[good].tobytes())
    return dataset.select(good) if skipped else dataset, skipped, digest.hexdigest()
