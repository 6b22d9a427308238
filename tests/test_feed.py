"""Many meters in one pass equal each in a pass of its own, bit for bit, and an SAE is encoded once a batch for all."""

from collections import Counter

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.crossmodal import Weights
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.meters.health import HealthMeter
from mmsae_helpers.meters.pooling import Pooling
from mmsae_helpers.meters.words import ImageScan, Words

D_IN, D_SAE, LAYERS, PATCHES = 16, 48, (0, 3), 4


def an_sae(seed, d_in=D_IN):
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=D_SAE))
    draw = torch.Generator().manual_seed(seed)
    for name in ("W_enc", "W_dec", "b_enc"):
        weight = getattr(sae, name)
        weight.data = torch.randn(weight.shape, generator=draw)
    return sae.requires_grad_(False)


def tokens(batches=3, samples=5):
    draw = torch.Generator().manual_seed(9)
    for i in range(batches):
        sample = torch.arange(i * samples, (i + 1) * samples).repeat_interleave(6)
        place = torch.arange(6).repeat(samples)
        image = place < PATCHES
        acts = {layer: torch.randn(len(sample), D_IN, generator=draw) for layer in LAYERS}
        word = torch.randint(0, 7, (len(sample),), generator=draw)
        yield TokenBatch(acts, sample, place, word, image, torch.where(image, place, -1))


def all_meters(saes):
    labels, cover = np.arange(15) % 3, np.random.default_rng(0).random((15, PATCHES))
    meters = {}
    for (layer, seed), sae in saes.items():
        for scale in (1.0, 0.5):
            key = (layer, seed, scale)
            meters["health", *key] = HealthMeter(sae, layer, scale)
            meters["pooled", *key] = Pooling(sae, layer, (None, 3), scale)
            meters["words", *key] = Words(sae, layer, 7, scale)
            meters["scan", *key] = ImageScan(sae, layer, [4, 1], labels, 3, cover, scale)
            meters["weights", *key] = Weights(sae, layer, scale, k=2, delta=0.1)
    return meters


def plain(result):
    """Everything a result holds, as arrays."""
    if hasattr(result, "toarray"):
        return [result.toarray()]
    if isinstance(result, dict):
        return [x for key in result for x in plain(result[key])]
    if isinstance(result, tuple | list):
        return [x for part in result for x in plain(part)]
    if hasattr(result, "maxima"):
        return [result.maxima, result.share(), result.retrieved]
    if hasattr(result, "sums"):
        return plain(result.sums) + plain(result.counts)
    return [np.asarray(result)]


@pytest.fixture(scope="module")
def saes():
    return {(layer, seed): an_sae(10 * layer + seed) for layer in LAYERS for seed in (0, 1)}


@pytest.mark.parametrize("how", [{}, {"device": "cpu", "together": 1}, {"together": 3}])
def test_one_pass_equals_separate_passes_bit_for_bit(saes, how):
    batches = list(tokens())
    whole = feed(all_meters(saes), batches, **how)
    for key, meter in all_meters(saes).items():
        alone = feed({key: meter}, batches)[key]
        for ours, theirs in zip(plain(whole[key]), plain(alone), strict=True):
            assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"), key


def test_each_sae_is_encoded_once_a_batch_for_all_its_meters(saes, monkeypatch):
    calls, encode = Counter(), StandardSAE.encode

    def counted(self, x):
        calls[id(self)] += 1
        return encode(self, x)

    monkeypatch.setattr(StandardSAE, "encode", counted)
    feed(all_meters(saes), tokens(batches=2))
    assert set(calls.values()) == {2 * 2}, "two scales, two batches"


def test_bad_activations_and_empty_passes_are_one_line(saes):
    broken = next(tokens())
    broken.acts[0][3, 2] = float("nan")
    meter = {0: HealthMeter(saes[0, 0], 0)}
    with pytest.raises(InputError, match="tokens 0 to 29 hold NaN or infinity"):
        feed(meter, [broken])
    with pytest.raises(InputError, match="no tokens to evaluate the SAE of layer 0 on"):
        feed({0: HealthMeter(saes[0, 0], 0)}, [])
