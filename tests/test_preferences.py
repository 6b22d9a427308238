"""Preference data of the embedded world and of files, the benchmark, and the exact judge."""

import io
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmsae_helpers import data
from mmsae_helpers.errors import InputError
from mmsae_helpers.tinyworld import dataset, language, preferences
from mmsae_helpers.tinyworld.scenes import ATTRIBUTES, Scene, sample_scene


@pytest.fixture(scope="module")
def rows():
    return preferences.preferences(100, 3, damage=0.7)


def test_the_share_of_each_kind_is_exact_and_drawn_from_the_seed(rows):
    counts = Counter(rows["kind"])
    assert counts.pop("") == 30 and set(counts) == set(preferences.KINDS) and set(counts.values()) == {10}
    again, other = (preferences.preferences(100, seed, damage=0.7) for seed in (3, 4))
    assert again["chosen"] == rows["chosen"] and again["kind"] == rows["kind"] and other["kind"] != rows["kind"]


def test_every_row_has_two_different_answers(rows):
    assert all(row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"] for row in rows)


def test_damage_is_what_it_says(rows):
    templates = [answer for _, answer in language.QUESTIONS.values()]
    for row in rows.remove_columns("image"):
        words = row["chosen"].split()
        if row["kind"] == "truncated":
            assert 2 <= len(words) < len(templates[0].split())
        if row["kind"] == "repeated":
            n = next(n for n in (2, 3) if words == words[: len(words) // n] * n)
            assert len(words) % n == 0
    pictures = [image.tobytes() for image in rows["image"]]
    clean = {(p, row["question"], row["chosen"]) for p, row in zip(pictures, rows, strict=True) if row["kind"] == ""}
    for picture, row in zip(pictures, rows, strict=True):
        assert ((picture, row["question"], row["chosen"]) in clean) == (row["kind"] in ("", "duplicate"))


def test_damage_is_false_of_the_picture_where_it_should_be(rows):
    drawn, pictures, _ = dataset.arrays("train", 1, 3)
    scenes = {picture.tobytes(): scene for scene, picture in zip(drawn, pictures, strict=True)}
    attribute = {value: name for name, values in ATTRIBUTES.items() for value in values}
    wholes = 0
    for row in rows:
        scene, kind = scenes[np.asarray(row["image"]).tobytes()], row["kind"]
        said = [{attribute[w]: w for w in row[key].split() if w in attribute} for key in ("chosen", "rejected")]
        true = [all(getattr(scene, name) == word for name, word in one.items()) for one in said]
        if kind == "image swapped":  # color and shape are the class
            if whole := {"color", "shape"} <= set(said[0]):
                assert (said[0]["color"], said[0]["shape"]) != (scene.color, scene.shape)
            wholes += whole
        else:
            assert true == {"wrong attribute": [False, False], "flipped": [False, True]}.get(kind, [True, False])
            assert (set(said[0]) != set(said[1])) == (kind in ("off the question", "truncated"))
    assert wholes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(list(language.QUESTIONS)))
def test_a_false_answer_is_false_and_has_the_form_of_the_true_one(seed, kind):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    true = language.question_answer(scene, rng, kind)[1]
    false = preferences.false_answer(scene, true, rng)
    differing = [(a, b) for a, b in zip(true.split(), false.split(), strict=True) if a != b]
    assert differing and all(any(a in v and b in v for v in ATTRIBUTES.values()) for a, b in differing)


def test_the_judge_gives_one_to_the_truth_and_less_to_what_is_false():
    bench = preferences.benchmark(30)
    assert Counter(bench["category"]) == {"conversation": 10, "detail": 10, "reasoning": 10}
    assert (preferences.judge(bench, bench["reference"]) == 1).all()
    train = {picture.tobytes() for picture in dataset.arrays("train", 1, 0)[1]}
    assert not train & {np.asarray(image).tobytes() for image in bench["image"]}
    rng = np.random.default_rng(0)
    for i, row in enumerate(bench.remove_columns("image")):
        scene, one = Scene(**{name: row[name] for name in ATTRIBUTES}), bench.select([i])
        if row["category"] != "reasoning":
            assert preferences.judge(one, [preferences.false_answer(scene, row["reference"], rng)])[0, 0] < 1
            extra = next(v for v in ATTRIBUTES["color"] if v != scene.color)
            assert preferences.judge(one, [f"{row['reference']} {extra}"])[0, 0] < 1
        assert preferences.judge(one, [""])[0, 0] == 0


def png(color=(9, 9, 9)):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def file(folder, rows):
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def test_rows_in_rlaif_vs_layout_and_what_is_left_out(tmp_path):
    good = {"image": png(), "question": "what ?", "chosen": "a", "rejected": "b", "ds_name": "x", "idx": 1}
    bad = [{"image": {"bytes": b"no image", "path": None}}, {"chosen": ""}, {"rejected": "a"}, {"question": " "}]
    found = data.preferences(file(tmp_path, [good, *[good | one for one in bad], good]))
    assert found.dataset.column_names == ["image", "question", "chosen", "rejected"] and len(found.dataset) == 2
    why = ("image cannot be read", "empty answer", "equal answers", "empty question")
    assert found.left_out == dict.fromkeys(why, 1) and found.kinds is None
    with pytest.raises(InputError, match=r"2 rows fit .* but 3 are needed .*empty answer"):
        data.preferences(file(tmp_path, [good, *[good | one for one in bad], good]), 3)


def test_rows_in_align_anythings_layout(tmp_path):
    row = {"image": png(), "question": "?", "response_1": "one", "response_2": "two"}
    found = data.preferences(file(tmp_path, [row | {"overall_response": n} for n in (1, 2)]))
    assert sorted(zip(found.dataset["chosen"], found.dataset["rejected"], strict=True)) == [
        ("one", "two"),
        ("two", "one"),
    ]


def test_other_names_are_given_and_missing_ones_told(tmp_path):
    row = {"picture": png(), "question": "?", "chosen": "one", "rejected": "two"}
    with pytest.raises(InputError, match="has no column image: it has picture"):
        data.preferences(file(tmp_path, [row]))
    assert len(data.preferences(file(tmp_path, [row]), columns={"image": "picture"}).dataset) == 1


@pytest.mark.parametrize(
    ("change", "columns", "says"),
    [
        ({}, {"image": "photo"}, "no column photo: it has image"),
        ({"image": 5}, None, "column image .* has no image a row"),
        ({"question": 5}, None, "column question .* has no text a row"),
        ({"chosen": None, "rejected": None}, None, "left out: {'no preference': 1}"),
        ({"chosen": "b "}, None, "left out: {'equal answers': 1}"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path, change, columns, says):
    row = {"image": png(), "question": "?", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match=says):
        data.preferences(file(tmp_path, [row | change]), columns=columns)


def test_align_anything_rows_without_a_preference_or_a_response(tmp_path):
    row = {"image": png(), "question": "?", "response_1": "one", "response_2": "two"}
    found = data.preferences(file(tmp_path, [row | {"overall_response": n} for n in (1, None, 0, 3)]))
    assert found.dataset["chosen"] == ["one"] and found.left_out == {"no preference": 3}
    with pytest.raises(InputError, match="no column response_2"):
        data.preferences(
            file(tmp_path, [{k: v for k, v in row.items() if k != "response_2"} | {"overall_response": 1}])
        )


def test_columns_replace_those_there_and_a_foreign_kind_is_no_damage(tmp_path):
    row = {"image": png(), "question": "?", "chosen": "one", "rejected": "two", "better": "three", "kind": "photo"}
    found = data.preferences(file(tmp_path, [row]), columns={"chosen": "better"})
    assert found.dataset["chosen"] == ["three"] and found.kinds is None
    swapped = data.preferences(file(tmp_path, [row]), columns={"chosen": "rejected", "rejected": "chosen"}).dataset[0]
    assert (swapped["chosen"], swapped["rejected"]) == ("two", "one")


def test_splits_are_kept_apart(tmp_path):
    rows = [{"image": png(), "question": f"{i}", "chosen": "one", "rejected": "two"} for i in range(20)]
    parts = [
        data.preferences(file(tmp_path, rows), split=s).dataset["question"] for s in ("train", "validation", "test")
    ]
    assert [len(part) for part in parts] == [16, 2, 2] and len({q for part in parts for q in part}) == 20
    pictures = [
        {i.tobytes() for i in data.preferences("tinyworld", 50, split=s).dataset["image"]} for s in ("train", "test")
    ]
    assert not pictures[0] & pictures[1]
    for wrong in ({"split": "dev"}, {"count": None}, {"damage": 1.5}):
        with pytest.raises(InputError):
            data.preferences(**{"name": "tinyworld", "count": 5} | wrong)


def test_a_benchmark_in_llava_benchs_layout(tmp_path):
    row = {"image": png(), "question": "?", "gpt_answer": "this", "category": "detail", "caption": "a thing"}
    assert data.benchmark(file(tmp_path, [row] * 3), 2)["reference"] == ["this", "this"]


def test_a_second_data_set_has_wide_and_tall_pictures():
    found = data.preferences("tinyworld-aspects", 60, 0, damage=0.5)
    sizes = Counter(image.size for image in found.dataset["image"])
    assert set(sizes) == {(64, 64), (128, 64), (64, 128)} and sizes[64, 64] > 15 and sum(found.kinds != "") == 30


def test_scores_and_training_cannot_see_the_damage():
    found = data.preferences("tinyworld", 20, 0, damage=0.5)
    assert found.dataset.column_names == ["image", "question", "chosen", "rejected"]
    assert sum(found.kinds != "") == 10 and found.fingerprint != data.preferences("tinyworld", 20, 1).fingerprint


def test_the_exported_rows_train_with_a_plain_script(tmp_path):
    """What a user does with notebook 06's ranked.parquet: ten lines of TRL, nothing of this package but the model."""
    from trl import SFTConfig, SFTTrainer

    from mmsae_helpers import alignment, models

    kept = data.preferences("tinyworld", 4, 0).dataset
    kept.add_column("score: cosine", [0.1, 0.4, 0.2, 0.3]).to_parquet(tmp_path / "ranked.parquet")
    ranked = load_dataset("parquet", data_files=str(tmp_path / "ranked.parquet"), split="train")
    best = ranked.sort("score: cosine", reverse=True).select(range(2))
    assert best["score: cosine"] == [0.4, 0.3]
    adapter = models.load("tinyworld/llava-next")
    adapter.model.requires_grad_(True)
    said = [[{"role": "assistant", "content": [{"type": "text", "text": a}]}] for a in best["chosen"]]
    asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in best["question"]]
    rows = Dataset.from_dict({"images": [[i] for i in best["image"]], "prompt": asked, "completion": said})
    options = dict(max_steps=1, per_device_train_batch_size=2, max_length=None, use_cpu=True, report_to=[])
    config = SFTConfig(str(tmp_path), save_strategy="no", gradient_checkpointing=False, **options)
    trainer = SFTTrainer(adapter.model, args=config, train_dataset=rows, processing_class=alignment.chats(adapter))
    assert trainer.train().global_step == 1
