"""Shared fixtures: tiny random models made in the test, so that nothing here needs a shipped checkpoint."""

import os

# before torch: kernels this small otherwise spin beside a busy neighbour
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
from types import SimpleNamespace

import datasets
import hypothesis
import numpy as np
import pytest
import torch

from mmsae_helpers.activations import Inputs

PAD, BOS, EOS, IMAGE = 0, 2, 1, 63
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # 5 s a stream otherwise


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium; of a module, since papermill needs the event loop that playwright holds while it runs."""
    found = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if found is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


def _tokenizer():
    return SimpleNamespace(pad_token="<pad>", all_special_ids=[PAD, EOS, BOS])


def _gemma_config():
    from transformers import GemmaConfig

    return GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def llava():
    """Adapter around a random LlavaForConditionalGeneration: 4 blocks, width 32, 2 x 2 patches an image."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    from mmsae_helpers.models import LlavaAdapter

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=_gemma_config(), image_token_id=IMAGE)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    return LlavaAdapter("tiny random llava", model, _tokenizer(), SimpleNamespace())


@pytest.fixture(scope="session")
def gemma():
    """Text-only adapter around a random GemmaForCausalLM."""
    from transformers import GemmaForCausalLM

    from mmsae_helpers.models import Adapter

    torch.manual_seed(1)
    model = GemmaForCausalLM(_gemma_config()).eval().requires_grad_(False)
    return Adapter("tiny random gemma", model, _tokenizer())


def _pad(rows):
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    mask = torch.zeros_like(ids)
    for row, (i, m) in zip(rows, zip(ids, mask, strict=True), strict=True):
        i[: len(row)] = torch.tensor(row)
        m[: len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def image_batches():
    """Function (start, stop, batch_size) -> Inputs: prompts of uneven length, image at position 2 to 4."""

    def batches(start=0, stop=10, batch_size=4):
        for first in range(start, stop, batch_size):
            samples = list(range(first, min(first + batch_size, stop)))
            rng = [np.random.default_rng(s) for s in samples]
            rows = [
                [BOS, *r.integers(3, 60, 1 + s % 3), *[IMAGE] * 4, *r.integers(3, 60, 2 + s % 4), EOS]
                for s, r in zip(samples, rng, strict=True)
            ]
            pixels = torch.from_numpy(np.stack([r.standard_normal((3, 16, 16), np.float32) for r in rng]))
            yield Inputs(torch.tensor(samples), {**_pad(rows), "pixel_values": pixels})

    return batches


@pytest.fixture(scope="session")
def text_batches():
    """Function (start, stop, batch_size) -> Inputs: text of uneven length."""

    def batches(start=0, stop=10, batch_size=4):
        for first in range(start, stop, batch_size):
            samples = list(range(first, min(first + batch_size, stop)))
            rows = [[BOS, *np.random.default_rng(s).integers(3, 60, 3 + s % 5)] for s in samples]
            yield Inputs(torch.tensor(samples), _pad(rows))

    return batches
