"""Patch scores equal their plain definition and need one forward a sample; the baselines; keeping and painting."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmsae_helpers.activations import stream
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import patches
from mmsae_helpers.meters.crossmodal import CrossModal, sample_scores
from mmsae_helpers.meters.features import encode, to_csr
from mmsae_helpers.meters.feed import feed

P = 4


def scores_by_definition(z, sample, patch, is_image, weights):
    """METHODS C.4, token by token; {method: {(sample, patch): score}}."""
    found = {}
    for s in sorted(set(sample.tolist())):
        on_text = {k for t in np.flatnonzero((sample == s) & ~is_image) for k in np.flatnonzero(z[t] > 0)}
        for p in range(P):
            tokens = []
            for t in np.flatnonzero((sample == s) & (patch == p)):
                active = np.flatnonzero(z[t] > 0).tolist()
                known = [weights[k] for k in active if not np.isnan(weights[k])]
                tokens.append((len(active), z[t].sum(), sum(k in on_text for k in active), sum(known)))
            found[s, p] = np.mean(tokens, axis=0) if tokens else np.zeros(4)
    return np.array(list(found.values())).reshape(-1, P, 4)


@settings(max_examples=80)
@given(n=st.integers(0, 60), seed=st.integers(0, 2**32), of_images=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_scores_equal_the_definition(n, seed, of_images):
    rng = np.random.default_rng(seed)
    z = (rng.choice([0.5, 1.0, 2.0], (n, 12)) * (rng.random((n, 12)) < 0.4)).astype(np.float32)
    sample, is_image = np.sort(rng.integers(2, 6, n)), rng.random(n) < of_images
    patch = np.where(is_image, rng.integers(-1, P, n), -1)  # -1 of an image token: a newline
    weights = np.where(rng.random(12) < 0.3, np.nan, rng.standard_normal(12))
    found = patches.scores(to_csr(z), sample, patch, is_image, weights, P)
    assert list(found) == ["l0", "l1", "cooccurrence", "cosine"]
    expected = scores_by_definition(z, sample, patch, is_image, weights)
    np.testing.assert_allclose(np.stack(list(found.values()), axis=2), expected, atol=1e-9)


def test_base_and_tile_count_alike_and_newlines_do_not():
    z = to_csr(np.float32([[1, 0], [1, 1], [9, 9], [0, 1]]))
    found = patches.scores(z, [0] * 4, [2, 2, -1, -1], [True, True, True, False], np.ones(2), P)
    assert found["l0"].tolist() == [[0, 0, 1.5, 0]]  # one and two active features on the base and the tile token
    assert found["cooccurrence"].tolist() == [[0, 0, 0.5, 0]]  # only feature 1 is on the text


def test_wrong_widths_and_grids_are_refused():
    with pytest.raises(InputError, match="width 3 but 2 weights"):
        patches.scores(to_csr(np.ones((1, 3))), [0], [0], [True], np.ones(2), P)
    with pytest.raises(InputError, match="patch 9 but there are 4"):
        patches.average([1.0], [0], [9], 1, P)


def test_one_forward_serves_all_scores_weights_and_hook_points(llava, image_batches, monkeypatch):
    forwards, forward = [], llava.forward
    monkeypatch.setattr(llava, "forward", lambda inputs: forwards.append(len(inputs["input_ids"])) or forward(inputs))
    sae = SimpleNamespace(encode=lambda x: torch.relu(torch.cat([x, -x], dim=1)))
    weights = {layer: CrossModal(64, 32, delta=0.0) for layer in (0, 1, 3)}
    of_patches, of_samples, norms = {}, {}, {}
    for batch in stream(llava, image_batches(0, 10, 4), weights, keep="all"):
        rows = np.unique(batch.sample, return_inverse=True)[1]
        for layer, acts in batch.acts.items():
            found = encode(sae, acts)
            weights[layer].add(found, batch.is_image, acts)
            omega, tokens = weights[layer].weights(), (batch.sample, batch.patch, batch.is_image)
            of_patches.setdefault(layer, []).append(patches.scores(found, *tokens, omega, P))
            of_samples.setdefault(layer, []).append(sample_scores(found, batch.sample, batch.is_image, omega))
            norms.setdefault(layer, []).append(patches.average(acts.norm(dim=1), rows, batch.patch, rows.max() + 1, P))
    assert sum(forwards) == 10 and len(forwards) == 3
    for layer in weights:
        assert sum(len(part["cosine"]) for part in of_patches[layer]) == sum(map(len, of_samples[layer])) == 10
        assert all((part["cooccurrence"] > 0).any() for part in of_patches[layer])
        assert (np.concatenate(norms[layer]) > 0).all()


def test_the_meter_equals_the_scores_of_the_whole_pass_in_any_reading(llava, image_batches):
    batches = list(stream(llava, image_batches(0, 10, 4), [1], keep="all"))
    sae = SimpleNamespace(encode=lambda x: torch.relu(torch.cat([x, -x], dim=1)))
    whole = {
        of: torch.cat([getattr(batch, of) for batch in batches]) for of in ("sample", "position", "patch", "is_image")
    }
    acts, weights = torch.cat([batch.acts[1] for batch in batches]), np.random.default_rng(0).standard_normal(64)
    layout = torch.full((10, int(whole["position"].max()) + 1), -1)
    layout[whole["sample"], whole["position"]] = whole["patch"]
    shifted = torch.where(layout >= 0, (layout + 1) % P, -1)
    meters = {way: patches.PatchScores(sae, 1, weights, of, P) for way, of in (("as is", layout), ("off", shifted))}
    found = feed(meters, batches)
    rest = whole["sample"], whole["patch"], whole["is_image"]
    expected = patches.scores(encode(sae, acts), *rest, weights, P)
    expected["norm"] = patches.average(acts.norm(dim=1), whole["sample"], whole["patch"], 10, P)
    assert list(found["as is"]) == list(expected)
    for method, of in expected.items():
        np.testing.assert_allclose(found["as is"][method], of)
        np.testing.assert_allclose(found["off"][method], np.roll(of, 1, axis=1))


# ---------------------------------------------------------------- baselines


def test_gradient_times_input_predicts_a_small_change(llava, image_batches, monkeypatch):
    """Scaling one position's embedding by 1 + e changes the log probability by e times the score."""
    _, inputs = next(image_batches(0, 3, 3))
    target, forwards, forward = torch.tensor([5, 9, 11]), [], llava.forward
    with monkeypatch.context() as patched:
        patched.setattr(llava, "forward", lambda x: forwards.append(1) or forward(x))
        found = patches.gradient_times_input(llava, inputs, target)
    assert len(forwards) == 1 and found.shape == inputs["input_ids"].shape
    assert not llava.blocks[0]._forward_pre_hooks and not any(p.requires_grad for p in llava.model.parameters())

    def log_probability(position, factor):
        def scale(_block, args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[:, position] *= factor
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        handle = llava.blocks[0].register_forward_pre_hook(scale, with_kwargs=True)
        with torch.no_grad():
            logits = llava.forward(inputs).logits
        handle.remove()
        last = inputs["attention_mask"].sum(1) - 1
        return logits[torch.arange(3), last].log_softmax(1)[torch.arange(3), target]

    for position in (1, 3, 5):
        slope = (log_probability(position, 1.02) - log_probability(position, 0.98)) / 0.04
        torch.testing.assert_close(found[:, position], slope, atol=2e-4, rtol=0.02)
    padding = inputs["attention_mask"] == 0
    assert (found[padding] == 0).all() and (found[~padding] != 0).any()


def test_encoder_attention_is_the_class_tokens(llava, gemma, image_batches):
    _, inputs = next(image_batches(0, 3, 3))
    before = llava.model.model.vision_tower.config._attn_implementation
    found = patches.encoder_attention(llava, inputs)
    assert found.shape == (3, P) and (found > 0).all() and (found.sum(axis=1) < 1).all()  # the rest is its own
    assert llava.model.model.vision_tower.config._attn_implementation == before
    tiled = inputs | {"pixel_values": torch.stack([inputs["pixel_values"], torch.zeros(3, 3, 16, 16)], dim=1)}
    np.testing.assert_array_equal(patches.encoder_attention(llava, tiled), found)  # of the base image
    assert patches.encoder_attention(gemma, inputs) is None


# ---------------------------------------------------------------- keeping patches


def test_keep_top_takes_the_lowest_patch_of_a_tie():
    scores = np.array([[1, 3, 3, 2], [0, 0, 0, 0]])
    assert patches.keep_top(scores, 0.5).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert patches.keep_top(scores, 0.25).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert patches.keep_top(scores, 1).all() and not patches.keep_top(scores, 0).any()
    assert patches.keep_top(scores, [0.25, 0.75]).sum(axis=1).tolist() == [1, 3]


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (336, 100), (1, 1)])
def test_paint_blackens_exactly_the_dropped_patches(size):
    width, height = size
    image = Image.new("L", size, 200)
    keep = np.array([[True, False, False, True]])
    (painted,) = patches.paint([image], keep, (2, 2))
    pixels = np.asarray(painted)
    assert painted.size == size and painted.mode == "RGB"
    rows, columns = np.arange(height) >= height // 2, np.arange(width) >= width // 2
    assert np.array_equal(pixels, np.where(rows[:, None, None] == columns[None, :, None], 200, 0) * np.ones(3))


def test_patches_are_hidden_on_the_device_of_the_inputs():
    there = torch.zeros(2, 5, dtype=torch.int64, device="meta")  # refuses tensors of the CPU as CUDA does
    hidden = patches.hide({"attention_mask": there}, there, np.ones((2, 4), bool))
    assert hidden["attention_mask"].device.type == "meta"


def test_hidden_patches_change_nothing_any_more(llava, image_batches):
    _, inputs = next(image_batches(0, 3, 3))
    patch, keep = llava.patch_index(inputs["input_ids"]), np.array([[True, False, True, True]] * 3)
    hidden = patches.hide(inputs, patch, keep)
    assert (inputs["attention_mask"] - hidden["attention_mask"]).sum(1).tolist() == [1, 1, 1]
    last = inputs["attention_mask"].sum(1) - 1

    def answer(inputs, seed):
        def disturb(_block, args, kwargs):
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[patch == 1] = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        handle = llava.blocks[0].register_forward_pre_hook(disturb, with_kwargs=True)
        with torch.no_grad():
            logits = llava.forward(inputs).logits[torch.arange(3), last]
        handle.remove()
        return logits

    torch.testing.assert_close(answer(hidden, 0), answer(hidden, 1))
    assert not torch.allclose(answer(inputs, 0), answer(inputs, 1))


def test_iou_is_by_area():
    keep = np.array([[True, True, False, False], [False] * 4, [True, False, False, False]])
    cover = np.array([[1.0, 0.5, 0.5, 0.0], [0.0] * 4, [1.0, 0, 0, 0]])
    np.testing.assert_allclose(patches.iou(keep, cover), [1.5 / 2.5, np.nan, 1])
