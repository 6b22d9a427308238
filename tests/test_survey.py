"""The survey of captioned images against plain loops."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from mmsae_helpers import saes
from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.meters.purity import Purity, alike
from mmsae_helpers.meters.survey import BIN_EDGES, Survey, for_browser, judged, shares, slopes, survey

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
    key, about = ("a", 0, 1.0, 0), {"attributes": ATTRIBUTES, "names": NAMES, "k": 2}
    table, kept = survey({"a": {key[1:]: _sae()}}, _batches(), EMBEDDINGS, keep=[key], **about)
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
    assert table["n_tokens"].tolist() == (tokens > 0).sum(0).tolist()
    assert table["n_images"][5] == 0 and np.isnan(table["purity"][5]) and one.tops.ids[5].tolist() == [-1, -1]


def test_an_image_each():
    with pytest.raises(InputError, match="8 embeddings but 9 rows"):
        Survey(_sae(), 0, EMBEDDINGS[:8], ATTRIBUTES, NAMES)


def test_a_few_at_a_time_is_all_at_once_and_the_seed_deals_the_controls():
    saes_ = {"a": {(0, 1.0, seed): _sae() for seed in (0, 1, 2)}}
    whole, _ = survey(saes_, list(_batches()), EMBEDDINGS, attributes=ATTRIBUTES, names=NAMES)
    parts, kept = survey(saes_, list(_batches()), EMBEDDINGS, together=2, attributes=ATTRIBUTES, names=NAMES)
    pd.testing.assert_frame_equal(whole, parts)
    assert not kept
    by = whole.groupby("seed")
    assert (by["purity"].sum().nunique(), by["word_purity"].sum().nunique()) == (1, 1)
    assert by["purity_control"].sum().nunique() == by["word_purity_control"].sum().nunique() == 3


def test_swapped_captions_are_judged_by_image_and_by_caption():
    swap = np.random.default_rng(2).permutation(S)
    about = {"attributes": ATTRIBUTES, "names": NAMES, "swap": swap, "draws": 2}
    keys = [("a", 0, 1.0, seed) for seed in (0, 1)]
    table, kept = survey({"a": {key[1:]: _sae() for key in keys}}, list(_batches()), EMBEDDINGS, keep=keys[:1], **about)
    read, alone = [i for i in range(S) if i != 4], Purity(ATTRIBUTES.iloc[swap], F)
    tops = survey({"a": {keys[0][1:]: _sae()}}, _batches(), EMBEDDINGS, keep=keys[:1], **about | {"k": S})[1][
        keys[0]
    ].tops
    maxima = np.zeros((S, F), np.float32)
    for feature, (ids, values) in enumerate(zip(tops.ids, tops.values, strict=True)):
        maxima[ids[ids >= 0], feature] = values[ids >= 0]
    alone.add(sp.csr_matrix(maxima[read]), read)
    np.testing.assert_allclose(table["said"][:F], alone.score()["purity"])
    assert kept[keys[0]].purity["purity"].bootstrap().shape == (2, F) and len(kept) == 1
    found = judged(table, 1, 0.8, 0.1)
    larger = table["purity"] >= table["said"]
    assert found["source"].any() and (found["image"] == (found["source"] & larger)).all() and not found["image"][5]
    of = shares(found, "image", among="source")
    assert of["seed"].tolist() == [0, 1] and of["value"][0] == larger[:F][found["source"][:F]].mean()


def test_images_are_not_dealt_out_as_captions_were_swapped():
    """A caller swaps with the SAE's own seed: the control must not give each image what its caption says."""
    images = 40
    attributes = pd.DataFrame({"color": np.tile(["red", "blue", "green", "pink"], images // 4)})
    swap = np.random.default_rng(3).permutation(images)
    one = Survey(_sae(), 0, np.ones((images, 1)), attributes, NAMES, swap=swap, seed=3)
    follows = np.zeros((images, F), np.float32)
    follows[attributes["color"].to_numpy()[swap] == "red", 0] = 1  # what the caption says
    for purity in one.purity.values():
        purity.add(sp.csr_matrix(follows), np.arange(images))
    table = one.table()
    assert table["said"][0] == 1 and max(table["purity_control"][0], table["said_control"][0]) < 0.8


def _judged(**changed):
    n = 50
    base = {"layer": 0, "arm": "a", "penalty": 1.0, "n_tokens": 40, "frequency": 0.5, "similarity": 0.5}
    rows = pd.DataFrame(base | {"seed": np.repeat([0, 1], n), "n_images": 40}, index=range(2 * n))
    rows["purity_control"] = rows["word_purity_control"] = np.tile(np.linspace(0, 0.4, n), 2)
    rows["purity"] = np.tile([0.9, 0.6, 0.1, 0.1] + [np.nan] * (n - 4), 2)
    rows["word_purity"] = np.tile([0.1, 0.9, 0.8, 0.1] + [np.nan] * (n - 4), 2)
    rows.loc[rows["purity"].isna(), "n_images"] = 0
    rows.loc[n + 4, "n_images"] = 5
    rows.loc[3, "n_images"] = 8
    return judged(rows.assign(**changed), 8, 0.8, 0.5)


def test_judged_and_shares():
    found = _judged()
    by = found.groupby("seed")
    assert by["counts"].sum().tolist() == [4, 4]
    share = {what: shares(found, what)["value"].tolist() for what in found if found[what].dtype == bool}
    assert share["pure"] == [0.25, 0.25] and share["impure"] == [0.5, 0.5]
    assert share["means_attribute"] == share["means_word"] == [0.5, 0.5]
    assert share["polysemous"] == [0.25, 0.25]
    assert shares(found, found["purity"] >= 0.6)["value"].tolist() == [0.5, 0.5]
    silent = _judged(n_images=0)
    assert not silent["counts"].any() and shares(silent, "pure")["value"].tolist() == [0, 0]
    assert set(shares(found, "pure")) == {"arm", "layer", "penalty", "seed", "value"}


def test_slopes_compare_features_that_fire_on_as_many_images():
    rows = pd.DataFrame({"arm": "a", "layer": 0, "seed": 0, "counts": True, "penalty": [1.0, 2, 4] * 4})
    rows["n_images"] = np.repeat([10, 100], 6)
    rows["purity"] = np.log2(rows["penalty"]) * 0.05 + np.where(rows["n_images"] == 10, 0.5, 0)
    rare = pd.concat([rows, rows[:3].assign(penalty=4.0)], ignore_index=True)  # more rare features at a large penalty
    rare.loc[12:, "purity"] = 0.6
    left_out = [rare[:1].assign(counts=False, purity=9.0), rare[:1].assign(purity=np.nan)]
    rare = pd.concat([rare, *left_out], ignore_index=True)
    assert slopes(rare, "purity", alike(rare["n_images"]))["value"].tolist() == pytest.approx([0.05])
    plain = slopes(rare, "purity")
    assert plain["value"][0] > 0.06 and set(plain) == {"arm", "layer", "seed", "value"}


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
