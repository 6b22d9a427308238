"""Passes on Ray's workers give what one process gives, and a worker may die."""

import os
import re
import shutil
import signal
import sys
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from test_feed import LAYERS, all_meters, an_sae, plain
from test_feed import tokens as made_up

from mmsae_helpers import cache, data, models, scale
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import samples
from mmsae_helpers.meters.feed import feed


@pytest.fixture(scope="module")
def ray():
    """Two workers of one local cluster; Ray gives each one core, so that the single process must have one too."""
    ray, n = pytest.importorskip("ray"), torch.get_num_threads()
    pytest.importorskip("ray.data")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("MMSAE_WORKERS", "2")
        yield patch
    ray.shutdown()
    torch.set_num_threads(n)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def flat(tokens):
    batches = list(tokens)
    beside = [torch.cat([b[i] for b in batches]) for i in range(1, 6)]
    return beside + [torch.cat([b.acts[layer] for b in batches]) for layer in batches[0].acts]


def test_two_workers_equal_the_single_process_bit_for_bit_though_one_dies_in_mid_shard(ray, tmp_path):
    images = data.load("tinyworld", "test", 2)
    adapter = models.load("tinyworld/llava", "cpu")
    make = partial(cache.of_images, adapter=adapter, images=images, layers=[1, 4], batch_size=25, keep="content")

    def dying(start, stop, layers):
        """Half of a shard, then the end of its worker, the first time."""
        for batch in stores[1].made(start, stop, layers):
            yield batch
            if start == 100 and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)

    marker = tmp_path / "died"
    stores = [make(tmp_path / name) for name in ("one", "two")]
    for store in stores:
        store.shard_samples = 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSAE_WORKERS", "0")
        single = flat(stores[0])
    complete = [path for path in files(tmp_path / "one") if re.search("000(050|150)-", path.name)]
    for path in complete:  # shards that are there already
        (tmp_path / "two" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tmp_path / "one" / path, tmp_path / "two" / path)
    stores[1].made, stores[1].make = stores[1].make, dying
    spread = flat(stores[1])
    assert marker.is_file() and int(marker.read_text()) != os.getpid()
    assert all(torch.equal(a, b) for a, b in zip(single, spread, strict=True))
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) == 9
    times = [[(tmp_path / name / path).stat().st_mtime_ns for path in complete] for name in ("one", "two")]
    assert times[0] == times[1] and [(s.computed, s.reused) for s in stores] == [(8, 0), (4, 4)]
    passed = list(islice(make(None), 3))  # what is not kept comes batch by batch, and may be left before its end
    assert [len(batch.sample.unique()) for batch in passed] == [25] * 3
    assert all(torch.equal(a[: len(b)], b) for a, b in zip(single, flat(passed), strict=True))
    assert passed[0].acts[1].add_(1).is_contiguous()


def test_meters_on_two_workers_become_what_they_become_here(ray, tmp_path):
    batches = list(made_up())

    def make(start, stop, layers):
        found = batches[start // 5]
        yield found._replace(acts={layer: found.acts[layer] for layer in layers})

    saes = {(layer, seed): an_sae(10 * layer + seed) for layer in LAYERS for seed in (0, 1)}
    here, there = all_meters(saes), all_meters(saes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSAE_WORKERS", "0")
        want = feed(here, cache.Tokens(make, {}, LAYERS, 15, tmp_path / "one", 5))
    got = feed(there, tokens := cache.Tokens(make, {}, LAYERS, 15, tmp_path / "two", 5))
    assert tokens.computed == 6 and files(tmp_path / "one") == files(tmp_path / "two")
    for key in want:
        for ours, theirs in zip(plain(want[key]), plain(got[key]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert all(there[key].sae is saes[key[1:3]] for key in there)
    shard = next(tokens.folder.glob("layer_00/*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="a shard of .* was damaged or taken away during the run; run again"):
        feed(all_meters(saes), tokens)


def test_scores_by_two_workers_equal_those_of_one_process(ray):
    adapter = models.load("tinyworld/llava-next", "cpu")
    rows = data.preferences("tinyworld", 7, 0).dataset
    saes = {seed: an_sae(seed, adapter.d_model) for seed in (0, 1)}
    starts = samples.starts(adapter, rows["question"], rows["image"])
    weights = np.random.default_rng(0).random(saes[0].cfg.d_sae)
    meters = {seed: samples.SampleScores(sae, 1, weights, starts, 0.01) for seed, sae in saes.items()}
    found = []
    for n in ("0", "2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MMSAE_WORKERS", n)
            found.append(samples.scored(adapter, rows, meters, starts, 2, 2))
    (here, beside), (there, too) = found
    assert beside.equals(too) and len(beside) == len(rows) and beside.notna().all(axis=None)
    assert all(here[seed].equals(there[seed]) for seed in saes) and not meters[0].frames


def test_what_a_worker_cannot_do_is_said(ray):
    def make(start, stop):
        raise InputError(f"layer {start} does not exist")

    with pytest.raises(InputError, match="^layer 9 does not exist$"):
        next(scale.spread(make, [(9, 10)], 2))
    with pytest.raises(InputError, match="^MMSAE_WORKERS is 3, but local has 2 CPUs, of which each worker takes one$"):
        next(scale.spread(make, [(0, 1)], 3))
    with pytest.raises(InputError, match="this pass cannot be sent to workers: set MMSAE_WORKERS=0, .*generator"):
        next(scale.spread((i for i in ()), [(0, 1)], 2))


def test_bad_settings(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("MMSAE_WORKERS", "eight")
    with pytest.raises(InputError, match="MMSAE_WORKERS is 'eight': give a number"):
        scale.workers()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(InputError, match="no Ray cluster at 127.0.0.1:9: .*refused; see to RAY_ADDRESS"):
        next(scale.spread(print, [], 1))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"MMSAE_WORKERS needs Ray: pip install -e '.\[scale\]'"):
        next(scale.spread(print, [], 1))
