"""Preflight: its memory against what tiny models really take, its checks, its command line; all without a network."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch.profiler import ProfilerActivity, profile

from mmsae_helpers import models, saes
from mmsae_helpers.activations import hooked, run
from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import parameters, preflight

ROOT = parameters.repo_root()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(preflight, "hub", lambda name, kind: None)


def peak(function) -> int:
    """Most bytes that ``function()`` had from torch's allocator at once, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def in_this_thread(device="cpu"):
    """`workers.crew` without threads, which the profiler does not see: one SAE at a time, as on a GPU."""
    yield lambda function, items: [function(item) for item in items]


def llava_config(width, blocks):
    text = hf.GemmaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks, head_dim=16,
        num_attention_heads=width // 16, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=4
    )
    return hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=500, vision_feature_layer=-2)


SIZES = {"small": (64, 4, 2, 96, 512, 128), "middle": (128, 6, 4, 160, 2048, 256), "large": (256, 8, 4, 256, 4096, 512)}


@pytest.mark.parametrize("width, blocks, batch, tokens, d_sae, rows", SIZES.values(), ids=SIZES)
def test_memory_is_what_a_tiny_model_and_its_saes_really_take(tmp_path, width, blocks, batch, tokens, d_sae, rows, monkeypatch):
    monkeypatch.setattr(saes, "crew", in_this_thread)
    config = llava_config(width, blocks)
    config.save_pretrained(tmp_path)
    counted = preflight.Model(str(tmp_path))
    model = hf.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    adapter = models.LlavaAdapter("real", model, SimpleNamespace(pad_token="<pad>"), SimpleNamespace())
    ids = torch.randint(1, 400, (batch, tokens))
    ids[:, 2:66] = 500  # 8 x 8 patches
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(batch, 3, 32, 32)}

    def forward():
        with hooked(adapter, [blocks - 2]):
            run(adapter, inputs)

    batches = [{0: torch.randn(rows, width)} for _ in range(saes.CHUNK)]
    one = dict(d_sae=d_sae, l1_coefficient=1.0, lr=1e-3, batch_size=rows, steps=saes.CHUNK, norm_batches=1)
    jobs = {seed: saes.Job(0, seed, saes.TrainingConfig(**one)) for seed in range(3)}
    took = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "pass": peak(forward),
        "training": peak(lambda: saes.fit(iter(batches), jobs, d_in=width, progress=False)),
    }
    held, _ = counted.decoding(blocks - 1, batch, tokens, torch.float32)
    said = {
        "weights": counted.n_weights * 4,
        "pass": max(held, batch * counted.tower(torch.float32)[0]),
        "training": preflight.training_bytes(width, d_sae, rows, 3) + 4 * saes.CHUNK * rows * width,
    }
    print({k: (took[k], said[k], said[k] / took[k] - 1) for k in took}, sum(said.values()) / sum(took.values()) - 1)
    for part in took:
        assert said[part] == pytest.approx(took[part], rel=0.15), part
    assert sum(said.values()) == pytest.approx(sum(took.values()), rel=0.15)
