"""Rebuild the shipped checkpoints from scratch: ``python -m mmsae_helpers.tinyworld.build``.

Every stage is a process of its own, on a CPU with one thread (so its weights do not depend on the number of cores), two
run side by side, and a stage whose folder is complete is not run again: a killed build continues.
``--install`` copies what ships into the package.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CHECKPOINTS = Path(__file__).parent / "checkpoints"


class Stage(NamedTuple):
    """One model: what must exist first, how to train it into a folder, and whether it ships."""

    needs: tuple[str, ...]
    train: Callable[[Path, Path, float], None]  # (root of finished stages, own folder, scale of the schedule)
    family: str
    ships: bool = True


def _tower(root: Path, folder: Path, scale: float) -> None:
    from mmsae_helpers.tinyworld import dataset, llava, training

    scenes, images, masks = dataset.arrays("train", seed=training.pictures_seed())
    tower = llava.clip_tower()
    curve = llava.train_tower(tower, scenes, images, masks, steps=int(2600 * scale))
    training.save(tower, folder, curve)
    llava.image_processor().save_pretrained(folder)


def _resnet(root: Path, folder: Path, scale: float) -> None:
    from mmsae_helpers.tinyworld import dataset, llava, training

    scenes, images, _ = dataset.arrays("train", seed=training.pictures_seed())
    model, curve = llava.train_resnet(scenes, images, steps=int(2500 * scale))
    training.save(model, folder, curve)
    llava.image_processor().save_pretrained(folder)


def _gemma(root: Path, folder: Path, scale: float, word_lists: bool = True) -> None:
    from transformers import GemmaForCausalLM

    from mmsae_helpers.tinyworld import llava, tokenizer, training

    model, words = GemmaForCausalLM(llava.gemma_config()), tokenizer.make_tokenizer()
    name = "gemma" if word_lists else "control gemma"
    curve = llava.train_text(model, words, steps=int(2400 * scale), name=name, word_lists=word_lists)
    training.save(model, folder, curve)
    words.save_pretrained(folder)


def _gemma_it(root: Path, folder: Path, scale: float, word_lists: bool = True) -> None:
    from transformers import GemmaForCausalLM

    from mmsae_helpers.tinyworld import llava, tokenizer, training

    model = GemmaForCausalLM.from_pretrained(root / _named("gemma", word_lists), dtype="float32")
    words = tokenizer.make_tokenizer()
    curve = llava.train_instruct(model, words, steps=int(1000 * scale), name="gemma-it", word_lists=word_lists)
    training.save(model, folder, curve)
    words.save_pretrained(folder)


def _mistral(root: Path, folder: Path, scale: float) -> None:
    from transformers import MistralForCausalLM

    from mmsae_helpers.tinyworld import llava, mistral, training

    model, words = MistralForCausalLM(mistral.mistral_config()), mistral.make_tokenizer()
    curve = llava.train_text(model, words, steps=int(2000 * scale), name="mistral")
    training.save(model, folder, curve)
    words.save_pretrained(folder)


def _mistral_it(root: Path, folder: Path, scale: float) -> None:
    from transformers import MistralForCausalLM

    from mmsae_helpers.tinyworld import language, llava, mistral, training

    model = MistralForCausalLM.from_pretrained(root / "mistral", dtype="float32")
    words, ask = mistral.make_tokenizer(), language.any_question
    curve = llava.train_instruct(model, words, steps=int(1600 * scale), name="mistral-it", ask=ask)
    training.save(model, folder, curve)
    words.save_pretrained(folder)


def _llava(root: Path, folder: Path, scale: float, word_lists: bool = True) -> None:
    from transformers import CLIPVisionModel, GemmaForCausalLM

    from mmsae_helpers.tinyworld import dataset, llava, training

    tower = CLIPVisionModel.from_pretrained(root / "clip", dtype="float32").eval()
    text = GemmaForCausalLM.from_pretrained(root / _named("gemma-it", word_lists), dtype="float32")
    scenes, images, _ = dataset.arrays("train", 200, training.pictures_seed())
    model, curve = llava.train_llava(
        tower, text, scenes, images, projector_steps=int(500 * scale), joint_steps=int(400 * scale)
    )
    training.save(model, folder, curve)
    llava.make_processor().save_pretrained(folder)


def _clip_tiles(root: Path, folder: Path, scale: float) -> None:
    from transformers import CLIPVisionModel

    from mmsae_helpers.tinyworld import llava, llava_next, training

    tower = CLIPVisionModel.from_pretrained(root / "clip", dtype="float32")
    examples = llava_next.tower_examples({"square": 40, "wide": 60, "tall": 60, "wider": 12, "taller": 12})
    scenes, images, masks, whole = examples
    curve = llava.train_tower(tower, scenes, images, masks, whole=whole, steps=int(2000 * scale), lr=1e-3)
    training.save(tower, folder, curve)


def _llava_next(root: Path, folder: Path, scale: float) -> None:
    from transformers import CLIPVisionModel, MistralForCausalLM

    from mmsae_helpers.tinyworld import llava_next, training

    tower = CLIPVisionModel.from_pretrained(root / "clip-tiles", dtype="float32").eval()
    text = MistralForCausalLM.from_pretrained(root / "mistral-it", dtype="float32")
    shown = llava_next.pictures(tower, {"square": 80, "wide": 40, "tall": 40, "wider": 12, "taller": 12})
    model = llava_next.make_model(tower, text)
    curve = llava_next.train(model, shown, projector_steps=int(300 * scale), joint_steps=int(900 * scale))
    training.save(model, folder, curve)
    llava_next.make_processor().save_pretrained(folder)


def _captioner(root: Path, folder: Path, scale: float) -> None:
    from transformers import CLIPVisionModel

    from mmsae_helpers.tinyworld import captioner, dataset, llava, tokenizer, training

    tower = CLIPVisionModel.from_pretrained(root / "clip", dtype="float32").eval()
    scenes, images, masks = dataset.arrays("train", seed=training.pictures_seed())
    model = captioner.make_captioner()
    captioner.start_from_clip(model.encoder, tower, images[:500])
    curve = llava.train_tower(model.encoder, scenes, images, masks, steps=int(400 * scale), lr=1e-3)
    curve += captioner.train_decoder(model, scenes, images, steps=int(1400 * scale))
    training.save(model, folder, curve)
    captioner.image_processor().save_pretrained(folder)
    tokenizer.make_tokenizer().save_pretrained(folder)


def _chameleon_tokenizer(root: Path, folder: Path, scale: float) -> None:
    import numpy as np
    from transformers import CLIPVisionModel

    from mmsae_helpers.tinyworld import chameleon, dataset, training

    tower = CLIPVisionModel.from_pretrained(root / "clip", dtype="float32").eval()
    scenes, images, masks = dataset.arrays("train", seed=training.pictures_seed())
    model, curve = chameleon.train_tokenizer(tower, scenes, images, masks, steps=int(2600 * scale))
    training.save(model, folder, curve, **chameleon.code_scores(model))
    np.save(folder / "codes.npy", chameleon.codes(model, images[:20_000]).astype(np.uint16))  # for the next two stages


def _chameleon_base(root: Path, folder: Path, scale: float) -> None:
    from transformers import ChameleonVQVAE

    from mmsae_helpers.tinyworld import chameleon, training

    image_tokenizer = ChameleonVQVAE.from_pretrained(root / "chameleon-tokenizer", dtype="float32").eval()
    model, shares = chameleon.make_model(image_tokenizer), {"chats": 0.5, "choices": 0.125}
    curve = chameleon.train_language(model, *_coded_pictures(root), steps=int(2400 * scale), lr=2e-3, **shares)
    training.save(model, folder, curve, **chameleon.code_scores(image_tokenizer))


def _chameleon_from(before: str, steps: int, chats: float, choices: float, lr: float):
    def train(root: Path, folder: Path, scale: float) -> None:
        from transformers import ChameleonForConditionalGeneration

        from mmsae_helpers.tinyworld import chameleon, training

        model = ChameleonForConditionalGeneration.from_pretrained(root / before, dtype="float32")
        curve = json.loads((root / before / "training.json").read_text())["curve"]
        shares, pictures = {"chats": chats, "choices": choices}, _coded_pictures(root)
        curve += chameleon.train_language(model, *pictures, steps=int(steps * scale), lr=lr, **shares)
        training.save(model, folder, curve, **chameleon.code_scores(model.model.vqmodel))
        chameleon.make_processor().save_pretrained(folder)

    return train


def _anole(root: Path, folder: Path, scale: float) -> None:
    from transformers import ChameleonForConditionalGeneration

    from mmsae_helpers.tinyworld import chameleon, training

    model = ChameleonForConditionalGeneration.from_pretrained(root / "chameleon", dtype="float32")
    curve = chameleon.train_anole(model, *_coded_pictures(root), steps=int(1000 * scale))
    training.save(model, folder, curve)
    chameleon.make_processor().save_pretrained(folder)


def _coded_pictures(root: Path):
    import numpy as np

    from mmsae_helpers.tinyworld import dataset, training

    codes = np.load(root / "chameleon-tokenizer" / "codes.npy").astype(int)
    return [scene for scene, *_ in dataset.iter_split("train", len(codes) // 100, training.pictures_seed())], codes


def _named(name: str, word_lists: bool) -> str:
    return name if word_lists else f"{name}-no-lists"


def _without_lists(train):
    return lambda root, folder, scale: train(root, folder, scale, word_lists=False)


STAGES: dict[str, Stage] = {
    "clip": Stage((), _tower, "llava"),
    "gemma": Stage((), _gemma, "llava"),
    "gemma-it": Stage(("gemma",), _gemma_it, "llava"),
    "llava": Stage(("clip", "gemma-it"), _llava, "llava"),
    "gemma-no-lists": Stage((), _without_lists(_gemma), "llava", ships=False),
    "gemma-it-no-lists": Stage(("gemma-no-lists",), _without_lists(_gemma_it), "llava", ships=False),
    "llava-no-lists": Stage(("clip", "gemma-it-no-lists"), _without_lists(_llava), "llava"),
    "resnet": Stage((), _resnet, "llava"),
    "mistral": Stage((), _mistral, "llava-next"),
    "mistral-it": Stage(("mistral",), _mistral_it, "llava-next", ships=False),
    "clip-tiles": Stage(("clip",), _clip_tiles, "llava-next", ships=False),
    "llava-next": Stage(("clip-tiles", "mistral-it"), _llava_next, "llava-next"),
    "vit-gpt2": Stage(("clip",), _captioner, "captioner"),
    "chameleon-tokenizer": Stage(("clip",), _chameleon_tokenizer, "chameleon", ships=False),
    "chameleon-base": Stage(("chameleon-tokenizer",), _chameleon_base, "chameleon", ships=False),
    "chameleon-chat": Stage(
        ("chameleon-tokenizer", "chameleon-base"),
        _chameleon_from("chameleon-base", 1600, 0.7, 0.125, 2e-3),
        "chameleon",
        ships=False,
    ),
    "chameleon": Stage(
        ("chameleon-tokenizer", "chameleon-chat"),
        _chameleon_from("chameleon-chat", 1000, 0.8, 0.6, 1.5e-3),
        "chameleon",
    ),
    "anole": Stage(("chameleon-tokenizer", "chameleon"), _anole, "chameleon"),
}


def run_stage(name: str, root: Path, scale: float = 1.0, seed: int = 0, device: str = "cpu") -> None:
    """Train one stage into ``root/name``; the folder appears only when it is complete. Another ``seed`` than 0 is
    another set of models: other initial weights, pictures, texts and order of both."""
    import torch

    from mmsae_helpers.tinyworld import training

    torch.set_num_threads(1)
    training.build_set(seed, name, device)
    folder = root / f".{name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    STAGES[name].train(root, folder, scale)
    folder.rename(root / name)


def build(root: Path, *, families: list[str] | None = None, jobs: int = 2, **how) -> Path:
    """Train every stage that ``root`` lacks, ``jobs`` at a time; returns ``root``. ``how``: as `run_stage` takes it.

    Raises RuntimeError naming a stage that failed.
    """
    wanted = [n for n, stage in STAGES.items() if not families or stage.family in families]
    for name in wanted:  # grows as it goes: a family may need another's model
        wanted += [need for need in STAGES[name].needs if need not in wanted]
    running: dict[str, subprocess.Popen] = {}
    root.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if how.get("device", "cpu") == "cpu" else {}
    environment = os.environ | threads
    while todo := [n for n in wanted if not (root / n).exists()]:
        for name in todo:
            ready = all((root / need).exists() for need in STAGES[name].needs)
            if ready and name not in running and len(running) < jobs:
                command = [sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name]
                command += ["--stage", name, "--out", str(root), *(f"--{key}={value}" for key, value in how.items())]
                with open(root / f"{name}.log", "w") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                print(f"{time.strftime('%H:%M:%S')} {name} started", flush=True)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    raise RuntimeError(f"stage {name} failed with status {process.returncode}; see {root / name}.log")
                print(f"{time.strftime('%H:%M:%S')} {name} done", flush=True)
        time.sleep(0.5)
    return root


def install(root: Path) -> None:
    """Copy the stages that ship from ``root`` into the package."""
    for name, stage in STAGES.items():
        if stage.ships and (root / name).exists():
            shutil.copytree(root / name, CHECKPOINTS / name, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("artifacts/tinyworld_build"), help="folder to train into")
    parser.add_argument("--family", action="append", help="only this family (repeatable); default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply every schedule, e.g. 0.01 for a dry run")
    parser.add_argument("--jobs", type=int, default=2, help="stages side by side")
    parser.add_argument("--seed", type=int, default=0, help="another set of models than the one that ships (0)")
    parser.add_argument("--device", default="cpu", help="cuda: minutes in place of hours, and other digits")
    parser.add_argument("--install", action="store_true", help="copy what ships into the package when done")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    how = {name: getattr(options, name) for name in ("scale", "seed", "device")}
    if options.stage:
        run_stage(options.stage, options.out, **how)
        return
    build(options.out, families=options.family, jobs=options.jobs, **how)
    if options.install:
        install(options.out)


if __name__ == "__main__":
    main()
