"""Throughput at the papers' sizes on the accelerator at hand: extraction, early exit, SAE training, TF32 and bfloat16.

    python tests/benchmarks/bench_gpu.py [--small] [--out RESULTS.md]

Random weights, made on the device: LLaVA-NeXT on Mistral-7B in bfloat16, an image of 672 x 672 (2,928 tokens) and 64
words a sample; an SAE of 4,096 -> 65,536 on batches of 4,096. Model FLOP utilisation is of the rate of an 8,192^3
product in bfloat16, measured first; FLOPs are torch's own count (attention in full, as if it were not causal). SAE
training is `saes.fit` against sae-lens's `SAETrainer` on the same batches, in the CPU's memory for both; a rate is that
of 32 steps, the first ones and the making of the weights left out. Faster types are held to float32 by a bound on the
relative error. `--small` is the same on a CPU at sizes that mean nothing. Exit status 1 where an error exceeds its
bound.
"""

import argparse
import gc
import platform
import time
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmsae_helpers import activations, models, saes
from mmsae_helpers.activations import Inputs

BIG = dict(
    product=8192, d=4096, inner=14336, blocks=32, heads=32, kv=8, words=32064, vision=(1024, 4096, 24, 16), side=336,
    patch=14, text=64, batch=2, repeats=3, shallow=8, d_sae=65536, sae_batch=4096,
)  # fmt: skip
SMALL = dict(
    product=512, d=64, inner=128, blocks=4, heads=4, kv=2, words=500, vision=(32, 64, 2, 2), side=28,
    patch=14, text=8, batch=2, repeats=2, shallow=2, d_sae=256, sae_batch=64,
)  # fmt: skip
BOUNDS = {"residual": {"TF32": 5e-3, "bfloat16": 3e-2}, "reconstruction": {"TF32": 5e-3, "bfloat16": 3e-2}}


def attention_flops(query, key, _value, *_, **__) -> int:
    """Of attention [B, H, T, d] whose keys may have fewer heads, which torch's own count refuses."""
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3]


KINDS = ("flash", "efficient", "cudnn")
ATTENTION = {getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention"): attention_flops for kind in KINDS}


class Table:
    """Rows of the result; ``held`` is False once an error exceeded its bound."""

    def __init__(self):
        self.rows, self.held = [], True

    def add(self, what: str, value: str, beside: str = "") -> None:
        self.rows.append(f"| {what} | {value} | {beside} |")
        print(self.rows[-1], flush=True)

    def parity(self, of: str, kind: str, error: float, speed: float) -> None:
        bound = BOUNDS[of][kind]
        self.held &= error <= bound
        said = f"relative error {error:.1e} (bound {bound:g}{'' if error <= bound else ': EXCEEDED'})"
        self.add(f"{of}, {kind} against float32", f"{speed:.2f}x", said)


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(call, device: str, repeats: int) -> float:
    """Median of ``repeats`` calls after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - begun)
    return median(found[1:])


@contextmanager
def tf32(on: bool):
    """Products of float32 through TF32 tensor cores while open."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.accelerator.empty_cache()


def peak(size: dict, device: str) -> float:
    """FLOP/s of one large product in bfloat16."""
    n = size["product"]
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def ten():
        for _ in range(10):
            a @ b

    return 20 * n**3 / seconds(ten, device, size["repeats"])


def llava_next(size: dict, device: str, dtype: torch.dtype, blocks: int):
    """An adapter of a random LLaVA-NeXT on ``device``, and a batch of images of 2 x 2 tiles with text."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    width, inner, deep, heads = size["vision"]
    side, image = size["side"], size["words"] - 1
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=deep, num_attention_heads=heads,
        image_size=side, patch_size=size["patch"],
    )  # fmt: skip
    text = MistralConfig(
        vocab_size=size["words"], hidden_size=size["d"], intermediate_size=size["inner"], num_hidden_layers=blocks,
        num_attention_heads=size["heads"], num_key_value_heads=size["kv"], sliding_window=None,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=image, image_grid_pinpoints=[[2 * side, 2 * side]]
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaNextForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    words = SimpleNamespace(pad_token="<pad>", all_special_ids=[])
    adapter = models.LlavaNextAdapter("random LLaVA-NeXT", model, words, SimpleNamespace())
    n, n_image = size["batch"], adapter.image_tokens((2 * side, 2 * side))
    ids = torch.randint(1, image, (n, n_image + size["text"]))
    ids[:, :n_image] = image
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), image_sizes=torch.full((n, 2), 2 * side))
    inputs = {k: v.to(device) for k, v in inputs.items()}
    inputs["pixel_values"] = torch.randn(n, 5, 3, side, side).to(device, dtype)
    return adapter, inputs


def extraction(table: Table, size: dict, device: str, rate: float) -> None:
    """Tokens a second through `activations.stream`, utilisation, and early exit against the full forward."""
    adapter, inputs = llava_next(size, device, torch.bfloat16, size["blocks"])
    tokens, middle = inputs["input_ids"].numel(), size["blocks"] // 2

    def early():
        with activations.hooked(adapter, [middle]):
            activations.run(adapter, inputs)

    def streamed():
        for _ in activations.stream(adapter, [Inputs(torch.arange(size["batch"]), inputs)], [middle], "content"):
            pass

    took = {}
    for what, call in {"full forward": lambda: activations.run(adapter, inputs), "early exit": early}.items():
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as count:
            call()
        flops, took[what] = count.get_total_flops(), seconds(call, device, size["repeats"])
        used = f"{flops / tokens / 1e9:.3g} GFLOP a token, {flops / took[what] / rate:.0%} of the product's rate"
        table.add(f"{what}, bfloat16", f"{tokens / took[what]:,.0f} tokens/s", used)
    faster = took["full forward"] / took["early exit"]
    table.add(f"early exit after block {middle} of {size['blocks']}", f"{faster:.2f}x", "of the full forward's speed")
    streaming = seconds(streamed, device, size["repeats"])
    beside = f"{tokens} tokens a batch"
    table.add("stream, residuals to the CPU in float32", f"{tokens / streaming:,.0f} tokens/s", beside)


def residual_parity(table: Table, size: dict, device: str) -> None:
    """Residuals after the last of a few blocks, in each type, by those in float32."""
    adapter, inputs = llava_next(size, device, torch.float32, size["shallow"])
    found, took = {}, {}
    for kind in ("float32", "TF32", "bfloat16"):
        if kind == "bfloat16":
            adapter.model.to(torch.bfloat16)
            inputs = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}

        def read(inputs=inputs):
            with activations.hooked(adapter, [size["shallow"] - 1]) as seen:
                activations.run(adapter, inputs)
            return seen[size["shallow"] - 1].float()

        with tf32(kind == "TF32"):
            found[kind], took[kind] = read(), seconds(read, device, size["repeats"])
    for kind in ("TF32", "bfloat16"):
        error = (found[kind] - found["float32"]).norm() / found["float32"].norm()
        table.parity("residual", kind, float(error), took["float32"] / took[kind])


class Watched:
    """An endless stream of ``batches`` that notes the time, all work done, when those numbered ``marks`` are asked."""

    def __init__(self, batches, marks: tuple[int, int], device: str):
        self.batches, self.marks, self.device, self.times = batches, marks, device, []

    def __iter__(self):
        for i, batch in enumerate(cycle(self.batches)):
            if i in self.marks:
                wait(self.device)
                self.times.append(time.perf_counter())
            yield batch

    def steps_per_second(self) -> float:
        return (self.marks[1] - self.marks[0]) / (self.times[1] - self.times[0])


def fit(batches, size: dict, device: str, autocast: bool):
    """An SAE by `saes.fit`, and its steps a second: of the second chunk, with its way to the device."""
    watch = Watched(batches, (saes.CHUNK, 2 * saes.CHUNK), device)
    steps, n = watch.marks[1] + 1, size["sae_batch"]
    job = saes.Job(0, 0, saes.TrainingConfig(size["d_sae"], 1.0, 1e-4, steps, n, autocast=autocast))
    made = saes.fit(({0: x} for x in watch), {0: job}, d_in=size["d"], device=device, progress=False)
    return made[0], watch.steps_per_second()


def fit_by_sae_lens(batches, size: dict, device: str, autocast: bool) -> float:
    """Steps a second of sae-lens's own loop, which takes 8 batches for its scaling first."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    watch, n = Watched(batches, (16, 16 + saes.CHUNK), device), size["sae_batch"]
    norm = {"normalize_activations": "expected_average_only_in"}
    sae = StandardTrainingSAEConfig(d_in=size["d"], d_sae=size["d_sae"], l1_coefficient=1.0, device=device, **norm)
    config = SAETrainerConfig(
        total_training_samples=(watch.marks[1] - 7) * n, train_batch_size_samples=n, lr=1e-4, lr_end=1e-4,
        device=device, autocast=autocast, n_batches_for_norm_estimate=8,
    )  # fmt: skip
    SAETrainer(config, StandardTrainingSAE(sae), iter(watch)).fit()
    return watch.steps_per_second()


def training(table: Table, size: dict, device: str, rate: float) -> None:
    """Steps a second of `saes.fit` and of `SAETrainer`; then how far TF32 and bfloat16 take one SAE from float32."""
    basis = torch.randn(400, size["d"]) / size["d"] ** 0.5
    batches = [3 * (torch.rand(size["sae_batch"], 400) < 0.02).float() @ basis + 0.1 for _ in range(4)]
    flops = 12 * size["sae_batch"] * size["d"] * size["d_sae"]  # two products forwards, four backwards
    for kind in ("bfloat16", "TF32", "float32"):
        with tf32(kind == "TF32"):
            sae, ours = fit(batches, size, device, kind == "bfloat16")
            free(device)
            theirs = fit_by_sae_lens(batches, size, device, kind == "bfloat16")
            free(device)
        used = f"{ours / theirs:.2f}x SAETrainer's {theirs:.2f}; {ours * flops / rate:.0%} of the product's rate"
        table.add(f"SAE training, {kind}", f"{ours:.2f} steps/s", used)
    x = batches[0].to(device)
    found, took = {}, {}
    for kind in ("float32", "TF32", "bfloat16"):
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=kind == "bfloat16")
        with tf32(kind == "TF32"), autocast, torch.no_grad():
            found[kind] = sae.decode(sae.encode(x)).float()
            took[kind] = seconds(lambda: sae.decode(sae.encode(x)), device, size["repeats"])
    for kind in ("TF32", "bfloat16"):
        error = (found[kind] - found["float32"]).norm() / found["float32"].norm()
        table.parity("reconstruction", kind, float(error), took["float32"] / took[kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="on the CPU, at sizes that mean nothing")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    given = parser.parse_args()
    device, size = ("cpu", SMALL) if given.small else (models.pick_device(), BIG)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}", flush=True)
    table, begun = Table(), time.perf_counter()
    rate = peak(size, device)
    table.add(f"product of {size['product']}^3, bfloat16", f"{rate / 1e12:.3g} TFLOP/s")
    for part in (lambda: extraction(table, size, device, rate), lambda: residual_parity(table, size, device),
                 lambda: training(table, size, device, rate)):  # fmt: skip
        part()
        free(device)
    about = f"{name}, torch {torch.__version__}{', --small' if given.small else ''}"
    head = [f"# bench_gpu.py on {about}", "", "| what | measured | beside |", "| --- | --- | --- |"]
    if given.out:
        given.out.write_text("\n".join([*head, *table.rows]) + "\n")
    print(f"{time.perf_counter() - begun:.0f} s; parity {'holds' if table.held else 'FAILS'}")
    raise SystemExit(not table.held)


if __name__ == "__main__":
    main()
