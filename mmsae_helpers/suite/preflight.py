"""What a profile needs, and what of it would fail, before the first download: ``--profile paper --gpu h100 [ONLY]``.

Models are built on torch's meta device, without weights. What a pass computes and holds is counted by running one and
two decoder blocks on FakeTensors, which have shapes alone; all else is arithmetic on parameters and `preflight.yaml`.
The processor's own work (decoding pictures, surveys, probes) is not in the hours.
"""

import argparse
import copy
import math
import os
import shutil
import sys
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace as Stand

import torch
import transformers as hf
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from mmsae_helpers import models, saes
from mmsae_helpers.errors import InputError, first_line
from mmsae_helpers.suite import parameters, runner

FACTS = yaml.safe_load(Path(__file__).with_name("preflight.yaml").read_text(encoding="utf-8"))
GIB = 2**30
NAMES = {  # parameters that name models and data sets, alone or in lists
    "model": "model text_model instruct_model control_model classifier image_classifier multimodal language_models "
    "other_models arms",
    "dataset": "dataset text_dataset documents benchmark vqa",
}
PROMPT = 40  # tokens of a question and its template


class Live(TorchDispatchMode):
    """Counts bytes of storages that are made while it is open, ``known`` tensors' left out: ``peak``, most at once."""

    def __init__(self, *known):
        super().__init__()
        self.now, self.peak, self._seen = 0, 0, {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if (key := storage._cdata) not in self._seen:
                self._seen.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return out

    def _free(self, key, n_bytes):
        self.now -= n_bytes
        self._seen.discard(key)


def _attention(q, k, *_, out_shape=None, **__):
    return 4 * math.prod(q) * k[-2]


def _attention_backward(_, q, k, *__, out_shape=None, **___):
    return 10 * math.prod(q) * k[-2]


def counted(run, *known) -> tuple[int, int]:
    """Peak bytes of what ``run()`` makes beside the tensors ``known``, and its FLOPs, two a multiply-add."""
    cpu = torch.ops.aten  # whose attention torch does not count
    own = {cpu._scaled_dot_product_flash_attention_for_cpu: _attention}
    own[cpu._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward
    with FlopCounterMode(display=False, custom_mapping=own) as flops, Live(*known) as live:
        run()
    return live.peak, flops.get_total_flops()


@cache
def hub(name: str, kind: str) -> str | None:
    """What the hub says when asked for a repository: "" where it grants it, None where it cannot be reached."""
    import huggingface_hub

    try:
        return huggingface_hub.auth_check(name.partition(":")[0], repo_type=kind) or ""
    except huggingface_hub.errors.GatedRepoError:
        return f"accept its licence at https://huggingface.co/{'datasets/' * (kind == 'dataset')}{name} and log in"
    except huggingface_hub.errors.RepositoryNotFoundError:
        return "the hub has no such repository, or does not show it to you"
    except Exception:  # no network has a dozen faces
        return None


def config_of(name: str):
    """A model's config, from its folder, the hub, the hub's cache, or `preflight.yaml`; else InputError."""
    path, known = models.resolve(name), FACTS["models"].get(name, {}).get("config")
    said = None if os.path.isdir(path) else hub(name, "model")
    if said:
        raise InputError(f"model {name}: {said}")
    if known and said is None:
        return hf.AutoConfig.for_model(**copy.deepcopy(known))
    try:
        return hf.AutoConfig.from_pretrained(path, local_files_only=said is None)
    except Exception as error:  # as of models.load
        why = first_line(error) if os.path.isdir(path) or said == "" else "neither in preflight.yaml nor reachable"
        raise InputError(f"model {name}: {why}; give its folder, or mend the id or the network") from None


class Model:
    """A model without weights. ``adapter``: its adapter, on the meta device (None for an image classifier);
    ``n_weights``; ``stored``: bytes on the hub."""

    def __init__(self, name: str):
        self.name, self.config, self.adapter = name, config_of(name), None
        family = models.FAMILIES.get(self.config.model_type, models.Adapter)
        factory = hf.AutoModelForCausalLM if family is models.Adapter else hf.AutoModelForImageTextToText
        if type(self.config) in hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            factory = hf.AutoModelForImageClassification
        with torch.device("meta"):
            self.model = factory.from_config(self.config)
        if factory is not hf.AutoModelForImageClassification:
            self.adapter = family(name, self.model, *_stand_ins(self.config))
        self.n_weights = sum(p.numel() for p in self.model.parameters())
        self.stored = self.n_weights * (self.config.dtype or torch.float32).itemsize

    def image(self, size) -> tuple[int, int]:
        """Tokens that a picture of ``size`` (height, width) takes in the text, and how often the tower runs for it."""
        side, pinpoints = 1, getattr(self.config, "image_grid_pinpoints", None)
        if pinpoints:
            from transformers.image_processing_utils import select_best_resolution

            side = self.config.vision_config.image_size
            return self.adapter.written(size), 1 + math.prod(select_best_resolution(size, pinpoints)) // side**2
        return (self.adapter.written(size) if self.adapter.image_token_id is not None else 0), 1

    @cache  # noqa: B019 - models live as long as the program
    def tower(self, dtype) -> tuple[int, int]:
        """Peak bytes beside the weights, and FLOPs, of one picture in the vision tower (or image tokenizer)."""
        parts = {key: m for key, m in self.model.named_modules() if key.split(".")[-1] in ("vision_tower", "encoder")}
        if not parts:
            return 0, 0
        part = copy.deepcopy(parts[min(parts, key=len)]).requires_grad_(False).to(dtype)
        config = next(filter(None, (getattr(self.config, f"{k}_config", None) for k in ("vision", "vq"))), None)
        config = config or self.config.encoder
        side = getattr(config, "image_size", None) or config.resolution
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            part.to_empty(device="cpu")
            pixels = torch.empty(1, 3, side, side, dtype=dtype)
            return counted(lambda: part(pixels), *part.parameters(), *part.buffers(), pixels)

    @cache  # noqa: B019 - models live as long as the program
    def decoding(self, blocks: int, batch: int, tokens: int, dtype, head=False, grad="") -> tuple[int, int]:
        """Peak bytes beside the weights, and FLOPs, of ``batch`` x ``tokens`` through the first ``blocks`` decoder
        blocks (and on to the logits, if ``head``): of two blocks, and so many times what a third adds. ``grad``:
        forward and backward, to the "inputs", or to all "weights", whose gradients then count too."""
        (m2, f2), (m3, f3) = (self._short(n, batch, tokens, dtype, head, grad) for n in (2, 3))
        return m2 + max(blocks - 2, 0) * (m3 - m2), f2 + (blocks - 2) * (f3 - f2)

    @cache  # noqa: B019 - models live as long as the program
    def speed(self, device="auto", tokens=1024) -> float:
        """TFLOP/s in bfloat16 that two decoder blocks reach on this machine's ``device``, weights random."""
        (short, shapes), device = self._language(2, 1, tokens, torch.bfloat16), models.pick_device(device)
        run, n_words = short.base_model.to_empty(device=device).requires_grad_(False), short.config.vocab_size
        given = {name: torch.randn(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
        for tensor in (*run.parameters(), *run.buffers()):
            if n_words not in tensor.shape:  # nothing is embedded
                tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
        known = {"run": run, "given": given}
        timer = Timer("run(**given, use_cache=False)", globals=known, num_threads=os.cpu_count())
        flops = self._short(2, 1, tokens, torch.bfloat16, False, "")[1]
        return flops / timer.blocked_autorange(min_run_time=2).median / 1e12

    def _language(self, blocks, batch, tokens, dtype):
        """The language model with so many blocks, on the meta device, and the shapes of what it is given."""
        config = copy.deepcopy(self.config.get_text_config())
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
        text = type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING
        factory = hf.AutoModelForCausalLM if text else hf.AutoModelForImageTextToText
        with torch.device("meta"):
            short = factory.from_config(config, dtype=dtype)
        shapes = {"inputs_embeds": (batch, tokens, config.hidden_size)}
        if getattr(config, "add_cross_attention", False):  # the encoder's states, projected where widths differ
            shapes["encoder_hidden_states"] = (batch, 1 + math.prod(self.adapter.patch_grid), config.hidden_size)
        return short, shapes

    def _short(self, blocks, batch, tokens, dtype, head, grad):
        short, shapes = self._language(blocks, batch, tokens, dtype)
        short.requires_grad_(grad == "weights").train(grad == "weights")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(bool(grad)):
            short.to_empty(device="cpu")
            given = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
            if grad:
                given["labels"] = torch.zeros(batch, tokens, dtype=torch.int64)
            given["inputs_embeds"].requires_grad_(grad == "inputs")

            def run():
                out = (short if head or grad else short.base_model)(**given, use_cache=False)
                if grad:
                    out.loss.backward()

            peak, flops = counted(run, *short.parameters(), *short.buffers(), *given.values())
            return peak + sum(x.nbytes for x in given.values()), flops


def _stand_ins(config):
    """A tokenizer and a processor that say as much as an adapter asks when it is made."""
    words = Stand(pad_token="<pad>", pad_token_id=0, bos_token_id=0, convert_ids_to_tokens=str)
    if (vq := getattr(config, "vq_config", None)) is None:
        return (words, Stand()) if config.model_type in models.FAMILIES else (words,)
    side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
    names = dict(image_start_token="<", image_token="<image>", image_end_token=">", image_seq_length=side**2)
    return words, Stand(image_processor=Stand(crop_size=dict(height=vq.resolution, width=vq.resolution)), **names)


def sae_bytes(d_in: int, d_sae: int) -> int:
    """Of an SAE's weights, float32: 4 (2 d_in d_sae + d_sae + d_in)."""
    return 4 * (2 * d_in * d_sae + d_sae + d_in)


def training_bytes(d_in: int, d_sae: int, batch: int, n: int = 1) -> int:
    """Peak bytes of training ``n`` SAEs side by side, one step at a time: with W the bytes of an SAE's weights, 3 W
    each (weights and Adam's two moments), and for the one that makes a step its gradient W and the larger of what there
    is when the backward pass begins, three times the features of the batch and four times its activations, and when
    the decoder's gradients are added, W / 2 and the features once. float32; with autocast up to a fifth less."""
    w, features, acts = sae_bytes(d_in, d_sae), 4 * batch * d_sae, 4 * batch * d_in
    return 3 * n * w + w + max(3 * features + 4 * acts, w // 2 + features + 2 * acts)


class Needs:
    """What a notebook needs with parameters ``v``, on a GPU of `preflight.yaml`: its recipe, below, calls the methods.

    ``phases``: what is on the GPU at a time, {what: (bytes, parameter that it hangs on)}; ``flops`` {(what, kind of
    product): FLOPs}; ``seconds`` {what: s} of what no FLOPs decide; ``disk`` {(what, of what): bytes}; ``licences`` to
    accept; ``problems``: a line for each thing that would fail.
    """

    def __init__(self, name: str, v: dict, gpu: str = "h100", tflops: float | str | None = None):
        self.gpu, self.problems, self.licences, self.models = FACTS["gpus"][gpu], [], set(), {}
        self.measured = None
        self.flops, self.seconds, self.disk, self.phases = Counter(), Counter(), Counter(), []
        self.dtype = getattr(torch, v.get("dtype", "float32"), None)
        if not isinstance(self.dtype, torch.dtype):
            raise InputError(f"{name}: no dtype {v['dtype']!r}; choose bfloat16 or float32")
        self.precise = "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.kind = "bfloat16" if self.dtype.itemsize == 2 else self.precise
        for kind, params in NAMES.items():
            for one in dict.fromkeys(x for param in params.split() for x in _names(v.get(param))):
                try:
                    self._named(one, kind)
                except InputError as error:
                    self.problems.append(str(error))
        if tflops == "here" and (asked := [m for m in self.models.values() if m.adapter]):
            tflops = self.measured = max(asked, key=lambda m: m.n_weights).speed()
        reached = self.gpu["bfloat16"] * FACTS["utilisation"]["bfloat16"]
        self.faster = tflops / reached if tflops and tflops != "here" else 1
        if name[:2] in RECIPES and not self.problems:
            try:
                RECIPES[name[:2]](self, v)
            except KeyError as error:
                raise InputError(f"{name} has no parameter {error} any more: mend its recipe in preflight.py") from None
            most, free = max(self.phases, key=self.at_once), self.gpu["memory"] - FACTS["context"]
            if (need := self.at_once(most) / GIB) > free:
                parts = [
                    f"{n / GIB:.0f} hang on {param}" for n, param in sorted(most.values())[::-1] if n > 0.2 * GIB * free
                ]
                what = f"needs {need:.0f} GiB of GPU memory, of {free:.0f}: {', '.join(parts)}"
                self.problems.append(f"{what}; lower those, or take a larger GPU")
        self.problems = list(dict.fromkeys(self.problems))

    def _named(self, name, kind):
        known = _facts(kind, name)
        if (known or {}).get("gated"):
            self.licences.add(name)
        if kind == "model":
            self.models[name] = _model(name)
            if not os.path.isdir(models.resolve(name)):
                self.disk["models", name] = self.models[name].stored
        elif "/" in name and not os.path.exists(name):
            said = hub(name, "dataset")
            if said or said is None and not known:
                raise InputError(f"data set {name}: {said or 'neither known to preflight.yaml nor reachable'}")

    @staticmethod
    def at_once(phase) -> int:
        """Weights, the largest pass, and SAEs: in training, or loaded and made."""
        part = {what: n for what, (n, _) in phase.items()}
        return part["weights"] + part["passes"] + max(part["SAEs"], part["training"])

    def phase(self, names, saes=0, more=0):
        """From here on these models, ``saes`` bytes of SAEs, and ``more`` bytes as weights are on the GPU."""
        weights = sum(self.models[name].n_weights for name in names) * self.dtype.itemsize + more
        now = {"weights": (weights, "the model or dtype"), "passes": (0, ""), "training": (0, "")}
        self.phases.append(now | {"SAEs": (saes, "seeds or the SAEs' width")})

    def data(self, name):
        """The facts about a data set; those of any other where it is not listed."""
        any_, own = FACTS["datasets"]["any"], _facts("dataset", name)
        return {key: x for key, x in any_.items() if key != "images" or own is None} | (own or {})

    def images(self, name, per_class):
        """Number of images of so many a class; their files go to disk."""
        n = self.data(name)["classes"] * per_class
        self.disk["pictures", name] = max(self.disk["pictures", name], n * self.data(name)["bytes"])
        return n

    def asked(self, name, model, more=PROMPT):
        """Tokens and tower passes of a question of ``more`` tokens about an image."""
        tokens, views = self.models[model].image(tuple(self.data(name)["picture"]))
        return tokens + more, views

    def document(self, name, model, cut=0):
        """Tokens, tower passes, and share of image tokens of a document of mean length m cut at c tokens: lengths taken
        as exponential, of which c (1 - exp(-m / c)) are left."""
        facts, reads = self.data(name), self.models[model].adapter.config.max_position_embeddings
        n_images = facts.get("images", 0) if self.models[model].adapter.image_token_id is not None else 0
        each, views = self.models[model].image(tuple(facts["picture"])) if n_images else (0, 0)
        whole = facts["tokens"] + n_images * each
        left = (cut or reads) * -math.expm1(-whole / (cut or reads))
        if cut > reads:
            self.problems.append(f"{model} reads {reads} tokens, not {cut}: lower max_tokens or the context")
        return left, n_images * views * left / whole, n_images * each / whole

    def fetch(self, name, count):
        """Bytes and seconds of ``count`` documents whose images are all alive; number of images taken as geometric."""
        facts, link = self.data(name), FACTS["links"]
        self.disk["pictures", name] = count * facts["images"] * facts["bytes"]
        if facts.get("links"):
            q, alive = 1 / facts["images"], link["alive"]
            share = q * alive / (1 - alive * (1 - q))
            self.seconds["links"] += count / share * facts["images"] * link["seconds"] / link["threads"]

    def run(self, model, n, sample, batch, param="batch_size", block=None, grad=""):
        """``n`` samples of (tokens, tower passes) through the blocks up to ``block``, or else to the logits."""
        m, (tokens, views) = self.models[model], sample[:2]
        try:
            blocks = m.adapter.n_layers if block is None else m.adapter.check_layer(block) + 1
        except InputError as error:
            self.problems.append(str(error))
            return
        if tokens > (reads := m.adapter.config.max_position_embeddings):
            self.problems.append(f"{model} reads {reads} tokens, but a picture and its question take {tokens:.0f}")
        held, flops = m.decoding(blocks, batch, math.ceil(tokens), self.dtype, block is None, grad)
        of_tower, tower_flops = m.tower(self.dtype)
        self._most("passes", max(held, math.ceil(of_tower * views * batch)), param)
        self.flops["passes", self.kind] += n * (flops / batch + views * tower_flops)

    def _most(self, what, n_bytes, param):
        self.phases[-1][what] = max(self.phases[-1][what], (n_bytes, param))

    def write(self, model, n, batch, new):
        """``n`` answers of ``new`` tokens: for each token of a batch all weights are read once."""
        n_bytes, speed = self.models[model].n_weights * self.dtype.itemsize, self.gpu["bandwidth"] * 1e12
        self.seconds["answers"] += math.ceil(n / batch) * new * n_bytes / speed / FACTS["bandwidth_used"]

    def train(self, name, model, n, d_sae, batch, steps, autocast, together=0, layers=1, beside=0):
        """``n`` SAEs, with ``beside`` more in one `saes.trained`: 12 d_in d_sae FLOPs a token and SAE; on the GPU
        `training_bytes`, and `saes.CHUNK` batches of tokens."""
        d, kind = self.models[model].adapter.d_model, "bfloat16" if autocast else self.precise
        held = training_bytes(d, d_sae, batch, min(n + beside, together or n)) + 4 * saes.CHUNK * batch * d * layers
        self._most("training", held, "SAEs in training: together, seeds, their width or sae_batch_size")
        self.flops["SAE training", kind] += 12.0 * n * d * d_sae * batch * steps
        self.disk["SAEs", name] += n * sae_bytes(d, d_sae)

    def encode(self, model, n, d_sae, tokens):
        """Features and reconstructions of tokens by ``n`` SAEs: 4 d_in d_sae FLOPs each."""
        self.flops["encoding", self.precise] += 4.0 * n * self.models[model].adapter.d_model * d_sae * tokens

    def shards(self, name, model, tokens, layers):
        """Activations on disk in float32, 33 bytes beside each token."""
        self.disk["cache", name] += tokens * layers * (4 * self.models[model].adapter.d_model + 17)

    def released(self, source, sae_id, model, layers, d_sae):
        """Checks blocks and widths of a release of SAEs, as far as they are known; its files."""
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        d, release = self.models[model].adapter.d_model, get_pretrained_saes_directory().get(source)
        if not release and not os.path.isdir(source):
            self.problems.append(f"there is neither a release nor a folder of SAEs {source}: mend sae_source")
        for one in (sae_id.format(layer=layer) for layer in layers if release):
            if one not in release.saes_map:
                self.problems.append(f"{source} has no SAE {one}, but {', '.join(release.saes_map)}: mend layers")
        for key, ours in {"d_in": d, "d_sae": d_sae}.items():
            if ours != (theirs := FACTS["saes"].get(source, {}).get(key, ours)):
                self.problems.append(f"SAEs of {source} have {key} {theirs}, not {ours}: mend d_sae or the model")
        self.disk["SAEs", source] = len(layers) * sae_bytes(d, d_sae)

    def hours(self) -> dict[str, float]:
        """Hours by what takes them: seconds, and FLOPs over what the GPU reaches of its peak for their kind."""
        found = Counter({what: s / 3600 for what, s in self.seconds.items()})
        for (what, kind), flops in self.flops.items():
            found[what] += flops / (self.gpu[kind] * 1e12 * FACTS["utilisation"][kind] * self.faster) / 3600
        return dict(found)

    def told(self) -> list[str]:
        """Lines about it, in GiB, FLOPs and hours."""
        disk = Counter()
        for (what, _), n_bytes in self.disk.items():
            disk[what] += n_bytes / GIB
        most = max(self.phases, key=self.at_once, default={})
        rows = {
            "models": {x.name: f"{x.n_weights / 1e9:.3g} B" for x in self.models.values()},
            "GPU": {what: f"{n_bytes / GIB:.1f}" for what, (n_bytes, _) in most.items()},
            "FLOPs": {f"{what} in {kind}": f"{n:.1e}" for (what, kind), n in self.flops.items()},
            "hours": {what: f"{h:.1f}" for what, h in self.hours().items()},
            "disk": {what: f"{n:.1f}" for what, n in disk.items()},
        }
        total = {"disk": f"; together {disk.total():.0f} GiB", "hours": f"; together {sum(self.hours().values()):.1f}"}
        if self.measured:
            total["hours"] += f" at {self.measured:.3g} TFLOP/s, measured here"
        total["GPU"] = f"; at once {self.at_once(most) / GIB:.1f} of {self.gpu['memory']} GiB" if most else ""
        lines = [
            f"{row:8}{', '.join(map(' '.join, cells.items()))}{total.get(row, '')}"
            for row, cells in rows.items()
            if cells
        ]
        lines += [f"licence {name}" for name in sorted(self.licences)]
        return lines + [f"FAILS   {problem}" for problem in self.problems]


_model = cache(Model)


def _names(value) -> list[str]:
    """The name in a parameter, or those in a list of names, or of lists that begin with one; of 06's "model on data
    set" the model; empty ones left out."""
    if isinstance(value, list):
        return [x for one in value for x in _names(one[0] if isinstance(one, list) else one)]
    return [value.partition(" on ")[0]] if value else []


def _facts(kind: str, name: str) -> dict | None:
    """What `preflight.yaml` says of a model or data set; a draw or configuration (name:one) is as the data set."""
    return FACTS[f"{kind}s"].get(name, FACTS[f"{kind}s"].get(name.partition(":")[0]))


# ---------------------------------------------------------------- recipes: what each notebook does with its parameters


def _on_text(n, v, name, model, layers, source, kinds=2):
    """Text through a model of 01 and 02, and the SAEs on it, ``kinds`` with their random ones; how many are trained."""
    doc, number = n.document(v["text_dataset"], model, v["max_tokens"]), len(layers)
    learn = v["train_documents"]
    if source == "train":
        number *= len(v["seeds"])
        n.train(name, model, number, v["d_sae"], v["sae_batch_size"], v["sae_steps"], True, layers=len(layers))
        learn = max(learn, (not v["cache"]) * v["sae_steps"] * v["sae_batch_size"] / doc[0])
    else:
        n.released(source, v["sae_id"], model, layers, v["d_sae"])
    n.run(model, v["label_documents"] + learn, doc, v["text_batch_size"], "text_batch_size", max(layers))
    n.shards(name, model, v["cache"] * (v["label_documents"] + v["train_documents"]) * doc[0], len(layers))
    n.encode(model, kinds * number, v["d_sae"], v["label_documents"] * doc[0])
    return number


def _01(n, v):
    llava, source, blocks = v["model"], v["dataset"], v["layers"]
    n.phase([v["text_model"], v["instruct_model"]])
    number = 3 * _on_text(n, v, "01", v["text_model"], blocks, v["sae_source"], 3)  # random ones of both kinds
    number += 2 * _on_text(n, v, "01", v["instruct_model"], [v["instruct_layer"]], v["instruct_sae_source"])
    held = number * sae_bytes(n.models[llava].adapter.d_model, v["d_sae"])
    n._most("SAEs", held, "seeds or d_sae")
    n.phase([llava], held)
    seen, few = n.images(source, v["images_per_class"]), v["control"]["images"] + 3 * v["health_images"]
    n.run(llava, seen + few, n.asked(source, llava), v["batch_size"], block=max(blocks))
    tokens = n.asked(source, llava, 0)[0]
    n.encode(llava, number, v["d_sae"], (seen + few) * tokens)
    n.shards("01", llava, v["cache"] * seen * tokens, len(blocks))


def _02(n, v):
    llava, source, blocks = v["model"], v["dataset"], v["layers"]
    n.phase([llava, v["text_model"]])
    number = _on_text(n, v, "02", v["text_model"], blocks, v["sae_source"]) + 2 * len(blocks) * len(v["seeds"])
    n._most("SAEs", number * sae_bytes(n.models[llava].adapter.d_model, v["d_sae"]), "seeds or d_sae")
    seen, few, asked = (n.images(source, v[f"{k}images_per_class"]) for k in ("", "compare_", "answer_"))
    sample, tokens = n.asked(source, llava), n.asked(source, llava, 0)[0]
    for block in [max(blocks), blocks[len(blocks) // 2], *([] if v["cache"] else blocks)]:
        n.run(llava, seen, sample, v["batch_size"], block=block)
    n.run(llava, 4 * few + asked, sample, v["batch_size"], block=n.models[llava].adapter.n_layers - 1)
    n.write(llava, asked, v["batch_size"], 16)
    n.encode(llava, number, v["d_sae"], seen * tokens)
    n.shards("02", llava, v["cache"] * seen * tokens, len(blocks))


def _03(n, v):
    model, seeds, words, B = v["model"], len(v["seeds"]), min(v["max_new_tokens"], 12), v["sae_batch_size"]
    learn, seen = (n.images(v["dataset"], v[f"{k}images_per_class"]) for k in ("train_", ""))
    width, most = (
        v["expansion"] * n.models[model].adapter.d_model,
        {"together": v["together"], "layers": len(v["layers"])},
    )
    swept = (len({*v["layers"]}) + len({*v["l1_coefficients"]} - {v["l1_coefficient"]})) * seeds
    printed, alone = len(v["printed_lambdas"]) * seeds, (len(v["last_step_l1_coefficients"]) + 1) * seeds
    n.phase([model])
    n.train("03", model, swept + alone, width, B, v["sae_steps"], v["sae_autocast"], **most)
    n.train("03", model, printed, width, B, max(1, v["printed_epochs"] * learn * words // B), v["sae_autocast"], **most)
    surveyed = 2 * swept + len({*v["layers"]}) * seeds + printed + alone  # matched ones of all, even ones of the main
    passes = seen * (seeds * math.ceil(surveyed / seeds / v["together"]) + 2)  # captions swapped anew for every seed
    n.run(model, learn + passes, (words + 1, 1), v["batch_size"], block=max(v["layers"]))
    n.write(model, (v["captions"] == "generated") * (learn + seen), v["batch_size"], v["max_new_tokens"])
    n.encode(model, 2 * surveyed, width, seen * words)
    n.shards("03", model, v["cache"] * (learn + seen) * words, len(v["layers"]))


def _04(n, v):
    """Each call of the notebook's `train` takes a pass for every ``saes_together`` SAEs, and so does each measurement,
    of each kind of token."""
    seeds, B, side, steps = len(v["seeds"]), v["sae_batch_size"], v["saes_together"], v["sae_steps"]
    swept = len(v["sweep_l1"]) * seeds
    size = {"text": (v["text_batch_size"], "text_batch_size"), "mixed": (v["batch_size"], "batch_size")}
    n.fetch(v["dataset"], v["train_interleaved"] + v["test_interleaved"])
    twins = []

    def learn(model, kind, sample, at, width, number, steps=steps, share=1.0, beside=0, again=True):
        docs = v["train_texts" if kind == "text" else "train_interleaved"]
        if v["cache"] and again:  # found on disk
            docs = 0
        elif not v["cache"]:
            docs = math.ceil(number / side) * (steps + v["norm_batches"]) * B / sample[0] / share
        n.shards("04", model, v["cache"] * docs * sample[0], 1)
        n.run(model, docs, sample, *size[kind], at)
        n.train("04", model, number, width, B, steps, v["sae_autocast"], side, beside=beside)

    def measure(model, kind, sample, at, width, number, times=1):
        docs = v["test_texts" if kind == "text" else "test_interleaved"]
        again = 1 if v["cache"] else times * math.ceil(number / side)
        n.run(model, again * docs, sample, *size[kind], at)
        n.encode(model, number, width, docs * sample[0])

    lists = (v[key] for key in ("multimodal", "language_models", "layers", "expansions", "contexts"))
    for i, (model, base, at, expansion, cut) in enumerate(zip(*lists, strict=True)):
        sample = {"text": n.document(v["text_dataset"], model, cut), "mixed": n.document(v["dataset"], model, cut)}
        width, config = expansion * n.models[model].adapter.d_model, n.models[model].config.to_dict()
        n.phase([model])
        for _ in range(1 if config in twins else 2):  # the untrained twin, which models of one shape share
            for kind in sample:
                learn(model, kind, sample[kind], at, width, seeds, again=False)
                learn(model, kind, sample[kind], at, width, swept)
        if i == 0:
            learn(model, "mixed", sample["mixed"], at, width, seeds, share=sample["mixed"][2])  # image tokens alone
            sized = {(w, s) for w in v["widths"] for s in (*v["length_steps"], steps)} - {(1, steps)}
            for wide, length in sized:
                learn(model, "mixed", sample["mixed"], at, int(wide * width), seeds, length, beside=seeds)
            measure(model, "mixed", sample["mixed"], at, width, math.ceil(sum(w for w, _ in sized)) * seeds)
        meets = [(2 + (i == 0) + bool(base)) * seeds, (2 + bool(base)) * swept]
        for number in meets + [2 * seeds, 2 * swept] * (config not in twins):
            measure(model, "text", sample["text"], at, width, number)
            measure(model, "mixed", sample["mixed"], at, width, number, 2)  # images, and words
        n.run(model, 2 * v["loss_documents"] * (2 + 2 * seeds), sample["mixed"], *size["mixed"])
        twins.append(config)
        if base:
            n.phase([base])
            plain = n.document(v["text_dataset"], base, cut)
            learn(base, "text", plain, at, width, seeds, again=False)
            learn(base, "text", plain, at, width, swept)
            for number in meets:
                measure(base, "text", plain, at, width, number)


def _sae_v(n, v, name, model, layer, autocast, trained, batch, param):
    """The SAE-Vs of 05 and 06, and the held-out documents; bytes of these SAEs and of both kinds of random ones."""
    mixed, width = n.document(v["documents"], model, v["context"]), v["expansion"] * n.models[model].adapter.d_model
    n.train(name, model, trained, width, v["sae_batch_size"], v["sae_steps"][0], autocast)
    tokens, cached = (v["sae_steps"][0] + v["norm_batches"]) * v["sae_batch_size"], v.get("cache", True)
    learn = v["interleaved"][0] if cached else tokens / mixed[0]
    n.run(model, learn + v["interleaved"][1], mixed, batch, param, layer)
    n.encode(model, 3 * trained, width, v["interleaved"][1] * mixed[0])
    n.shards(name, model, cached * sum(v["interleaved"][:2]) * mixed[0], 1)
    return 3 * trained * sae_bytes(n.models[model].adapter.d_model, width)


def _05(n, v):
    model, seeds, at, shares = v["model"], len(v["seeds"]), v["layer"], len(v["shares"])
    images, with_gradients, documents = v["batch_sizes"]
    n.phase([model])
    if v["sae_source"] == "train":
        n.fetch(v["documents"], sum(v["interleaved"]))
        _sae_v(n, v, "05", model, at, v["autocast"], seeds, documents, "batch_sizes[2]")
    width = n.models[model].adapter.d_model
    n.phase([model], 3 * seeds * sae_bytes(width, v["expansion"] * width))  # trained, and random ones of both kinds
    n.images(v["dataset"], v["images_per_class"])
    sample = n.asked(v["dataset"], model, 3 * PROMPT)  # ten options
    # of four scores and one lot a seed, of three scores without an SAE, of controls at the last share; of the curve
    masks = 5 * shares * seeds + 3 * shares + 4 * seeds * (2 + len(v["weight_readings"])) + 8 * len(v["more_shares"])
    masks += len(v["deltas"]) * seeds  # of the one score that it changes
    n.run(model, v["n_images"] * (masks + 10), sample, images, "batch_sizes[0]")
    n.run(model, v["n_images"], sample, with_gradients, "batch_sizes[1]", grad="inputs")


def _06(n, v):
    seeds, tune, every = len(v["seeds"]), v["tuning"], list(dict.fromkeys(_names(v["arms"])))
    n.fetch(v["documents"], sum(v["interleaved"][:2]))
    rows, held = n.data(v["dataset"]), 0
    n.disk["pictures", v["dataset"]] = rows.get("download", v["n_rows"] * rows["bytes"])
    copies = sum(n.models[name].n_weights for name in every) * n.dtype.itemsize  # the weights that tuning starts from
    n.phase(every, more=copies)
    for model in every if v["sae_source"] == "train" else ():
        held += _sae_v(n, v, "06", model, v["layers"][model], False, seeds + 1, v["batch_size"], "batch_size")
    sample = {name: n.asked(v["dataset"], name, rows["tokens"] + PROMPT) for name in every}
    n.phase(every, held, copies)
    for model in every:  # with the picture: scores, then IFD's losses; without: two more
        n.run(model, 2 * v["n_rows"] * seeds, sample[model], v["batch_size"])
        n.run(model, 2 * v["n_rows"] * seeds, (rows["tokens"] + PROMPT, 0), v["batch_size"])
    for arm, how, _, rankings, shares in v["arms"]:
        (model,) = _names(arm)  # a second data set is taken for as large as the first
        pair, lists = 1 + (how == "dpo"), len(rankings) + 1
        number, share = len(shares) * lists + 1, sum(shares) * lists + 1
        own = n.models[model].n_weights * n.dtype.itemsize
        n.phase(every, held, copies + 2 * own + (how == "dpo") * own)  # Adam's moments, DPO's reference
        tuned, batch = pair * v["n_rows"] * tune["epochs"] * seeds * share, pair * tune["batch_size"]
        n.run(model, tuned, sample[model], batch, "tuning.batch_size", grad="weights")
        n.run(model, (how == "dpo") * tuned, sample[model], batch, "tuning.batch_size")
        n.write(model, seeds * number * v["n_benchmark"], v["batch_size"], v["max_new_tokens"])


def _07(n, v):
    model, asked, blocks = v["model"], sum(map(len, v["questions"].values())), v["layers"]
    learn, seen = (n.images(v["dataset"], v[f"{k}images_per_class"]) for k in ("train_", ""))
    seen, number, after = min(v["max_images"], seen) * asked, len(blocks) * len(v["seeds"]), PROMPT / 2
    n.phase([model], 3 * number * sae_bytes(n.models[model].adapter.d_model, v["d_sae"]))
    n.train("07", model, number, v["d_sae"], v["sae_batch_size"], v["sae_steps"], True, layers=len(blocks))
    n.run(model, learn + seen, n.asked(v["dataset"], model), v["batch_size"], block=max(blocks))
    n.encode(model, 3 * number, v["d_sae"], seen * after)
    n.shards("07", model, v.get("cache", True) * learn * after, len(blocks))


RECIPES = {"01": _01, "02": _02, "03": _03, "04": _04, "05": _05, "06": _06, "07": _07}


def estimate(root, profile: str, name: str, gpu="h100", tflops=None, **changed) -> Needs:
    """`Needs` of a notebook with the parameters of a profile, some of them ``changed``; InputError for a parameter that
    the notebook does not have."""
    notebook = Path(root) / "notebooks" / f"{name}.ipynb"
    known = parameters.defaults(notebook)
    given = parameters.load(Path(root) / "params" / profile / f"{name}.yaml", notebook)
    return Needs(name, known | given | parameters.check(changed, known, "changed"), gpu, tflops)


def no_room(needs) -> list[str]:
    """A line for each file system with less free space than the notebooks together want on it."""
    from huggingface_hub.constants import HF_HOME

    most, wanted = Counter(), {}
    for one in needs:
        most |= one.disk  # what several notebooks name is there once
    artifacts = os.environ.get("MMSAE_ARTIFACTS") or parameters.repo_root() / "artifacts"
    for (what, _), n_bytes in most.items():
        name, place = ("HF_HOME", HF_HOME) if what in ("models", "pictures") else ("MMSAE_ARTIFACTS", artifacts)
        there = next(p for p in (Path(place).absolute(), *Path(place).absolute().parents) if p.exists())
        of = wanted.setdefault(there.stat().st_dev, Stand(there=there, names=set(), needs=0))
        of.needs, of.names = of.needs + n_bytes / GIB, of.names | {name}
    (what, of), n_bytes = most.most_common(1)[0] if most else (("", ""), 0)
    do = f"most, {n_bytes / GIB:.0f}, {what} of {of}; take fewer documents or images, or set"
    return [
        f"{one.needs:.0f} GiB go to the disk of {one.there}, where {free:.0f} are free: {do} {' and '.join(one.names)}"
        for one in wanted.values()
        if one.needs > (free := shutil.disk_usage(one.there).free / GIB)
    ]


def main(argv=None) -> int:
    """Command line; returns the exit status: 0, 1 where something would fail, 2 for bad input."""
    parser = argparse.ArgumentParser("python -m mmsae_helpers.suite.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="paper", help="folder of params/ (default: paper)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(FACTS['gpus'])} (default: h100)")
    what = "TFLOP/s measured in bfloat16, or here: of two blocks of its largest model, now; other kinds in proportion"
    parser.add_argument("--tflops", type=lambda x: x if x == "here" else float(x), metavar="T", help=what)
    parser.add_argument("only", nargs="*", help="first letters of notebook names, as in 03 or 01,02")
    asked = parser.parse_args(argv)
    hf.utils.logging.set_verbosity_error()
    try:
        root, gpu = parameters.repo_root(), asked.gpu.lower()
        there = runner.of_profile(runner.order(root), root, asked.profile)
        if gpu not in FACTS["gpus"] or asked.tflops not in (None, "here") and not asked.tflops > 0:
            known = ", ".join(FACTS["gpus"])
            raise InputError(
                f"--gpu {asked.gpu} --tflops {asked.tflops}: give one of {known}, and a number above 0 or here"
            )
        needs = {}
        for name in runner.select(there, " ".join(asked.only)):
            needs[name] = estimate(root, asked.profile, name, gpu, asked.tflops)
            print("\n    ".join([name, *needs[name].told()]), flush=True)
        failing = no_room(needs.values())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in failing:
        print(f"FAILS {line}")
    hours, wrong = sum(sum(one.hours().values()) for one in needs.values()), [k for k in needs if needs[k].problems]
    print(f"{len(needs)} notebooks, {hours:.0f} hours on {gpu}; would fail: {', '.join(wrong) or 'none'}")
    return 1 if wrong or failing else 0


if __name__ == "__main__":
    sys.exit(main())
