"""Profile paper: each notebook runs from its own YAML on tiny repositories in the hub's layouts, sizes alone changed.

Models and SAEs are found under the ids that the YAML names, in a hub cache without a network; data sets, which a cache
without one does not give, in a copy of their repository. The captioner is converted first, as the README says.
"""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hub_layouts as hub_of
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmsae_helpers import activations, data, models, saes
from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import runner

ROOT = Path(__file__).resolve().parents[1]
SAE = {"sae_batch_size": 64, "norm_batches": 2, "expansion": 2, "seeds": [42, 43]}
SIZES = {  # beside dtype float32, as a CPU is slow in bfloat16; shards of so few tokens do not fill a disk
    "01": {"train_documents": 20, "label_documents": 60, "images_per_class": 4, "health_images": 12, "asked_images": 4,
           "control": {"split": "train", "images": 12, "tokens": 200}, "rescale": True},  # so that features fire
    "02": {"label_documents": 20, "images_per_class": 10, "answer_images_per_class": 1, "compare_images_per_class": 6,
           "train_tenths": [1, 5], "seeds": [0, 1]},
    "03": {"train_images_per_class": 4, "images_per_class": 4, "max_new_tokens": 6, "expansion": 2, "sae_steps": 10,
           "sae_batch_size": 64, "loss_images": 8, "batch_size": 48, "layers": [0, 8, 11], "min_images": 2,
           "l1_coefficients": [1.0, 5.0], "printed_epochs": 1, "printed_lambdas": [0.001, 10.0]},
    "04": {"train_interleaved": 8, "test_interleaved": 6, "train_texts": 24, "test_texts": 12, "expansions": [2],
           "sae_steps": 20, "sae_batch_size": 64, "lr_warm_up_steps": 1, "lr_decay_steps": 4, "l1_warm_up_steps": 1,
           "norm_batches": 2, "length_steps": [10], "seeds": [42, 43], "loss_documents": 4, "batch_size": 8,
           "text_batch_size": 12, "saes_together": 20, "cache": True},
    "05": SAE | {"n_images": 6, "interleaved": [8, 6], "sae_steps": [20, 1, 1, 4], "batch_sizes": [6, 3, 8],
           "greedy_images": 3, "more_shares": [0.1], "shares": [0.5, 0.25], "cache": True},
    "06": SAE | {"n_rows": 8, "n_benchmark": 3, "interleaved": [8, 4, 2], "sae_steps": [20, 1, 1, 4], "deltas": [1.0],
           "max_new_tokens": 2, "batch_size": 8,
           "tuning": {"batch_size": 8, "accumulate": 1, "epochs": 1, "warmup_steps": 1, "sft_lr": 1e-6,
                      "dpo_lr": 1e-6}},
    "07": {"max_images": 6, "images_per_class": 1, "train_images_per_class": 2, "d_sae": 32, "sae_steps": 20,
           "sae_batch_size": 64, "answer_tokens": 3, "batch_size": 72, "seeds": [0, 1], "shuffles": 3, "sae_lr": 1e-3,
           "l1_coefficient": 0.1},
}  # fmt: skip
MODELS = {"Intel/llava-gemma-2b": hub_of.llava_gemma, "llava-hf/llava-1.5-7b-hf": hub_of.llava,
          "llava-hf/llava-v1.6-mistral-7b-hf": hub_of.llava_next, "mistralai/Mistral-7B-Instruct-v0.2": hub_of.mistral,
          "facebook/chameleon-7b": hub_of.chameleon, "leloy/Anole-7b-v0.1-hf": hub_of.chameleon,
          "nlpconnect/vit-gpt2-image-captioning": hub_of.vit_gpt2, "microsoft/resnet-50": hub_of.resnet,
          "google/gemma-2b": hub_of.gemma, "google/gemma-2b-it": hub_of.gemma,
          "google/paligemma2-3b-mix-224": hub_of.paligemma}  # fmt: skip


@pytest.fixture(scope="module")
def site():
    """Serves the pictures that OBELICS links to, and a judge."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, content):
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def do_GET(self):
            found = re.fullmatch(r"/(\d)/(\d+)(b?)\.jpg", self.path)
            size = (60, 30) if found and found[3] else (40, 40)
            self._answer(found and hub_of.picture(int(found[1]), 500 + int(found[2]), size))

        def do_POST(self):
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            said = {"role": "assistant", "content": f"{1 + len(asked) % 9} {1 + len(asked) % 7}\nbecause"}
            self._answer(json.dumps({"choices": [{"message": said}]}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory, site):
    """A hub cache with every repository that the YAML files of profile paper name, and the environment to use it."""
    hub, patch = tmp_path_factory.mktemp("hub"), pytest.MonkeyPatch()
    for name, make in MODELS.items():
        make(hub, name)
    base = hub / "models--google--gemma-2b/snapshots" / hub_of.SHA
    hub_of.gemma_res_jb(hub, base)
    hub_of.gemma_it_res_jb(hub, base)
    pictures, preferences = (hub_of.cifar100, hub_of.imagenet), (hub_of.align_anything, hub_of.rlaif_v)
    for make in (*pictures, hub_of.pile, *preferences, hub_of.llava_bench, hub_of.vqav2):
        make(hub)
    hub_of.imagenet(hub, "timm/mini-imagenet")
    hub_of.obelics(hub, site)
    # as in conftest.py, in the kernels too: a dozen streams that sleep 5 s each
    (hub / "sitecustomize.py").write_text(
        "import datasets.config\n\ndatasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1\n"
    )
    here = {"HF_HUB_CACHE": hub, "HF_HUB_OFFLINE": 1, "HF_DATASETS_CACHE": hub / "datasets", "OMP_NUM_THREADS": 1}
    for key, value in (here | {"PYTHONPATH": hub}).items():
        patch.setenv(key, str(value))
    yield hub
    patch.undo()


@pytest.fixture(scope="module")
def suite(hub, site, tmp_path_factory):
    """Notebooks, and their paper YAML with sizes changed; and data sets, captioner and judge that are at hand."""
    root = tmp_path_factory.mktemp("suite")
    converted = root / "captioner"
    command = [sys.executable, "-m", "mmsae_helpers.models", "nlpconnect/vit-gpt2-image-captioning", str(converted)]
    subprocess.run(command, check=True, cwd=ROOT)
    for block in (0, 6, 10, 12):
        hub_of.neuronpedia(root / "v1", f"gemma-2b/{block}-res-jb")
    hub_of.neuronpedia(root / "v1", "gemma-2b-it/12-res-jb")
    here = {"nlpconnect/vit-gpt2-image-captioning": str(converted), "https://api.openai.com/v1": site}
    here["neuronpedia:"] = f"{root}/v1/"
    for name in (
        "uoft-cs/cifar100", "ILSVRC/imagenet-1k", "timm/mini-imagenet", "monology/pile-uncopyrighted",
        "HuggingFaceM4/OBELICS", "PKU-Alignment/align-anything", "openbmb/RLAIF-V-Dataset",
        "lmms-lab/llava-bench-coco", "lmms-lab/VQAv2",
    ):  # fmt: skip
        here[name] = str(hub / f"datasets--{name.replace('/', '--')}" / "snapshots" / hub_of.SHA)
    (root / "params/paper").mkdir(parents=True)
    (root / "notebooks").mkdir()
    (root / "constraints.txt").symlink_to(ROOT / "constraints.txt")
    for number, sizes in SIZES.items():
        (notebook,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        (root / "notebooks" / notebook.name).symlink_to(notebook)
        text = (ROOT / "params/paper" / f"{notebook.stem}.yaml").read_text()
        for theirs, ours in here.items():
            text = text.replace(theirs, ours)
        values = yaml.safe_load(text) | sizes | {"dtype": "float32", "device": "cpu"}
        if number == "06":
            few = {"cosine", "random directions", "IFD"}
            arms = [(of, [one for one in by if one in few], shares) for *of, by, shares in values["arms"]]
            values["arms"] = [[*of, by, shares[: 1 + (i < 2)]] for i, (of, by, shares) in enumerate(arms)]
        (root / "params/paper" / f"{notebook.stem}.yaml").write_text(yaml.safe_dump(values))
    return root


@pytest.mark.parametrize("number", SIZES)
def test_a_notebook_runs_from_its_paper_yaml_to_its_report(suite, number):
    runner.run(suite, "paper", number, artifacts=suite / "artifacts", reports=suite / "reports")
    (folder,) = (suite / "artifacts/paper").glob(f"{number}_*")
    status = json.loads((folder / "run.json").read_text())
    assert status["status"] == "ok", f"{status['error']}\n{status['traceback']}"
    results = json.loads((folder / "results.json").read_text())
    assert results["profile"] == "paper" and results["metrics"] and results["claims"]
    page = (suite / "reports/paper" / f"{folder.name}.html").read_text()
    assert len(page) > 5000
    if number == "01":  # the post's table, and what the release says of its SAEs
        assert "&lt;b&gt;" in page and "mentions of <b>" not in page and "underwater animals and" in page
        assert results["metrics"]["sparsity_explained_variance_trained_says_the_release_12"]["value"] == -0.65
        assert results["metrics"]["post_features_found"]["n"] == 40
    if number == "07":
        assert results["metrics"]["told_apart_standard_set_trained_not_told_apart"]["value"] == 0
        assert "told_apart_own_questions_trained_not_told_apart" in results["metrics"]


def at(hub, name, kind="models"):
    return hub / f"{kind}--{name.replace('/', '--')}" / "snapshots" / hub_of.SHA


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_as_it_lies_on_the_hub(hub, name):
    if name == "microsoft/resnet-50":
        logits, hidden = models.classify(str(at(hub, name)), [[Image.new("RGB", (40, 30))]], "cpu")
        assert logits.shape == (1, len(hub_of.CLASSES)) and hidden.shape == (1, 16)
        return
    if name.startswith("nlpconnect"):
        with pytest.raises(InputError, match="has no safetensors: python -m mmsae_helpers.models"):
            models.load(str(at(hub, name)), "cpu")
        return
    adapter = models.load(str(at(hub, name)), "cpu")
    tensors = {key: x for key, x in adapter.model.state_dict().items() if "embed_tokens" in key or "lm_head" in key}
    tied = len({x.data_ptr() for x in tensors.values()}) == 1
    assert tied == ("gemma" in name) and adapter.n_layers in (10, 18, 32)
    if adapter.patch_grid is None:
        assert adapter.encode(["a dolphin"])["input_ids"][0, 0] == adapter.tokenizer.bos_token_id
        return
    assert "<image>" not in adapter.prompt("what is it?", image=False)
    inputs = adapter.encode([adapter.prompt("what is it?")], [Image.new("RGB", (40, 30))])
    is_image, patch, _ = adapter.geometry(inputs)
    assert (inputs["input_ids"] == adapter.tokenizer.bos_token_id).sum() == 1
    assert is_image.sum() == adapter.image_tokens((30, 40)) and set(patch[is_image].tolist()) >= {0, 1, 2, 3}
    assert adapter.forward(inputs).logits.isfinite().all()


def test_paligemma_reads_picture_and_question_both_ways(hub):
    adapter = models.load(str(at(hub, "google/paligemma2-3b-mix-224")), "cpu")
    picture, questions = Image.new("RGB", (40, 30), (200, 10, 10)), ["what is it", "", "one big dolphin"]
    given = adapter.encode([adapter.prompt(q) for q in questions], [picture] * 3)
    (batch,) = activations.stream(adapter, [activations.Inputs(torch.arange(3), given)], [17], "image")
    tokens = batch.acts[17].reshape(3, 4, -1)
    assert batch.patch.tolist() == [0, 1, 2, 3] * 3 and (tokens[0] - tokens[2]).abs().min() > 1e-3
    for i, question in enumerate(questions):
        alone = adapter.encode([adapter.prompt(question)], [picture])
        (one,) = activations.stream(adapter, [activations.Inputs(torch.arange(1), alone)], [17], "image")
        assert torch.allclose(one.acts[17], tokens[i], atol=1e-4), "padding is not attended to"
        assert adapter.answer(alone, 3) == adapter.answer(given, 3)[i : i + 1]
    assert adapter.vision_features([picture]).shape == (1, 16) and adapter.crop(picture) is picture


def fires_as_often(sae, spread=0.8):
    acts = torch.randn(2000, sae.cfg.d_in) * spread
    made, like = ((one.encode(acts) > 0).sum(0) for one in (saes.random_sae(sae, acts, matched=True), sae))
    assert like.float().mean() > 10 and (made - like).abs().max() <= 1


@pytest.fixture
def offline(hub, monkeypatch):
    """The hub cache in this process too, which read its environment when it began."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_release_and_a_copy_of_it_are_the_same(hub, offline):
    """gemma-2b-res-jb: folders by long names, scaling_factor, one block normalised by a factor the registry knows."""
    where = dict(d_in=hub_of.WIDTH, seeds=[0])
    (by_id,) = saes.obtain("gemma-2b-res-jb", layers=[6], **where).values()
    copy, name = str(at(hub, "jbloom/Gemma-2b-Residual-Stream-SAEs")), "gemma_2b_blocks.{layer}.hook_resid_post_16384"
    (by_folder,) = saes.obtain(copy, layers=[6], sae_id=f"{name}_anthropic_fast_lr", **where).values()
    x = torch.randn(20, hub_of.WIDTH)
    assert torch.equal(by_id(x), by_folder(x)) and not by_id.cfg.apply_b_dec_to_input
    (folded,) = saes.obtain("gemma-2b-res-jb", layers=[12], **where).values()
    assert folded.cfg.normalize_activations == "none"
    assert folded.cfg.metadata.trained_norm == pytest.approx(hub_of.WIDTH**0.5 / 0.21381938399317255)
    with pytest.raises(InputError, match="expected_average_only_in is not folded in"):
        saes.obtain(copy, layers=[12], sae_id=name, **where)
    for sae in (by_id, folded):
        fires_as_often(sae, 4.0)


def test_both_ways_to_centre_the_input_are_the_same_sae(hub, offline, tmp_path):
    model, x = at(hub, "google/gemma-2b"), torch.randn(20, hub_of.WIDTH)
    copies = [hub_of.gemma_res_jb(tmp_path / str(how), model, apply_b_dec=how) for how in (True, False)]
    name = "gemma_2b_blocks.{layer}.hook_resid_post_16384_anthropic"
    a, b = (saes.obtain(str(copy), d_in=hub_of.WIDTH, layers=[0], sae_id=name)[0, 0] for copy in copies)
    assert a.cfg.apply_b_dec_to_input and not b.cfg.apply_b_dec_to_input
    assert torch.allclose(a.encode(x), b.encode(x), atol=1e-5)
    fires_as_often(a, 4.0)


def test_other_saes_of_the_hub(tmp_path, offline, monkeypatch):
    """gpt2-small-res-jb reads a block's input; a BatchTopK is kept as JumpReLU; Gemma Scope is an npz file."""
    where = dict(d_in=hub_of.WIDTH, layers=[8])
    copy = str(hub_of.gpt2_res_jb(tmp_path))
    with pytest.raises(InputError, match="the SAE for block 8 of .* reads blocks.8.hook_resid_pre"):
        saes.obtain(copy, sae_id="blocks.{layer}.hook_resid_pre", **where)
    found = saes.obtain(copy, sae_id="blocks.{layer}.hook_resid_pre", any_hook=True, **where)
    hub_of.batch_topk(tmp_path / "new", 8)
    found |= {"new": saes.obtain(str(tmp_path / "new"), **where)[8, 0]}
    from sae_lens.loading import pretrained_sae_loaders as loaders

    real, shape = loaders.get_gemma_2_config_from_hf, {"d_in": hub_of.WIDTH, "d_sae": 48}
    monkeypatch.setattr(loaders, "get_gemma_2_config_from_hf", lambda *a, **k: real(*a, **k) | shape)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_of.gemma_scope(tmp_path)
    scope = saes.obtain("gemma-scope-2b-pt-res", sae_id="layer_{layer}/width_16k/average_l0_82", d_in=16, layers=[12])
    assert [sae.cfg.architecture() for sae in (*found.values(), scope[12, 0])] == ["standard", "jumprelu", "jumprelu"]
    for sae in (*found.values(), scope[12, 0]):
        fires_as_often(sae)


def test_data_sets_are_read_as_they_lie_on_the_hub(hub, site, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    images = data.load(str(at(hub, "uoft-cs/cifar100", "datasets")), per_class=2)
    assert images.class_names == hub_of.CLASSES and np.bincount(images.labels).tolist() == [2] * 6
    assert {"maple", "tree", "dolphin"} <= {*images.concepts().columns}
    labelled = data.load(str(at(hub, "ILSVRC/imagenet-1k", "datasets")), "val", 1)
    assert labelled.class_names[0] == "dolphin, mammal" and len(labelled.dataset) == 12
    with pytest.raises(InputError, match="have no label"):
        data.load(str(at(hub, "ILSVRC/imagenet-1k", "datasets")), "test")
    assert len(data.documents(str(at(hub, "monology/pile-uncopyrighted", "datasets")), 200)) == 200
    found = data.interleaved(str(at(hub, "HuggingFaceM4/OBELICS", "datasets")), 40)
    assert len(found) == 40 and len(found.skipped) == 20 and all("404" in line for line in found.skipped)
    for make, config, left_out in (
        (hub_of.align_anything, ":text-image-to-text", {"no preference": 1}), (hub_of.rlaif_v, "", {})
    ):  # fmt: skip
        rows = data.preferences(f"{make(tmp_path)}{config}")
        assert rows.left_out == left_out and len(rows.dataset) == 24 - len(left_out)
