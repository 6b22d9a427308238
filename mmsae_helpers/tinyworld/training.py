"""One training loop for every model of the world, and the tensors it feeds on."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

IGNORE = -100
_set = 0  # which set of models a process builds


def build_set(seed: int, name: str, device: str = "cpu") -> None:
    """From here on, this process trains the model ``name`` of the set of models ``seed`` (0: the one that ships)."""
    global _set
    _set = seed
    torch.set_default_device(device)
    torch.manual_seed(sum(name.encode()) + 1000 * seed)


def numpy_rng(stream: int) -> np.random.Generator:
    """What draws a model's texts and their order: each model a stream, each set of models other draws."""
    return np.random.default_rng([stream, _set])


def torch_rng() -> torch.Generator:
    """What draws the order of a model's pictures."""
    return torch.Generator(torch.get_default_device()).manual_seed(_set)


def pictures_seed() -> int:
    """The draw of pictures that this set of models is trained on; notebooks' draws are the thousands."""
    return 1_000_003 * _set


def fit(
    parameters: Iterable[torch.nn.Parameter], loss: Callable[[int], Tensor], *, steps: int, lr: float, name: str
) -> list[dict]:
    """Minimise ``loss(step)`` with AdamW under a one-cycle schedule; returns the curve, a row every 50 steps.

    ``loss`` draws its own batch. Gradients are clipped at norm 1.
    """
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    curve, window, start = [], [], time.time()
    for step in tqdm(range(steps), desc=name, mininterval=10):
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        window.append(value.detach())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = torch.stack(window).mean().item()
            curve.append({"stage": name, "step": step + 1, "loss": round(mean, 4)})
            window = []
            if (step + 1) % 200 == 0:
                print(f"{name} {step + 1}/{steps} loss {mean:.4f} {time.time() - start:.0f}s", flush=True)
    return curve


def here(array: np.ndarray) -> Tensor:
    """The array as a tensor where this process trains."""
    return torch.from_numpy(array).to(torch.get_default_device())


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in -1..1, as the world's image processors do (mean and std 0.5)."""
    return here(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of token ids right-padded with ``value``, int64 [N, longest]."""
    out = np.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return here(out)


def save(model: torch.nn.Module, folder: Path, curve: list[dict] | None = None, **scores: float) -> None:
    """``save_pretrained`` in float16 (half the size; loaded back to float32) with the training curve and scores."""
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    record = {"scores": {k: round(v, 4) for k, v in scores.items()}, "curve": curve or []}
    (Path(folder) / "training.json").write_text(json.dumps(record, indent=1) + "\n")
