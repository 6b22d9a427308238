"""Preference data about the scenes, a known share of it damaged, a benchmark, and the exact judge of its answers."""

import numpy as np
from datasets import Dataset
from PIL import Image

from mmsae_helpers.tinyworld import dataset, language
from mmsae_helpers.tinyworld.scenes import ATTRIBUTES, Scene

KINDS = (
    "wrong attribute", "image swapped", "off the question", "truncated", "repeated", "duplicate", "flipped",
)  # fmt: skip
WRONG = 0.6  # of the attributes of a description with wrong ones


def preferences(
    count: int, seed: int, damage: float = 0.4, split: str = "train", kinds=KINDS, sizes=(dataset.SQUARE,)
) -> Dataset:
    """``count`` rows: image, question, chosen (true), rejected (a false attribute or more), kind ("" where clean);
    pictures are of ``sizes`` (height, width) in turn.

    A share ``damage`` of them, in random places, is damaged, each of ``kinds`` as often as the others or once more:
    a false chosen answer, the picture of another class, the answer to another question, its first words alone, the
    answer twice or thrice, the copy of a clean row, chosen and rejected exchanged. Half of the questions ask for a
    description, as do all of rows to be truncated.
    """
    rng = np.random.default_rng([seed, 20])
    scenes, images = _scenes(count, split, seed, rng, sizes)
    bad = rng.permutation(count)[: round(damage * count)]
    kind = np.full(count, "", object)
    kind[bad] = np.resize(kinds, len(bad))
    clean = np.flatnonzero(kind == "")
    rows = []
    for i in range(count):
        scene, what = scenes[i], kind[i]
        asked = "describe" if what == "truncated" or rng.integers(2) else list(language.QUESTIONS)[rng.integers(7)]
        if what == "wrong attribute" and asked == "size":  # of two values there are no two false ones
            asked = "color"
        question, true = language.question_answer(scene, rng, asked)
        chosen, rejected, image = true, false_answer(scene, true, rng), images[i]
        if what == "wrong attribute":
            chosen, rejected = rejected, false_answer(scene, true, rng)
            while rejected == chosen:
                rejected = false_answer(scene, true, rng)
        elif what == "image swapped":
            others = [j for j, other in enumerate(scenes) if other.fine_label != scene.fine_label]
            image = images[others[rng.integers(len(others))]]
        elif what == "off the question":
            other = [name for name, (_, answer) in language.QUESTIONS.items() if answer != language.QUESTIONS[asked][1]]
            chosen = language.question_answer(scene, rng, other[rng.integers(len(other))])[1]
        elif what == "truncated":
            chosen = " ".join(chosen.split()[: rng.integers(2, 6)])
        elif what == "repeated":
            chosen = " ".join([chosen] * int(rng.integers(2, 4)))
        elif what == "flipped":
            chosen, rejected = rejected, chosen
        rows.append({"image": image, "question": question, "chosen": chosen, "rejected": rejected, "kind": what})
    for i in np.flatnonzero(kind == "duplicate") if len(clean) else []:
        rows[i] = rows[clean[rng.integers(len(clean))]] | {"kind": "duplicate"}
    return Dataset.from_list(rows)


def benchmark(count: int, seed: int = 0, split: str = "test") -> Dataset:
    """``count`` questions with their true answers: image, question, category, reference and the scene's attributes.

    A third each, as in LLaVA-Bench: conversation (one thing asked), detail (a description), reasoning (a numbered list
    of ten, half of them shuffled, from which to choose).
    """
    rng = np.random.default_rng([seed, 21])
    scenes, images = _scenes(count, split, seed, rng)
    rows = []
    for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        category = ("conversation", "detail", "reasoning")[i % 3]
        if category == "reasoning":
            attribute = language.CHOICES[rng.integers(len(language.CHOICES))]
            question, reference = language.choice_question(scene, rng, attribute, bool(rng.integers(2)))
        else:
            some = [name for name in language.QUESTIONS if name != "describe"]
            kind = "describe" if category == "detail" else some[rng.integers(len(some))]
            question, reference = language.question_answer(scene, rng, kind)
        rows.append({"image": image, "question": question, "category": category, "reference": reference})
        rows[-1] |= scene._asdict()
    return Dataset.from_list(rows)


def judge(rows, answers) -> np.ndarray:
    """Scores of answers and references, float64 [N, 2], the reference's 1.

    An answer's is the share of the attributes asked for whose value it says, less the attributes of which it says
    something false, asked for or not, per attribute asked for; at least 0. A number chosen from a list is right or not.
    """
    scores = []
    for row, answer in zip(rows.remove_columns("image"), answers, strict=True):
        said, wanted = answer.split(), row["reference"].split()
        if row["category"] == "reasoning":
            scores.append(float(said[:1] == wanted))
            continue
        asked = [name for name in ATTRIBUTES if row[name] in wanted]
        right = sum(row[name] in said for name in asked)
        false = sum(bool(set(said) & set(values) - {row[name]}) for name, values in ATTRIBUTES.items())
        scores.append(max(0, right - false) / len(asked))
    return np.stack([scores, np.ones(len(scores))], 1)


def false_answer(scene: Scene, true: str, rng: np.random.Generator) -> str:
    """An answer in which at least one of the attributes that ``true`` mentions has another value."""
    words = true.split()
    places = [(i, name) for i, word in enumerate(words) for name in ATTRIBUTES if getattr(scene, name) == word]
    wrong = rng.random(len(places)) < WRONG
    wrong[rng.integers(len(places))] = True
    for (i, name), change in zip(places, wrong, strict=True):
        others = [value for value in ATTRIBUTES[name] if value != words[i]]
        words[i] = others[rng.integers(len(others))] if change else words[i]
    return " ".join(words)


def _scenes(count, split, seed, rng, sizes=(dataset.SQUARE,)):
    """``count`` scenes, any classes, with their pictures."""
    drawn = list(dataset.iter_split(split, -(-count // 100), seed, sizes))
    some = [drawn[i] for i in rng.permutation(len(drawn))[:count]]
    return [scene for scene, *_ in some], [Image.fromarray(picture) for _, picture, *_ in some]
