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

from mmsae_helpers import data, models, saes
from mmsae_helpers.errors import InputError
from mmsae_helpers.suite import runner

ROOT = Path(__file__).resolve().parents[1]
SAE = {"sae_batch_size": 64, "norm_batches": 2}
SIZES = {  # and dtype float32, since a CPU is slow in bfloat16
    "01": {"train_documents": 20, "label_documents": 60, "images_per_class": 4, "health_images": 12,
           "control": {"split": "train", "images": 12, "tokens": 200}},
    "02": {"label_documents": 20, "images_per_class": 10, "answer_images_per_class": 1, "compare_images_per_class": 6,
           "train_tenths": [1, 5], "seeds": [0, 1]},
    "03": {"train_images_per_class": 4, "images_per_class": 4, "max_new_tokens": 6, "expansion": 2, "sae_steps": 30,
           "sae_batch_size": 64, "loss_images": 8, "batch_size": 48, "layers": [0, 8, 11], "min_images": 2,
           "l1_coefficients": [1.0, 5.0], "printed_epochs": 1, "printed_lambdas": [0.001, 10.0]},
    "04": SAE | {"train_interleaved": 8, "test_interleaved": 6, "train_texts": 24, "test_texts": 12, "expansions": [2],
           "sae_steps": 20, "lr_warm_up_steps": 1, "lr_decay_steps": 4, "l1_warm_up_steps": 1, "length_steps": [10],
           "seeds": [42, 43], "loss_documents": 4, "batch_size": 4, "text_batch_size": 12, "saes_together": 20},
    "05": SAE | {"n_images": 6, "interleaved": [8, 6], "expansion": 2, "seeds": [42, 43], "sae_steps": [20, 1, 1, 4],
           "batch_sizes": [6, 3, 4], "greedy_images": 3, "more_shares": [0.1]},
    "06": SAE | {"n_rows": 8, "n_benchmark": 3, "interleaved": [8, 4, 2], "expansion": 2, "seeds": [42, 43],
           "sae_steps": [20, 1, 1, 4], "max_new_tokens": 3, "batch_size": 8, "deltas": [1.0],
           "tuning": {"batch_size": 4, "accumulate": 1, "epochs": 1, "warmup_steps": 1, "sft_lr": 1e-6,
                      "dpo_lr": 1e-6}},
    "07": {"max_images": 6, "images_per_class": 1, "train_images_per_class": 2, "d_sae": 32, "sae_steps": 20,
           "sae_batch_size": 64, "answer_tokens": 3, "batch_size": 72, "seeds": [0, 1], "shuffles": 3, "sae_lr": 1e-3,
           "l1_coefficient": 0.1},
}  # fmt: skip
MODELS = {"Intel/llava-gemma-2b": hub_of.llava_gemma, "llava-hf/llava-1.5-7b-hf": hub_of.llava,
          "llava-hf/llava-v1.6-mistral-7b-hf": hub_of.llava_next, "mistralai/Mistral-7B-Instruct-v0.2": hub_of.mistral,
          "facebook/chameleon-7b": hub_of.chameleon, "leloy/Anole-7b-v0.1-hf": hub_of.chameleon,
          "nlpconnect/vit-gpt2-image-captioning": hub_of.vit_gpt2, "microsoft/resnet-50": hub_of.resnet,
          "google/gemma-2b": hub_of.gemma, "google/gemma-2b-it": hub_of.gemma}  # fmt: skip


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
    for make in (hub_of.cifar100, hub_of.imagenet, hub_of.pile, hub_of.align_anything, hub_of.llava_bench):
        make(hub)
    hub_of.imagenet(hub, "timm/mini-imagenet")
    hub_of.obelics(hub, site)
    for key, value in {"HF_HUB_CACHE": hub, "HF_HUB_OFFLINE": 1, "HF_DATASETS_CACHE": hub / "datasets"}.items():
        patch.setenv(key, str(value))
    patch.setenv("OMP_NUM_THREADS", "1")
    yield hub
    patch.undo()


@pytest.fixture(scope="module")
def suite(hub, site, tmp_path_factory):
    """Notebooks, and their paper YAML with sizes changed; and data sets, captioner and judge that are at hand."""
    root = tmp_path_factory.mktemp("suite")
    converted = root / "captioner"
    command = [sys.executable, "-m", "mmsae_helpers.models", "nlpconnect/vit-gpt2-image-captioning", str(converted)]
    subprocess.run(command, check=True, cwd=ROOT)
    here = {"nlpconnect/vit-gpt2-image-captioning": str(converted), "https://api.openai.com/v1": site}
    for name in (
        "uoft-cs/cifar100", "ILSVRC/imagenet-1k", "timm/mini-imagenet", "monology/pile-uncopyrighted",
        "HuggingFaceM4/OBELICS", "PKU-Alignment/align-anything", "lmms-lab/llava-bench-coco",
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
            values["arms"] = [[*arm[:4], arm[4][:2]] for arm in values["arms"]]
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
    assert (suite / "reports/paper" / f"{folder.name}.html").stat().st_size > 5000
