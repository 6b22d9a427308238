"""The shard cache: activations on disk, content-addressed by what made them, checksummed, resumable.

    root/<hash of the description>/description.json
    root/<hash of the description>/layer_07/samples_000500-001000.safetensors

A shard is one layer's residuals of a range of samples with sample id, position, token, modality and patch
beside every token, and a SHA-256 of all that in its own header: one atomic rename commits it, and several
notebooks may fill one folder at a time.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from mmsae_helpers import data
from mmsae_helpers.activations import TokenBatch, stream
from mmsae_helpers.errors import InputError

_INT = ("sample", "position", "token", "patch")
_BESIDE = (*_INT, "is_image")


class ShardCache:
    """Activations of one pass; ``description`` (JSON) says which: model, data, prompt, keep, reading...

    It leaves out layers and batch size, so a notebook that needs other layers of the same pass finds the shards there
    are. ``dtype`` is what is stored; yielded values are float32. ``computed`` and ``reused`` count shard files.
    """

    def __init__(self, root, description: dict, layers: Iterable[int], shard_samples=500, dtype="float32"):
        self.layers = sorted(set(layers))
        self.shard_samples = shard_samples
        self.dtype = getattr(torch, dtype)
        self.description = {**description, "stored_dtype": dtype}
        self.folder = Path(root) / fingerprint(self.description)[:16]
        self.computed = self.reused = 0

    def tokens(self, make: Callable[[int, int, list[int]], Iterator[TokenBatch]], n_samples: int):
        """One TokenBatch per shard, in order: from disk where valid, else made, stored, then yielded.

        ``make(start, stop, layers)`` streams samples start to stop - 1; it is called for the layers that are missing. A
        shard that is truncated or altered is reported in one line and made again. InputError when the disk is full.
        """
        clear = json.dumps(self.description, indent=1, sort_keys=True)
        _write(self.folder / "description.json", clear.encode())
        for left in self.folder.glob("*/*.tmp-*"):  # of a run that was killed
            if not _alive(int(left.name.rsplit("-", 1)[1])):
                left.unlink(missing_ok=True)
        for start in range(0, n_samples, self.shard_samples):
            stop = min(start + self.shard_samples, n_samples)
            paths = {
                k: self.folder / f"layer_{k:02d}" / f"samples_{start:06d}-{stop:06d}.safetensors" for k in self.layers
            }
            shards = {layer: self._load(path) for layer, path in paths.items()}
            missing = [layer for layer in self.layers if shards[layer] is None]
            if missing:
                made = _concatenate(list(make(start, stop, missing)), missing)
                beside = {"is_image": made.is_image, **{k: getattr(made, k).int() for k in _INT}}
                for layer in missing:
                    shards[layer] = {"acts": made.acts[layer].to(self.dtype), **beside}
                    _write(paths[layer], save(shards[layer], metadata={"sha256": _digest(shards[layer])}))
            self.computed += len(missing)
            self.reused += len(self.layers) - len(missing)
            yield self._merge(shards, start, stop)

    def _load(self, path: Path) -> dict[str, torch.Tensor] | None:
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
        warnings.warn(f"damaged shard {path} will be made again: {reason}", stacklevel=3)
        return None

    def _merge(self, shards: dict[int, dict[str, torch.Tensor]], start: int, stop: int) -> TokenBatch:
        first = shards[self.layers[0]]
        for layer, shard in shards.items():
            if not all(torch.equal(shard[k], first[k]) for k in _BESIDE):
                raise InputError(
                    f"layers {self.layers[0]} and {layer} of samples {start}-{stop} in {self.folder} hold "
                    "different tokens: the data changed but its description did not; delete that folder"
                )
        acts = {layer: shard["acts"].float() for layer, shard in shards.items()}
        return TokenBatch(acts, is_image=first["is_image"], **{k: first[k].long() for k in _INT})


def _concatenate(batches: list[TokenBatch], layers: list[int]) -> TokenBatch:
    if not batches:
        raise InputError("the activation pass gave no batch for a shard: is the data set empty?")
    acts = {layer: torch.cat([b.acts[layer] for b in batches]) for layer in layers}
    return TokenBatch(acts, **{k: torch.cat([getattr(b, k) for b in batches]) for k in _BESIDE})


def _write(path: Path, data: bytes) -> None:
    """Write atomically: a reader sees the whole file or none, and a failure leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        temporary.unlink(missing_ok=True)  # before asking how much is free
        there = next(folder for folder in path.parents if folder.exists())
        needs, free = (f"{size / 2**20:.1f} MiB" for size in (len(data), shutil.disk_usage(there).free))
        kept = "make room and run again (finished shards are kept)"
        raise InputError(f"disk full: {path} needs {needs}, {free} free; {kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:  # not permitted: it is there
        return error.errno != errno.ESRCH
    return True


# ---------------------------------------------------------------- the passes of the notebooks


class Tokens:
    """One activation pass that can be gone over again and again: from shards where there is a folder, else anew.

    ``description`` (JSON) says what the tokens are of; it names whatever is made from them, such as trained SAEs.
    """

    def __init__(self, make, description: dict, layers: Iterable[int], n_samples: int, folder=None):
        self.make, self.description, self.n_samples = make, description, n_samples
        self.layers = sorted(set(layers))
        self.shards = ShardCache(folder, description, self.layers) if folder else None

    def __iter__(self) -> Iterator[TokenBatch]:
        if self.shards is None:
            return iter(self.make(0, self.n_samples, self.layers))
        n_shards = -(-self.n_samples // self.shards.shard_samples)
        # nested bars scroll in notebooks
        shown = not self.shards.folder.is_dir() and not getattr(tqdm, "_instances", ())
        shards = self.shards.tokens(self.make, self.n_samples)
        return iter(tqdm(shards, "activations", n_shards, mininterval=1, disable=not shown))


def of_images(
    folder,
    adapter,
    images,
    layers,
    *,
    batch_size,
    question="",
    texts=None,
    keep="image",
    reading="corrected",
    start=0,
    stop=None,
) -> Tokens:
    """Tokens of an `data.ImageData` in the chat template with ``question``, or with ``texts``, one an image.

    ``start`` and ``stop`` choose images (and their texts); ``folder`` None does not store the tokens."""
    texts = None if texts is None else list(texts)[start:stop]
    dataset = images.dataset.select(range(start, len(images.dataset) if stop is None else stop))

    def make(a, b, layers):
        batches = data.batches(adapter, dataset, batch_size, question=question, texts=texts, start=a, stop=b)
        return stream(adapter, batches, layers, keep, reading)

    about = {
        "images": images.fingerprint,
        "rows": [start, start + len(dataset)],
        "prompt": adapter.prompt(question) if texts is None else fingerprint(texts),
    }
    about |= {"model": fingerprint(adapter), "dtype": str(adapter.model.dtype), "keep": keep, "reading": reading}
    return Tokens(make, about, layers, len(dataset), folder)


def of_texts(
    folder, adapter, texts, layers, *, batch_size, keep="text", reading="corrected", max_tokens=None
) -> Tokens:
    """Tokens of text-only documents; ``folder`` None does not store them."""
    texts = list(texts)

    def make(a, b, layers):
        batches = data.text_batches(adapter, texts, batch_size, start=a, stop=b, max_tokens=max_tokens)
        return stream(adapter, batches, layers, keep, reading)

    about = {"texts": fingerprint(texts), "max_tokens": max_tokens, "keep": keep, "reading": reading}
    about |= {"model": fingerprint(adapter), "dtype": str(adapter.model.dtype)}
    return Tokens(make, about, layers, len(texts), folder)


# ---------------------------------------------------------------- fingerprints


def fingerprint(thing) -> str:
    """SHA-256 of content, equal in every process.

    A model or adapter (weights, config, image processor), or anything that goes into JSON.
    """
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
    if isinstance(settings, dict):
        left_out = ("_name_or_path", "transformers_version", "architectures", "dtype")
        return {k: _without_place(v) for k, v in settings.items() if k not in left_out}
    return settings
