"""The model adapter: the shipped LLaVA through the code that loads the papers' own."""

import json
import shutil

import pytest
import torch
from PIL import Image

from mmsae_helpers import models
from mmsae_helpers.errors import InputError


@pytest.fixture(scope="module")
def llava():
    return models.load("tinyworld/llava", "cpu")


@pytest.fixture(scope="module")
def picture():
    return Image.new("RGB", (64, 64), (20, 20, 20))


def test_geometry_comes_from_the_config(llava):
    vision = llava.model.config.vision_config
    assert llava.patch_grid == (vision.image_size // vision.patch_size,) * 2
    assert (llava.family, llava.d_model, llava.n_layers) == ("llava", 128, len(llava.blocks))


def test_image_tokens_are_those_the_picture_changes(llava, picture):
    """Paint one patch: at the embedding only its own token may change with the projector fed patch by patch."""
    inputs = llava.encode([llava.prompt()], [picture])
    index = llava.patch_index(inputs["input_ids"])[0]
    rows, columns = llava.patch_grid
    assert index[index >= 0].tolist() == list(range(rows * columns))
    assert (llava.image_mask(inputs["input_ids"])[0] == (index >= 0)).all()
    vision = llava.model.model.vision_tower
    embed = lambda image: vision.embeddings(llava.encode([llava.prompt()], [image])["pixel_values"])[0, 1:]  # noqa: E731
    painted = picture.copy()
    painted.paste((255, 0, 0), (3 * 8, 5 * 8, 4 * 8, 6 * 8))  # column 3, row 5
    changed = (embed(painted) - embed(picture)).abs().amax(1).nonzero().flatten()
    assert changed.tolist() == [5 * columns + 3]


def test_padding_does_not_change_an_answer(llava, picture):
    questions = ["", "what is it ?", "where is it ?"]
    together = llava.answer(llava.encode([llava.prompt(q) for q in questions], [picture] * 3))
    alone = [llava.answer(llava.encode([llava.prompt(q)], [picture]))[0] for q in questions]
    assert together == alone


def test_grey_and_rgba_images_are_read_as_rgb(llava, picture):
    a, b, c = (llava.encode([llava.prompt()], [picture.convert(m)])["pixel_values"] for m in ("RGB", "L", "RGBA"))
    assert a.shape == b.shape == c.shape and torch.equal(a, c)


def test_text_only_prompt_has_no_image(llava):
    gemma = models.load("tinyworld/gemma-it", "cpu")
    assert "<image>" not in gemma.prompt("what is it ?")
    assert not gemma.image_mask(gemma.encode(["red circle"])["input_ids"]).any()
    assert "<image>" in llava.prompt("what is it ?") and "<image>" not in llava.prompt("x", image=False)


def test_a_template_that_writes_bos_gets_no_second_one(llava):
    once = llava.encode(["<bos> red circle"])["input_ids"][0].tolist()
    assert once.count(llava.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tinyworld/nothing", "no embedded model"),
        ("./nowhere/model", "does not exist"),
        ("/nowhere", "does not exist"),
    ],
)
def test_a_missing_model_gets_one_line(name, says):
    with pytest.raises(InputError, match=says) as caught:
        models.load(name)
    assert "\n" not in str(caught.value)


def test_a_damaged_model_gets_one_line(tmp_path):
    source = models.CHECKPOINTS / "gemma"
    shutil.copytree(source, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load model") as caught:
        models.load(str(tmp_path / "cut"))
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no config.json"):
        models.load(str(tmp_path / "empty"))


def test_layers_out_of_range(llava):
    assert llava.check_layer(llava.n_layers - 1) == llava.n_layers - 1
    for layer in (-1, llava.n_layers):
        with pytest.raises(InputError, match=f"layer {layer} does not exist"):
            llava.check_layer(layer)


def test_counts_of_texts_and_images_must_agree(llava, picture):
    with pytest.raises(InputError, match="2 texts but 1 images"):
        llava.encode([llava.prompt()] * 2, [picture])


def test_every_shipped_checkpoint_is_small_and_safe():
    folders = [f for f in models.CHECKPOINTS.iterdir() if f.is_dir()]
    total = sum(p.stat().st_size for f in folders for p in f.rglob("*"))
    assert total < 30e6
    for folder in folders:
        assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
        assert json.loads((folder / "training.json").read_text())["curve"]
