"""Notebook 06 as the runner runs it: every ranking that profile tiny_full names, and a run killed among its tunings."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from mmsae_helpers.suite import runner

NAME = "06_alignment_filtering"
ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    n_rows=13, n_benchmark=3, max_new_tokens=4, interleaved=[12, 6, 2], sae_steps=[10, 1, 1, 2], seeds=[0, 1],
    untune={"rows": 8, "lr": 1e-3, "steps": {"tinyworld/chameleon": 1}},
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with notebook 06 alone and profile tiny_full cut down to Chameleon, two shares and smoke's sizes."""
    root = tmp_path_factory.mktemp("root")
    for path in (f"notebooks/{NAME}.ipynb", "constraints.txt"):
        (root / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, root / path)
    full, smoke = (yaml.safe_load((ROOT / f"params/{p}/{NAME}.yaml").read_text()) for p in ("tiny_full", "smoke"))
    whole, *others = [arm for arm in full["arms"] if arm[0] == "tinyworld/chameleon"]
    arms = [[*whole[:4], [0.4, 0.7]], *([*arm[:3], arm[3][:1], [0.4]] for arm in others)]
    assert {tuple(arm[1:3]) for arm in arms} == {("sft", "epochs"), ("sft", "steps"), ("dpo", "epochs")}
    (root / "params/tiny_full").mkdir(parents=True)
    (root / f"params/tiny_full/{NAME}.yaml").write_text(yaml.safe_dump(smoke | SMALL | full | {"arms": arms}))
    return root


@pytest.fixture(scope="module")
def whole(root):
    """Results of a run from start to end."""
    assert runner.run(root, "tiny_full", artifacts=root / "whole", reports=root / "reports") == 0
    return json.loads((root / f"whole/tiny_full/{NAME}/results.json").read_text())


def test_every_arm_and_ranking_of_tiny_full_runs(root, whole):
    full = yaml.safe_load((ROOT / f"params/tiny_full/{NAME}.yaml").read_text())
    assert all(set(arm[4]) == {share / 10 for share in range(1, 10)} for arm in full["arms"])
    assert {claim["id"] for claim in whole["claims"]} == {"C5", "C6", "C7", "C8"}
    said = [name for name in whole["metrics"] if name.startswith("kept_chameleon_sft_epochs_")]
    assert len(said) == 2 * (1 + len(full["arms"][0][3]))
    assert {"loss_with_benchmark_chameleon", "rows_held_out_by_model_and_seed"} <= set(whole["metrics"])


def test_a_run_killed_among_its_tunings_goes_on_there_with_the_same_numbers(root, whole):
    folder, reports = root / f"killed/tiny_full/{NAME}", root / "reports_killed"
    environment = {"MMSAE_ARTIFACTS": str(root / "killed"), "MMSAE_REPORTS": str(reports)}
    environment |= {"PYTHONPATH": str(runner.PACKAGE.parent)}
    command = [sys.executable, "-m", "mmsae_helpers.suite.runner", "--root", root, "--profile", "tiny_full"]
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    while len(kept := list(folder.glob("tuned/*.json"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    for kernel in psutil.Process(process.pid).children():
        kernel.kill()
    assert "the kernel died in code cell" in process.communicate()[0]
    assert not (folder / "results.json").exists()
    before = {file: file.stat().st_mtime_ns for file in kept}
    assert runner.run(root, "tiny_full", artifacts=root / "killed", reports=reports) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == before, "what was tuned is not tuned again"
    again = json.loads((folder / "results.json").read_text())
    for results in (whole, again):
        results["metrics"] = {name: of for name, of in results["metrics"].items() if not name.startswith("seconds_")}
    assert again["metrics"] == whole["metrics"] and again["claims"] == whole["claims"]
