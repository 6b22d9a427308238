"""The shard cache: activations on disk, content-addressed by what made them, checksummed, resumable.

A shard, <hash of the description>/layer_07/samples_000500-001000.safetensors, has one layer's residuals of a range of
samples with sample id, position, token, modality and patch beside every token, and a SHA-256 of it all in its header:
one atomic rename commits it, and several notebooks may fill one folder at a time.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Iterator
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from mmsae_helpers import data, files, scale
from mmsae_helpers.activations import TokenBatch, stream
from mmsae_helpers.errors import InputError

_INT = ("sample", "position", "token", "patch")
_BESIDE = (*_INT, "is_image")


class Tokens:
    """One activation pass that can be gone over again and again: from shards where there is a folder, else anew.

    ``make(start, stop, layers)`` yields TokenBatches of samples start to stop - 1. ``description`` (JSON) says what of,
    layers and batch size left out: it names the shards and whatever is made from the tokens, such as trained SAEs. With
    a folder there is one TokenBatch a shard, made and stored where it is missing, truncated or altered; ``computed``
    and ``reused`` count shard files. InputError when the disk is full. Where `scale.workers` are asked for they make
    what is missing, each with ``make`` on a ``device`` of its own; without a folder they pass on ``batch_size`` samples
    at a time, of which ``make`` makes one TokenBatch.
    """

    def __init__(
        self, make, description: dict, layers: Iterable[int], n_samples: int, folder=None, shard_samples=500, *,
        batch_size=1, device="cpu",
    ):  # fmt: skip
        self.make, self.description, self.n_samples = make, description, n_samples
        self.batch_size, self.device = batch_size, device
        self.layers, self.shard_samples = sorted(set(layers)), shard_samples
        self.stored = {**description, "stored_dtype": "float32"}
        self.folder = folder and Path(folder).absolute() / fingerprint(self.stored)[:16]
        self.computed, self.reused, self.image = 0, 0, None

    def __iter__(self) -> Iterator[TokenBatch]:
        whole = self._whole()
        return whole if self.image is None else (b.rows(b.is_image == self.image) for b in whole)

    def _whole(self) -> Iterator[TokenBatch]:
        n = scale.workers()
        if not self.folder:
            if not n:
                yield from self.make(0, self.n_samples, self.layers)
                return
            for found in scale.spread(self._columns, self._ranges(self.batch_size), n, self.device):
                found = {k: torch.from_numpy(v.copy()) for k, v in found.items()}  # Ray's memory is read-only
                yield TokenBatch({layer: found.pop(f"acts {layer}") for layer in self.layers}, **found)
            return
        # nested bars scroll in notebooks
        shown = not self.folder.is_dir() and not getattr(tqdm, "_instances", ())
        files.write(self.folder / "description.json", json.dumps(self.stored, indent=1, sort_keys=True).encode())
        for left in self.folder.glob("*/*.tmp-*"):  # of a run that was killed, not of one that goes on
            if left.stat().st_mtime < time.time() - 3600:
                left.unlink(missing_ok=True)
        if n:
            self._by_workers(n, shown)
        for some in tqdm(self._ranges(self.shard_samples), "activations", mininterval=1, disable=not shown):
            yield self._shard(*some)

    def at_rest(self) -> "Tokens":
        """This pass for workers: every shard is there, made now where it was not, and the model is not sent along."""
        self._by_workers(scale.workers(), True)
        part = copy(self)
        part.make = partial(_gone, self.folder)
        return part

    def _by_workers(self, n: int, shown: bool) -> None:
        ranges = self._ranges(self.shard_samples)
        missing = [some for some in ranges if not all(path.exists() for path in self._paths(*some).values())]
        if not missing:
            return
        done = scale.spread(self._store, missing, n, self.device)
        made = sum(int(one["computed"][0]) for one in tqdm(done, "shards", len(missing), disable=not shown))
        self.computed, self.reused = self.computed + made, self.reused - made

    def _ranges(self, n: int) -> list[tuple[int, int]]:
        return [(start, min(start + n, self.n_samples)) for start in range(0, self.n_samples, n)]

    def _columns(self, start: int, stop: int) -> dict:
        (batch,) = self.make(start, stop, self.layers)
        return {f"acts {k}": v.numpy() for k, v in batch.acts.items()} | {k: getattr(batch, k).numpy() for k in _BESIDE}

    def _store(self, start: int, stop: int) -> dict:
        before = self.computed
        self._shard(start, stop)
        return {"computed": np.array([self.computed - before])}

    def only(self, image: bool) -> "Tokens":
        """The image tokens of this pass, or all others, from the same shards."""
        part = copy(self)
        part.image, part.description = image, {**self.description, "image": image}
        return part

    def _paths(self, start: int, stop: int) -> dict[int, Path]:
        name = f"samples_{start:06d}-{stop:06d}.safetensors"
        return {layer: self.folder / f"layer_{layer:02d}" / name for layer in self.layers}

    def _shard(self, start: int, stop: int) -> TokenBatch:
        paths = self._paths(start, stop)
        shards = {layer: _load(path) for layer, path in paths.items()}
        if missing := [layer for layer in self.layers if shards[layer] is None]:
            batches = list(self.make(start, stop, missing))
            beside = {k: torch.cat([getattr(b, k) for b in batches]) for k in _BESIDE}
            beside |= {k: beside[k].int() for k in _INT}
            for layer in missing:
                shards[layer] = {"acts": torch.cat([b.acts[layer] for b in batches]), **beside}
                files.write(paths[layer], save(shards[layer], metadata={"sha256": _digest(shards[layer])}))
        self.computed += len(missing)
        self.reused += len(self.layers) - len(missing)
        first = shards[self.layers[0]]
        if any(not torch.equal(shard[k], first[k]) for shard in shards.values() for k in _BESIDE):
            name = paths[self.layers[0]].name
            raise InputError(f"layers of {name} hold different tokens, so the data changed: delete {self.folder}")
        acts = {layer: shard["acts"] for layer, shard in shards.items()}
        return TokenBatch(acts, is_image=first["is_image"], **{k: first[k].long() for k in _INT})


def _load(path: Path) -> dict[str, torch.Tensor] | None:
    """The shard, or None when there is none or its checksum is wrong."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            shard = {name: file.get_tensor(name) for name in file.keys()}
            if (file.metadata() or {}).get("sha256") == _digest(shard):
                return shard
        reason = "its content does not match its checksum"
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error)
    warnings.warn(f"damaged shard {path} will be made again: {reason}", stacklevel=4)
    return None


def _gone(folder, *_):
    raise InputError(f"a shard of {folder} was damaged or taken away during the run; run again, which makes it anew")


def of_images(
    folder, adapter, images, layers, *, batch_size, question="", texts=None, keep="image", reading="corrected",
    start=0, stop=None,
) -> Tokens:  # fmt: skip
    """Tokens of images ``start`` to ``stop`` of an `data.ImageData` in the chat template with ``question``, or with
    ``texts``, one an image; ``keep`` and ``reading`` as of `stream`. ``folder`` None does not store them."""
    texts = None if texts is None else list(texts)[start:stop]
    dataset = images.dataset.select(range(start, len(images.dataset) if stop is None else stop))
    batches = partial(data.batches, adapter, dataset, batch_size, question=question, texts=texts)
    about = {"images": images.fingerprint, "rows": [start, start + len(dataset)]}
    about["prompt"] = adapter.prompt(question) if texts is None else fingerprint(texts)
    return _tokens(adapter, batches, about, layers, len(dataset), folder, keep, reading, batch_size)


def of_texts(
    folder, adapter, texts, layers, *, batch_size, keep="text", reading="corrected", max_tokens=None
) -> Tokens:
    """Tokens of documents, text-only or `data.Interleaved`; ``folder`` None does not store them."""
    batches = partial(data.document_batches, adapter, texts, batch_size, max_tokens=max_tokens)
    digest = hashlib.sha256(b"[")  # of the list of all contents as JSON, which is never held as a whole
    for i, text in enumerate(texts):
        content = text if isinstance(text, str) else [text.text, *map(data.image_digest, text.images)]
        digest.update(f"{', ' * bool(i)}{json.dumps(content)}".encode())
    digest.update(b"]")
    about = {"texts": digest.hexdigest(), "max_tokens": max_tokens}
    return _tokens(adapter, batches, about, layers, len(texts), folder, keep, reading, batch_size)


def _tokens(adapter, batches, about, layers, n_samples, folder, keep, reading, batch_size) -> Tokens:
    def make(start, stop, layers):
        return stream(adapter, batches(start=start, stop=stop), layers, keep, reading)

    about |= {"model": fingerprint(adapter), "dtype": str(adapter.model.dtype), "keep": keep, "reading": reading}
    of = dict(batch_size=batch_size, device=adapter.device.type)
    return Tokens(make, about, layers, n_samples, folder, **of)


def fingerprint(thing) -> str:
    """SHA-256, equal in every process, of a model or adapter (weights, config, image processor) or of JSON."""
    image_processor = getattr(getattr(thing, "processor", None), "image_processor", None)
    if not hasattr(thing, "state_dict"):  # an adapter; models have a .model too
        thing = getattr(thing, "model", thing)
    if hasattr(thing, "state_dict"):
        parts = [part and _without_place(part.to_dict()) for part in (thing.config, image_processor)]
        text = _digest(thing.state_dict()) + "".join(json.dumps(p, sort_keys=True, default=str) for p in parts)
    else:
        text = json.dumps(thing, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _without_place(settings):
    """Nested settings without what depends on where, and whether, they were saved."""
    left_out = ("_name_or_path", "transformers_version", "architectures", "dtype")
    nested = isinstance(settings, dict)
    return {k: _without_place(v) for k, v in settings.items() if k not in left_out} if nested else settings
