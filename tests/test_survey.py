"""The survey of captioned images against plain loops."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mmsae_helpers import labels
from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.errors import InputError
from mmsae_helpers.survey import BIN_EDGES, Survey, for_browser, survey

F, D, S = 6, 6, 9


def _sae(seed=0):
    """An SAE whose features are the positive coordinates; feature 5 is dead."""
    weights = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(seed)), dim=1)
    alive = torch.tensor([1.0, 1, 1, 1, 1, 0])
    return SimpleNamespace(
        encode=lambda x: x.relu() * alive, cfg=SimpleNamespace(d_sae=F, d_in=D), W_dec=weights, device="cpu"
    )


def _batches(empty=4):
    """Three tokens an image but for image ``empty``, which has an empty caption; three images a batch."""
    rng = np.random.default_rng(0)
    for first in range(0, S, 3):
        sample = [i for i in range(first, first + 3) if i != empty for _ in range(3)]
        n = len(sample)
        acts = torch.from_numpy(rng.standard_normal((n, D)).astype(np.float32))
        token = torch.from_numpy(rng.integers(0, 4, n))
        place = torch.tensor([1, 2, 3] * (n // 3))
        false = torch.zeros(n, dtype=torch.bool)
        yield TokenBatch({0: acts}, torch.tensor(sample), place, token, false, torch.full((n,), -1))


EMBEDDINGS = np.random.default_rng(1).standard_normal((S, 4))
ATTRIBUTES = pd.DataFrame({"color": ["red", "blue", "green"] * 3})


def test_equals_plain_loops():
    one = survey({(0, "a"): _sae()}, _batches(), EMBEDDINGS, attributes=ATTRIBUTES, n_words=4, k=2)[0, "a"]
    acts = np.zeros((S, F))
    tokens = np.concatenate([b.acts[0].numpy() for b in _batches()]).clip(0)
    tokens[:, 5] = 0
    sample = np.concatenate([b.sample.numpy() for b in _batches()])
    for row, image in zip(tokens, sample, strict=True):
        acts[image] = np.maximum(acts[image], row)
    table = one.table()
    assert table["n_images"].tolist() == (acts > 0).sum(0).tolist()
    np.testing.assert_allclose(table["frequency"], (acts > 0).mean(0))
    np.testing.assert_allclose(table["max"], acts.max(0), rtol=1e-6)
    unit = EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)
    for f in range(5):
        read = [i for i in range(S) if i != 4]
        pairs = [(i, j) for i in read for j in read if i != j]
        least = acts[read, f].min()
        weight = [(acts[i, f] - least) * (acts[j, f] - least) for i, j in pairs]
        expected = sum(w * (unit[i] @ unit[j]) for w, (i, j) in zip(weight, pairs, strict=True)) / sum(weight)
        assert table["similarity"][f] == pytest.approx(expected, abs=1e-5)
        best = sorted(range(S), key=lambda i: (-acts[i, f], i))[:2]
        assert one.tops.ids[f].tolist() == best
    assert one.n_tokens == len(tokens) == 3 * (S - 1)
    assert one.histogram.sum() == (tokens > 0).sum() and one.histogram.shape == (F, len(BIN_EDGES) - 1)
    assert table["n_images"][5] == 0 and one.tops.ids[5].tolist() == [-1, -1]


def test_an_image_each():
    with pytest.raises(InputError, match="8 embeddings but 9 rows"):
        Survey(_sae(), 0, EMBEDDINGS[:8], ATTRIBUTES, 4)


def test_what_the_browser_gets():
    one = survey({(0, "a"): _sae()}, _batches(), EMBEDDINGS, attributes=ATTRIBUTES, n_words=4)[0, "a"]
    words = dict(enumerate("abcd"))
    named = labels.label(one.words, words, min_count=1)
    found = for_browser({0: one, 3: one}, {0: named, 3: named}, words)
    assert found["table"]["layer"].tolist() == [0] * F + [3] * F
    near, cosines = found["neighbours"]
    assert near.shape == (2 * F, F - 1) and near[:F].max() < F <= near[F:].min()
    assert (near != np.arange(2 * F)[:, None]).all() and (np.diff(cosines) <= 0).all()
    assert found["tokens"][5] == [] and found["tokens"][0][0][1] >= found["tokens"][0][-1][1]
