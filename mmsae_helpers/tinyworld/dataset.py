"""Splits of the world as ordinary ``datasets`` objects and as arrays for training."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from mmsae_helpers.tinyworld import language, scenes

SPLITS = {"train": 400, "validation": 20, "test": 100}  # images a class
SQUARE = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
ASPECTS = (SQUARE, (64, 128), SQUARE, (128, 64))  # half of the pictures square, a quarter wide, a quarter tall
_SPLIT_KEY = {"train": 1, "validation": 2, "test": 3}


def iter_split(split: str, per_class: int | None = None, seed: int = 0, sizes=(SQUARE,)):
    """Yield ``(scene, image, mask, rng)`` of a balanced split, classes interleaved, so any prefix is nearly balanced.

    ``rng`` continues the scene's own generator, for the words about it. Scenes of different splits never share a seed.
    ``sizes`` (height, width) are taken in turn; scenes of other sizes than the square are scenes of their own.
    """
    for index in range((per_class or SPLITS[split]) * len(scenes.FINE_NAMES)):
        size = sizes[(index + index // len(scenes.FINE_NAMES)) % len(sizes)]  # a class does not keep to one size
        own = () if size == SQUARE else size
        rng = np.random.default_rng([seed, _SPLIT_KEY[split], index, *own])
        scene = scenes.sample_scene(rng, index % len(scenes.FINE_NAMES))
        image, mask = scenes.render(scene, rng, size)
        yield scene, image, mask, rng


def arrays(split: str, per_class: int | None = None, seed: int = 0, size: tuple[int, int] = SQUARE):
    """A split as ``(scenes: list, images: uint8 [N, 64, 64, 3], masks: bool [N, 64, 64])``, for training the models."""
    rows = [(scene, image, mask) for scene, image, mask, _ in iter_split(split, per_class, seed, [size])]
    return [r[0] for r in rows], np.stack([r[1] for r in rows]), np.stack([r[2] for r in rows])


def make_dataset(split: str, per_class: int | None = None, seed: int = 0, sizes=(SQUARE,)) -> Dataset:
    """A split with the columns of a real data set (image, labels, caption, question, answer), attributes and mask."""
    features = Features(
        {
            "image": Image(),
            "fine_label": ClassLabel(names=list(scenes.FINE_NAMES)),
            "coarse_label": ClassLabel(names=list(scenes.COARSE_NAMES)),
            "caption": Value("string"),
            "question": Value("string"),
            "answer": Value("string"),
            **{name: Value("string") for name in scenes.ATTRIBUTES},
            "mask": Image(),
        }
    )
    return Dataset.from_list([_row(*item) for item in iter_split(split, per_class, seed, sizes)], features=features)


def interleaved(count: int, seed: int, split: str, sizes=(SQUARE,)) -> list[tuple[str, list[PILImage.Image]]]:
    """Documents of one or two scenes: sentences with ``<image>`` where a picture stands, and the pictures, of ``sizes``
    in turn."""
    out = []
    for index in range(count):
        rng = np.random.default_rng([seed, 9, _SPLIT_KEY[split], index])
        chosen = [scenes.sample_scene(rng) for _ in range(rng.integers(1, 3))]
        text = language.SEPARATOR.join(language.interleaved(scene, rng) for scene in chosen)
        shown = [(scene, sizes[(index + i) % len(sizes)]) for i, scene in enumerate(chosen)]
        out.append((text, [PILImage.fromarray(scenes.render(scene, rng, size)[0]) for scene, size in shown]))
    return out


def _row(scene, image, mask, rng) -> dict:
    question, answer = language.question_answer(scene, rng)
    return {
        "image": _png(image),
        "fine_label": scene.fine_label,
        "coarse_label": scene.coarse_label,
        "caption": language.QUESTIONS["describe"][1].format(**scene._asdict()),
        "question": question,
        "answer": answer,
        **scene._asdict(),
        "mask": _png(mask.astype(np.uint8) * 255),
    }


def _png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
