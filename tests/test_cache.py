"""The cache gives back what was computed, bit for bit, and survives kills, damage and full disks."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmsae_helpers import activations, cache
from mmsae_helpers.errors import InputError

TESTS = Path(__file__).parent
DESCRIPTION = {"model": "m", "data": "d", "keep": "image"}


@pytest.fixture
def make(llava, image_batches):
    def make(start, stop, layers):
        make.calls.append((start, stop, tuple(layers)))
        return activations.stream(llava, image_batches(start, stop, batch_size=2), layers, "image")

    make.calls = []
    return make


def tokens(folder, make, layers, shard_samples=5, description=DESCRIPTION, n=10):
    return cache.Tokens(make, description, layers, n, folder, shard_samples)


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert list(x.acts) == list(y.acts)
        for u, v in zip([*x.acts.values(), *x[1:]], [*y.acts.values(), *y[1:]], strict=True):
            assert u.dtype == v.dtype and torch.equal(u, v)


def shards(root):
    return sorted(root.rglob("*.safetensors"))


def test_one_modality_of_a_pass_comes_from_the_same_shards(tmp_path, llava, image_batches):
    def make(start, stop, layers):
        return activations.stream(llava, image_batches(start, stop, batch_size=2), layers, "content")

    whole = tokens(tmp_path, make, [1])
    n = sum(len(batch.token) for batch in whole)
    images, words = whole.only(image=True), whole.only(image=False)
    assert sum(len(b.token) for some in (images, words) for b in some) == n
    assert all(b.is_image.all() for b in images) and not any(b.is_image.any() for b in words)
    assert (images.computed, images.folder, whole.image) == (whole.computed, whole.folder, None)
    assert len({str(some.description) for some in (whole, images, words)}) == 3


def test_cached_equals_uncached_bit_for_bit(tmp_path, make):
    first = tokens(tmp_path, make, [1, 3], 4)
    computed = list(first)
    direct = list(tokens(None, make, [1, 3]))
    for k, column in enumerate(direct[0]._fields[1:], 1):
        assert torch.equal(torch.cat([b[k] for b in computed]), torch.cat([b[k] for b in direct])), column
    for layer in (1, 3):
        assert torch.equal(torch.cat([b.acts[layer] for b in computed]), torch.cat([b.acts[layer] for b in direct]))
    again = tokens(tmp_path, make, [1, 3], 4)
    make.calls.clear()
    assert_same(list(again), computed)
    assert make.calls == [] and (first.computed, first.reused, again.computed, again.reused) == (6, 0, 0, 6)
    assert json.loads((first.folder / "description.json").read_text())["keep"] == "image"


def test_layers_are_shared_between_passes(tmp_path, make):
    list(tokens(tmp_path, make, [0, 3]))
    make.calls.clear()
    subset = tokens(tmp_path, make, [3])
    list(subset)
    assert make.calls == [] and subset.reused == 2
    assert [list(b.acts) for b in tokens(tmp_path, make, [3, 1])] == [[1, 3]] * 2
    assert make.calls == [(0, 5, (1,)), (5, 10, (1,))]


def test_another_description_or_range_is_another_shard(tmp_path, make):
    list(tokens(tmp_path, make, [0]))
    other = tokens(tmp_path, make, [0], description={**DESCRIPTION, "keep": "text"})
    list(other)
    short = tokens(tmp_path, make, [0], n=7)
    assert sum(len(b.sample) for b in short) == 7 * 4
    assert other.computed == 2 and (short.computed, short.reused) == (1, 1)


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_shard_is_found_and_made_again(tmp_path, make, damage):
    good = list(tokens(tmp_path, make, [1]))
    victim = shards(tmp_path)[0]
    data = bytearray(victim.read_bytes())
    if damage == "altered":
        data[-37] ^= 1
    victim.write_bytes({"truncated": data[: len(data) // 2], "altered": data, "empty": b""}[damage])
    make.calls.clear()
    store = tokens(tmp_path, make, [1])
    with pytest.warns(UserWarning, match="damaged shard .*samples_000000-000005.* made again"):
        assert_same(list(store), good)
    assert make.calls == [(0, 5, (1,))] and (store.computed, store.reused) == (1, 1)
    assert_same(list(tokens(tmp_path, make, [1])), good)


@pytest.mark.filterwarnings("ignore:damaged shard")
def test_every_altered_byte_is_found(tmp_path, make):
    (good,) = tokens(tmp_path, make, [1], n=1)
    victim = shards(tmp_path)[0]
    data = victim.read_bytes()
    for position in range(0, len(data), 7):
        victim.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        loaded = cache._load(victim)
        assert loaded is None or torch.equal(loaded["acts"], good.acts[1])


def test_full_disk_says_where_and_leaves_nothing(tmp_path, make, monkeypatch):
    written = []

    def fsync(_fd):
        written.append(1)
        if len(written) == 3:  # the description, one shard, then no room
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    store = tokens(tmp_path, make, [1])
    with pytest.raises(InputError, match=r"disk full: .*samples_000005-000010.* needs 0.0 MiB; make room"):
        list(store)
    assert len(shards(tmp_path)) == 1 and not list(tmp_path.rglob("*tmp*"))
    monkeypatch.undo()
    resumed = tokens(tmp_path, make, [1])
    list(resumed)
    assert (resumed.computed, resumed.reused) == (1, 1)


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path, make, monkeypatch):
    def replace(_from, _to):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="input/output"):
        list(tokens(tmp_path, make, [1]))
    assert not list(tmp_path.rglob("*tmp*"))


SCRIPT = """
import sys, time, torch
from mmsae_helpers.cache import Tokens
from mmsae_helpers.activations import TokenBatch

def make(start, stop, layers):
    for sample in range(start, stop):
        print("sample", sample, flush=True)
        time.sleep(0.02)
        n = torch.arange(3)
        g = torch.Generator().manual_seed(sample)
        acts = {layer: torch.randn(3, 8, generator=g) for layer in layers}
        yield TokenBatch(acts, torch.full((3,), sample), n, n, n > 0, n)

store = Tokens(make, {"x": 1}, [2], 30, sys.argv[1], shard_samples=5)
total = sum(float(b.acts[2].double().sum()) for b in store)
print("done", store.computed, store.reused, repr(total), flush=True)
"""


def start(root):
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_a_killed_pass_goes_on_at_the_first_missing_shard(tmp_path):
    with start(tmp_path / "killed") as process:
        for line in process.stdout:
            if line.strip() == "sample 12":  # in the middle of the third shard
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert len(shards(tmp_path / "killed")) == 2
    with start(tmp_path / "killed") as process:
        lines = process.stdout.read().splitlines()
    with start(tmp_path / "whole") as process:
        whole = process.stdout.read().splitlines()
    assert lines[0] == "sample 10" and lines[-1].startswith("done 4 2 ")
    assert lines[-1].split()[-1] == whole[-1].split()[-1]
    for a, b in zip(shards(tmp_path / "killed"), shards(tmp_path / "whole"), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_what_a_killed_writer_left_is_cleared(tmp_path, make):
    store = tokens(tmp_path, make, [1])
    folder = store.folder / "layer_01"
    folder.mkdir(parents=True)
    left, living = folder / "samples_000000-000005.safetensors.tmp-1", folder / "other.safetensors.tmp-2"
    left.write_bytes(b"half")
    living.write_bytes(b"a living writer's")
    os.utime(left, (0, 0))
    list(store)
    assert [p for p in folder.iterdir() if "tmp" in p.name] == [living]


def test_data_that_changed_under_one_description_is_refused(tmp_path, make, llava, image_batches):
    list(tokens(tmp_path, make, [1]))

    def longer(start, stop, layers):
        return activations.stream(llava, image_batches(start, stop, 2), layers, "all")

    with pytest.raises(InputError, match="different tokens"):
        list(tokens(tmp_path, longer, [1, 2]))


def test_fingerprints_follow_content(tmp_path, llava, gemma):
    assert cache.fingerprint("a") == cache.fingerprint("a") != cache.fingerprint("b")
    gemma.model.save_pretrained(tmp_path / "x")
    before = cache.fingerprint(gemma)
    reloaded = type(gemma.model).from_pretrained(tmp_path / "x")
    assert before == cache.fingerprint(gemma.model) == cache.fingerprint(reloaded)
    assert before != cache.fingerprint(llava)
