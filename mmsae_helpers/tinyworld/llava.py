"""The LLaVA-Gemma family: vision tower, text models, LLaVA made of them, and a ResNet for the baseline.

The recipe is the papers': a text-only Gemma; an instruction-tuned one from it; a tower; LLaVA from the tower and the
instruction-tuned Gemma, first the projector alone against the frozen language model, then a light fine-tune of both.
"""

import numpy as np
import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

from mmsae_helpers.tinyworld import language
from mmsae_helpers.tinyworld.scenes import ATTRIBUTES, FINE_NAMES, IMAGE_SIZE, sample_scene
from mmsae_helpers.tinyworld.tokenizer import make_tokenizer
from mmsae_helpers.tinyworld.training import IGNORE, fit, here, numpy_rng, pad, pixels, torch_rng
from mmsae_helpers.workers import autocast

PATCH = 8
GRID = IMAGE_SIZE // PATCH


def image_processor() -> CLIPImageProcessorPil:
    """The tower's image processor: 64 x 64, mean and standard deviation 0.5."""
    return CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def clip_tower() -> CLIPVisionModel:
    """An untrained CLIP vision tower: four layers of width 128, 8 x 8 patches."""
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    return CLIPVisionModel(config)


def train_tower(
    tower, scenes, images, masks, *, whole=None, steps: int, lr: float = 2e-3, batch: int = 128
) -> list[dict]:
    """Supervise an image encoder (a class token, then one token a patch) at its patch tokens; returns the curve.

    Heads on the mean of the patch tokens name every attribute; heads on each single token name what the patch shows:
    the object's shape, colour and size where at least a quarter of its pixels are the object's, the ground elsewhere.
    Where ``masks`` is nan there is no picture; ``whole`` bool [N] says which images show a whole scene (all).
    """
    whole = torch.ones(len(scenes), dtype=torch.bool) if whole is None else here(whole)
    width = tower.config.hidden_size
    pooled = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in ATTRIBUTES.items()})
    local = nn.ModuleDict({k: nn.Linear(width, len(ATTRIBUTES[k])) for k in ("shape", "color", "size", "ground")})
    truth = {k: torch.tensor([v.index(getattr(s, k)) for s in scenes]) for k, v in ATTRIBUTES.items()}
    shown = here(masks).float().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).mean((-1, -2)).flatten(1)
    generator = torch_rng()
    entropy = nn.functional.cross_entropy

    def loss(step):
        i = torch.randint(len(scenes), (batch,), generator=generator)
        with autocast():
            tokens = tower(pixels(images[i.cpu().numpy()])).last_hidden_state[:, 1:]
        tokens = tokens.float()
        mean = tokens.mean(1)[whole[i]]
        total = sum(entropy(head(mean), truth[k][i][whole[i]]) for k, head in pooled.items())
        for k, head in local.items():
            where = shown[i] >= 0.25 if k != "ground" else shown[i] < 0.25
            total = total + 0.5 * entropy(head(tokens[where]), truth[k][i][:, None].expand(-1, GRID**2)[where])
        return total

    modules = nn.ModuleList([tower, pooled, local])
    curve = fit(modules.parameters(), loss, steps=steps, lr=lr, name="tower")
    tower.eval()
    return curve


def gemma_config() -> GemmaConfig:
    """Eight blocks of width 128, so that the papers' five depths of eighteen are five different blocks."""
    tokenizer = make_tokenizer()
    return GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def train_text(model, tokenizer, *, steps: int, name: str, word_lists: bool = True, batch: int = 64) -> list[dict]:
    """Train a text-only causal model on documents; with ``word_lists=False`` the control that never saw such a list."""
    rng = numpy_rng(11)
    draw = _bucketed(
        lambda: tokenizer.encode(language.document(sample_scene(rng), rng, word_lists).text) + [tokenizer.eos_token_id],
        batch, rng,
    )  # fmt: skip

    def loss(step):
        return text_loss(model, next(draw), tokenizer)

    return fit(model.parameters(), loss, steps=steps, lr=3e-3, name=name)


def text_loss(model, rows: list[list[int]], tokenizer) -> torch.Tensor:
    """Mean cross-entropy of the tokens of ``rows`` of ids, the first of each row excepted."""
    ids = pad(rows, tokenizer.pad_token_id)
    return _lm_loss(model, ids, ids.masked_fill(ids == tokenizer.pad_token_id, IGNORE))


def train_instruct(
    model, tokenizer, *, steps: int, name: str, word_lists: bool = True, ask=language.question_answer, batch: int = 64
) -> list[dict]:
    """Instruction-tune a text-only model on chats of a document and a question; the loss is on the answer alone.

    ``ask(scene, rng)`` gives a question and its answer.
    """
    rng = numpy_rng(12)
    _stop_at_end_of_turn(model, tokenizer)

    def chat():
        scene = sample_scene(rng)
        text = language.complete_document(scene, rng, word_lists) + " "
        return chat_ids(tokenizer, text, *ask(scene, rng))

    draw = _bucketed(chat, batch, rng)

    def loss(step):
        rows = next(draw)
        ids = pad([p + a for p, a in rows], tokenizer.pad_token_id)
        return _lm_loss(model, ids, pad([[IGNORE] * len(p) + a for p, a in rows], IGNORE))

    return fit(model.parameters(), loss, steps=steps, lr=1e-3, name=name)


def chat_ids(tokenizer, context: str, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a chat's prompt (context and question) and of its answer with the end of turn."""
    message = [{"role": "user", "content": f"{context}{question}"}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(prompt), tokenizer.encode(f"{answer} <end_of_turn>", add_special_tokens=False)


def train_llava(tower, language_model, scenes, images, *, projector_steps: int, joint_steps: int, batch: int = 64):
    """LLaVA from the tower and an instruction-tuned Gemma: projector first, all else frozen; then a light fine-tune.

    The tower stays frozen throughout. Returns the model and the curve of both stages.
    """
    tokenizer, rng = make_tokenizer(), numpy_rng(13)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config, text_config=language_model.config, image_token_id=image_id,
            vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=GRID**2,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    _stop_at_end_of_turn(model, tokenizer)
    features = image_tokens(tower, images)

    def loss(step):
        chosen, rows = rng.integers(len(scenes), size=batch), []
        for i in chosen:
            kind = "describe" if rng.integers(2) else None
            rows.append(chat_ids(tokenizer, "<image> ", *language.question_answer(scenes[i], rng, kind)))
        with autocast():
            projected = model.model.multi_modal_projector(features[here(chosen)])
        return image_text_loss(model, tokenizer, rows, list(projected))

    return model, train_connected(model, loss, loss, projector_steps, joint_steps)


def image_text_loss(model, tokenizer, rows, images) -> torch.Tensor:
    """Loss on the second part of ``rows`` (ids before, ids to predict), where ``images`` stand in for placeholders.

    ``images`` are embeddings [n, d], one for every ``<image>`` of all rows, in order; the loss is on text alone.
    """
    image_id, remaining = tokenizer.convert_tokens_to_ids("<image>"), iter(images)
    rows = [[_expand(part, image_id, remaining) for part in row] for row in rows]
    ids = pad([p + a for p, a in rows], tokenizer.pad_token_id)
    labels = pad([[IGNORE] * len(p) + a for p, a in rows], IGNORE)
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == image_id)[..., None], torch.cat(images).float())
    return _lm_loss(model, ids, labels.masked_fill(labels == image_id, IGNORE), embeds)


def train_connected(model, first, then, projector_steps: int, joint_steps: int) -> list[dict]:
    """Minimise ``first(step)`` in what connects tower and text, all else frozen; then ``then(step)`` in text too."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.requires_grad_(True)
    curve = fit(model.parameters(), first, steps=projector_steps, lr=3e-3, name="projector")
    model.model.language_model.requires_grad_(True)
    curve += fit(model.parameters(), then, steps=joint_steps, lr=5e-4, name="joint")
    model.requires_grad_(True).eval()
    return curve


def make_processor(kind=LlavaProcessor, images=None, tokenizer=None):
    """The processor of the family: one image makes 64 image tokens. Another ``kind`` brings its own two parts."""
    images, tokenizer = images or image_processor(), tokenizer or make_tokenizer()
    return kind(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=tokenizer.chat_template, image_token="<image>",
    )  # fmt: skip


def train_resnet(scenes, images, *, steps: int, batch: int = 128) -> tuple[ResNetForImageClassification, list[dict]]:
    """A small ResNet on the 100 fine classes, the paper's supervised baseline."""
    names = dict(enumerate(FINE_NAMES))
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1], layer_type="basic",
        id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    model = ResNetForImageClassification(config).train()
    truth = torch.tensor([s.fine_label for s in scenes])
    generator = torch_rng()

    def loss(step):
        i = torch.randint(len(scenes), (batch,), generator=generator)
        with autocast():
            logits = model(pixels(images[i.cpu().numpy()])).logits
        return nn.functional.cross_entropy(logits.float(), truth[i])

    curve = fit(model.parameters(), loss, steps=steps, lr=3e-3, name="resnet")
    return model.eval(), curve


@torch.no_grad()
def image_tokens(tower: CLIPVisionModel, images: np.ndarray, batch: int = 256) -> torch.Tensor:
    """The frozen tower's patch tokens, float32 [N, 64, 128], computed once for both stages of LLaVA."""
    rows = range(0, len(images), batch)
    return torch.cat([tower(pixels(images[i : i + batch])).last_hidden_state[:, 1:] for i in rows])


def _stop_at_end_of_turn(model, tokenizer) -> None:
    config = model.generation_config
    config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    config.pad_token_id = tokenizer.pad_token_id


def _expand(ids: list[int], image_id: int, images) -> list[int]:
    return [out for i in ids for out in ([image_id] * len(next(images)) if i == image_id else [i])]


def _lm_loss(model, ids, labels, embeds=None):
    """Mean cross-entropy of the labelled tokens; logits are computed only where there is a label."""
    inputs = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    inner = getattr(model.model, "language_model", model.model)
    with autocast(labels.device):
        # Right padding under a causal mask never reaches a real token, so no attention mask is needed.
        hidden = inner(**inputs, use_cache=False).last_hidden_state[:, :-1]
        where = labels[:, 1:] != IGNORE
        logits = model.lm_head(hidden[where])
    return nn.functional.cross_entropy(logits.float(), labels[:, 1:][where])


def _bucketed(draw, batch: int, rng: np.random.Generator, pool: int = 16):
    """Endless batches of rows of similar length: a pool of batches sorted by length, served in random order."""

    def size(row):
        return sum(map(len, row)) if isinstance(row, tuple) else len(row)

    while True:
        rows = sorted((draw() for _ in range(batch * pool)), key=size)
        for i in rng.permutation(pool):
            yield rows[i * batch : (i + 1) * batch]
