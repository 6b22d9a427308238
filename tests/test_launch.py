"""Fine-tuning under `accelerate launch` is that of one process, and the configurations shipped are accelerate's."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, Features, Image, Value, concatenate_datasets

from mmsae_helpers import alignment, models
from mmsae_helpers.errors import InputError
from mmsae_helpers.tinyworld import dataset

CONFIGS = Path(__file__).parents[1] / "launch"
ONE = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n"


@pytest.fixture
def rows():
    _, pixels, _ = dataset.arrays("train", 1, seed=5)
    columns = {"image": list(pixels[:4]), "question": ["what color is it ?"] * 4}
    columns |= {"chosen": ["red", "green", "blue", "black"], "rejected": ["a", "white", "a ring", "small"]}
    return Dataset.from_dict(columns, Features({k: Image() if k == "image" else Value("string") for k in columns}))


def test_launched_equals_in_process_bit_for_bit(rows, tmp_path, monkeypatch):
    adapter, weights, n = models.load("tinyworld/chameleon", "cpu"), [], torch.get_num_threads()
    base = alignment.weights_of(adapter)
    (tmp_path / "one.yaml").write_text(ONE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    logs = []
    for config in ("", str(tmp_path / "one.yaml")):
        monkeypatch.setenv("MMSAE_ACCELERATE", config)
        alignment.restore(adapter, base)
        logs.append(alignment.fine_tune(adapter, rows, "dpo", seed=3, learning_rate=1e-3, batch_size=2, steps=2))
        weights.append(alignment.weights_of(adapter))
    torch.set_num_threads(n)
    curves = [[(e["step"], e["loss"]) for e in log] for log in logs]
    assert curves[0] == curves[1] and len(curves[1]) == 2
    assert all(torch.equal(x, weights[1][k]) for k, x in weights[0].items())
    assert not any(torch.equal(x, base[k]) for k, x in weights[1].items() if k.endswith("q_proj.weight"))
    (tmp_path / "one.yaml").write_text(f"{ONE}no_such_key: 1\n")
    with pytest.raises(InputError, match=r"^accelerate launch, by .*one.yaml, ended with ValueError: .*no_such_key"):
        alignment.fine_tune(adapter, rows, seed=3, learning_rate=1e-3, batch_size=2, steps=2)


def test_two_processes_share_each_step_of_one(rows, tmp_path, monkeypatch):
    """By fsdp.yaml on CPUs: as many rows a step as one process takes, and the same ones."""
    adapter, rows = models.load("tinyworld/chameleon", "cpu"), concatenate_datasets([rows, rows.select([2, 0, 3, 1])])
    base, shipped = alignment.weights_of(adapter), (CONFIGS / "fsdp.yaml").read_text()
    (tmp_path / "two.yaml").write_text(shipped.replace("processes: 8", "processes: 2") + "use_cpu: true\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    logs = []
    for config in ("", str(tmp_path / "two.yaml")):
        monkeypatch.setenv("MMSAE_ACCELERATE", config)
        alignment.restore(adapter, base)
        logs.append(alignment.fine_tune(adapter, rows, seed=3, learning_rate=1e-3, batch_size=4, steps=3))
    one, two = ([e["loss"] for e in log] for log in logs)
    assert len(set(one)) == 3 and two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_shipped_configurations_are_read_by_accelerate(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == 8 and config.distributed_type in ("FSDP", "DEEPSPEED")
    assert config.fsdp_config or config.deepspeed_config


def test_a_configuration_that_is_not_there(monkeypatch):
    monkeypatch.setenv("MMSAE_ACCELERATE", "launch/none.yaml")
    with pytest.raises(InputError, match="MMSAE_ACCELERATE is launch/none.yaml: give the whole path"):
        alignment.fine_tune(None, [], seed=0, learning_rate=1e-3, batch_size=1, steps=1)
