"""LLaVA-NeXT's tokens: base image, tiles and newlines at the papers' sizes, by painting patches and by counting."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    SiglipVisionConfig,
)

from mmsae_helpers import activations, cache, data, models
from mmsae_helpers.errors import InputError
from mmsae_helpers.models import LlavaAdapter, LlavaNextAdapter
from mmsae_helpers.tinyworld import dataset, evaluation, language, llava_next, scenes, tokenizer
from mmsae_helpers.tinyworld.mistral import make_tokenizer

PAPER_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def parts(side, patch, context):
    """Configs of a random model of width 16 that reads ``side`` pixels, and the tokenizer."""
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=side,
        patch_size=patch,
    )  # fmt: skip
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=context,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    # With one layer, -2 is the embedding of each patch by itself: nothing there has looked at its neighbours.
    return dict(vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-2), tokenizer


def make_next(side, patch, pinpoints, context=4096):
    torch.manual_seed(0)
    config, tokenizer = parts(side, patch, context)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**config, image_grid_pinpoints=pinpoints))
    square = {"height": side, "width": side}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=pinpoints),
        tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template, image_token="<image>",
    )  # fmt: skip
    return LlavaNextAdapter("random", model.eval().requires_grad_(False), tokenizer, processor)


@pytest.fixture(scope="module")
def paper():
    return make_next(336, 14, PAPER_PINPOINTS)


@pytest.fixture(scope="module")
def tiny():
    return make_next(64, 8, llava_next.PINPOINTS, context=400)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_a_square_image_has_1176_tokens(paper):
    inputs = paper.encode([paper.prompt()], [noise(336, 336)])
    is_image, patch, part = (x[0] for x in paper.geometry(inputs))
    assert paper.patch_grid == (24, 24) and is_image.sum() == 1176
    assert (is_image == paper.image_mask(inputs["input_ids"])[0]).all()
    patch, part = patch[is_image], part[is_image]
    assert part.bincount().tolist() == [576, 576, 24] and (part[:576] == 0).all()
    assert (part[576:].view(24, 25)[:, -1] == 2).all() and (patch[part == 2] == -1).all()
    assert patch[part < 2].tolist() == list(range(576)) * 2


def test_llava_1_5_has_576():
    config, tokenizer = parts(336, 14, 4096)
    model = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    square = {"height": 336, "width": 336}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=square), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template, image_token="<image>",
    )  # fmt: skip
    adapter = LlavaAdapter("random", model, tokenizer, processor)
    inputs = adapter.encode([adapter.prompt()], [noise(480, 640)])
    is_image, patch, part = (x[0] for x in adapter.geometry(inputs))
    assert adapter.patch_grid == (24, 24) and patch[is_image].tolist() == list(range(576))
    assert (part == is_image.long() - 1).all()


@pytest.mark.parametrize("size", [(672, 672), (300, 500), (640, 480), (1000, 200), (37, 911), (335, 337), (5, 4000)])
def test_any_size_has_the_tokens_that_the_model_makes(paper, size):
    inputs = paper.encode([paper.prompt()], [noise(*size)])
    is_image, patch, part = (x[0] for x in paper.geometry(inputs))
    made = paper.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    assert len(made) == is_image.sum()
    newline = (made == paper.model.model.image_newline).all(1)
    assert (newline == (part[is_image] == 2)).all()
    tiles = patch[part == 1]
    assert not len(tiles) or (tiles.min() >= 0 and tiles.max() < 576)
    if len(tiles):
        lengths = newline[576:].nonzero().flatten().diff()
        assert lengths.unique().numel() <= 1  # every row of the tiles is as long


def painted_tokens(adapter, size, patch):
    """Which image tokens differ when one patch of the base image is painted, and the geometry of the image."""
    plain = noise(*size)
    rows, columns = adapter.patch_grid
    (top, bottom), (left, right) = (
        (round(i * edge / n), round((i + 1) * edge / n))
        for i, n, edge in zip(divmod(patch, columns), (rows, columns), size, strict=True)
    )
    paint = plain.copy()
    paint.paste((255, 0, 0), (left, top, right, bottom))
    inputs = adapter.encode([adapter.prompt()] * 2, [plain, paint])
    before, after = adapter.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    is_image, patches, part = (x[0] for x in adapter.geometry(inputs))
    return (before != after).any(1), patches[is_image], part[is_image]


@pytest.mark.parametrize("patch", [0, 7, 27, 56, 63])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64), (192, 64), (128, 128)])
def test_a_painted_patch_changes_the_tokens_that_show_it(tiny, size, patch):
    changed, patches, part = painted_tokens(tiny, size, patch)
    assert changed[(part == 1) & (patches == patch)].all() and not changed[(part == 1) & (patches != patch)].any()
    assert not changed[part == 2].any() and changed[(part == 0) & (patches == patch)].all()
    expected = (size[0] // 64) * (size[1] // 64) if size != (64, 64) else 1
    assert ((part == 1) & (patches == patch)).sum() == expected
    if size == (64, 64):  # otherwise the base image is resized, and a patch bleeds into its neighbours
        assert changed[part == 0].sum() == 1


@pytest.mark.parametrize("size", [(90, 130), (61, 190), (100, 100)])
def test_a_resized_tile_changes_in_the_patch_and_beside_it(tiny, size):
    for patch in (0, 27, 63):
        changed, patches, part = painted_tokens(tiny, size, patch)
        near = (patches // 8 - patch // 8).abs().maximum((patches % 8 - patch % 8).abs()) <= 1
        assert not changed[(part < 2) & ~near].any() and not changed[part == 2].any()
        assert changed[(part < 2) & (patches == patch)].all()


def test_as_published_the_last_column_reads_newlines(paper):
    inputs = paper.encode([paper.prompt()], [noise(336, 336)])
    _, patch, part = (x[0] for x in paper.geometry(inputs))
    _, wrong, wrong_part = (x[0] for x in paper.geometry(inputs, "as_published"))
    assert (wrong_part == 1).sum() == 576 and (patch[part == 0] == wrong[part == 0]).all()
    assert (wrong[part == 2] % 24 == 23).all() and (wrong[(part == 1) & (patch % 24 == 0)] == -1).all()
    inner = (part == 1) & (patch % 24 > 0)
    assert (wrong[inner] == patch[inner] - 1).all()


def test_images_of_several_shapes_in_one_batch(tiny):
    sizes = [(64, 64), (64, 128), (192, 64), (70, 50)]
    texts = [tiny.prompt("what is it ?" * (i % 2)) for i in range(4)]
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    together = tiny.encode(texts, images)
    assert together["image_sizes"].tolist() == [list(size) for size in sizes]
    logits = tiny.forward(together).logits
    for i in range(4):
        alone = tiny.encode(texts[i : i + 1], images[i : i + 1])
        n = alone["input_ids"].shape[1]
        for a, b in zip(tiny.geometry(together), tiny.geometry(alone), strict=True):
            assert torch.equal(a[i, :n], b[0])
            assert (a[i, n:] == (-1 if a.dtype == torch.int64 else False)).all()
        torch.testing.assert_close(logits[i, :n], tiny.forward(alone).logits[0], atol=1e-5, rtol=1e-4)
    batch = next(activations.stream(tiny, [activations.Inputs(torch.arange(4), together)], [1]))
    assert (
        batch.is_image.all()
        and batch.sample.bincount().tolist() == tiny.image_mask(together["input_ids"]).sum(1).tolist()
    )
    assert (batch.patch == -1).sum() == 8 + 8 + 24 + tiny.geometry(together)[2][3].eq(2).sum()


def test_documents_with_none_one_and_two_images(tiny):
    texts = ["it is red", "<image> it is red", "red . <image> . blue . <image> it"]
    images = [[], [noise(64, 64)], [noise(64, 64, 1), noise(64, 64, 2)]]
    inputs = tiny.encode(texts, images)
    assert tiny.image_mask(inputs["input_ids"]).sum(1).tolist() == [0, 136, 272] and len(inputs["image_sizes"]) == 3
    assert (tiny.geometry(inputs).patch == 63).sum(1).tolist() == [0, 2, 4]
    assert tiny.encode(texts[:1], images[:1]).keys() == {"input_ids", "attention_mask"}
    assert not tiny.geometry(tiny.encode(texts[:1])).is_image.any()
    assert tiny.forward(inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_a_document_is_cut_before_an_image_that_does_not_fit(tiny):
    one = data.Interleaved("red . <image> it is red", [noise(64, 64)])
    two = data.Interleaved("red . <image> . blue . <image> it", [noise(64, 64, 1), noise(64, 64, 2)])
    whole, cut = (next(data.document_batches(tiny, [one, two], 2, max_tokens=n)).inputs for n in (None, 200))
    assert whole["input_ids"].shape[1] == 279 and len(whole["image_sizes"]) == 3
    assert cut["attention_mask"].sum(1).tolist() == [142, 142] and len(cut["image_sizes"]) == 2
    assert tiny.image_mask(cut["input_ids"]).sum(1).tolist() == [136, 136]
    torch.testing.assert_close(cut["pixel_values"][1], whole["pixel_values"][1])
    tiny.forward(cut)
    inside_words = next(data.document_batches(tiny, [one], 1, max_tokens=140)).inputs
    assert inside_words["attention_mask"].sum().item() == 140 and len(inside_words["image_sizes"]) == 1
    with pytest.raises(InputError, match="document 0 begins with an image .*longer than 50 "):
        next(data.document_batches(tiny, [data.Interleaved("<image> it", [noise(64, 64)])], 1, max_tokens=50))


@pytest.mark.parametrize(
    ("text", "images", "says"),
    [
        ("<image> it", [], "text 0 has 1 <image> but is given no image"),
        ("<image> it", None, "text 0 has 1 <image> but is given no image"),
        ("it", [(64, 64)], "text 0 has 0 <image> but is given one image"),
        ("<image> it", [(64, 64)] * 2, "text 0 has 1 <image> but is given 2 images"),
        ("<image> " + "red " * 400, [(64, 64)], "reads 400: shorten it"),
    ],
)
def test_bad_inputs_get_one_line(tiny, text, images, says):
    with pytest.raises(InputError, match=says) as caught:
        tiny.encode([text], None if images is None else [[noise(*size) for size in images]])
    assert "\n" not in str(caught.value)


def test_geometry_needs_the_sizes(tiny):
    inputs = tiny.encode(["<image> it"], [noise(64, 64)])
    with pytest.raises(InputError, match="depend on the sizes"):
        tiny.patch_index(inputs["input_ids"])
    with pytest.raises(InputError, match="136 image tokens, but the image sizes of the batch make 0"):
        tiny.geometry({"input_ids": inputs["input_ids"]})


def test_embedded_documents_are_true_to_their_scenes():
    documents = data.interleaved("tinyworld", 40, seed=1)
    assert {len(d.images) for d in documents} == {1, 2} and not documents.skipped
    assert all(d.text.count(data.PLACEHOLDER) == len(d.images) for d in documents)
    again = data.interleaved("tinyworld", 40, seed=1)
    assert [d.text for d in again] == [d.text for d in documents]
    assert np.array_equal(np.asarray(again[3].images[0]), np.asarray(documents[3].images[0]))
    with pytest.raises(InputError, match="no split"):
        data.interleaved("tinyworld", 1, split="dev")


def test_obelics_layout_counts_what_cannot_be_had(tmp_path):
    noise(20, 30).save(tmp_path / "a.png")
    here, gone = str(tmp_path / "a.png"), str(tmp_path / "gone.png")
    rows = {
        "texts": [["before", None, "after"], [None, "x"], ["words alone"], [None, None]],
        "images": [[None, here, None], [gone, None], [None], [here, here]],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "o.parquet")
    documents = data.interleaved(str(tmp_path / "o.parquet"), 2, seed=0)
    assert sorted(d.text for d in documents) == ["<image> <image>", "before <image> after"]
    assert all(i.size == (30, 20) for d in documents for i in d.opened())
    with pytest.raises(InputError, match=r"has 2 documents .* but 3 are needed \(2 left out\)"):
        data.interleaved(str(tmp_path / "o.parquet"), 3)
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="has no column images and texts"):
        data.interleaved(str(tmp_path / "t.parquet"), 1)


def test_wide_scenes_keep_their_objects_size():
    for name, size in llava_next.SHAPES.items():
        for scene, image, mask, _ in list(dataset.iter_split("test", 1, sizes=[size]))[:10]:
            assert image.shape == (*size, 3) and mask.shape == size, name
            radius = 8 if scene.size == "small" else 13
            assert mask.any(0).sum() >= radius and mask.sum() < (2.6 * 16) ** 2
            column = mask.any(0).nonzero()[0].mean() / size[1]
            assert abs(column - (0.18, 0.5, 0.82)[scenes.ATTRIBUTES["horizontal"].index(scene.horizontal)]) < 0.2


def test_interleaved_tokens_are_stored_and_found(tiny, tmp_path):
    documents = data.interleaved("tinyworld", 4, seed=2)
    tokens, again = (cache.of_texts(tmp_path, tiny, documents, [1], batch_size=2, keep="all") for _ in range(2))
    first, second = next(iter(tokens)), next(iter(again))
    assert tokens.computed == 1 and again.reused == 1
    assert torch.equal(first.acts[1], second.acts[1]) and torch.equal(first.patch, second.patch)
    assert first.is_image.sum() == 136 * sum(len(d.images) for d in documents) and (~first.is_image).any()
    documents[0].images[0] = noise(64, 64)
    other = cache.of_texts(tmp_path, tiny, documents, [1], batch_size=2, keep="all")
    assert other.folder != tokens.folder


@pytest.fixture(scope="module")
def shipped():
    return models.load("tinyworld/llava-next", "cpu")


@pytest.mark.parametrize("shape", llava_next.SHAPES)
def test_the_shipped_model_answers(shipped, shape):
    images = dataset.make_dataset("test", 1, sizes=[llava_next.SHAPES[shape]]).select(range(0, 100, 2))
    said = evaluation.answers(shipped, images, batch_size=50)
    hits = {name: right.mean() for name, right in evaluation.attribute_hits(said, images).items()}
    assert all(hits[name] >= 0.9 for name in scenes.ATTRIBUTES), hits  # of 50; of 400 the bar is .95


def test_padding_and_company_do_not_change_an_answer(shipped):
    rng = np.random.default_rng(0)
    drawn = [(scenes.sample_scene(rng), size) for size in llava_next.SHAPES.values()]
    images = [Image.fromarray(scenes.render(scene, rng, size)[0]) for scene, size in drawn]
    questions = ["what is it ?", "", language.choice_question(drawn[2][0], rng, "shape", False)[0], "where is it ?", ""]
    prompts = [shipped.prompt(q) for q in questions]
    together = shipped.answer(shipped.encode(prompts, images))
    alone = [shipped.answer(shipped.encode([p], [i]))[0] for p, i in zip(prompts, images, strict=True)]
    assert together == alone and together[2].isdigit()


def test_a_choice_is_the_number_beside_the_truth():
    rng = np.random.default_rng(0)
    words, old = make_tokenizer(), tokenizer.make_tokenizer()
    assert all(words.get_vocab()[word] == i for word, i in old.get_vocab().items())
    orders = set()
    for i in range(40):
        scene = scenes.sample_scene(rng)
        name = language.CHOICES[i % 2]
        question, answer = language.choice_question(scene, rng, name, shuffled=i >= 20)
        listed = question.removeprefix("choose the number ").split()
        assert dict(zip(listed[::2], listed[1::2], strict=True))[answer] == getattr(scene, name)
        assert listed[::2] == list("0123456789") and words.unk_token_id not in words.encode(question)
        orders.add(tuple(listed))
    assert len(orders) == 22


def make_siglip(kind, strategy, layers=-2):
    """A random model of either family with a tower that has no class token: 4 x 4 patches."""
    torch.manual_seed(0)
    config, tokenizer = parts(32, 8, 400)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config["vision_config"] = SiglipVisionConfig(image_size=32, patch_size=8, **sizes)
    config |= dict(vision_feature_select_strategy=strategy, vision_feature_layer=layers)
    square, rest = {"height": 32, "width": 32}, dict(patch_size=8, chat_template=tokenizer.chat_template)
    if kind == "llava":
        model, images = LlavaForConditionalGeneration(LlavaConfig(**config)), CLIPImageProcessorPil
        processor = LlavaProcessor(images(size={"shortest_edge": 32}, crop_size=square), tokenizer, **rest)
        return LlavaAdapter("siglip", model.eval(), tokenizer, processor)
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**config, image_grid_pinpoints=pinpoints))
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=pinpoints)
    return LlavaNextAdapter("siglip", model.eval(), tokenizer, LlavaNextProcessor(images, tokenizer, **rest))


@pytest.mark.parametrize(("strategy", "first"), [("full", 0), ("default", 1)])
def test_a_tower_without_a_class_token(strategy, first):
    """Strategy "default" drops the first token whatever it is: here that of patch 0."""
    adapter = make_siglip("llava", strategy)
    plain = noise(32, 32)
    painted = plain.copy()
    painted.paste((255, 0, 0), (2 * 8, 8, 3 * 8, 2 * 8))  # column 2, row 1
    inputs = adapter.encode([adapter.prompt()] * 2, [plain, painted])
    is_image, patch, _ = (x[0] for x in adapter.geometry(inputs))
    assert patch[is_image].tolist() == list(range(first, 16)) and adapter.image_tokens((32, 32)) == 16 - first
    made = adapter.model.get_image_features(inputs["pixel_values"]).pooler_output
    changed = (made[0] - made[1]).abs().amax(1) > 1e-6
    assert patch[is_image][changed].tolist() == [6]
    assert adapter.forward(inputs).logits.isfinite().all() and adapter.vision_features([plain]).shape == (1, 16)


def test_llava_next_with_a_tower_without_a_class_token():
    adapter = make_siglip("llava_next", "full")
    for size in ((32, 32), (40, 70)):
        inputs = adapter.encode([adapter.prompt()], [noise(*size)])
        is_image, patch, part = (x[0] for x in adapter.geometry(inputs))
        assert patch[part == 0].tolist() == list(range(16)) and is_image.sum() == adapter.image_tokens(size)
        assert adapter.forward(inputs).logits.isfinite().all()
    with pytest.raises(InputError, match="vision_feature_select_strategy 'default' does not fit a tower .siglip"):
        make_siglip("llava_next", "default")


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_features_of_several_tower_layers(kind):
    adapter = make_siglip(kind, "full", [-2, -1])
    found, image = adapter.vision_features([noise(32, 32)]), noise(32, 32)
    assert found.shape == (1, 32) and not torch.equal(found[:, :16], found[:, 16:])
    assert adapter.forward(adapter.encode([adapter.prompt()], [image])).logits.isfinite().all()
