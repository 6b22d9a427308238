"""The stream of residual activations: several hook points in one pass, stopping after the last hooked block.

Hooks read block outputs (``blocks.L.hook_resid_post``), since the last of transformers' ``hidden_states`` is after the
final norm. Shapes: B inputs, T positions (padded right), N kept tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Literal, NamedTuple

import torch

from mmsae_helpers.errors import InputError

Keep = Literal["image", "text", "content", "all", "after_image", "all_after_image", "last"]
Reading = Literal["corrected", "as_published"]
PUBLISHED_IMAGE_START = 4  # paper A's code took image tokens as positions 4 to 579 (METHODS A.3 b)


class Inputs(NamedTuple):
    """One batch for the model: sample ids [B] int64 and the keyword arguments of its forward."""

    sample: torch.Tensor
    inputs: dict[str, torch.Tensor]


class TokenBatch(NamedTuple):
    """Kept tokens of whole samples, in reading order; all tensors on the CPU."""

    acts: dict[int, torch.Tensor]  # layer -> residual after that block [N, d_model] float32
    sample: torch.Tensor  # sample id [N] int64
    position: torch.Tensor  # position in the sequence [N] int64
    token: torch.Tensor  # input id [N] int64
    is_image: torch.Tensor  # [N] bool
    patch: torch.Tensor  # patch of the base image, row * columns + column [N] int64; -1 for text and newline tokens

    def rows(self, mask: torch.Tensor) -> "TokenBatch":
        """The tokens where ``mask`` [N] is true."""
        acts, *beside = self
        return TokenBatch({layer: x[mask] for layer, x in acts.items()}, *(x[mask] for x in beside))


class Means(NamedTuple):
    """Of one pass, by layer: every sample's mean residual [S, d_model], and the mean norm of the tokens."""

    residual: dict[int, torch.Tensor]
    norm: dict[int, float]


class _Stop(Exception):
    """Ends a forward pass after the last hooked block."""


@contextmanager
def hooked(adapter, layers: Iterable[int], reading: Reading = "corrected", stop=True) -> Iterator[dict]:
    """Hook decoder blocks; one `run` inside the context fills the dict yielded: layer -> [B, T, d_model]; a second
    raises RuntimeError. ``as_published`` reads each block's input instead of its output (METHODS A.3 a). Without
    ``stop`` the pass goes on to the logits. InputError for a layer out of range or no layers at all."""
    layers = sorted({adapter.check_layer(layer) for layer in layers})
    if not layers:
        raise InputError("no layers to read: give at least one layer number")
    _check("reading", reading, Reading)
    found: dict[int, torch.Tensor] = {}

    def see(layer, _block, args, kwargs, output=None):
        if layer in found:
            raise RuntimeError(f"block {layer} ran twice in one hooked context; run one forward per context")
        shown = output if output is not None else args or kwargs["hidden_states"]
        found[layer] = shown[0] if isinstance(shown, tuple) else shown
        if stop and layer == layers[-1]:
            raise _Stop

    register = "register_forward_pre_hook" if reading == "as_published" else "register_forward_hook"
    with ExitStack() as handles:
        for layer in layers:
            handles.enter_context(getattr(adapter.blocks[layer], register)(partial(see, layer), with_kwargs=True))
        yield found


def run(adapter, inputs: dict[str, torch.Tensor]):
    """Forward without gradients inside a `hooked` context; ends after the last hooked block, or gives the output."""
    with torch.no_grad(), suppress(_Stop):
        return adapter.forward(inputs)


def stream(
    adapter,
    batches: Iterable[Inputs],
    layers,
    keep: Keep = "image",
    reading: Reading = "corrected",
    keep_special=False,
    see=None,
) -> Iterator[TokenBatch]:
    """Residuals of the kept tokens, one TokenBatch per input batch, all layers from one pass.

    ``keep``: image tokens; text tokens (special ones such as BOS only with ``keep_special``); both, as "content"; all;
    or per sample the first text token after the image (paper A's "EoI"), all after it (special ones too), or the last
    token (all that paper B's code kept of a caption, METHODS B.1 b). Padding is never kept. ``as_published`` takes the
    block's input, and as image tokens a fixed range of positions from 4 on, whatever they are (METHODS A.3 a, b).
    ``see(sample, inputs, output)``, if given, is shown what the model makes of each batch: passes then go to the end.
    """
    layers = list(layers)
    _check("keep", keep, Keep)
    for sample, inputs in batches:
        with hooked(adapter, layers, reading, stop=see is None) as found:
            output = run(adapter, inputs)
        if see:
            see(sample, inputs, output)
        is_image, patch = _image_positions(adapter, inputs, reading)
        mask = kept(adapter, inputs, is_image, keep, keep_special)
        row, position = (i.cpu() for i in mask.nonzero(as_tuple=True))
        acts = {layer: found[layer][mask].float().cpu() for layer in found}
        beside = (x[mask].cpu() for x in (inputs["input_ids"], is_image, patch))
        yield TokenBatch(acts, sample.cpu()[row], position, *beside)


def means(tokens: Iterable[TokenBatch]) -> Means:
    """Mean residual of each sample's tokens, rows in the order in which samples come; whole samples per batch."""
    parts, norms, n = {}, {}, 0
    for batch in tokens:
        ids, rows = batch.sample.unique(return_inverse=True)
        n += len(rows)
        for layer, acts in batch.acts.items():
            total = torch.zeros(len(ids), acts.shape[1], dtype=torch.float64).index_add_(0, rows, acts.double())
            parts.setdefault(layer, []).append((total / rows.bincount()[:, None]).float())
            norms[layer] = norms.get(layer, 0.0) + acts.norm(dim=1).sum(dtype=torch.float64).item()
    if not n:
        raise InputError("no tokens to average: the pass kept none")
    residual = {layer: torch.cat(rows) for layer, rows in parts.items()}
    return Means(residual, {layer: norm / n for layer, norm in norms.items()})


def _image_positions(adapter, inputs, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions the reading takes for image tokens [B, T] bool, and their patch [B, T] (-1 elsewhere)."""
    if reading == "corrected":
        return adapter.geometry(inputs)[:2]
    is_image = adapter.image_mask(inputs["input_ids"])
    offset = torch.arange(is_image.shape[1], device=is_image.device) - PUBLISHED_IMAGE_START
    taken = (offset >= 0) & (offset < is_image.sum(dim=1, keepdim=True))
    return taken, torch.where(taken, offset, -1)


def kept(adapter, inputs, is_image: torch.Tensor, keep: Keep, keep_special: bool = False) -> torch.Tensor:
    """Which positions `stream` keeps, bool [B, T]; ``is_image`` bool [B, T]."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    special = [] if keep_special else sorted(adapter.tokenizer.all_special_ids)
    text = real & ~is_image & ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))
    order = torch.arange(ids.shape[1], device=ids.device)
    end, last = (torch.where(mask, order, -1).amax(dim=1, keepdim=True) for mask in (real, is_image))
    after = real & (last >= 0) & (order > last)
    masks = {"image": real & is_image, "text": text, "content": text | real & is_image, "all": real}
    return (masks | {"after_image": after & (order == last + 1), "all_after_image": after, "last": order == end})[keep]


def _check(name: str, value: str, allowed) -> None:
    if value not in allowed.__args__:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(allowed.__args__)}")
