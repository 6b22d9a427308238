"""Scores of samples for filtering: parts, losses and the one pass, against plain definitions on the embedded models."""

import gc
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from mmsae_helpers import models
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters import samples
from mmsae_helpers.meters.crossmodal import sample_scores
from mmsae_helpers.meters.features import to_csr
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.tinyworld import dataset

QUESTIONS = ["what is it ?", "", "what color is it ?", "where is it ?", "describe the picture"]
ANSWERS = ["red circle", "a small red circle at the top left on gray", "red", "top left", "a"]


@pytest.fixture(scope="module", params=["llava-next", "chameleon"])
def adapter(request):
    return models.load(f"tinyworld/{request.param}")


@pytest.fixture(scope="module")
def rows():
    _, pictures, _ = dataset.arrays("train", 1, 3)
    images = [Image.fromarray(p) for p in pictures[: len(QUESTIONS)]]
    return Dataset.from_dict({"image": images, "question": QUESTIONS, "chosen": ANSWERS})


@pytest.fixture(scope="module")
def sae(adapter):
    from sae_lens import StandardSAE, StandardSAEConfig

    torch.manual_seed(0)
    made = StandardSAE(StandardSAEConfig(d_in=adapter.d_model, d_sae=64))
    torch.nn.init.normal_(made.W_enc, std=0.1)
    return made


def test_starts_are_where_the_answers_begin(adapter, rows):
    at = samples.starts(adapter, rows["question"], rows["image"])
    for i, row in enumerate(rows):
        ids = adapter.encode([adapter.prompt(row["question"]) + row["chosen"]], [row["image"]])["input_ids"][0]
        assert adapter.tokenizer.decode(ids[at[i] :]).split() == row["chosen"].split()


def test_losses_equal_the_definition_whatever_the_batches(adapter, rows):
    starts = samples.starts(adapter, rows["question"], rows["image"])
    plain, lengths = [], []
    for row, start in zip(rows, starts, strict=True):
        inputs = adapter.encode([adapter.prompt(row["question"]) + row["chosen"]], [row["image"]])
        with torch.no_grad():
            scores = adapter.forward(inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        plain.append(-np.mean([scores[i - 1, ids[i]].item() for i in range(start, len(ids))]))
        lengths.append(len(ids) - start)
    for batch_size in (1, 3):
        see = samples.AnswerLosses(starts)
        assert np.isnan(see.losses).all()
        list(samples.passing(adapter, rows, [1], batch_size, see))
        np.testing.assert_allclose(see.losses, plain, rtol=1e-4)
        np.testing.assert_allclose(samples.answer_losses(adapter, rows, batch_size), plain, rtol=1e-4)
        assert see.lengths.tolist() == lengths


def test_without_the_image_the_loss_is_of_question_or_answer_alone(adapter, rows):
    for question in (True, False):
        found = samples.answer_losses(adapter, rows, 2, "question" if question else "nothing")
        for row, loss in zip(rows, found, strict=True):
            prompt = adapter.prompt(row["question"], image=False) if question else adapter.tokenizer.bos_token
            inputs = adapter.encode([prompt + row["chosen"]])
            n = len(row["chosen"].split())
            with torch.no_grad():
                scores = adapter.forward(inputs).logits[0].log_softmax(-1)
            ids = inputs["input_ids"][0]
            assert loss == pytest.approx(
                -np.mean([scores[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))]), rel=1e-4
            )


def test_losses_after_something_else_are_refused(adapter, rows):
    with pytest.raises(InputError, match="choose one of image and question, question, nothing"):
        samples.answer_losses(adapter, rows, 2, "image")


def test_scores_of_prompt_and_answer_equal_separate_passes(adapter, rows, sae):
    starts = samples.starts(adapter, rows["question"], rows["image"])
    weights = np.random.default_rng(0).random(sae.cfg.d_sae)
    meter = samples.SampleScores(sae, 1, weights, starts, 0.01)
    found = feed({0: meter}, samples.passing(adapter, rows, [1], 2))[0]
    assert found.index.get_level_values("part").unique().tolist() == list(samples.PARTS)
    for part, texts in zip(samples.PARTS, ([""] * len(rows), rows["chosen"]), strict=True):
        alone = rows.remove_columns("chosen").add_column("chosen", list(texts))
        for batch in samples.passing(adapter, alone, [1], 1):
            with torch.no_grad():
                z = to_csr(sae.encode(batch.acts[1]))
            want = sample_scores(z, batch.sample, batch.is_image, weights, 0.01)
            got = found.loc[part].loc[want.index]
            np.testing.assert_allclose(got.to_numpy(float), want.to_numpy(float), rtol=1e-3, atol=1e-3)


def test_a_threshold_a_feature_is_a_threshold_for_all_where_they_are_equal(adapter, rows, sae):
    starts = samples.starts(adapter, rows["question"], rows["image"])
    weights = np.ones(sae.cfg.d_sae)
    meters = {
        d: samples.SampleScores(sae, 1, weights, starts, delta)
        for d, delta in (("one", 0.05), ("each", weights * 0.05))
    }
    found = feed(meters, samples.passing(adapter, rows, [1], 5))
    assert found["one"].equals(found["each"])


def test_similarity_is_the_cosine_of_the_means_whatever_the_batches(adapter, rows):
    for batch_size in (1, 5):
        alike = samples.Similarity(len(rows) + 1, 1)
        batches = list(alike.watch(samples.passing(adapter, rows, [1], batch_size)))
        for batch in batches:
            for i in batch.sample.unique().tolist():
                image, text = (
                    batch.acts[1][(batch.sample == i) & (batch.is_image == m)].mean(0) for m in (True, False)
                )
                assert alike.values[i] == pytest.approx(torch.cosine_similarity(image, text, dim=0).item(), abs=1e-4)
        assert np.isfinite(alike.values[:-1]).all() and np.isnan(alike.values[-1]), "the last was not seen"


def test_similarity_of_one_modality_is_none(adapter, rows):
    alike = samples.Similarity(len(rows), 1)
    list(alike.watch(batch.rows(batch.is_image) for batch in samples.passing(adapter, rows, [1], 2)))
    assert np.isnan(alike.values).all()


def test_maxima_are_the_highest_activations(adapter, rows, sae):
    batches = list(samples.passing(adapter, rows, [1], 2))
    found = feed({0: samples.Maxima(sae, 1)}, batches)[0]
    with torch.no_grad():
        want = sae.encode(torch.cat([batch.acts[1] for batch in batches])).amax(0).clamp(min=0)
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-5)
    assert (found > 0).any()


def live_bytes():
    """Bytes of all tensors there are, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what some old names say when they are looked at
        storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_memory_of_the_scoring_pass_is_flat_in_the_number_of_samples(adapter, rows, sae):
    peaks = {}
    for times in (1, 4):
        some = rows.select([1] * (8 * times))  # alike, so that the batches are
        at = samples.starts(adapter, some["question"], some["image"])
        see, alike, live = samples.AnswerLosses(at), samples.Similarity(len(some), 1), []

        def both(sample, inputs, output, see=see, live=live):
            see(sample, inputs, output)
            live.append(live_bytes())

        meter = samples.SampleScores(sae, 1, np.ones(sae.cfg.d_sae), at, 0.01)
        before = live_bytes()
        tracemalloc.start()
        feed({0: meter}, alike.watch(samples.passing(adapter, some, [1], 4, both)))
        peaks[times] = max(live) - before, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(live) == 2 * times and np.isfinite(see.losses).all() and np.isfinite(alike.values).all()
    assert peaks[4][0] == peaks[1][0] > 0, "tensors: those of a batch"
    assert peaks[4][1] - peaks[1][1] < 24 * 2**10 * 6, "and of a batch more its two small frames"
