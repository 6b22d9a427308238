"""Interventions: only the blocks after the changed one run again, and an edit takes out or adds what it says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmsae_helpers import data, interventions, models
from mmsae_helpers.activations import hooked, run

D_IN = 32


def test_loss_recovered():
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    model = GemmaForCausalLM(
        GemmaConfig(vocab_size=40, hidden_size=D_IN, intermediate_size=48, initializer_range=0.3, **sizes)
    ).eval()
    adapter = SimpleNamespace(
        blocks=model.model.layers,
        check_layer=int,
        device=torch.device("cpu"),
        image_token_id=7,
        tokenizer=SimpleNamespace(all_special_ids=[0, 1, 7]),
        image_mask=lambda ids: ids == 7,
        forward=lambda inputs: model(**inputs),
    )
    ids = torch.randint(8, 40, (4, 12))
    ids[:, 0], ids[:, 1:3], ids[3, 8:] = 1, 7, 0
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}

    identity = lambda x: x  # noqa: E731
    found = interventions.loss_recovered(
        adapter, {"same": identity, "zero": torch.zeros_like}, 1, [(torch.arange(4), inputs)]
    )
    assert found["same"].recovered == 1 and found["zero"].recovered == 0
    assert found["same"].n_tokens == 4 * 9 - 4
    labels = ids.masked_fill((ids == 0) | (ids == 7), -100)
    expected = torch.nn.functional.cross_entropy(
        model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert found["same"].original == pytest.approx(expected.item(), rel=1e-5)
    image = interventions.loss_recovered(adapter, {0: torch.zeros_like}, 1, [(torch.arange(4), inputs)], keep="image")
    assert image[0].zero_ablated != found["zero"].zero_ablated
    assert not model.model.layers[1]._forward_hooks


FAMILIES = ["tinyworld/llava", "tinyworld/chameleon", "tinyworld/vit-gpt2", "tinyworld/llava-next"]


def asked(adapter, n=6):
    question = "" if adapter.name.endswith("vit-gpt2") else "what color is it ?"
    images = data.load("tinyworld", "test", 1).dataset.select(range(n))
    text = "a small" if not question else adapter.prompt(question)
    return list(data.batches(adapter, images, 4, texts=[text] * n))


@pytest.mark.parametrize("name", FAMILIES)
def test_going_on_from_a_block_is_the_whole_pass_bit_for_bit(name):
    adapter, changed = models.load(name), []
    layer = adapter.n_layers // 2
    edits = {"same": (layer, lambda x, _: x), "none": (layer, lambda x, _: 0 * x), "first": (0, lambda x, _: x)}
    keep = "image" if adapter.image_token_id is not None else "text"
    for sample, inputs in asked(adapter):
        with torch.no_grad():
            found = dict(interventions._logits(adapter, sample, inputs, edits, keep))
            with hooked(adapter, [layer]):
                run(adapter, inputs)  # nothing is left behind
        assert torch.equal(found["same"], found[None]) and torch.equal(found["first"], found[None])
        changed.append((found["none"] - found[None]).abs().max().item())
    assert min(changed) > 1e-3
    assert not any(block._forward_hooks or "forward" in vars(block) for block in adapter.blocks)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.endswith("vit-gpt2")])
def test_logits_of_some_positions_and_no_pass_for_an_edit_that_changes_nothing(name, monkeypatch):
    adapter, passes = models.load(name), []
    layer, ends = adapter.n_layers // 2, torch.tensor([-2, -1])
    edits = {"none": (layer, lambda x, _: 0 * x), "same": (layer, lambda x, _: x), "again": (0, lambda x, _: x)}
    sample, inputs = asked(adapter)[0]
    with torch.no_grad():
        every = dict(interventions._logits(adapter, sample, inputs, edits, "image"))
        forward = adapter.forward
        monkeypatch.setattr(adapter, "forward", lambda given: passes.append(1) or forward(given))
        few = dict(interventions._logits(adapter, sample, inputs, edits, "image", ends))
    assert len(passes) == 2, "one as it is and one for the edit that changes something"
    for key, logits in every.items():
        assert torch.allclose(few[key], logits[:, ends], atol=1e-5)


def test_first_words_are_the_answers_own():
    adapter = models.load("tinyworld/llava")
    found = interventions.first_words(adapter, asked(adapter), {"none": (0, lambda x, _: 0 * x)})
    answers = [words.split()[0] for _, inputs in asked(adapter) for words in adapter.answer(inputs, 3)]
    assert found[None].tolist() == answers and len(found["none"]) == len(answers)
    assert (found["none"] != found[None]).any()


@pytest.mark.parametrize("scaling", ["none", "layer_norm"])
def test_edits_do_what_they_say(scaling):
    from sae_lens import SAE

    torch.manual_seed(0)
    config = {"architecture": "standard", "d_in": D_IN, "d_sae": 64, "normalize_activations": scaling}
    sae = SAE.from_dict(config).eval().requires_grad_(False)
    sae.b_enc.data += 0.05
    x, sample = torch.randn(50, D_IN), torch.arange(50) // 10
    some = [3, 7, 60]
    active = sae.encode(2 * x)
    left = interventions.without(sae, some, scale=2.0)(x, sample)
    if scaling == "none":
        assert torch.allclose(x - left, active[:, some] @ sae.W_dec[some] / 2, atol=1e-5)
    assert torch.allclose(left[(active[:, some] == 0).all(1)], x[(active[:, some] == 0).all(1)], atol=1e-6)
    assert torch.equal(interventions.without(sae, [])(x, sample), x)
    gone = interventions.projected_out(torch.stack([x[0], x[1], x[0] + x[1]]))(x, sample)
    assert torch.allclose(gone @ x[:2].T, torch.zeros(50, 2), atol=1e-4)
    assert np.linalg.matrix_rank(gone.double().numpy(), tol=1e-3) == D_IN - 2
    vectors = torch.randn(5, D_IN)
    assert torch.equal(interventions.added(vectors)(x, sample), x + vectors.repeat_interleave(10, 0))


def test_a_control_is_as_large_and_another_feature():
    size = [0.0, 1.0, 1.1, 5.0, 5.2, 9.0, 1.05]
    assert interventions.as_large(size, [1, 3], [1, 2, 3]) == [6, 4]
    assert interventions.as_large(size, [1, 2], range(6)) == [6], "none is left for the other"


def test_what_a_feature_adds_where_it_fires():
    from sae_lens import SAE

    torch.manual_seed(0)
    sae = SAE.from_dict({"architecture": "standard", "d_in": 8, "d_sae": 16}).eval().requires_grad_(False)
    sae.b_enc.data[3] = -1e6
    acts = torch.randn(200, 8)
    vectors, size = interventions.typical(sae, acts, scale=2.0)
    active = sae.encode(2 * acts)
    assert vectors[3].abs().sum() == 0 and size[3] == 0
    fires = active[:, 5] > 0
    assert torch.allclose(vectors[5], active[fires, 5].mean() * sae.W_dec[5] / 2, atol=1e-5)
    assert torch.allclose(size, (active[:, :, None] * sae.W_dec).norm(dim=2).mean(0) / 2, atol=1e-5)
