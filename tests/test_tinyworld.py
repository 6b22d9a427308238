"""The embedded world: deterministic, balanced, and a language whose entropy is what it says."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsae_helpers.tinyworld import build, dataset, language, scenes
from mmsae_helpers.tinyworld.tokenizer import make_tokenizer


def test_a_seed_gives_the_same_bytes_everywhere():
    digest = hashlib.sha256()
    for scene, image, mask, _ in dataset.iter_split("test", 1):
        digest.update(repr(scene).encode() + image.tobytes() + mask.tobytes())
    assert digest.hexdigest() == "1660e170c0142c8726cfe9cb16d93c11f9d1490beda67d566578dceca566d53c"


def test_splits_are_balanced_and_disjoint():
    seen = {}
    for split in dataset.SPLITS:
        rows = list(dataset.iter_split(split, 2))
        assert Counter(scene.fine_label for scene, *_ in rows) == {label: 2 for label in range(100)}
        seen[split] = {image.tobytes() for _, image, *_ in rows}
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    assert len(scenes.FINE_NAMES) == 100 and len(scenes.COARSE_NAMES) == 20


def test_the_mask_is_where_the_object_is():
    for scene, image, mask, _ in dataset.iter_split("test", 1):
        color, ground = (
            np.array(t[n]) for t, n in ((scenes._COLOR_RGB, scene.color), (scenes._GROUND_RGB, scene.ground))
        )
        to_color, to_ground = (np.abs(image.astype(int) - c).sum(-1) for c in (color, ground))
        agree = ((to_color < to_ground) == mask).mean()
        assert agree > 0.9, scene
        assert 0.01 < mask.mean() < 0.3


def test_dataset_has_the_columns_of_a_real_one():
    rows = dataset.make_dataset("test", 1)
    assert {"image", "fine_label", "coarse_label", "caption", "question", "answer", "mask"} <= set(rows.column_names)
    row = rows[17]
    assert rows.features["fine_label"].int2str(row["fine_label"]) == f"{row['color']} {row['shape']}"
    assert row["image"].size == row["mask"].size == (64, 64)


def test_the_tokenizer_knows_every_word_and_keeps_the_image_token():
    tokenizer = make_tokenizer()
    texts = [d.text for d in language.documents(300, 0)]
    texts += [q for phrasings, _ in language.QUESTIONS.values() for q in phrasings]
    for ids, text in zip(tokenizer(texts)["input_ids"], texts, strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer.encode("<image>" * 3 + " red", add_special_tokens=False)) == 4


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.booleans())
def test_documents_tell_the_truth_and_fit_the_context(seed, word_lists):
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng)
    text, nats = language.document(scene, rng, word_lists)
    words = set(text.split())
    for name, values in scenes.ATTRIBUTES.items():
        assert words & set(values) <= {getattr(scene, name)}
    assert nats > 0 and len(text.split()) < 200
    complete = set(language.complete_document(scene, rng, word_lists).split())
    assert set(scene) <= complete


def test_the_nats_are_the_probability_of_the_text(monkeypatch):
    """In a language cut down to one attribute of two words, sampled frequencies match exp(-nats)."""
    monkeypatch.setattr(language, "SENTENCES", ("it is {size}", "how big ? {size}"))
    monkeypatch.setattr(language, "MAX_SENTENCES", 2)
    rng = np.random.default_rng(0)
    texts = [language.document(scenes.sample_scene(rng), rng, word_lists=False) for _ in range(20_000)]
    counts, cost = Counter(d.text for d in texts), {d.text: d.nats for d in texts}
    assert sum(math.exp(-nats) for nats in cost.values()) == pytest.approx(1)
    for text, count in counts.items():
        assert count / len(texts) == pytest.approx(math.exp(-cost[text]), abs=0.015)


def test_a_build_continues_where_it_was_killed(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    (tmp_path / ".gemma.partial").mkdir()
    trained = []
    stages = {name: stage._replace(train=lambda root, folder, scale: trained.append(folder.name)) for name, stage in
              build.STAGES.items()}  # fmt: skip
    monkeypatch.setattr(build, "STAGES", stages)
    build.run_stage("gemma", tmp_path, 1.0)
    assert (tmp_path / "gemma").is_dir() and not (tmp_path / ".gemma.partial").exists()
    assert trained == [".gemma.partial"]


def test_a_failed_stage_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="gemma-it"):
        (tmp_path / "gemma").mkdir()  # an empty folder is not a model, so the next stage cannot load it
        for name in ("clip", "resnet", "llava", "gemma-no-lists", "gemma-it-no-lists", "llava-no-lists"):
            (tmp_path / name).mkdir()
        build.build(tmp_path, families=["llava"], scale=0.001, jobs=1)
