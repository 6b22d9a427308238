"""The survey of captioned images against plain loops."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mmsae_helpers import saes
from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.meters.survey import (
    BIN_EDGES,
    Survey,
    for_browser,
    intervals,
    judged,
    known,
    over_seeds,
    per_seed,
    survey,
)

F, D, S = 6, 6, 9


def _sae(seed=0):
    """An SAE whose features are the positive coordinates; feature 5 is dead."""
    weights = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(seed)), dim=1)
    alive = torch.tensor([1.0, 1, 1, 1, 1, 0])
    return SimpleNamespace(
        encode=lambda x: x.relu() * alive,
        cfg=SimpleNamespace(d_sae=F, d_in=D),
        W_dec=weights,
        device="cpu",
        to=lambda device: None,
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
NAMES = dict(enumerate("abcd"))
ATTRIBUTES = pd.DataFrame({"color": ["red", "blue", "green"] * 3})


def test_equals_plain_loops():
    key = (0, "a", 0)
    table, kept = survey({key: _sae()}, _batches(), EMBEDDINGS, keep=[key], attributes=ATTRIBUTES, names=NAMES, k=2)
    one = kept[key]
    acts = np.zeros((S, F))
    tokens = np.concatenate([b.acts[0].numpy() for b in _batches()]).clip(0)
    tokens[:, 5] = 0
    sample = np.concatenate([b.sample.numpy() for b in _batches()])
    for row, image in zip(tokens, sample, strict=True):
        acts[image] = np.maximum(acts[image], row)
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
    np.testing.assert_allclose(table["mean"], tokens.mean(0), rtol=1e-5)
    assert table["n_tokens"].tolist() == (tokens > 0).sum(0).tolist()
    assert table["n_images"][5] == 0 and np.isnan(table["purity"][5]) and one.tops.ids[5].tolist() == [-1, -1]


def test_an_image_each():
    with pytest.raises(InputError, match="8 embeddings but 9 rows"):
        Survey(_sae(), 0, EMBEDDINGS[:8], ATTRIBUTES, NAMES)


def test_a_few_at_a_time_is_all_at_once_and_the_seed_deals_the_controls():
    saes_ = {(0, "a", seed): _sae() for seed in (0, 1, 2)}
    whole, _ = survey(saes_, list(_batches()), EMBEDDINGS, attributes=ATTRIBUTES, names=NAMES)
    parts, kept = survey(saes_, list(_batches()), EMBEDDINGS, together=2, attributes=ATTRIBUTES, names=NAMES)
    pd.testing.assert_frame_equal(whole, parts)
    assert not kept
    by = whole.groupby("seed")
    assert (by["purity"].sum().nunique(), by["word_purity"].sum().nunique()) == (1, 1)
    assert by["purity_control"].sum().nunique() == by["word_purity_control"].sum().nunique() == 3


def test_judged_and_per_seed():
    n = 50
    base = {"layer": 0, "arm": "a", "n_tokens": 40, "frequency": 0.5, "similarity": 0.5, "similarity_control": 0.4}
    rows = pd.DataFrame(base | {"seed": np.repeat([0, 1], n), "n_images": 40}, index=range(2 * n))
    rows["purity_control"] = rows["word_purity_control"] = np.tile(np.linspace(0, 0.4, n), 2)
    rows["purity"] = np.tile([0.9, 0.6, 0.1, 0.1] + [np.nan] * (n - 4), 2)
    rows["word_purity"] = np.tile([0.1, 0.9, 0.8, 0.1] + [np.nan] * (n - 4), 2)
    rows.loc[rows["purity"].isna(), "n_images"] = 0
    rows.loc[n + 4, "n_images"] = 5
    rows.loc[3, "n_images"] = 8
    found = per_seed(judged(rows, 8, 0.8, 0.5))
    assert (
        found["features"].tolist() == [4, 4] and found["rare"].tolist() == [1, 1] and found["dead"].tolist() == [46, 45]
    )
    assert found["pure"].tolist() == [0.25, 0.25] and found["impure"].tolist() == [0.5, 0.5]
    assert found["means_attribute"].tolist() == found["means_word"].tolist() == [0.5, 0.5]
    assert found["polysemous"].tolist() == [0.25, 0.25]
    silent = per_seed(judged(rows.assign(n_images=0), 8, 0.8, 0.5))
    assert silent["features"].tolist() == [0, 0] and silent["pure"].isna().all()
    none = intervals(silent)[0, "a"]
    assert set(known(none)) == {"features", "rare", "dead"}
    assert str(none["pure"]) == "nan" and none["features"].value == 0 and over_seeds([]).n == 0


def test_matched_random_directions_fire_as_often_feature_by_feature():
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=40))
    draw = torch.Generator().manual_seed(0)
    sae.W_enc.data = torch.randn(8, 40, generator=draw)
    sae.b_enc.data = torch.linspace(-20, 2, 40)
    acts = torch.randn(500, 8, generator=draw)
    control = saes.random_sae(sae, acts, seed=1, matched=True)
    fires = [(one.encode(acts) > 0).sum(0) for one in (sae, control)]
    assert (fires[0] == 0).any() and (fires[0] - fires[1]).abs().max() <= 1
    assert (control.encode(100 * acts)[:, fires[0] == 0] == 0).all(), "dead ones stay dead"


def test_what_the_browser_gets():
    one = Survey(_sae(), 0, EMBEDDINGS, ATTRIBUTES, NAMES, min_images=4)
    feed({0: one}, _batches())
    found = for_browser({0: one, 3: one}, min_purity=0.3)
    table, known = found["table"][:F], one.table()
    before = (known["kind"] == "predicts") & (known["word_purity"] >= 0.3)
    assert before.any() and (table.loc[before, "label"] == 'before "' + known.loc[before, "label"] + '"').all()
    assert (table["label"] != "").equals(known["word_purity"] >= 0.3)
    assert table["purity"].notna().equals(known["n_images"] >= 4) and (table["n_images"] < 4).any()
    assert found["table"]["layer"].tolist() == [0] * F + [3] * F
    near, cosines = found["neighbours"]
    assert near.shape == (2 * F, F - 1) and near[:F].max() < F <= near[F:].min()
    assert (near != np.arange(2 * F)[:, None]).all() and (np.diff(cosines) <= 0).all()
    assert found["tokens"][5] == [] and found["tokens"][0][0][1] >= found["tokens"][0][-1][1]
