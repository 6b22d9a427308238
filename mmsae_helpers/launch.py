"""Fine-tuning by several processes under ``accelerate launch``, one a GPU, for a notebook, which is one process.

MMSAE_ACCELERATE is the path of accelerate's configuration, as launch/fsdp.yaml; else `alignment.fine_tune` tunes here.
"""

import json
import os
import re
import subprocess
import sys
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from safetensors.torch import load_file, save_file

from mmsae_helpers.errors import InputError


def launched(tune):
    """Decorator of `alignment.fine_tune`: where MMSAE_ACCELERATE is set, `main` calls it in processes of its own, from
    the adapter's weights, and the adapter has the tuned ones in the end. Raises InputError where that fails."""

    @wraps(tune)
    def read(adapter, rows, how="sft", *, callbacks=(), after=None, **options):
        config = os.environ.get("MMSAE_ACCELERATE")
        if not config or after:
            return tune(adapter, rows, how, callbacks=callbacks, after=after, **options)
        if callbacks or not Path(config).is_file():
            raise InputError(f"MMSAE_ACCELERATE is {config}: give the whole path of a file (and no callbacks)")
        with TemporaryDirectory() as folder:
            return _launch(config, Path(folder), adapter, rows, {"how": how} | options)

    return read


def _launch(config: str, folder: Path, adapter, rows, options: dict) -> list[dict]:
    from mmsae_helpers import alignment

    code = type(adapter.model).__module__.startswith("transformers_modules")  # not of transformers itself
    load = {"name": adapter.name, "dtype": str(adapter.model.dtype)[6:], "trust_remote_code": code}
    (folder / "job.json").write_text(json.dumps({"load": load, "options": options}, default=str))
    save_file(alignment.weights_of(adapter), folder / "begin.safetensors")
    rows.save_to_disk(folder / "rows")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["-m", "mmsae_helpers.launch", str(folder)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    device = adapter.device
    adapter.model.to("cpu")  # makes room
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    adapter.model.to(device)
    if done.returncode:
        said = re.findall(r"^(?:\[rank\d+\]: *)?((?:error|[\w.]+Error): .+)", done.stderr, re.M)
        why = next((line for line in said if "CalledProcessError" not in line), f"status {done.returncode}")
        raise InputError(f"accelerate launch, by {config}, ended with {why.removeprefix('error: ')}")
    alignment.restore(adapter, load_file(folder / "tuned.safetensors"))
    return json.loads((folder / "log.json").read_text())


def main(folder: str | Path) -> None:
    """What each process does: load the model, tune it on the rows in ``folder`` from the weights there, and leave the
    tuned weights and the log. A step takes as many rows as in one process. Raises InputError where these cannot be
    shared equally."""
    from accelerate import PartialState

    from mmsae_helpers import alignment, models

    # use_cpu of the configuration, which under FSDP and DeepSpeed does not come this far
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    folder, state = Path(folder), PartialState(cpu=cpu)
    job = json.loads((folder / "job.json").read_text())
    options, n = job["options"], state.num_processes
    whole = options["batch_size"] * options.get("accumulate", 1)
    if whole % n:
        raise InputError(f"{whole} rows a step cannot be shared by {n} processes: change num_processes")
    options["batch_size"] = max(b for b in range(1, options["batch_size"] + 1) if whole // n % b == 0)
    options["accumulate"] = whole // n // options["batch_size"]
    adapter = models.load(device="cpu" if cpu else str(state.device), **job["load"])
    alignment.restore(adapter, load_file(folder / "begin.safetensors"))
    names = list(alignment.trainable(adapter))
    # some classes that transformers would not split are in none of these models, which stops FSDP
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = type(adapter.blocks[0]).__name__

    def keep(trainer):
        tuned = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # which all processes gather
        if state.is_main_process:
            save_file({name: tuned[name].contiguous() for name in names}, folder / "tuned.safetensors")

    log = alignment.fine_tune(adapter, datasets.load_from_disk(str(folder / "rows")), after=keep, **options)
    if state.is_main_process:
        (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except InputError as error:
        sys.exit(f"error: {error}")
