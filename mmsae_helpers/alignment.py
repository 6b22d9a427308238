"""Fine-tuning on part of a preference data set, and what it did to the model's answers.

A row has an ``image``, a ``question`` and two answers, ``chosen`` and ``rejected``; a row of a benchmark has an
``image``, a ``question`` and a ``reference``. TRL does the training (METHODS C.5), ``SFTTrainer`` or ``DPOTrainer``.
"""

import copy
import gc
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import PIL.Image
import requests
import torch
from torch import Tensor

from mmsae_helpers import data, files
from mmsae_helpers.cache import fingerprint
from mmsae_helpers.errors import InputError, first_line
from mmsae_helpers.launch import launched

FROZEN = re.compile(r"(^|\.)(vision_tower|vision_model|vqmodel)\.")
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
# LLaVA-Bench's request to the judge (haotian-liu/LLaVA, llava/eval/table/rule.json).
RULE = """We would like to request your feedback on the performance of two AI assistants in response to the user \
question displayed above. The user asks the question on observing an image. For your reference, the visual content in \
the image is represented with a few sentences describing the image.
Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space.
In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias and \
ensuring that the order in which the responses were presented does not affect your judgment."""


def chats(adapter):
    """A copy of the processor that writes a chat as `Adapter.encode` reads prompt + answer + end, so that TRL trains on
    the tokens that the model is asked with: Chameleon's form where there is no chat template, the BOS that TRL leaves
    out, and an end after the answer, which the model must learn to write. Raises InputError for a text-only model."""
    if adapter.image_token_id is None:
        raise InputError(f"{adapter.name} reads no images among its text: give a LLaVA or a Chameleon")
    processor, words = copy.copy(adapter.processor), adapter.tokenizer
    own = "{% for m in messages %}{% for p in m.content %}{{ 'IMAGE' if p.type == 'image' else p.text }}{% endfor %}"
    own = own.replace("IMAGE", adapter.image_words[1]) + "{{ sep_token if m.role == 'user' }}{% endfor %}"
    template = getattr(processor, "chat_template", None) or words.chat_template or own
    if words.bos_token and words("?").input_ids[0] == words.bos_token_id:
        template = "{{ bos_token }}" * (not adapter.prompt("?").startswith(words.bos_token)) + template
    processor.chat_template = template
    processor.return_for_text_completion = True  # or Chameleon's adds a second separator, and one after the answer
    stops = {words.eos_token_id, *np.atleast_1d(adapter.model.generation_config.eos_token_id or [])}
    if stops.isdisjoint(words(_text(processor, "?", "!").rpartition("!")[2], add_special_tokens=False).input_ids):
        processor.chat_template += "{{ eos_token if messages[-1].role == 'assistant' }}"
    return processor


def _turn(role: str, text: str) -> list[dict]:
    parts = [{"type": "image"}] * (role == "user") + [{"type": "text", "text": text}]
    return [{"role": role, "content": parts}]


def _text(processor, question: str, answer: str) -> str:
    return processor.apply_chat_template(_turn("user", question) + _turn("assistant", answer), tokenize=False)


def fitting(adapter, rows: datasets.Dataset, max_length: int | None = None) -> tuple[np.ndarray, int]:
    """Indices of the rows whose image, question and longer answer the context (``max_length`` tokens) holds, int64,
    and how many are too long. Reads the images' sizes, not their pixels."""
    processor, limit = chats(adapter), max_length or adapter.config.max_position_embeddings
    keep = []
    for i, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
        answers = [_text(processor, adapter.raw(row["question"]), adapter.raw(row[k])) for k in ("chosen", "rejected")]
        longest = max(map(len, adapter.tokenizer(answers, add_special_tokens=False).input_ids))
        if longest - 1 + adapter.written(_size(row["image"])) <= limit:  # the placeholder is one token of the text
            keep.append(i)
    return np.array(keep, np.int64), len(rows) - len(keep)


def _size(stored: dict) -> tuple[int, int]:
    """(height, width) that a stored image will have once `datasets` has turned it as its EXIF tag says."""
    with PIL.Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
        turned = image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1) >= 5
        return image.size if turned else image.size[::-1]


def trainable(adapter) -> dict[str, torch.nn.Parameter]:
    """What fine-tuning changes: all but the vision tower or image tokenizer; tied weights once."""
    return {name: p for name, p in adapter.model.named_parameters() if not FROZEN.search(name)}


def weights_of(adapter) -> dict[str, Tensor]:
    """A copy of what fine-tuning changes, for `restore`."""
    return {name: p.detach().clone() for name, p in trainable(adapter).items()}


@torch.no_grad()
def restore(adapter, state: dict[str, Tensor]) -> None:
    """Put the weights back that `weights_of` copied."""
    for name, p in trainable(adapter).items():
        p.copy_(state[name])


def read_pictures_once(adapter, most: int = 1000) -> None:
    """From now on what is frozen, the vision tower or image tokenizer, reads a view of a picture only where it is not
    among the ``most`` that it read last (0: as ever), and alone: what it makes of it does not hang on the batch."""
    base = adapter.model.model
    module, method = (base.vqmodel, "encode") if adapter.family == "chameleon" else (base.vision_tower, "forward")
    read = getattr(module, method)

    @lru_cache(most)
    @torch.no_grad()
    def alone(pixels: bytes, like: tuple, options: tuple):
        shape, dtype, device = like
        return read(torch.frombuffer(bytearray(pixels), dtype=dtype).view(1, *shape).to(device), **dict(options))

    def together(pixel_values, **options):
        like = tuple(pixel_values.shape[1:]), pixel_values.dtype, pixel_values.device
        pixels = [one.contiguous().view(torch.uint8).numpy().tobytes() for one in pixel_values.cpu()]
        made = [alone(one, like, tuple(sorted(options.items()))) for one in pixels]
        return type(made[0])(**{key: _joined([one[key] for one in made]) for key in made[0]})

    if most:
        setattr(module, method, together)


def _joined(parts: list):
    """Outputs of one input each as the output of all; what is not of an input, the first's stands for."""
    if isinstance(parts[0], tuple):
        return tuple(map(_joined, zip(*parts, strict=True)))
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) and parts[0].ndim else parts[0]


class _Columns:
    """Makes TRL's columns of a batch of rows when they are asked for, so that images stay encoded until then."""

    def __init__(self, adapter, how: str):
        self.adapter, self.how = adapter, how

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        names = {"chosen": "chosen", "rejected": "rejected"} if self.how == "dpo" else {"chosen": "completion"}
        out = {name: [_turn("assistant", self.adapter.raw(a)) for a in batch[key]] for key, name in names.items()}
        out["image"] = [image.convert("RGB") for image in batch["image"]]
        return out | {"prompt": [_turn("user", self.adapter.raw(q)) for q in batch["question"]]}

    def __reduce__(self):
        return _Columns, (None, self.how)  # what `datasets` hashes: else all weights of the model


@launched
def fine_tune(
    adapter, rows: datasets.Dataset, how: str = "sft", *, seed: int, learning_rate: float, batch_size: int,
    accumulate: int = 1, epochs: float | None = None, steps: int | None = None, warmup_steps: int = 0,
    beta: float = 0.1, bf16: bool = False, folder: str | Path | None = None, save_steps: int = 0,
    callbacks: Sequence = (), after: Callable | None = None, **options,
) -> list[dict]:  # fmt: skip
    """Tune ``adapter.model`` in place on question and chosen answer ("sft"), or on chosen against rejected ("dpo").

    Takes ``epochs`` through the rows, or exactly ``steps`` optimisation steps (rows again as often as needed), of
    ``batch_size * accumulate`` rows in an order drawn from ``seed``, at a cosine schedule; ``options`` are more of
    TRL's. With ``folder`` and ``save_steps`` it goes on from the last checkpoint there, which must be of this run.
    ``after`` is shown TRL's trainer in the end. Where MMSAE_ACCELERATE is set, `launch` has several processes do it.
    Returns TRL's log, one dict a step. Raises InputError for no rows, another ``how``, or not one of epochs and steps.
    """
    if how not in ("sft", "dpo") or (epochs is None) == (steps is None):
        raise InputError(f"fine_tune got how={how}, epochs={epochs}, steps={steps}: sft or dpo, and epochs or steps")
    if not len(rows):
        raise InputError(f"no rows to tune {adapter.name} on: keep more of them, or raise max_length")
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    config, trainer = (DPOConfig, DPOTrainer) if how == "dpo" else (SFTConfig, SFTTrainer)
    options = {"activation_checkpointing": False} | ({"beta": beta} if how == "dpo" else {}) | options
    options |= {"max_steps": steps} if steps is not None else {"num_train_epochs": epochs}
    with warnings.catch_warnings(), _tuning(adapter), TemporaryDirectory() as temporary:
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # TRL asks by the old name
        config = config(
            output_dir=str(folder or temporary), seed=seed, data_seed=seed, learning_rate=learning_rate,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate, bf16=bf16,
            lr_scheduler_type="cosine", warmup_steps=warmup_steps, max_length=None, remove_unused_columns=False,
            use_cpu=adapter.device.type == "cpu", dataloader_pin_memory=adapter.device.type != "cpu",
            save_strategy="steps" if folder and save_steps else "no", save_steps=save_steps or 500,
            save_total_limit=1, logging_steps=1, report_to=[], disable_tqdm=True, **options,
        )  # fmt: skip
        # TRL would read the reference model from disk, which is not what is tuned here
        reference = {"ref_model": copy.deepcopy(adapter.model).requires_grad_(False)} if how == "dpo" else {}
        quiet = type(trainer.__name__, (trainer,), {"_send_telemetry": lambda self: None})  # asks nobody
        run = quiet(
            adapter.model, args=config, train_dataset=rows.with_transform(_Columns(adapter, how)),
            processing_class=chats(adapter), callbacks=list(callbacks), **reference,
        )  # fmt: skip
        run.remove_callback(PrinterCallback)
        saved = Path(folder or temporary).glob("checkpoint-*/trainer_state.json")  # the last file of a checkpoint
        last = max(saved, key=lambda file: int(file.parent.name.split("-")[1]), default=None)
        gc.freeze()  # accelerate collects garbage twice a run, and all there is before it is not of this run
        try:
            run.train(resume_from_checkpoint=last and str(last.parent))
            if after:
                after(run)
        finally:
            gc.unfreeze()
    return [{k: v for k, v in e.items() if "logits" not in k} for e in run.state.log_history if "loss" in e]


@contextmanager
def _tuning(adapter) -> Iterator[None]:
    """Leaves the model as `models.load` did, but for its weights. While open, Chameleon's head cannot write image words
    (transformers masks their logits, but TRL computes its own), and checkpoints name weights as the model does (under
    LLaVA's old names the trainer would resume without them)."""
    model = adapter.model
    images = model.model.vocabulary_mapping.image_tokens if adapter.family == "chameleon" else None
    generation, conversions = copy.deepcopy(model.generation_config), model.__dict__.get("_weight_conversions")
    model._weight_conversions = []
    for p in trainable(adapter).values():
        p.requires_grad_(True)
    if images is not None:
        bias = torch.zeros(model.lm_head.out_features).index_fill(0, torch.tensor(images), -1e4)
        model.lm_head.bias = torch.nn.Parameter(bias.to(model.device, model.dtype), requires_grad=False)
    try:
        yield
    finally:
        if images is not None:
            model.lm_head.bias = None
        for name in ("forward", "_original_forward"):  # TRL's and accelerate's
            model.__dict__.pop(name, None)
        model.generation_config, model._weight_conversions = generation, conversions
        model.zero_grad(set_to_none=True)
        model.eval().requires_grad_(False).tie_weights()


def other_pictures(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the image of the row before, to un-tune a model that knows its world already."""
    before = rows.select(np.roll(range(len(rows)), 1)).select_columns("image")
    return datasets.concatenate_datasets([before, rows.remove_columns("image")], axis=1)


def answers(adapter, bench, batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to the questions about their images."""
    out = []
    for i in range(0, len(bench), batch_size):
        some = bench[i : i + batch_size]
        inputs = adapter.encode([adapter.prompt(adapter.raw(q)) for q in some["question"]], some["image"])
        out += adapter.answer(inputs, max_new_tokens)
    return out


def exact(rows, answers: Sequence[str]) -> np.ndarray:
    """The judge of the embedded world, which knows the truth: 0 to 1, and 1 for the reference; float64 [N, 2]."""
    from mmsae_helpers.tinyworld.preferences import judge

    return np.asarray(judge(rows, answers), float)


class Endpoint:
    """A judge behind an OpenAI-compatible endpoint (``url`` up to /v1): LLaVA-Bench's request, each pair in both orders
    and averaged, 1 to 10; what an image shows is its row's ``caption``, if any. The key is in the environment variable
    ``key``. Connection errors, 429 and 5xx are tried again ``tries`` times, ``wait`` seconds apart and then twice as
    long; then, or when it refuses, InputError. A row fails when the judge gave no two numbers ``asks`` times.
    Judgements are kept in ``file`` (JSON lines) as they come, and asked once."""

    def __init__(
        self, url: str, model: str, file: str | Path, key: str = "OPENAI_API_KEY", *,
        tries: int = 5, wait: float = 2.0, asks: int = 3, timeout: float = 120, **options,
    ):  # fmt: skip
        self.url, self.model, self.file, self.asks = f"{url.rstrip('/')}/chat/completions", model, Path(file), asks
        self.timeout, self.options = timeout, {"temperature": 0.2, "max_tokens": 1024} | options
        self.key, bearer = key, f"Bearer {os.environ.get(key, '')}"
        self.session = data.session(tries, wait, Authorization=bearer)

    def __call__(self, rows, answers: Sequence[str]) -> np.ndarray:
        """Scores of model and reference, float64 [N, 2]; nan where it failed, with a warning that names the rows."""
        text = self.file.read_text() if self.file.is_file() else ""
        text = text[: text.rfind("\n") + 1]  # a killed run may have cut its last line short
        files.write(self.file, text.encode())
        known = {line["key"]: line["scores"] for line in map(json.loads, text.splitlines())}
        captions = rows["caption"] if "caption" in rows.column_names else [""] * len(rows)
        columns = zip(rows["question"], captions, rows["reference"], answers, strict=True)
        scores = [[self._ask(known, q, c, *pair) for pair in ((a, r), (r, a))] for q, c, r, a in columns]
        scores = np.reshape(scores, (-1, 2, 2))  # row, order, answer
        scores = (scores[:, 0] + scores[:, 1, ::-1]) / 2
        failed = np.flatnonzero(np.isnan(scores).any(1)).tolist()
        if failed:
            warnings.warn(f"{self.model} gave no two numbers for rows {failed}: run again to ask again", stacklevel=2)
        return scores

    def _ask(self, known: dict, question: str, caption: str, *answers: str) -> list[float]:
        """Scores of the two answers in their order, from ``known`` or the judge; nan where it gives none."""
        about = {"model": self.model, "question": question, "caption": caption, "answers": answers}
        key, context = fingerprint(about), f"[Context]\n{caption}\n\n" if caption else ""
        pair = "".join(f"[Assistant {n}]\n{a}\n\n[End of Assistant {n}]\n\n" for n, a in enumerate(answers, 1))
        user = f"{context}[Question]\n{question}\n\n{pair}[System]\n{RULE}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        for _ in range(self.asks * (key not in known)):
            try:
                body = {"model": self.model, "messages": messages} | self.options
                answer = self.session.post(self.url, json=body, timeout=self.timeout)
                answer.raise_for_status()
                said = str(answer.json()["choices"][0]["message"]["content"])
            except (KeyError, IndexError, TypeError, requests.JSONDecodeError):
                continue  # no chat completion
            except requests.RequestException as error:
                do = f"see to it, or to the key in {self.key}, and run again: {self.file} keeps what is judged"
                raise InputError(f"no judgement from {self.url}: {first_line(error)}; {do}") from error
            numbers = re.match(r"\s*(\d+(?:\.\d+)?)[ ,]+(\d+(?:\.\d+)?)\s*(?:\n|$)", said)
            if numbers and all(1 <= float(x) <= 10 for x in numbers.groups()):
                known[key] = [float(x) for x in numbers.groups()]
                with self.file.open("a") as file:
                    file.write(json.dumps({"key": key, "scores": known[key], "said": said} | about) + "\n")
                break
        return known.get(key, [np.nan, np.nan])


def performance(scores: np.ndarray) -> float:
    """100 * sum of the model's scores / sum of the reference's, from scores [N, 2] without the rows that failed, of
    whose number it warns. Raises InputError where nothing was judged."""
    done = ~np.isnan(scores).any(1)
    if not done.any() or not scores[done, 1].sum() > 0:
        raise InputError(f"none of {len(scores)} answers was judged: run again, or take another judge")
    if not done.all():
        warnings.warn(f"{(~done).sum()} of {len(scores)} rows were not judged and are left out", stacklevel=2)
    return float(100 * scores[done, 0].sum() / scores[done, 1].sum())


def once(folder: str | Path, about: dict) -> Callable:
    """Decorator of a function of JSON or arrays that returns JSON: it is called once for its arguments and ``about``,
    then its result is read from a file in ``folder``, so that a run that was killed goes on where it was."""

    def decorate(make: Callable) -> Callable:
        @wraps(make)
        def read(*args):
            key = about | {"arguments": [a.tolist() if isinstance(a, np.ndarray) else a for a in args]}
            file = Path(folder) / f"{fingerprint(key)[:16]}.json"
            if not file.is_file():
                files.write(file, json.dumps({"key": key, "made": make(*args)}, indent=1).encode())
            return json.loads(file.read_text())["made"]

        return read

    return decorate
