"""LLaVA-NeXT: the Mistral and a tower that read pictures of any shape, as a base image and as tiles of it.

Sizes are the papers' by 64 / 336: tiles of 64 x 64 pixels and 8 x 8 patches, the same five grids of tiles. A square
picture makes 64 base tokens and 8 x (8 + 1) tile and newline tokens, as theirs makes 576 + 24 x (24 + 1).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil
from transformers import LlavaNextProcessor as Processor

from mmsae_helpers.tinyworld import dataset, language, llava
from mmsae_helpers.tinyworld.llava import (
    GRID,
    IMAGE_SIZE,
    _stop_at_end_of_turn,
    chat_ids,
    image_text_loss,
    image_tokens,
    text_loss,
    train_connected,
)
from mmsae_helpers.tinyworld.mistral import make_tokenizer
from mmsae_helpers.tinyworld.scenes import Scene, sample_scene
from mmsae_helpers.tinyworld.training import numpy_rng, pictures_seed
from mmsae_helpers.workers import autocast

PINPOINTS = [[64 * rows, 64 * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]  # height, width
SHAPES = {"square": (64, 64), "wide": (64, 128), "tall": (128, 64), "wider": (64, 192), "taller": (192, 64)}


class Pictures(NamedTuple):
    """Scenes of one picture size, and what the tower says about their views (base, tiles)."""

    size: tuple[int, int]
    scenes: list[Scene]
    features: Tensor  # [N, views, 64, 128] float16


def image_processor() -> LlavaNextImageProcessorPil:
    """Any-resolution tiling by transformers, mean and standard deviation 0.5."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip


def make_processor() -> Processor:
    """The processor of the family: how many image tokens there are depends on the picture's shape."""
    return llava.make_processor(Processor, image_processor(), make_tokenizer())


def views(images: np.ndarray) -> np.ndarray:
    """Base image and tiles of pictures of one size, uint8 [N, H, W, 3] -> uint8 [N, views, 64, 64, 3]."""
    options = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_last"}
    made = [np.stack(image_processor()([image], **options)["pixel_values"]) for image in images]
    return np.concatenate(made).transpose(0, 1, 3, 4, 2).round().clip(0, 255).astype(np.uint8)


def tower_examples(per_class: dict[str, int]):
    """What `llava.train_tower` needs to read tiles too: scenes, views, masks (nan for padding), and which are whole."""
    parts = []
    for shape, count in per_class.items():
        scenes, images, masks = dataset.arrays("train", count, pictures_seed() + 1, SHAPES[shape])
        shown = views(images)
        three = lambda mask: np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255  # noqa: E731
        covered = views(three(masks))[..., 0] >= 128
        picture = views(three(np.ones_like(masks[:1])))[..., 0] >= 128
        masks = np.where(picture, covered, np.float32("nan")).astype(np.float32)
        whole = np.arange(shown.shape[1]) == 0
        rows = [scene for scene in scenes for _ in whole]
        parts.append((rows, shown.reshape(-1, *shown.shape[2:]), masks.reshape(-1, *masks.shape[2:]),
                      np.tile(whole, len(scenes))))  # fmt: skip
    rows, *arrays = zip(*parts, strict=True)
    return sum(rows, []), *map(np.concatenate, arrays)


def pictures(tower, per_class: dict[str, int], split: str = "train") -> list[Pictures]:
    """Scenes of every shape with the frozen tower's patch tokens."""
    out = []
    for shape, count in per_class.items():
        scenes, images, _ = dataset.arrays(split, count, pictures_seed(), SHAPES[shape])
        rows = range(0, len(images), 100)
        seen = []
        for i in rows:
            shown = views(images[i : i + 100])
            tokens = image_tokens(tower, shown.reshape(-1, *shown.shape[2:]))
            seen.append(tokens.half().view(*shown.shape[:2], *tokens.shape[1:]))
        out.append(Pictures(SHAPES[shape], scenes, torch.cat(seen)))
    return out


def make_model(tower, language_model) -> LlavaNextForConditionalGeneration:
    """An untrained connection between ``tower`` and a Mistral."""
    tokenizer = make_tokenizer()
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=tower.config, text_config=language_model.config, image_seq_length=GRID**2,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    _stop_at_end_of_turn(model, tokenizer)
    return model


def train(model, shown: list[Pictures], *, projector_steps: int, joint_steps: int, batch: int = 48) -> list[dict]:
    """Projector and newline first, then the language model too.

    Then a quarter of the batches are interleaved documents, and an eighth the text of the language model itself, which
    would be forgotten otherwise. Each scene of ``shown`` is as likely as any other. The tower is frozen. Returns the
    curve.
    """
    tokenizer, rng = make_tokenizer(), numpy_rng(15)
    shares = np.array([len(kind.scenes) for kind in shown], float)

    def draw():
        kind = shown[rng.choice(len(shown), p=shares / shares.sum())]
        return kind, int(rng.integers(len(kind.scenes)))

    def embed(chosen):
        """Packed embeddings of pictures of any shapes, each [n, d]; one projection for all."""
        flat = torch.cat([kind.features[i] for kind, i in chosen]).float()
        with autocast():
            parts = model.model.multi_modal_projector(flat).split([kind.features.shape[1] for kind, _ in chosen])
        sizes = [kind.size for kind, _ in chosen]
        return model.model.pack_image_features(parts, sizes, "default", model.model.image_newline)[0]

    def questions(step):
        # One draw of shape a batch, so that little is padded.
        kind = draw()[0]
        chosen = [(kind, int(rng.integers(len(kind.scenes)))) for _ in range(batch)]
        rows = []
        for _, i in chosen:
            ask = language.any_question if rng.integers(3) else lambda s, r: language.question_answer(s, r, "describe")
            rows.append(chat_ids(tokenizer, "<image> ", *ask(kind.scenes[i], rng)))
        return image_text_loss(model, tokenizer, rows, embed(chosen))

    def mixed(step):
        what = rng.integers(8)
        if what == 0:
            texts = [language.document(sample_scene(rng), rng).text for _ in range(batch)]
            return text_loss(model, [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts], tokenizer)
        return documents() if what < 3 else questions(step)

    def documents():
        rows, chosen = [], []
        for _ in range(batch // 2):
            part = [draw() for _ in range(rng.integers(1, 3))]
            text = language.SEPARATOR.join(language.interleaved(kind.scenes[i], rng) for kind, i in part)
            ids = tokenizer.encode(text) + [tokenizer.eos_token_id]
            rows.append(([], ids))
            chosen += part
        return image_text_loss(model, tokenizer, rows, embed(chosen))

    return train_connected(model, questions, mixed, projector_steps, joint_steps)
