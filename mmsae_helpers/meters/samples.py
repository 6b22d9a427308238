"""Scores of whole samples, by which alignment data is filtered (paper C, section 4; METHODS C.3), from one pass.

A sample is a prompt with its image and an answer to it. `passing` streams such samples to the meters here and, from the
same forward passes, gives the model's loss on the answers, so that scores with and without an SAE cost one pass.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from mmsae_helpers import activations
from mmsae_helpers.activations import Inputs, TokenBatch
from mmsae_helpers.meters.crossmodal import sample_scores
from mmsae_helpers.meters.feed import Meter

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
    before, _, after = adapter.image_words
    written = [adapter.image_tokens(image.size[::-1]) + bool(before) + bool(after) - 1 for image in images]
    return _lengths(adapter, [adapter.prompt(question) for question in questions]) + written


def passing(adapter, rows, layers, batch_size: int, see: AnswerLosses | None = None, answer="chosen") -> Iterator:
    """TokenBatches of the rows' prompts with their answers (text and image tokens), longest together.

    ``rows`` has columns image, question and ``answer``; with ``see`` the passes go to the end, and it fills.
    """
    texts = [adapter.prompt(q) + a for q, a in zip(rows["question"], rows[answer], strict=True)]
    order = np.argsort([len(text) for text in texts], kind="stable")

    def batches():
        for at in np.array_split(order, -(-len(order) // batch_size)):
            part = rows.select(at)
            yield Inputs(torch.from_numpy(at), adapter.encode([texts[i] for i in at], part["image"]))

    return activations.stream(adapter, batches(), layers, keep="content", see=see)


@torch.no_grad()
def text_losses(adapter, rows, batch_size: int, question: bool, answer="chosen") -> np.ndarray:
    """Loss on the answers, in nats a token [S], without the image: after the question alone, or after nothing."""
    bos = adapter.tokenizer.bos_token or ""
    prompts = [adapter.prompt(q, image=False) if question else bos for q in rows["question"]]
    texts = [prompt + text for prompt, text in zip(prompts, rows[answer], strict=True)]
    losses = AnswerLosses(_lengths(adapter, prompts))
    for at in np.array_split(np.argsort([len(text) for text in texts], kind="stable"), -(-len(texts) // batch_size)):
        inputs = adapter.encode([texts[i] for i in at])
        losses(torch.from_numpy(at), inputs, adapter.forward(inputs))
    return losses.losses


def _lengths(adapter, texts) -> np.ndarray:
    """Tokens of each text as `Adapter.encode` writes it, a placeholder counting as one, int [S]."""
    bos = adapter.tokenizer.bos_token
    special = not (bos and texts[0].startswith(bos))
    return np.array([len(ids) for ids in adapter.tokenizer(texts, add_special_tokens=special)["input_ids"]])
