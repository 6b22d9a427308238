"""Scores of whole samples, by which alignment data is filtered (paper C, section 4; METHODS C.3), from one pass.

A sample is a prompt with its image and an answer to it. `passing` streams such samples to the meters here and, from the
same forward passes, gives the model's loss on the answers, so that scores with and without an SAE cost one pass.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Literal

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from mmsae_helpers import activations, scale
from mmsae_helpers.activations import Inputs, TokenBatch
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.crossmodal import sample_scores
from mmsae_helpers.meters.feed import Meter, feed

After = Literal["image and question", "question", "nothing"]
PARTS = ("prompt", "prompt + answer")


class SampleScores(Meter):
    """`crossmodal.sample_scores` of one SAE, read from the prompt alone (as published: what comes before an answer
    cannot see it) and from prompt and answer.

    ``starts`` int [S]: position of each sample's first answer token; ``weights`` [d_sae] as there; a feature is active
    above ``delta``, a number or one a feature [d_sae]. Result: a frame, one row a sample and part, indexed by both.
    """

    def __init__(self, sae, layer: int, weights, starts, delta=1.0, scale: float = 1.0):
        super().__init__(sae, layer, scale)
        self.weights, self.starts, self.delta, self.frames = weights, np.asarray(starts), delta, []

    def add(self, batch: TokenBatch, features) -> None:
        sample, is_image = batch.sample.numpy(), batch.is_image.numpy()
        asked = batch.position.numpy() < self.starts[sample]
        parts = ((features[asked], sample[asked], is_image[asked]), (features, sample, is_image))
        scores = [sample_scores(*part, self.weights, self.delta) for part in parts]
        self.frames.append(pd.concat(scores, keys=PARTS, names=["part"]))

    def result(self) -> pd.DataFrame:
        return pd.concat(self.frames)


class Maxima(Meter):
    """The highest activation of each feature, float32 [d_sae], 0 where it never fires: a `delta` may be a share of it,
    since features fire at scales of their own."""

    def __init__(self, sae, layer: int, scale: float = 1.0):
        super().__init__(sae, layer, scale)
        self.highest = torch.zeros(sae.cfg.d_sae)

    def chunk(self, raw: torch.Tensor, x: torch.Tensor, features: torch.Tensor) -> None:
        self.highest = torch.maximum(self.highest.to(features.device), features.amax(0))

    def result(self) -> np.ndarray:
        return self.highest.cpu().numpy()


class Similarity:
    """Image-text similarity by the model itself, without an SAE: the cosine between the mean residual after block
    ``layer`` of a sample's image tokens and that of its text tokens (question and answer; no special tokens).

    `watch` passes a stream on, so that it costs no pass. ``values`` [S]: nan for samples not seen, or of one modality.
    """

    def __init__(self, n_samples: int, layer: int):
        self.layer, self.values = layer, np.full(n_samples, np.nan)

    def watch(self, tokens: Iterable[TokenBatch]) -> Iterator[TokenBatch]:
        for batch in tokens:
            ids, row = batch.sample.unique(return_inverse=True)
            acts = batch.acts[self.layer].double()
            sums = acts.new_zeros(2, len(ids), acts.shape[1]).index_put_(
                (batch.is_image.long(), row), acts, accumulate=True
            )  # a cosine is that of the means
            there = (sums != 0).any(2).all(0)
            alike = torch.nn.functional.cosine_similarity(*sums, dim=1)
            self.values[ids.numpy()] = torch.where(there, alike, torch.nan).numpy()
            yield batch


class AnswerLosses:
    """The model's mean loss on each answer, in nats a token, filled batch by batch; ``see`` of `activations.stream`.

    ``losses`` and ``lengths`` [S]: nan and 0 for samples not seen yet. ``lengths`` counts the answer's tokens.
    """

    def __init__(self, starts):
        self.starts = torch.as_tensor(np.asarray(starts))
        self.losses, self.lengths = np.full(len(self.starts), np.nan), np.zeros(len(self.starts), int)

    def __call__(self, sample, inputs, output) -> None:
        ids, real = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
        at = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        answer = real & (at >= self.starts[sample].to(ids.device)[:, None])
        row = answer.nonzero()[:, 0]
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1][answer].float(), ids[answer], reduction="none")
        n = answer.sum(1)
        total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device).index_add_(0, row, loss.double())
        rows = sample.cpu().numpy()  # a tensor of one element would index as a number
        self.losses[rows], self.lengths[rows] = (total / n).cpu().numpy(), n.cpu().numpy()


def starts(adapter, questions, images) -> np.ndarray:
    """Position of the first answer token after each prompt, int [S]: prompt tokens, those of the image included."""
    written = [adapter.written(image.size[::-1]) - 1 for image in images]
    return adapter.lengths(_prompts(adapter, questions)) + written


def passing(
    adapter, rows, layers, batch_size: int, see: AnswerLosses | None = None, answer="chosen", part: slice = slice(None)
) -> Iterator:
    """TokenBatches of the rows' prompts with their answers (text and image tokens), longest last.

    ``rows`` has columns image, question and ``answer``; with ``see`` the passes go to the end, and it fills. ``part``:
    these batches alone.
    """
    texts = _answered(adapter, _prompts(adapter, rows["question"]), rows[answer])
    batches = (
        Inputs(torch.from_numpy(at), adapter.encode([texts[i] for i in at], rows.select(at)["image"]))
        for at in _by_length(texts, batch_size)[part]
    )
    return activations.stream(adapter, batches, layers, keep="content", see=see)


def scored(adapter, rows, meters: Mapping, starts, layer: int, batch_size: int) -> tuple[dict, pd.DataFrame]:
    """One pass over the rows' prompts and chosen answers: `SampleScores` of ``meters`` by key, and of every row what
    needs no SAE, columns loss, length (`AnswerLosses`) and similarity (`Similarity`, after block ``layer``).

    Where `scale.workers` are asked for, each takes an equal part of the batches, with a model of its own.
    """

    def scan(start: int, stop: int) -> tuple[dict, pd.DataFrame]:
        own = {key: copy(meter) for key, meter in meters.items()}
        for meter in own.values():
            meter.frames = []
        see, alike = AnswerLosses(starts), Similarity(len(rows), layer)
        layers = {layer, *(meter.layer for meter in own.values())}
        tokens = passing(adapter, rows, sorted(layers), batch_size, see, part=slice(start, stop))
        scores = feed(own, alike.watch(tokens))
        beside = pd.DataFrame({"loss": see.losses, "length": see.lengths, "similarity": alike.values})
        return scores, beside[see.lengths > 0]

    done = scale.parts(scan, -(-len(rows) // batch_size), adapter.device.type)
    scores, beside = zip(*(found for _, found in done), strict=True)
    return {key: pd.concat(one[key] for one in scores) for key in meters}, pd.concat(beside).sort_index()


@torch.no_grad()
def answer_losses(adapter, rows, batch_size: int, after: After = "image and question", answer="chosen") -> np.ndarray:
    """The model's loss on the answers, in nats a token [S]: after image and question, the question alone, or nothing.

    Raises InputError for another ``after``.
    """
    if after not in After.__args__:
        raise InputError(f"losses of answers after {after!r}: choose one of {', '.join(After.__args__)}")
    asked, image = rows["question"], after == "image and question"
    first = adapter.tokenizer.bos_token or ""
    prompts = [first] * len(asked) if after == "nothing" else _prompts(adapter, asked, image)
    see = AnswerLosses(starts(adapter, asked, rows["image"]) if image else adapter.lengths(prompts))
    texts = _answered(adapter, prompts, rows[answer])
    for at in _by_length(texts, batch_size):
        inputs = adapter.encode([texts[i] for i in at], *([rows.select(at)["image"]] if image else []))
        see(torch.from_numpy(at), inputs, adapter.forward(inputs))
    return see.losses


def told_apart(scores: pd.DataFrame, kinds: np.ndarray) -> pd.DataFrame:
    """Area under the ROC curve of clean rows (kind "") against those of each kind of damage, [kinds, scores]: 1 where a
    column of ``scores`` [S, scores] puts every clean row above every damaged one, .5 where it cannot tell."""
    found = {}
    for kind in [kind for kind in dict.fromkeys(kinds) if kind]:
        either = np.isin(kinds, ["", kind])
        found[kind] = {name: roc_auc_score(kinds[either] == "", of[either]) for name, of in scores.items()}
    return pd.DataFrame(found).T


def _prompts(adapter, questions, image: bool = True) -> list[str]:
    """As `alignment` writes them: no word of a question stands for an image."""
    return [adapter.prompt(adapter.raw(question), image) for question in questions]


def _answered(adapter, prompts, answers) -> list[str]:
    return [prompt + adapter.raw(answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _by_length(texts, batch_size: int) -> list[np.ndarray]:
    """Indices of a batch's texts, shortest first, so that little is padded."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    return np.array_split(order, -(-len(order) // batch_size))
