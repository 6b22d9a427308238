"""What a change to one block's output does to a model: to its loss, and to what it answers.

A change is a callable from residuals [n, d_model] float32, and the number of the sample that each is of [n], to
residuals. Only the blocks after the changed one run again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from mmsae_helpers.activations import hooked, kept
from mmsae_helpers.errors import InputError
from mmsae_helpers.saes import groups, lent

Edit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LossRecovered(NamedTuple):
    """Mean next-token cross-entropy (nats): as is, with the SAE's output spliced in, with zeros instead.

    recovered = (zero_ablated - spliced) / (zero_ablated - original), 1 if nothing is lost."""

    original: float
    spliced: float
    zero_ablated: float
    recovered: float
    n_tokens: int


@torch.no_grad()
def loss_recovered(adapter, saes: Mapping[Hashable, Any], layer: int, batches, keep="all", *, together=None) -> dict:
    """LossRecovered by key, over all text targets of batches of `activations.Inputs`, for several SAEs of one layer.

    Replaced are the outputs of block `layer` at tokens `keep` "text", "image" or "all", never padding or special ones.
    together: lend the model's device to that many SAEs at a time. Raises InputError where there is no text.
    """
    if together:
        held, found = list(batches), {}
        for some in groups(saes, together):
            with lent(adapter.device, *some.values()):
                found |= loss_recovered(adapter, some, layer, held, keep)
        return found
    edits = {"zero": (layer, lambda x, _: torch.zeros_like(x))}
    edits |= {("sae", key): (layer, lambda x, _, sae=sae: sae(x)) for key, sae in saes.items()}
    totals, n_tokens = dict.fromkeys((None, *edits), 0.0), 0
    for sample, inputs in batches:
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        target = (real & ~adapter.image_mask(ids))[:, 1:] & real[:, :-1]
        n_tokens += int(target.sum())
        for key, logits in _logits(adapter, sample, inputs, edits, "content" if keep == "all" else keep):
            own = logits[:, :-1][target].float()
            totals[key] += torch.nn.functional.cross_entropy(own, ids[:, 1:][target], reduction="sum").item()
    if not n_tokens:
        raise InputError(f"no text tokens to measure the loss on (layer {layer})")
    original, zero, *spliced = (total / n_tokens for total in totals.values())
    return {
        key: LossRecovered(original, nats, zero, (zero - nats) / (zero - original), n_tokens)
        for key, nats in zip(saes, spliced, strict=True)
    }


@torch.no_grad()
def first_words(adapter, batches, edits: Mapping[Hashable, tuple[int, Edit]], keep="image") -> dict:
    """The first word of the model's answer to each prompt, lower case, by edit; unedited under None. [N] str

    ``edits`` {key: (block, change)} are applied one at a time, to the outputs of that block at the tokens `keep`.
    """
    found = {key: [] for key in (None, *edits)}
    for sample, inputs in batches:
        rows = torch.arange(len(inputs["input_ids"]), device=adapter.device)
        last = (inputs["attention_mask"].cumsum(1)).argmax(1)
        ends, own = last.unique(return_inverse=True)
        for key, logits in _logits(adapter, sample, inputs, edits, keep, ends):
            ids = logits[rows, own].argmax(1).tolist()
            found[key] += [adapter.tokenizer.decode([i]).strip().lower() for i in ids]
    return {key: np.array(words) for key, words in found.items()}


def without(sae, features, scale: float = 1.0) -> Edit:
    """Takes what ``features`` add to the SAE's output out of the residuals: x - z_F W_dec[F], an SAE fed x * scale."""
    features = torch.as_tensor(np.asarray(features, np.int64), device=sae.device)

    def edit(x, _sample):
        whole = sae.decode(sae.encode(x * scale))  # decode undoes, and forgets, the scaling that encode has noted
        return x - (whole - sae.decode(sae.encode(x * scale).index_fill(1, features, 0.0))) / scale

    return edit


def projected_out(directions: torch.Tensor) -> Edit:
    """Takes the span of ``directions`` [n, d_model] out of the residuals."""
    _, size, basis = torch.linalg.svd(directions.double(), full_matrices=False)
    basis = basis[size > 1e-6 * size.max().clamp(min=1e-30)].float()
    return lambda x, _sample: x - (x @ basis.T.to(x)) @ basis.to(x)


def added(vectors: torch.Tensor) -> Edit:
    """Adds to every residual of sample s (its number in the data set) the vector s of ``vectors`` [S, d_model]."""
    return lambda x, sample: x + vectors.to(x)[sample.to(x.device)]


@torch.no_grad()
def typical(sae, acts: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each feature on ``acts`` [N, d_model] times ``scale``: the vector that it adds to the residuals where it
    fires, [d_sae, d_model] (0 of a silent one), and the mean length of what it adds to any, [d_sae]."""
    total, fired = torch.zeros(2, sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
    for x in acts.split(1024):
        active = sae.encode(x.to(sae.W_dec) * scale)
        total, fired = total + active.sum(0), fired + (active > 0).sum(0)
    strength = (total / fired.clamp(min=1) / scale).to(sae.W_dec)
    return strength[:, None] * sae.W_dec, (total / len(acts) / scale).to(sae.W_dec) * sae.W_dec.norm(dim=1)


def as_large(size, wanted, barred) -> list[int]:
    """For each feature ``wanted`` another one, not ``barred``, nearest to it in ``size`` [F], each once: a control."""
    size, free = np.asarray(size, float), np.setdiff1d(np.arange(len(size)), np.asarray(barred, int))
    found = []
    for feature in wanted:
        if len(free):
            nearest = np.abs(size[free] - size[feature]).argmin()
            found.append(int(free[nearest]))
            free = np.delete(free, nearest)
    return found


def _logits(adapter, sample, inputs, edits: Mapping, keep: str, positions=None) -> Iterator[tuple]:
    """(None, logits [B, T, vocabulary] as they are), then (key, those of each edit); or of the positions given alone,
    and then the same ones again, without another pass, where an edit changes nothing."""
    which = {} if positions is None else {"logits_to_keep": positions}
    mask = kept(adapter, inputs, adapter.image_mask(inputs["input_ids"]), keep)
    of = sample.to(mask.device)[mask.nonzero(as_tuple=True)[0]]
    tuples = []
    with hooked(adapter, {layer for layer, _ in edits.values()}, stop=False) as held:
        with adapter.blocks[0].register_forward_hook(lambda _m, _i, out: tuples.append(isinstance(out, tuple))):
            plain = adapter.forward(inputs | which).logits
    yield None, plain
    plain = plain if which else None  # those of all positions are too large to keep
    words = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    again = inputs if adapter.image_token_id is None else words  # a captioner's blocks read the picture themselves
    for key, (layer, edit) in edits.items():
        hidden = held[layer].clone()
        hidden[mask] = edit(hidden[mask].float(), of).to(hidden)
        if which and torch.equal(hidden, held[layer]):
            yield key, plain
            continue
        with _resumed(adapter, layer, (hidden,) if tuples[0] else hidden):
            yield key, adapter.forward(again | which).logits


@contextmanager
def _resumed(adapter, layer: int, output):
    """While open, the blocks before ``layer`` do nothing, and what leaves that block is ``output``."""

    def passed_on(hidden_states, *_, **__):
        return (hidden_states,) if isinstance(output, tuple) else hidden_states

    with ExitStack() as changes:
        for block in adapter.blocks[:layer]:
            changes.enter_context(patch.object(block, "forward", passed_on))
        changes.enter_context(patch.object(adapter.blocks[layer], "forward", lambda *_, **__: output))
        yield
