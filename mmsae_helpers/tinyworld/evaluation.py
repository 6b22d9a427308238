"""How well the embedded models see and read, on scenes they never saw."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage

from mmsae_helpers import data
from mmsae_helpers.tinyworld import dataset, language
from mmsae_helpers.tinyworld.scenes import ATTRIBUTES, sample_scene


class TextLoss(NamedTuple):
    """Cross-entropy a token of held-out documents and the entropy of the language, in nats, end of text included."""

    loss: float
    entropy: float
    n_tokens: int


@torch.no_grad()
def text_loss(adapter, count: int, *, seed: int, word_lists: bool = True, batch_size: int = 128) -> TextLoss:
    """Loss on ``count`` fresh documents against the entropy of the very choices that made them."""
    documents = language.documents(count, seed, word_lists)
    eos, total, tokens = adapter.tokenizer.eos_token, 0.0, 0
    for _, inputs in data.document_batches(adapter, [f"{d.text} {eos}" for d in documents], batch_size):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
        logits = adapter.forward(inputs).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += int((labels != -100).sum())
    return TextLoss(total / tokens, sum(d.nats for d in documents) / tokens, tokens)


def answers(adapter, dataset, question: str = "", batch_size: int = 250) -> list[str]:
    """Greedy answers to one question about every image of ``dataset``."""
    return [
        a for _, inputs in data.batches(adapter, dataset, batch_size, question=question) for a in adapter.answer(inputs)
    ]


def attribute_hits(texts: list[str], dataset) -> dict[str, np.ndarray]:
    """Per attribute, which texts name its true value and no other, bool [N]; ``fine class`` needs shape and colour."""
    said = [set(text.split()) for text in texts]
    hits = {
        name: np.array([words & set(values) == {truth} for words, truth in zip(said, dataset[name], strict=True)])
        for name, values in ATTRIBUTES.items()
    }
    return hits | {"fine class": hits["shape"] & hits["color"]}


def question_accuracy(
    adapter, count: int, *, seed: int, size: tuple[int, int] | None = None, batch_size: int = 100
) -> dict[str, float]:
    """Share of questions that are answered word for word, by kind, ``count`` each, on held-out pictures of ``size``.

    The kinds are those of ``QUESTIONS`` and, where the tokenizer knows the words, numbered choices: ``choice shape``,
    ``shuffled shape`` and so on. ``size`` None asks about a text instead of a picture.
    """
    rng = np.random.default_rng([seed, 10])
    if size is None:
        drawn = [sample_scene(rng) for _ in range(count)]
        shown = None
    else:
        drawn, pixels, _ = dataset.arrays("test", -(-count // 100), seed, size)
        shown = [PILImage.fromarray(image) for image in pixels[:count]]
    asked = {k: lambda scene, k=k: language.question_answer(scene, rng, k) for k in language.QUESTIONS}
    if set(language.CHOICE_WORDS) <= set(adapter.tokenizer.get_vocab()):
        for k in language.CHOICES:
            asked[f"choice {k}"] = lambda scene, k=k: language.choice_question(scene, rng, k, False)
            asked[f"shuffled {k}"] = lambda scene, k=k: language.choice_question(scene, rng, k, True)
    out = {}
    for kind, ask in asked.items():
        questions, wanted = zip(*map(ask, drawn[:count]), strict=True)
        if shown is None:
            about = [f"{language.complete_document(scene, rng)} " for scene in drawn]
            prompts = [adapter.prompt(a + q, image=False) for a, q in zip(about, questions, strict=True)]
        else:
            prompts = [adapter.prompt(q) for q in questions]
        given = []
        for i in range(0, count, batch_size):
            rows = slice(i, i + batch_size)
            given += adapter.answer(adapter.encode(prompts[rows], shown and shown[rows]))
        out[kind] = float(np.mean([g == w for g, w in zip(given, wanted, strict=True)]))
    return out


def reading_accuracy(adapter, count: int, *, seed: int, batch_size: int = 250) -> tuple[float, int]:
    """Share of questions about a text that the instruction-tuned model answers word for word, and their number."""
    rng = np.random.default_rng([seed, 8])
    prompts, wanted = [], []
    for _ in range(count):
        scene = sample_scene(rng)
        question, answer = language.question_answer(scene, rng)
        prompts.append(adapter.prompt(f"{language.complete_document(scene, rng)} {question}", image=False))
        wanted.append(answer)
    given = []
    for i in range(0, count, batch_size):
        given += adapter.answer(adapter.encode(prompts[i : i + batch_size]))
    return float(np.mean([g == w for g, w in zip(given, wanted, strict=True)])), count
