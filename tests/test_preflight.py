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


HUB = preflight.hub


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
def test_memory_is_what_a_tiny_model_and_its_saes_really_take(
    tmp_path, width, blocks, batch, tokens, d_sae, rows, monkeypatch
):
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


FEW = ("02_classification_ablations", "03_vit_gpt2_sae")  # of profile paper_large


@pytest.fixture
def cheap(monkeypatch):
    """Passes that are not counted: a GiB, and a TFLOP a sample."""
    monkeypatch.setattr(preflight.Model, "decoding", lambda self, blocks, batch, *_: (preflight.GIB, batch * 10**12))
    monkeypatch.setattr(preflight.Model, "tower", lambda self, dtype: (0, 0))


@pytest.mark.parametrize("profile", ["paper", "paper_large", "tiny", "smoke"])
def test_every_notebook_has_a_recipe_that_its_parameters_fit(cheap, profile):
    for name in preflight.runner.order(ROOT) if profile != "paper_large" else FEW:
        needs = preflight.estimate(ROOT, profile, name)
        assert not [p for p in needs.problems if "GPU memory" not in p], name
        if name[:2] in preflight.RECIPES:
            assert min(needs.flops.values()) >= 0 and sum(needs.hours().values()) > 0 and needs.disk, name
        assert needs.told() or name[:2] == "08"


def test_flops_are_two_a_weight_and_token_and_the_attention_s(tmp_path):
    config = hf.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model, rows = preflight.Model(str(tmp_path)), 3 * 10
    block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64
    products, attention, head = 5 * rows * 2 * block, 5 * rows * 4 * 32 * 10, rows * 2 * 32 * 64
    assert model.decoding(5, 3, 10, torch.float32)[1] == products + attention
    assert model.decoding(5, 3, 10, torch.float32, head=True)[1] == products + attention + head
    both_ways = model.decoding(5, 3, 10, torch.float32, grad="weights")[1]
    assert both_ways == 3 * (products + head) + 3.5 * attention


def test_sizes_of_the_papers_models():
    weights = {name: round(preflight.Model(name).n_weights / 1e9, 2) for name in preflight.FACTS["models"]}
    assert weights["google/gemma-2b"] == 2.51 and weights["mistralai/Mistral-7B-Instruct-v0.2"] == 7.24
    assert weights["llava-hf/llava-v1.6-mistral-7b-hf"] == 7.57 and weights["llava-hf/llava-1.5-7b-hf"] == 7.06
    tokens = {name: preflight.Model(name).image((672, 672)) for name in weights if "resnet" not in name}
    assert tokens["Intel/llava-gemma-2b"] == (576, 1)
    assert tokens["llava-hf/llava-v1.6-mistral-7b-hf"] == (576 + 48 * 49, 5)
    assert weights["google/paligemma2-3b-mix-224"] == 3.03 and tokens["google/paligemma2-3b-mix-224"] == (256, 1)
    assert tokens["facebook/chameleon-7b"] == (1026, 1) and tokens["nlpconnect/vit-gpt2-image-captioning"] == (0, 1)


@pytest.mark.parametrize(
    "name, changed, says",
    [
        ("01", {"layers": [0, 18]}, "layer 18 does not exist: google/gemma-2b has blocks 0 to 17"),
        ("01", {"layers": [0, 7]}, "gemma-2b-res-jb has no SAE blocks.7.hook_resid_post, but blocks.0."),
        ("01", {"d_sae": 1024}, "SAEs of gemma-2b-res-jb have d_sae 16384, not 1024"),
        ("01", {"text_model": "mistralai/Mistral-7B-v0.1"}, "have d_in 2048, not 4096"),
        ("01", {"sae_source": "gemma-3b-res-jb"}, "neither a release nor a folder of SAEs gemma-3b-res-jb"),
        ("01", {"model": "google/gemma-3b"}, "model google/gemma-3b: neither in preflight.yaml nor reachable"),
        ("01", {"dataset": "you/own"}, "data set you/own: neither known to preflight.yaml nor reachable"),
        ("04", {"contexts": [40_000]}, "reads 32768 tokens, not 40000"),
        ("04", {"saes_together": 8}, "hang on SAEs in training: together"),
    ],
)
def test_what_would_fail_is_one_clear_line(cheap, name, changed, says):
    name = next(one for one in preflight.runner.order(ROOT) if one.startswith(name))
    problems = preflight.estimate(ROOT, "paper", name, **changed).problems
    assert any(says in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


def test_a_licence_that_is_not_accepted_fails_before_the_download(monkeypatch, cheap):
    preflight._model.cache_clear()
    monkeypatch.setattr(
        preflight, "hub", lambda name, kind: "accept its licence" if name == "google/gemma-2b" else None
    )
    needs = preflight.estimate(ROOT, "paper", "02_classification_ablations")
    assert needs.problems == ["model google/gemma-2b: accept its licence"] and needs.licences == {"google/gemma-2b"}


def test_command_line(monkeypatch, capsys, cheap):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=100 * preflight.GIB))
    assert preflight.main(["--profile", "paper", "01", "07"]) == 0
    out = capsys.readouterr().out
    assert "licence google/gemma-2b" in out and "would fail: none" in out
    assert preflight.main(["--gpu", "4090", "07"]) == 1
    assert "FAILS   needs" in capsys.readouterr().out
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=preflight.GIB))
    assert preflight.main(["01"]) == 1
    assert "where 1 are free" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gpu", "h1000"], "--gpu h1000 --tflops None: give one of h100, "),
        (["--tflops", "-1"], "give one of h100, h200, a100, l40s, 4090, and a number above 0"),
        (
            ["--profile", "papers"],
            "PROFILE=papers: no folder params/papers; there are "
            "batchtopk, jumprelu, matryoshka, paper, paper_large, real,",
        ),
        (["99"], "no notebook starts with '99'"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, says):
    assert preflight.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_a_parameter_that_the_notebook_lacks_is_refused():
    with pytest.raises(InputError, match="unknown parameter 'layer'; did you mean 'layers'?"):
        preflight.estimate(ROOT, "paper", "01_llava_transfer_signal", layer=[3])


def test_a_dtype_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no dtype 'float12'"):
        preflight.estimate(ROOT, "paper", "01_llava_transfer_signal", dtype="float12")


def test_measured_throughput_scales_all_hours_of_products(cheap):
    name = "07_standard_question_set"
    slow, fast = (preflight.estimate(ROOT, "paper", name, tflops=x).hours()["passes"] for x in (100, 400))
    assert slow == pytest.approx(4 * fast)


def test_throughput_is_measured_on_the_spot(cheap, monkeypatch):
    for name in ("tinyworld/gemma", "tinyworld/vit-gpt2", "tinyworld/chameleon"):
        assert 0 < preflight.Model(name).speed("cpu", 16) < 1000
    monkeypatch.setattr(preflight.Model, "speed", lambda model: model.n_weights / 1e9)
    name = "01_llava_transfer_signal"
    given, here = (preflight.estimate(ROOT, "paper", name, tflops=x) for x in (2.51, "here"))
    assert here.measured == pytest.approx(2.51, abs=0.5), "its largest model"
    assert here.hours()["passes"] == pytest.approx(given.hours()["passes"] * 2.51 / here.measured)
    assert any("TFLOP/s, measured here" in line for line in here.told()) and not given.measured


def test_what_the_hub_says(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    refusal = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    answers = {"open/one": None, "gated/one": errors.GatedRepoError("gated", response=refusal)}
    answers["no/such"] = errors.RepositoryNotFoundError("none", response=refusal)
    answers["no/network"] = OSError("no network")

    def auth_check(name, repo_type):
        if answers[name]:
            raise answers[name]

    monkeypatch.setattr(huggingface_hub, "auth_check", auth_check)
    said = [HUB(name, "dataset") for name in answers]
    assert said[0] == "" and said[1].startswith("accept its licence at https://huggingface.co/datasets/gated/one")
    assert said[2].startswith("the hub has no such repository") and said[3] is None
