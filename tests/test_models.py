"""The model adapter: the shipped LLaVA through the code that loads the papers' own."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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


def test_models_are_called_by_the_last_part_of_their_path_unless_two_share_it():
    assert models.short_names(["tinyworld/llava", "../made/anole/"]) == {
        "tinyworld/llava": "llava", "../made/anole/": "anole"
    }  # fmt: skip
    both = ["tinyworld/llava", "../artifacts/second/llava"]
    assert models.short_names([*both, *both]) == dict(zip(both, both, strict=True))


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
    size = {f.name: sum(p.stat().st_size for p in f.rglob("*")) for f in folders}
    assert max(size.pop("real-projector"), size.pop("real-tuned")) < 3e6 and sum(size.values()) < 30e6
    for folder in folders:
        assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
        assert json.loads((folder / "training.json").read_text())["curve"]


@pytest.fixture
def copied(tmp_path):
    """Function (name, change of its tensors, change of its config) -> a copy of a shipped checkpoint, as text."""

    def make(name, change=lambda tensors: None, config=lambda settings: None):
        folder = tmp_path / name
        shutil.copytree(models.CHECKPOINTS / name, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        config(settings)
        (folder / "config.json").write_text(json.dumps(settings))
        return str(folder)

    return make


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(DOWN), rf"missing {DOWN}$"),
        (lambda t: t.update({"model.layers.0.mlp.odd.weight": t[DOWN].clone()}), "unexpected model.layers.0.mlp.odd"),
        (lambda t: t.update({DOWN: t[DOWN][:-1].clone()}), rf"mismatched ..{DOWN}.*Size"),
        (lambda t: [t.pop(k) for k in list(t) if "mlp" in k], "missing .*, missing .* and [0-9]+ more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copied, change, says):
    with pytest.raises(InputError, match=f"the tensors of .*gemma do not fit its config: {says}"):
        models.load(copied("gemma", change), "cpu")


def test_a_head_of_its_own_that_is_not_in_the_file_is_missed(copied):
    def untie(settings):
        settings["tie_word_embeddings"] = False

    folder = copied("gemma", lambda tensors: tensors.pop("lm_head.weight", None), untie)
    with pytest.raises(InputError, match="missing lm_head.weight"):
        models.load(folder, "cpu")


def test_what_old_checkpoints_carry_beside_their_weights_is_no_fault(copied, picture):
    def old_captioner(tensors):
        for block in range(2):
            for part in ("attn", "crossattention"):
                tensors[f"decoder.transformer.h.{block}.{part}.bias"] = torch.ones(1, 1, 8, 8)
                tensors[f"decoder.transformer.h.{block}.{part}.masked_bias"] = torch.tensor(-1e4)
        tensors["encoder.pooler.dense.weight"] = torch.ones(4, 4)

    captioner = models.load(copied("vit-gpt2", old_captioner), "cpu")
    shipped = models.load("tinyworld/vit-gpt2", "cpu")
    assert captioner.answer(captioner.encode([""], [picture])) == shipped.answer(shipped.encode([""], [picture]))
    models.load(copied("anole", lambda t: t.update({"model.vqmodel.decoder.conv_in.weight": torch.ones(2, 2)})), "cpu")
    models.load(copied("llava", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dtype": "bf16"}, "no dtype 'bf16': choose float32, bfloat16, float16"),
        ({"dtype": "nn"}, "no dtype 'nn'"),
        ({"device": "gpu"}, "no device 'gpu' here: choose auto, .*cpu"),
        ({"device": "cuda:99"}, "no device 'cuda:99' here: choose auto, .*cpu"),
    ],
)
def test_an_unknown_dtype_or_device_lists_what_is_known(given, says):
    with pytest.raises(InputError, match=says):
        models.load("tinyworld/gemma", **{"device": "cpu"} | given)


def test_cuda_without_one_and_auto(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(InputError, match="no device 'cuda' here: choose auto, cpu"):
        models.load("tinyworld/gemma", "cuda")
    assert models.pick_device() == models.pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [models.pick_device(d) for d in ("auto", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]


def test_a_tokenizer_without_pad_takes_eos_or_unk_and_else_says_so():
    adapter = models.load("tinyworld/gemma", "cpu")
    expected = adapter.encode(["red circle", "red circle left of blue square"])["attention_mask"]
    for gone in (["pad_token"], ["eos_token"], ["unk_token"]):
        adapter.tokenizer.pad_token = None
        for token in gone:
            setattr(adapter.tokenizer, token, None)
        if gone == ["unk_token"]:
            with pytest.raises(InputError, match="the tokenizer of bare has no pad, eos or unk token"):
                models.Adapter("bare", adapter.model, adapter.tokenizer)
        else:
            again = models.Adapter("bare", adapter.model, adapter.tokenizer)
            mask = again.encode(["red circle", "red circle left of blue square"])["attention_mask"]
            assert torch.equal(mask, expected)


SMOL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
JSON = "{% for message in messages %}{{ message['content'] | tojson if message['content'] is not string else "
JSON += "message['content'] }}{% endfor %}"
STRICT = "{% if messages[0]['content'] is not string %}{{ raise_exception('strings only') }}{% endif %}"


@pytest.mark.parametrize("template", [SMOL, GEMMA, JSON, STRICT + GEMMA])
@pytest.mark.parametrize("image", [True, False])
def test_templates_that_know_strings_alone(llava, monkeypatch, template, image):
    monkeypatch.setattr(llava.processor, "chat_template", template)
    text = llava.prompt("what is it ?", image)
    assert "type" not in text and text.count("what is it ?") == 1 and text.count("<image>") == image


def test_a_template_that_fails_either_way_is_told(llava, monkeypatch):
    monkeypatch.setattr(llava.processor, "chat_template", "{{ raise_exception('never') }}")
    with pytest.raises(InputError, match="the chat template of tinyworld/llava fails, or drops"):
        llava.prompt("what is it ?")


def test_a_processor_that_is_missing_or_a_bare_tokenizer(copied, llava, monkeypatch):
    folder = copied("llava")
    (models.Path(folder) / "processor_config.json").unlink()
    with pytest.raises(InputError, match="Can't load image processor for") as caught:
        models.load(folder, "cpu")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda path, **options: llava.tokenizer)
    with pytest.raises(InputError, match="tinyworld/llava has no image processor: add its preprocessor_config.json"):
        models.load("tinyworld/llava", "cpu")


def test_the_class_token_of_a_full_strategy_shows_no_patch(copied, llava, picture):
    full = models.load(copied("llava", config=lambda c: c.update({"vision_feature_select_strategy": "full"})), "cpu")
    n = full.patch_grid[0] * full.patch_grid[1]
    inputs = full.encode([full.prompt()] * 2, [picture] * 2)
    is_image, patch, part = full.geometry(inputs)
    assert full.image_tokens((64, 64)) == n + 1 and (is_image.sum(1) == n + 1).all()
    assert patch[0][is_image[0]].tolist() == [-1, *range(n)] and (part == is_image.long() - 1).all()
    assert full.forward(inputs).logits.isfinite().all()
    assert torch.equal(full.vision_features([picture]), llava.vision_features([picture]))


@pytest.mark.parametrize("name", ["gemma", "vit-gpt2"])
def test_a_checkpoint_without_safetensors_is_converted_by_the_command_that_the_message_names(tmp_path, name):
    shutil.copytree(models.resolve(f"tinyworld/{name}"), tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    torch.save(tensors, tmp_path / "old/pytorch_model.bin")
    (tmp_path / "old/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"python -m mmsae_helpers.models .*old FOLDER converts its .bin"):
        models.load(str(tmp_path / "old"))
    made = models.convert(str(tmp_path / "old"), tmp_path / "new")
    assert not list(made.glob("*.bin")) and models.load(str(made)).n_layers == models.load(f"tinyworld/{name}").n_layers
    assert all(torch.equal(x, tensors[key]) for key, x in load_file(made / "model.safetensors").items())
    with pytest.raises(InputError, match="exists: give a new folder"):
        models.convert(str(tmp_path / "old"), made)
    with pytest.raises(InputError, match="has no pytorch_model.bin"):
        models.convert(str(made), tmp_path / "other")
