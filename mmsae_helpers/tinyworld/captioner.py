"""The captioner: a ViT encoder and a GPT-2 decoder that reads it by cross-attention, as vit-gpt2-image-captioning.

The encoder starts from the CLIP tower and is supervised at its patch tokens as that was; then the decoder learns to
write about what the frozen encoder shows it, half the time the plain description and half the time one to five
sentences, so that its residual stream has more to say than one template.
"""

import numpy as np
import torch
from torch import nn
from transformers import (
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from mmsae_helpers.tinyworld import language
from mmsae_helpers.tinyworld.llava import PATCH, _bucketed
from mmsae_helpers.tinyworld.scenes import IMAGE_SIZE, Scene
from mmsae_helpers.tinyworld.tokenizer import make_tokenizer
from mmsae_helpers.tinyworld.training import fit, numpy_rng, pad, pixels
from mmsae_helpers.workers import autocast

MAX_LENGTH = 64


def make_captioner() -> VisionEncoderDecoderModel:
    """An untrained captioner: four encoder layers of width 128, twelve decoder blocks of width 96."""
    tokenizer = make_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    encoder = ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    decoder = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=96, n_layer=12, n_head=4, n_inner=192, is_decoder=True,
        add_cross_attention=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special,
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=ViTModel(encoder), decoder=GPT2LMHeadModel(decoder))
    start = {"decoder_start_token_id": tokenizer.bos_token_id} | special
    model.config.update(start)
    model.generation_config.update(**start, max_length=MAX_LENGTH)
    return model


def image_processor() -> ViTImageProcessorPil:
    """The encoder's image processor: 64 x 64, mean and standard deviation 0.5."""
    return ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


@torch.no_grad()
def start_from_clip(encoder: ViTModel, tower: CLIPVisionModel, images: np.ndarray) -> None:
    """Copy the CLIP tower into a ViT of the same shape.

    A ViT has no norm before its first layer. Its mean and gain are linear and go into the embeddings exactly; its
    standard deviation becomes the mean one over ``images``, which leaves the features a sixth off: train them on.
    """
    weights = {}
    for name, value in tower.encoder.state_dict().items():
        for old, new in (("layer_norm1", "layernorm_before"), ("layer_norm2", "layernorm_after"),
                         ("self_attn.out_proj", "attention.o_proj"), ("self_attn", "attention")):  # fmt: skip
            name = name.replace(old, new)
        weights[name] = value
    filters = tower.embeddings.patch_embedding.weight
    places = tower.embeddings.position_embedding.weight
    norm = tower.pre_layrnorm
    embedded = tower.embeddings(pixels(images))[:, 1:]
    gain = norm.weight / embedded.std(-1, unbiased=False).mean()
    weights["embeddings.patch_embeddings.projection.weight"] = (filters - filters.mean(0)) * gain[:, None, None, None]
    weights["embeddings.patch_embeddings.projection.bias"] = torch.zeros_like(gain)
    weights["embeddings.position_embeddings"] = ((places - places.mean(1, keepdim=True)) * gain + norm.bias)[None]
    class_token = norm(tower.embeddings.class_embedding + places[0])
    weights["embeddings.cls_token"] = class_token - weights["embeddings.position_embeddings"][:, :1]
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(("layernorm", "pooler")) for name in missing)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Words about ``scene``: half the time the plain description, so that greedy captions have that form."""
    if rng.integers(2):
        return language.question_answer(scene, rng, "describe")[1]
    return language.document(scene, rng, word_lists=False).text


def train_decoder(model: VisionEncoderDecoderModel, scenes, images, *, steps: int, batch: int = 64) -> list[dict]:
    """Train everything but the encoder on captions of ``scenes``, teacher-forced; returns the curve."""
    tokenizer, rng = make_tokenizer(), numpy_rng(14)

    def example():
        i = int(rng.integers(len(scenes)))
        return [i], tokenizer.encode(caption(scenes[i], rng)) + [tokenizer.eos_token_id]

    draw = _bucketed(example, batch, rng)

    def loss(step):
        chosen, rows = zip(*next(draw), strict=True)
        ids = pad(rows, tokenizer.pad_token_id)
        with autocast():
            with torch.no_grad():
                seen = model.encoder(pixels(images[np.concatenate(chosen)])).last_hidden_state
            seen = model.enc_to_dec_proj(seen)
            # Right padding under a causal mask never reaches a real token, so no attention mask is needed.
            hidden = model.decoder.transformer(ids[:, :-1], encoder_hidden_states=seen, use_cache=False)[0]
            where = ids[:, 1:] != tokenizer.pad_token_id
            logits = model.decoder.lm_head(hidden[where])
        return nn.functional.cross_entropy(logits.float(), ids[:, 1:][where])

    model.requires_grad_(True).encoder.requires_grad_(False)
    curve = fit(model.parameters(), loss, steps=steps, lr=2e-3, name="decoder")
    model.requires_grad_(True).eval()
    return curve
