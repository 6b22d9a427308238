"""The stream reads what the blocks put out, of the right tokens, and leaves the model as it found it."""

import pytest
import torch

from mmsae_helpers import activations
from mmsae_helpers.errors import InputError

LAYERS = [0, 1, 2, 3]


def hidden_states(adapter, inputs):
    with torch.no_grad():
        return adapter.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states


def read(adapter, inputs, layers, reading="corrected"):
    with activations.hooked(adapter, layers, reading) as found:
        activations.run(adapter, inputs)
    return found


def n_hooks(adapter):
    return sum(len(b._forward_hooks) + len(b._forward_pre_hooks) for b in adapter.blocks)


def test_hooks_equal_hidden_states_before_the_final_norm(llava, image_batches):
    inputs = next(image_batches()).inputs
    states = hidden_states(llava, inputs)
    found = read(llava, inputs, LAYERS)
    for layer in LAYERS[:-1]:
        assert torch.equal(found[layer], states[layer + 1])
    last = found[3]
    assert not torch.allclose(last, states[-1])
    assert torch.equal(llava.model.model.language_model.norm(last), states[-1])


def test_as_published_reads_the_block_input(llava, image_batches):
    inputs = next(image_batches()).inputs
    states = hidden_states(llava, inputs)
    for layer, residual in read(llava, inputs, LAYERS, "as_published").items():
        assert torch.equal(residual, states[layer])


def test_one_pass_stops_after_the_last_hooked_block(llava, image_batches, monkeypatch):
    calls = [0] * 4
    passes = []
    for i, block in enumerate(llava.blocks):
        original = block.forward

        def counted(*args, i=i, original=original, **kwargs):
            calls[i] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(block, "forward", counted)
    forward = llava.forward
    monkeypatch.setattr(llava, "forward", lambda inputs: passes.append(1) or forward(inputs))
    list(activations.stream(llava, image_batches(0, 4), [2, 0]))
    assert calls == [1, 1, 1, 0] and len(passes) == 1
    list(activations.stream(llava, image_batches(0, 4), [2], reading="as_published"))
    assert calls == [2, 2, 1, 0]


def test_no_hook_and_no_state_left_behind(llava, image_batches):
    inputs = next(image_batches()).inputs
    before = hidden_states(llava, inputs)  # transformers hooks the blocks itself for this, for good
    hooks = n_hooks(llava)
    read(llava, inputs, [1])
    with pytest.raises(TypeError):
        read(llava, {**inputs, "not_an_argument": object(), "input_ids": "no"}, [1])
    with pytest.raises(ZeroDivisionError), activations.hooked(llava, [0, 1]):
        raise ZeroDivisionError
    stream = activations.stream(llava, image_batches(), [0])
    next(stream)
    stream.close()
    assert n_hooks(llava) == hooks
    assert all(torch.equal(a, b) for a, b in zip(before, hidden_states(llava, inputs), strict=True))


def test_a_second_forward_does_not_overwrite(llava, image_batches):
    inputs = next(image_batches()).inputs
    with activations.hooked(llava, [1]), pytest.raises(RuntimeError, match="ran twice"):
        activations.run(llava, inputs)
        activations.run(llava, inputs)


def test_image_tokens_come_with_sample_position_and_patch(llava, image_batches):
    for batch, out in zip(image_batches(), activations.stream(llava, image_batches(), [1, 3]), strict=True):
        states = read(llava, batch.inputs, [1, 3])
        assert list(out.acts) == [1, 3] and out.acts[1].shape == (4 * len(batch.sample), 32)
        assert out.patch.tolist() == [0, 1, 2, 3] * len(batch.sample)
        assert out.sample.tolist() == batch.sample.repeat_interleave(4).tolist()
        assert out.is_image.all() and (out.token == llava.image_token_id).all()
        rows = out.sample - batch.sample[0]
        assert torch.equal(out.acts[3], states[3][rows, out.position])


def test_padding_is_never_kept(llava, gemma, image_batches, text_batches):
    for adapter, batches in ((llava, image_batches), (gemma, text_batches)):
        for keep in ("all", "text", "image", "after_image"):
            for batch, out in zip(batches(), activations.stream(adapter, batches(), [0], keep), strict=True):
                length = batch.inputs["attention_mask"].sum(1)
                assert (out.position < length[out.sample - batch.sample[0]]).all()
                if keep == "all":
                    assert len(out.sample) == length.sum()


def test_text_leaves_out_special_and_image_tokens(llava, gemma, image_batches, text_batches):
    out = next(activations.stream(llava, image_batches(), [0], "text"))
    special = torch.tensor(llava.tokenizer.all_special_ids)
    assert not torch.isin(out.token, special).any() and not out.is_image.any() and (out.patch == -1).all()
    with_special = next(activations.stream(gemma, text_batches(), [0], "text", keep_special=True))
    assert (with_special.token == 2).sum() == 4


def test_content_is_text_and_image_tokens_and_divides_into_them(llava, image_batches):
    content, text, image = (
        next(activations.stream(llava, image_batches(), [0], k)) for k in ("content", "text", "image")
    )
    for part, mask in ((image, content.is_image), (text, ~content.is_image)):
        some = content.rows(mask)
        assert torch.equal(some.acts[0], part.acts[0])
        assert all(torch.equal(x, y) for x, y in zip(some[1:], part[1:], strict=True))


def test_after_image_is_the_first_token_after_the_last_patch(llava, image_batches):
    image = next(activations.stream(llava, image_batches(), [0]))
    after = next(activations.stream(llava, image_batches(), [0], "after_image"))
    assert torch.equal(after.position, image.position[3::4] + 1) and not after.is_image.any()


def test_all_after_image_are_the_text_tokens_behind_it(llava, image_batches):
    text = next(activations.stream(llava, image_batches(), [0], "text", keep_special=True))
    image = next(activations.stream(llava, image_batches(), [0]))
    behind = next(activations.stream(llava, image_batches(), [0], "all_after_image"))
    later = text.position > image.position[3::4][text.sample - text.sample[0]]
    assert later.any() and torch.equal(behind.position, text.position[later])
    assert torch.equal(behind.token, text.token[later])


def test_as_published_takes_fixed_positions_for_the_image(llava, image_batches):
    out = next(activations.stream(llava, image_batches(), [2], reading="as_published"))
    assert out.position.tolist() == [4, 5, 6, 7] * 4 and out.patch.tolist() == [0, 1, 2, 3] * 4
    assert out.is_image.all() and not (out.token == llava.image_token_id).all()
    after = next(activations.stream(llava, image_batches(), [2], "after_image", "as_published"))
    assert set(after.position.tolist()) == {8}


def test_bad_requests_are_named(llava, image_batches):
    with pytest.raises(InputError, match="layer 9 does not exist"):
        next(activations.stream(llava, image_batches(), [0, 9]))
    with pytest.raises(InputError, match="at least one layer"):
        next(activations.stream(llava, image_batches(), []))
    with pytest.raises(InputError, match="keep is 'images'"):
        next(activations.stream(llava, image_batches(), [0], "images"))
    with pytest.raises(InputError, match="reading is 'paper'"):
        next(activations.stream(llava, image_batches(), [0], reading="paper"))


def test_means_are_per_sample_and_over_all_tokens(llava, image_batches):
    one = list(activations.stream(llava, image_batches(0, 7, 7), [1, 3]))
    several = list(activations.stream(llava, image_batches(0, 7, 3), [1, 3]))
    means = activations.means(several)
    for layer in (1, 3):
        acts = one[0].acts[layer]
        expected = torch.stack([acts[one[0].sample == s].mean(0) for s in range(7)])
        torch.testing.assert_close(means.residual[layer], expected)
        assert means.norm[layer] == pytest.approx(acts.norm(dim=1).mean().item(), rel=1e-5)
    with pytest.raises(InputError, match="no tokens"):
        activations.means([])
