"""Chameleon: image tokens of the model's own vocabulary, at the paper's size and at the embedded world's."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    ChameleonVQVAEConfig,
    PreTrainedTokenizerFast,
)

from mmsae_helpers import models as adapters
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import patches
from mmsae_helpers.tinyworld import chameleon, dataset, evaluation, language

BOI, EOI, SEPARATOR = "<racm3:break>", "<eoss>", "<reserved08706>"


def make_adapter(resolution: int, multiplier: list[int], codes: int, context: int, image_seq_length=None, vq=None):
    """Config, processor and a random model of two blocks; the vocabulary is the 7B's in kind."""
    names = ["IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(i)) + "Z" for i in range(codes)]
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", BOI, EOI, SEPARATOR, *names, "what", "is", "it", "?", "red"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        sep_token=SEPARATOR, additional_special_tokens=["<image>", BOI, EOI],
    )  # fmt: skip
    vq = ChameleonVQVAEConfig(
        resolution=resolution, channel_multiplier=multiplier, num_embeddings=codes, base_channels=32,
        latent_channels=32, embed_dim=8, num_res_blocks=1, **(vq or {}),
    )  # fmt: skip
    config = ChameleonConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=context, vocabulary_map=tokenizer.get_vocab(),
        vq_config=vq.to_dict(), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    size = {"size": {"shortest_edge": resolution}, "crop_size": {"height": resolution, "width": resolution}}
    side = resolution // 2 ** (len(multiplier) - 1)
    length = image_seq_length or side**2
    processor = ChameleonProcessor(ChameleonImageProcessorPil(**size), tokenizer, image_seq_length=length)
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(config).eval().requires_grad_(False)
    return adapters.ChameleonAdapter("tiny random chameleon", model, tokenizer, processor)


@pytest.fixture(scope="module")
def tiny():
    return make_adapter(64, [1, 1, 1, 1], 32, 128)


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_geometry_at_the_papers_size():
    """512 x 512 pixels through five resolutions: 32 x 32 = 1,024 tokens of 8,192 codes between start and end."""
    adapter = make_adapter(512, [1, 1, 1, 1, 1], 8192, 4096)
    assert ChameleonVQVAEConfig().resolution == 512 and len(ChameleonVQVAEConfig().channel_multiplier) == 5
    assert adapter.patch_grid == (32, 32)
    inputs = adapter.encode([adapter.prompt("what is it ?")], [Image.new("RGB", (640, 480))])
    assert inputs["pixel_values"].shape == (1, 3, 512, 512)
    ids, mask = inputs["input_ids"][0], adapter.image_mask(inputs["input_ids"])[0]
    words = adapter.tokenizer.convert_ids_to_tokens(ids[~mask])
    assert words[:2] == [BOI, EOI] and words[2:] == ["what", "is", "it", "?", SEPARATOR]
    assert mask.sum() == 1024 and mask.nonzero().flatten().tolist() == list(range(1, 1025))
    assert adapter.patch_index(inputs["input_ids"])[0][mask].tolist() == list(range(1024))


def test_image_words_are_image_tokens_too(tiny, picture):
    """What a model wrote, or a document with its codes spelled out, reads as the placeholders do."""
    inputs = tiny.encode([tiny.prompt("what is it ?")], [picture])
    spelled = inputs["input_ids"].clone()
    spelled[tiny.image_mask(spelled)] = tiny.model.get_image_tokens(inputs["pixel_values"])[0].long()
    assert torch.equal(tiny.image_mask(spelled), tiny.image_mask(inputs["input_ids"]))
    assert torch.equal(tiny.patch_index(spelled), tiny.patch_index(inputs["input_ids"]))
    by_name = tiny.forward({"input_ids": spelled, "attention_mask": inputs["attention_mask"]}).logits
    assert torch.allclose(by_name, tiny.forward(inputs).logits, atol=1e-5)


def painted(picture, row, column):
    """``picture`` with one patch red."""
    copy = picture.copy()
    copy.paste((255, 0, 0), (8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
    return copy


def test_a_painted_patch_changes_its_own_code_alone(picture):
    """With kernels cut to their own place and neither norms nor attention, which see the whole image."""
    adapter = make_adapter(64, [1, 1, 1, 1], 32, 128, vq={"attn_type": "none"})
    vq = adapter.model.model.vqmodel
    for module in list(vq.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            own = torch.zeros(3, 3)
            own[(slice(2),) * 2 if module.stride == (2, 2) else (1, 1)] = 1  # downsampling pads right and below
            module.weight.data *= own
    pixels = adapter.encode([adapter.prompt()] * 2, [picture, Image.new("RGB", (64, 64), (255, 0, 0))])["pixel_values"]
    latents = vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2)
    vq.quantize.embedding.weight.data.copy_(torch.cat([latents[0, :62:2], latents[1, :1]]))  # red has a code of its own
    for row, column in ((0, 0), (0, 6), (6, 0), (3, 4), (7, 7)):
        inputs = adapter.encode([adapter.prompt()] * 2, [picture, painted(picture, row, column)])
        assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
        embeds = adapter.model.get_image_features(inputs["pixel_values"]).pooler_output
        index = adapter.patch_index(inputs["input_ids"])[0]
        changed = (embeds[0] != embeds[1]).any(-1).nonzero().flatten()
        assert index[index >= 0][changed].tolist() == [8 * row + column]


def test_a_painted_patch_changes_its_surroundings_most(tiny, picture):
    """The whole encoder: 7 convolutions at the last resolution reach 7 patches, norms and attention all of them, so
    every latent may move a little; those around the paint move most."""
    vq, place = tiny.model.model.vqmodel, torch.arange(8)
    for row, column in ((1, 1), (1, 6), (6, 1), (3, 4)):
        images = [picture, painted(picture, row, column)]
        a, b = vq.quant_conv(vq.encoder(tiny.encode([tiny.prompt()] * 2, images)["pixel_values"]))
        moved = (a - b).norm(dim=0)
        near = ((place - row).abs() <= 2)[:, None] & ((place - column).abs() <= 2)
        assert moved[near].mean() > 1.2 * moved[~near].mean()


@pytest.mark.parametrize(
    ("text", "images", "says"),
    [
        ("what is it ?", 1, "text 0 has 0 <image> but is given one image: one each"),
        ("<image><image> what is it ?", 1, "text 0 has 2 <image> but is given one image"),
        ("<image> what is it ?", 0, "text 0 has 1 <image> but is given no image"),
        ("<image>" + " red" * 200, 1, "tiny random chameleon reads 128: shorten it"),
    ],
)
def test_bad_inputs_get_one_line(tiny, picture, text, images, says):
    with pytest.raises(InputError) as caught:
        tiny.encode([text], [picture] * images or None)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_processor_of_another_size_is_refused():
    with pytest.raises(InputError, match="makes 64 codes an image but its processor writes 1024 placeholders"):
        make_adapter(64, [1, 1, 1, 1], 32, 128, image_seq_length=1024)


def test_padding_does_not_change_an_answer(tiny, picture):
    prompts = [tiny.prompt(q) for q in ("", "what is it ?", "red")]
    together = tiny.answer(tiny.encode(prompts, [picture] * 3), max_new_tokens=4)
    alone = [tiny.answer(tiny.encode([p], [picture]), max_new_tokens=4)[0] for p in prompts]
    assert together == alone


def test_the_world_spells_codes_as_transformers_reads_them():
    words = chameleon.make_tokenizer()
    mapping = chameleon.make_model(chameleon.ChameleonVQVAE(chameleon.vq_config())).model.vocabulary_mapping
    names = words.convert_ids_to_tokens([mapping.img2bpe[code] for code in (0, 7, 42, chameleon.CODES - 1)])
    assert names == [chameleon.code_name(code) for code in (0, 7, 42, chameleon.CODES - 1)]
    assert len(mapping.bpe2img) == chameleon.CODES and mapping.image_token_id == words.convert_tokens_to_ids("<image>")


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (512, 512)])
def test_patches_divide_what_the_processor_leaves_of_a_picture(size):
    adapter = make_adapter(512, [1] * 5, 16, 1200)
    keep = np.zeros((1, 32 * 32), bool)
    keep[0, 32 * 10 + 3] = True  # row 10, column 3
    (left,) = patches.paint([adapter.crop(Image.new("RGB", size, (255, 255, 255)))], keep, adapter.patch_grid)
    seen = adapter.processor.image_processor(left, do_normalize=False, return_tensors="pt")["pixel_values"][0, 0]
    share = seen.view(32, 16, 32, 16).mean((1, 3)) / seen.max()
    assert share[10, 3] > 0.7 and share.sum() < 1.6  # resampling spreads over the edges


def test_painting_black_touches_only_its_patches():
    images = np.full((1, 64, 64, 3), 200, np.uint8)
    painted = np.zeros((1, 64), bool)
    painted[0, 8 * 2 + 5] = True
    black = chameleon.paint_black(images, painted)[0, ..., 0] == 0
    assert black[16:24, 40:48].all() and black.sum() == 64


@pytest.mark.parametrize("name", ["chameleon", "anole"])
def test_the_shipped_models_answer(name):
    adapter, scenes = adapters.load(f"tinyworld/{name}", "cpu"), dataset.make_dataset("test", 1)
    hits = evaluation.attribute_hits(evaluation.answers(adapter, scenes, "describe the picture"), scenes)
    assert {k: v.mean() for k, v in hits.items() if v.mean() < 0.85} == {}
    tests = [(s, i) for s, i, *_ in dataset.iter_split("test", 1)][:40]
    rng = np.random.default_rng(0)
    asked = [language.choice_question(scene, rng, "color", shuffled=False) for scene, _ in tests]
    prompts = [adapter.prompt(question) for question, _ in asked]
    given = adapter.answer(adapter.encode(prompts, [Image.fromarray(image) for _, image in tests]))
    assert np.mean([g == a for g, (_, a) in zip(given, asked, strict=True)]) >= 0.85


def test_anole_predicts_image_tokens_and_chameleon_does_not():
    """Nats an image token after a description: Anole far below the entropy of the codes' own frequencies."""
    anole, other = (adapters.load(f"tinyworld/{name}", "cpu") for name in ("anole", "chameleon"))
    rows = list(dataset.iter_split("validation", 1))[:40]
    vq, mapping = anole.model.model.vqmodel, anole.model.model.vocabulary_mapping
    codes = torch.from_numpy(chameleon.codes(vq, np.stack([image for _, image, *_ in rows])))
    words = torch.tensor([[mapping.img2bpe[code] for code in row] for row in codes.tolist()])
    texts = [language.QUESTIONS["describe"][1].format(**scene._asdict()) + f" . {BOI}" for scene, *_ in rows]
    ids = torch.cat([anole.tokenizer(texts, return_tensors="pt")["input_ids"], words], 1)
    share = np.bincount(codes.flatten(), minlength=chameleon.CODES) / codes.numel()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    nats = [
        torch.nn.functional.cross_entropy(
            chameleon.image_logits(a.model, ids)[:, -65:-1].flatten(0, 1), codes.flatten()
        ).item()
        for a in (anole, other)
    ]
    assert nats[0] < entropy / 3 and nats[1] > entropy


def test_anole_imagines_what_the_text_names():
    """Sampled codes read back by Chameleon name the ground and the size that they were asked for."""
    anole, reader = (adapters.load(f"tinyworld/{name}", "cpu") for name in ("anole", "chameleon"))
    mapping, right = anole.model.model.vocabulary_mapping, 0
    for size, ground in (("large", "navy"), ("small", "olive"), ("large", "gray")):
        codes = chameleon.imagine(anole.model, f"a {size} red star at the middle center on {ground}")
        spelled = " ".join(anole.tokenizer.convert_ids_to_tokens([mapping.img2bpe[code] for code in codes]))
        answer = reader.answer(reader.encode([f"{BOI} {spelled} {EOI}what do you see ?{SEPARATOR}"]))[0]
        right += len({size, ground} & set(answer.split()))
    assert right >= 5
