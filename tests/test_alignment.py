"""Fine-tuning with TRL, benchmark answers, judges and what is kept of them; the shipped models, a few steps."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher
from PIL import Image as Picture
from transformers import TrainerCallback

from mmsae_helpers import alignment, models
from mmsae_helpers.errors import InputError
from mmsae_helpers.tinyworld import dataset, language

STEPS = dict(seed=0, learning_rate=1e-3, batch_size=2, steps=2)
FEATURES = Features({"image": Image(), **{k: Value("string") for k in ("question", "chosen", "rejected")}})


@pytest.fixture(scope="module")
def rows():
    """Six rows with short and long answers; what is rejected describes another scene."""
    scenes, pixels, _ = dataset.arrays("train", 1, seed=5)
    rng = np.random.default_rng(0)
    asked = [language.question_answer(scenes[i], rng, "describe" if i % 2 else None) for i in range(6)]
    other = [language.question_answer(scenes[i + 6], rng, "describe")[1] for i in range(6)]
    images = [Picture.fromarray(p) for p in pixels[:6]]
    images[1] = images[1].resize((96, 48))
    questions, chosen = zip(*asked, strict=True)
    columns = {"image": images, "question": list(questions), "chosen": list(chosen), "rejected": other}
    columns["question"][2] += " <image>"  # is no image
    return Dataset.from_dict(columns, features=FEATURES)


@pytest.fixture(scope="module", params=["chameleon", "llava-next"])
def adapter(request):
    return models.load(f"tinyworld/{request.param}")


@pytest.fixture(scope="module")
def base(adapter):
    return alignment.weights_of(adapter)


@pytest.fixture
def tuned(adapter, base):
    """Function that tunes the model from its base and returns (weights, curve)."""

    def tune(rows, how="sft", **options):
        alignment.restore(adapter, base)
        curve = alignment.fine_tune(adapter, rows, how, **STEPS | options)
        return alignment.weights_of(adapter), curve

    yield tune
    alignment.restore(adapter, base)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


class Seen(TrainerCallback):
    """What the trainer shows the model first, and the model's own loss on it."""

    def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
        self.batch = next(iter(train_dataloader))
        with torch.no_grad():
            labels = self.batch["labels"] if "labels" in self.batch else None
            self.loss = labels is not None and model(**self.batch).loss.item()


def test_trl_trains_on_the_tokens_that_the_model_is_asked_with(adapter, rows, tuned):
    end = {"chameleon": "<eos>", "llava_next": " <end_of_turn>"}[adapter.family]
    seen, n = Seen(), len(rows)
    before = adapter.prompt("what is it ?"), adapter.processor.__dict__.copy()
    _, curve = tuned(rows, steps=1, batch_size=n, callbacks=[seen])
    prompts = [adapter.prompt(adapter.raw(q)) for q in rows["question"]]
    whole = [p + a + end for p, a in zip(prompts, rows["chosen"], strict=True)]
    expected, lengths = adapter.encode(whole, rows["image"]), adapter.encode(prompts, rows["image"])["attention_mask"]
    row = lambda ids, mask: tuple(ids[mask.bool()].tolist())  # noqa: E731
    got = {}
    for ids, mask, labels in zip(*(seen.batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        got[row(ids, mask)] = tuple(labels[labels >= 0].tolist())
        assert (labels[labels >= 0] == ids[labels >= 0]).all()
    for ids, mask, length in zip(expected["input_ids"], expected["attention_mask"], lengths.sum(1), strict=True):
        text = row(ids, mask)
        assert got[text] == text[length:] and adapter.tokenizer.decode(text[-1]) == end.strip()
    assert len(got) == n
    assert curve[0]["loss"] == pytest.approx(seen.loss, rel=1e-4), "TRL's head is the model's"
    assert (adapter.prompt("what is it ?"), adapter.processor.__dict__) == before


def test_the_model_is_left_as_it_was_loaded_but_for_its_weights(adapter, base, rows, tuned, capfd, recwarn):
    model = adapter.model
    frozen = {k: v.clone() for k, v in model.state_dict().items() if alignment.FROZEN.search(k)}
    settings, config = model.generation_config.to_dict(), model.config.to_dict()
    after, curve = tuned(rows)
    assert [entry["step"] for entry in curve] == [1, 2] and json.dumps(curve)
    assert frozen and all(torch.equal(model.state_dict()[k], v) for k, v in frozen.items())
    assert not model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.bias is None
    assert "forward" not in model.__dict__ and model.generation_config.to_dict() == settings
    assert model.config.to_dict() == config
    assert not any(torch.equal(after[k], base[k]) for k in after if k.endswith("q_proj.weight"))
    assert capfd.readouterr() == ("", "") and not [str(w.message) for w in recwarn]
    columns = [alignment._Columns(some, "sft") for some in (adapter, None)]
    assert Hasher.hash(columns[0]) == Hasher.hash(columns[1]), "datasets hashes a transform, here without the model"
    alignment.restore(adapter, base)
    assert same(alignment.weights_of(adapter), base)


def test_seed_steps_and_epochs(rows, tuned):
    few = rows.select(range(3))
    (first, curve), (again, _), (other, _) = tuned(few, steps=3), tuned(few, steps=3), tuned(few, steps=3, seed=1)
    assert len(curve) == 3 and curve[-1]["epoch"] > 1
    assert same(first, again) and not same(first, other)
    _, curve = tuned(few, steps=None, epochs=2)
    assert len(curve) == 4
    _, curve = tuned(rows, steps=None, epochs=1, accumulate=2)
    assert len(curve) == 2


@pytest.mark.parametrize("how", ["sft", "dpo"])
def test_accumulated_rows_are_one_step(how, base, rows, tuned):
    few = rows.select(range(4))
    (whole, one), (split, two) = (tuned(few, how, steps=2, batch_size=4 // n, accumulate=n) for n in (1, 4))
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], rel=1e-3)
    length = lambda other: torch.cat([(whole[k] - other[k]).float().flatten() for k in base]).norm()  # noqa: E731
    assert length(split) < 1e-3 * length(base), "Adam moves by noise where a gradient is next to nothing"


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["sft", "dpo"])
def test_an_interrupted_run_goes_on(how, adapter, rows, tuned, tmp_path):
    rows = rows.select(range(4))
    whole, curve = tuned(rows, how, steps=3)
    kept = dict(steps=3, folder=tmp_path, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        tuned(rows, how, **kept, callbacks=[Stop()])
    assert not adapter.model.training and "forward" not in adapter.model.__dict__
    (tmp_path / "checkpoint-9").mkdir()  # cut short
    resumed, again = tuned(rows, how, **kept)
    assert same(resumed, whole)
    assert [e["loss"] for e in again] == [e["loss"] for e in curve]


def test_dpo_raises_the_margin_of_its_own_rows(rows, tuned):
    _, curve = tuned(rows, "dpo", steps=3, batch_size=4)
    margins = [entry["rewards/margins"] for entry in curve]
    assert margins[0] == pytest.approx(0, abs=1e-5), "the reference is the model as it came in"
    assert margins[-1] > 0.01 and curve[-1]["loss"] < curve[0]["loss"]


def test_answers_are_those_of_the_adapter(adapter, rows):
    out = alignment.answers(adapter, rows, 4, 24)
    prompts = [adapter.prompt(adapter.raw(q)) for q in rows["question"]]
    pairs = zip(prompts, rows["image"], strict=True)
    one = [adapter.answer(adapter.encode([prompt], [image]), 24)[0] for prompt, image in pairs]
    assert out == one


def test_fitting_counts_what_encode_counts(adapter, rows):
    texts = [[adapter.prompt(adapter.raw(r["question"])) + r[k] for k in ("chosen", "rejected")] for r in rows]
    pairs = zip(texts, rows["image"], strict=True)
    lengths = [adapter.encode(t, [i, i])["attention_mask"].sum(1).max().item() + 1 for t, i in pairs]
    limit = sorted(lengths)[3]
    kept, dropped = alignment.fitting(adapter, rows, limit)
    assert kept.tolist() == [i for i, n in enumerate(lengths) if n <= limit] and dropped == len(rows) - len(kept) > 0
    assert alignment.fitting(adapter, rows)[1] == 0


def test_size_of_a_stored_image_is_that_of_the_picture_shown():
    for orientation in (1, 3, 6, 8):
        exif = Picture.Exif()
        exif[Picture.ExifTags.Base.Orientation] = orientation
        file = io.BytesIO()
        Picture.new("RGB", (30, 20)).save(file, "JPEG", exif=exif)
        stored = {"bytes": file.getvalue(), "path": None}
        assert alignment._size(stored) == Image().decode_example(stored).size[::-1]


def test_bad_input_of_fine_tune(adapter, rows):
    for wrong in (dict(epochs=1), dict(steps=None), dict(how="ppo")):
        with pytest.raises(InputError, match="sft or dpo, and epochs or steps"):
            alignment.fine_tune(adapter, rows, **STEPS | wrong)
    with pytest.raises(InputError, match="no rows"):
        alignment.fine_tune(adapter, rows.select([]), **STEPS)


def test_once(tmp_path):
    calls = []

    def tuning(about, fail=False):
        @alignment.once(tmp_path, about)
        def make(name, rows):
            calls.append(name)
            if fail:
                raise RuntimeError
            return {"performance": rows.sum() / 8, "nan": float("nan")}

        return make

    first, again = (tuning({"seed": 0})("a", np.arange(4)) for _ in range(2))
    assert len(calls) == 1 and repr(first) == repr(again) and first["performance"] == 0.75
    tuning({"seed": 1})("a", np.arange(4))
    with pytest.raises(RuntimeError):
        tuning({"seed": 2}, fail=True)("a", np.arange(4))
    tuning({"seed": 0})("a", np.arange(3))
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 3


def test_pictures_read_once_change_nothing_but_the_time(rows):
    for name, module in (("chameleon", "vqmodel.encoder"), ("llava-next", "vision_tower.embeddings")):
        plain, other = (models.load(f"tinyworld/{name}") for _ in range(2))
        alignment.read_pictures_once(plain, 0)
        alignment.read_pictures_once(other)
        views, counts = [], []
        inner = other.model.model.get_submodule(module)
        inner.register_forward_pre_hook(lambda _, args, views=views: views.append(len(args[0])))
        prompts = [plain.prompt(plain.raw(q)) for q in rows["question"]]
        for some in (range(4), [5, 1, 0]):
            inputs = plain.encode([prompts[i] for i in some], rows.select(some)["image"])
            with torch.no_grad():
                same, read = (adapter.forward(inputs).logits for adapter in (plain, other))
            torch.testing.assert_close(read, same, rtol=1e-4, atol=1e-4)
            counts.append(len(views))
        assert set(views) == {1} and counts[1] - counts[0] == counts[0] // 4, "alone; of the second batch the new one"
        alignment.fine_tune(other, rows.select(range(2)), "dpo", **STEPS)


@pytest.fixture
def server():
    """A chat-completions server that answers from ``script``, then always by ``default(user message)``; ``asked``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((body, dict(self.headers)))
            said = self.server.script.pop(0) if self.server.script else self.server.default(body)
            status, text = (said, "no") if isinstance(said, int) else (200, said)
            message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(message).encode() if status == 200 else b"no")

        def log_message(self, *args):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    running.asked, running.script = [], []
    # likes what it reads first, and long answers
    running.default = lambda body: "8 4\nthe first" if "red red" in body["messages"][1]["content"] else "6 6"
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def judge(server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    return lambda **options: alignment.Endpoint(
        server.url, "judge", tmp_path / "said.jsonl", "A_KEY", **dict(wait=0.001, tries=2) | options
    )


BENCH = Dataset.from_dict({"question": ["what ?", "where ?"], "reference": ["red", "left"], "caption": ["a ring", ""]})


def test_endpoint_asks_in_both_orders_and_keeps_what_it_was_told(server, judge, tmp_path):
    server.script = ["9, 3\nbecause", "5 7.5", 500, "6 6", 429, "2 8\n"]
    scores = judge()(BENCH, ["ring", "right"])
    assert scores.tolist() == [[(9 + 7.5) / 2, (3 + 5) / 2], [(6 + 8) / 2, (6 + 2) / 2]]
    first, second = (body["messages"][1]["content"] for body, _ in server.asked[:2])
    assert first.index("ring\n\n[End of Assistant 1]") < first.index("red\n\n[End of Assistant 2]")
    assert second.index("red\n\n[End of Assistant 1]") < second.index("ring\n\n[End of Assistant 2]")
    assert "[Context]\na ring" in first and "[Context]" not in server.asked[3][0]["messages"][1]["content"]
    assert server.asked[0][1]["Authorization"] == "Bearer secret" and len(server.asked) == 6
    assert judge()(BENCH, ["ring", "right"]).tolist() == scores.tolist() and len(server.asked) == 6
    judge()(BENCH, ["ring", "there"])
    assert len(server.asked) == 8, "only the answer that is new"
    assert "secret" not in (tmp_path / "said.jsonl").read_text()


def test_nonsense_is_asked_again_then_failed_by_name(server, judge):
    server.script = ["I cannot", "11 3", "score: 4", "7 7", "", "5 5"]
    with pytest.warns(UserWarning, match=r"rows \[0\]"):
        scores = judge()(BENCH, ["ring", "right"])
    assert np.isnan(scores[0]).all() and scores[1].tolist() == [5.5, 5.5]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert alignment.performance(scores) == 100
    asked = len(server.asked)
    assert judge()(BENCH, ["ring", "right"])[0].tolist() == [6.5, 6.5] and len(server.asked) == asked + 1


def test_an_endpoint_that_is_down_loses_nothing(server, judge, tmp_path):
    server.script = ["9 3", "4 8", *[503] * 3]
    with pytest.raises(InputError, match="no judgement from .*run again: .*said.jsonl"):
        judge()(BENCH, ["ring", "right"])
    with open(tmp_path / "said.jsonl", "a") as file:
        file.write('{"key": "cut sho')
    asked = len(server.asked)
    assert judge()(BENCH, ["ring", "right"]).tolist() == [[8.5, 3.5], [6, 6]] and len(server.asked) == asked + 2
    server.script = [401]
    with pytest.raises(InputError, match="401 .*key in A_KEY"):
        judge()(BENCH, ["ring", "nowhere"])
    gone = alignment.Endpoint("http://127.0.0.1:1/v1", "judge", tmp_path / "other.jsonl", tries=1, wait=0.001)
    with pytest.raises(InputError, match="no judgement"):
        gone(BENCH, ["ring", "right"])


def test_performance():
    assert alignment.performance(np.array([[6, 8], [9, 7.0]])) == 100
    with pytest.raises(InputError, match="none of 2"):
        alignment.performance(np.full((2, 2), np.nan))
