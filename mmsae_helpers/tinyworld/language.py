"""The small English about scenes: sentences, documents, questions and answers, and what they cost in nats.

Every string of the language has exactly one derivation, so the probability of a document is the product of the choices
that made it, and an attribute is paid for once, at its first mention. That gives the language's entropy exactly, which
is the floor a language model's loss can reach.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mmsae_helpers.tinyworld.scenes import ATTRIBUTES, Scene, sample_scene

SENTENCES = (
    "a {size} {color} {shape} at the {vertical} {horizontal} on {ground}",
    "the {shape} is {color} and {size}",
    "there is a {color} {shape}",
    "it is at the {vertical} {horizontal} of a {ground} picture",
    "the background is {ground}",
    "the {color} thing is a {shape}",
    "the {size} {shape} is {color}",
    "it is {size} and {color}",
    "what color is the {shape} ? {color}",
    "where is it ? {vertical} {horizontal}",
    "how big is the {shape} ? {size}",
    "what is behind it ? {ground}",
    "the {shape} is at the {vertical} {horizontal}",
)
QUESTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "describe": (
        ("", "describe the picture", "what do you see ?", "tell me about the picture"),
        "a {size} {color} {shape} at the {vertical} {horizontal} on {ground}",
    ),
    "name": (("what is it ?", "name the thing", "what is the thing ?"), "{color} {shape}"),
    "shape": (("what shape is it ?", "which shape is the thing ?", "name the shape"), "{shape}"),
    "color": (("what color is it ?", "which color is the thing ?", "name the color"), "{color}"),
    "place": (("where is it ?", "where is the thing ?", "name the place"), "{vertical} {horizontal}"),
    "size": (("how big is it ?", "what size is it ?", "name the size"), "{size}"),
    "ground": (("what is behind it ?", "what is the background ?", "name the background"), "{ground}"),
}
CHOICES = ("shape", "color")  # attributes of ten values, for questions that are answered with a number
CHOICE_WORDS = ("choose", "number", *map(str, range(10)))  # not in `vocabulary`: only newer families know them
MAX_SENTENCES = 5
LIST_LENGTHS = (8, 64)
SEPARATOR = " . "


class Document(NamedTuple):
    """A text about one scene and the nats (natural log) that its choices cost, the end of text included."""

    text: str
    nats: float


def vocabulary() -> list[str]:
    """All words of the language, sorted."""
    texts = [*SENTENCES, *(q for phrasings, _ in QUESTIONS.values() for q in phrasings), SEPARATOR]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    return sorted(words | {value for values in ATTRIBUTES.values() for value in values})


def mentioned(template: str) -> tuple[str, ...]:
    """Names of the attributes that a template mentions."""
    return tuple(name for name in ATTRIBUTES if "{" + name + "}" in template)


def document(scene: Scene, rng: np.random.Generator, word_lists: bool = True) -> Document:
    """One to five sentences about ``scene``; with ``word_lists`` half of them after an unordered list of 8 to 64 words.

    The list is what image tokens are like: words about one scene in no order of grammar.
    """
    nats, known, parts = 0.0, set(), []

    def learn(names: Iterable[str]) -> float:
        new = set(names) - known
        known.update(new)
        return sum(math.log(len(ATTRIBUTES[name])) for name in new)

    if word_lists:
        nats += math.log(2)
        if rng.integers(2):
            words, names = _word_list(scene, rng)
            nats += (
                math.log(LIST_LENGTHS[1] - LIST_LENGTHS[0] + 1) + len(names) * math.log(len(ATTRIBUTES)) + learn(names)
            )
            parts.append(words)
    count = int(rng.integers(1, MAX_SENTENCES + 1))
    nats += math.log(MAX_SENTENCES)
    for _ in range(count):
        template = SENTENCES[rng.integers(len(SENTENCES))]
        nats += math.log(len(SENTENCES)) + learn(mentioned(template))
        parts.append(template.format(**scene._asdict()))
    return Document(SEPARATOR.join(parts), nats)


def complete_document(scene: Scene, rng: np.random.Generator, word_lists: bool = True) -> str:
    """A text that mentions every attribute, to ask questions about: a word list or several sentences."""
    if word_lists and rng.integers(2):
        names = [*ATTRIBUTES, *_word_list(scene, rng)[1]][: LIST_LENGTHS[1]]
        return " ".join(getattr(scene, names[i]) for i in rng.permutation(len(names)))
    order = [SENTENCES[i] for i in rng.permutation(len(SENTENCES))]
    chosen, known = [], set()
    for template in order:
        if not set(mentioned(template)) <= known:
            chosen.append(template)
            known.update(mentioned(template))
    return SEPARATOR.join(template.format(**scene._asdict()) for template in chosen)


def question_answer(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> tuple[str, str]:
    """A question about ``scene`` in one of its phrasings and the answer; ``kind`` is a key of ``QUESTIONS``."""
    kind = kind or list(QUESTIONS)[rng.integers(len(QUESTIONS))]
    phrasings, answer = QUESTIONS[kind]
    return phrasings[rng.integers(len(phrasings))], answer.format(**scene._asdict())


def choice_question(scene: Scene, rng: np.random.Generator, attribute: str, shuffled: bool) -> tuple[str, str]:
    """A question that lists the ten values of ``attribute``, numbered, and the number that is true of ``scene``.

    In the order of ``ATTRIBUTES``, or ``shuffled`` by ``rng``, so that the list has to be read.
    """
    values = ATTRIBUTES[attribute]
    order = rng.permutation(10) if shuffled else range(10)
    labels = [values[i] for i in order]
    listed = " ".join(f"{number} {label}" for number, label in enumerate(labels))
    return f"choose the number {listed}", str(labels.index(getattr(scene, attribute)))


def any_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question of ``QUESTIONS``, or a quarter of the time one of numbered choices, half of them shuffled."""
    if rng.integers(4):
        return question_answer(scene, rng)
    return choice_question(scene, rng, CHOICES[rng.integers(2)], bool(rng.integers(2)))


def interleaved(scene: Scene, rng: np.random.Generator, image: str = "<image>") -> str:
    """One to five sentences about ``scene`` with the placeholder of its picture before, between or after them."""
    parts = document(scene, rng, word_lists=False).text.split(SEPARATOR)
    parts.insert(int(rng.integers(len(parts) + 1)), image)
    return SEPARATOR.join(parts)


def documents(count: int, seed: int, word_lists: bool = True) -> list[Document]:
    """``count`` documents about as many scenes, deterministic from ``seed``."""
    rng = np.random.default_rng([seed, 7])
    return [document(sample_scene(rng), rng, word_lists) for _ in range(count)]


def _word_list(scene: Scene, rng: np.random.Generator) -> tuple[str, list[str]]:
    length = int(rng.integers(LIST_LENGTHS[0], LIST_LENGTHS[1] + 1))
    names = [list(ATTRIBUTES)[i] for i in rng.integers(len(ATTRIBUTES), size=length)]
    return " ".join(getattr(scene, name) for name in names), names
