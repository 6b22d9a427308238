"""Sparse autoencoders, all of them sae-lens's (imported inside functions, for it takes seconds): train, load, control.

Shapes: x [tokens, d_in] residual activations, f [tokens, d_sae] features >= 0.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice, tee
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from mmsae_helpers.errors import InputError, first_line
from mmsae_helpers.workers import autocast, crew

SAE_ID = "blocks.{layer}.hook_resid_post"
FOLDER = "layer_{:02d}_seed_{}"
ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu")
BUFFER = 65_536  # tokens that are mixed
CHUNK = 32  # batches within which each seed has its own order


@dataclass(frozen=True)
class TrainingConfig:
    """How an SAE is trained; names and meanings are sae-lens's.

    l1_coefficient: weight of the penalty sum_j f_j ||W_dec_j||; grows linearly over l1_warm_up_steps.
    lr: Adam's; linear warm-up, constant, linear decay to 0. steps: the optimiser's, each of batch_size tokens.
    normalize_activations: "expected_average_only_in" scales the input to a mean norm of sqrt(d_in) while training, by
        a factor estimated on the first norm_batches and folded into the weights; or "none".
    b_dec_init: "zeros" (sae-lens), or "mean": of those first batches.
    loss: "standard" (sae-lens's), or "as_printed" in paper B: mean squared error + l1_coefficient * mean(f).
    autocast: multiply in bfloat16 where the processor has it (weights and optimiser stay float32): 3 times faster.
    architecture: one of ARCHITECTURES, sae-lens's training classes; "standard" is ReLU + L1, as in the papers.
    options: further fields of sae-lens's configuration of that architecture, e.g. {"k": 8} of the TopK ones (features
        a token) or {"l0_coefficient": 1.0} of jumprelu; matryoshka_batchtopk has levels of d_sae / 8, / 4, / 2 and
        d_sae unless matryoshka_widths are among them.
    dead_after: steps without firing from which a feature is dead, for the TopK ones' auxiliary loss.
    """

    d_sae: int
    l1_coefficient: float
    lr: float
    steps: int
    batch_size: int
    l1_warm_up_steps: int = 0
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    normalize_activations: str = "expected_average_only_in"
    norm_batches: int = 8
    b_dec_init: str = "zeros"
    decoder_init_norm: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    architecture: str = "standard"
    options: Mapping = field(default_factory=dict)
    dead_after: int = 100
    autocast: bool = False
    loss: str = "standard"

    def __post_init__(self):
        counts = (self.d_sae, self.steps, self.batch_size, self.norm_batches)
        spans = (self.l1_warm_up_steps, self.lr_warm_up_steps, self.lr_decay_steps)
        scalings, counted = ("none", "expected_average_only_in"), all(isinstance(n, int) and n > 0 for n in counts)
        rules = {
            "d_sae, steps, batch_size, norm_batches: whole numbers above 0": counted,
            "lr, decoder_init_norm: above 0": min(self.lr, self.decoder_init_norm) > 0,
            "l1_coefficient, warm-up and decay steps: not below 0": min(self.l1_coefficient, *spans) >= 0,
            "lr warm-up and decay: together not longer than steps": sum(spans[1:]) <= self.steps,
            "loss: standard or as_printed": self.loss in ("standard", "as_printed"),
            f"architecture: one of {', '.join(ARCHITECTURES)}": self.architecture in ARCHITECTURES,
            "loss: as_printed with architecture standard alone": self.architecture == "standard"
            or self.loss == "standard",
            "k: above 0 and not above d_sae": 0 < self.options.get("k", 1) <= self.d_sae,
            "b_dec_init: zeros or mean": self.b_dec_init in ("zeros", "mean"),
            f"normalize_activations: one of {', '.join(scalings)}": self.normalize_activations in scalings,
        }
        if broken := [rule for rule, held in rules.items() if not held]:
            raise InputError(f"SAE training needs {broken[0]}; but got {self}")


class Job(NamedTuple):
    """One SAE to train: on which layer, from which seed, how."""

    layer: int
    seed: int
    config: TrainingConfig


def shuffled(tokens, batch_size: int, buffer: int = BUFFER, seed: int = 0) -> Iterator[dict]:
    """Mix a stream of TokenBatch into batches {layer: [batch_size, d]}, the same tokens in every layer, half of the
    tokens in `buffer` at a time. A callable that returns a fresh stream is replayed without end, from memory where the
    buffer holds it whole; an iterator ends with its tokens, less an incomplete batch."""
    order, held, rows = torch.Generator().manual_seed(seed), [], 0

    def draw(leave: int):
        nonlocal held, rows
        pool = {layer: torch.cat([part[layer] for part in held]) for layer in held[0]}
        perm = torch.randperm(rows, generator=order)
        n_drawn = (rows - leave) // batch_size * batch_size
        held = [{layer: acts[perm[n_drawn:]] for layer, acts in pool.items()}]
        rows -= n_drawn
        for chosen in perm[:n_drawn].split(batch_size) if n_drawn else ():
            yield {layer: acts[chosen] for layer, acts in pool.items()}

    whole: list[dict] = []  # the stream, where the buffer holds all of it: then it is read once
    while True:
        seen, passed = 0, []
        for acts in whole or (batch.acts for batch in (tokens() if callable(tokens) else tokens)):
            n = len(next(iter(acts.values())))
            seen, rows = seen + n, rows + n
            held.append(dict(acts))
            passed.append(acts)
            if seen > buffer:
                passed.clear()
            if rows >= max(buffer, 2 * batch_size):
                yield from draw(leave=rows // 2)
        if not seen or not callable(tokens):
            break
        whole = passed
    if rows:
        yield from draw(leave=0)


def sample(tokens, n: int = 8192) -> dict:
    """{layer: [n, d]} of a stream of TokenBatch, the first batch that `shuffled` draws, or all tokens where there are
    fewer than n; no more of the stream is read than fills the buffer."""
    held, rows = [], 0
    for batch in tokens:
        held.append(batch)
        rows += len(batch.token)
        if rows >= max(BUFFER, 2 * n):
            break
    return next(shuffled(iter(held), min(n, rows)))


@contextmanager
def lent(device, *things):
    """SAEs, or adapters of models, on `device` while open and in the CPU's memory afterwards."""
    modules = [getattr(thing, "model", thing) for thing in things]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")


def groups(saes: Mapping, together: int | None) -> list[dict]:
    """The SAEs (or jobs) in order, `together` at a time; all at once where that is None."""
    keys, n = list(saes), together or len(saes) or 1
    return [{key: saes[key] for key in keys[i : i + n]} for i in range(0, len(keys), n)]


def train(batches, *, layers: Sequence[int], seeds: Sequence[int], config: TrainingConfig, **options) -> dict:
    """One SAE per (layer, seed), all from one stream of {layer: [batch, d_in]}; options as of `fit`."""
    return fit(batches, {(layer, seed): Job(layer, seed, config) for layer in layers for seed in seeds}, **options)


def fit(batches, jobs: Mapping[Hashable, Job], *, d_in: int, device="cpu", progress=True, keep_order=False) -> dict:
    """Train many sae-lens SAEs on one stream of batches {layer: [batch, d_in]}: layers x lambda x seeds.

    `batches` may be a callable that returns a fresh stream: called again where norm_batches are many, not to hold them.
    A lean loop over sae-lens's training class: its initialisation, loss, schedules and clipping at 1.0, with fused Adam
    (a test compares it with `SAETrainer`). A seed decides the initial weights and, unless `keep_order`, the order of
    the tokens within every CHUNK batches; an SAE does not depend on the jobs beside it. Returns inference SAEs by job,
    input scaling folded in; `sae.cfg.metadata.trained_norm` is the mean norm of the activations it was trained on.
    Raises InputError where the stream ends early, and for activations of another width, not finite, or all zero.
    """
    from tqdm import tqdm

    if not jobs:
        return {}
    steps = max(job.config.steps for job in jobs.values())
    layers = sorted({job.layer for job in jobs.values()})
    n_head, sums = max(job.config.norm_batches for job in jobs.values()), {layer: [] for layer in layers}
    stream = batches() if callable(batches) else batches
    head, stream = (batches(), stream) if callable(batches) and n_head > CHUNK else tee(stream)
    for batch in islice(_checked(head, layers, d_in), n_head):
        for layer, x in batch.items():
            sums[layer].append((len(x), x.double().norm(dim=1).sum().item(), x.double().sum(0)))
    del head
    trainers = [_Trainer(job, d_in, sums[job.layer], device) for job in jobs.values()]
    stream, n_done = islice(_checked(stream, layers, d_in), steps), 0
    with crew(device) as each, tqdm(total=steps, desc="training SAEs", mininterval=1, disable=not progress) as bar:
        while chunk := list(islice(stream, CHUNK)):
            sizes = [len(batch[layers[0]]) for batch in chunk]
            tokens = {layer: torch.cat([b.pop(layer) for b in chunk]).to(device, torch.float32) for layer in layers}
            orders = {}
            for trainer in trainers:  # by its own last step, so that a longer job beside it changes nothing
                own = sizes[: max(trainer.cfg.steps - n_done, 0)]
                order = torch.Generator().manual_seed(_mixed(trainer.job.seed, n_done))
                rows = torch.arange(sum(own)) if keep_order else torch.randperm(sum(own), generator=order)
                orders[trainer] = rows.to(device).split(own)
            for i in range(len(chunk)):
                going = [trainer for trainer in trainers if i < len(orders[trainer])]
                each(lambda t, i=i, x=tokens, rows=orders: t.step(x[t.job.layer][rows[t][i]]), going)
                bar.update()
            n_done += len(chunk)
    if n_done < steps:
        raise InputError(f"SAE training: the stream ended after {n_done} of {steps} steps; give more text")
    return {key: trainer.finish() for key, trainer in zip(jobs, trainers, strict=True)}


def _checked(batches, layers: Sequence[int], d_in: int) -> Iterator[dict[int, torch.Tensor]]:
    """The batches' layers that are trained on; InputError for another width, and where a token is not finite."""
    for i, batch in enumerate(batches):
        for layer in layers:
            if (width := batch[layer].shape[1]) != d_in:
                raise InputError(f"SAE training: activations are {width} wide, but d_in is {d_in}")
            bad = ~batch[layer].sum(1, dtype=torch.float32).isfinite()
            if bad.any():
                where = f"layer {layer}, first in token {int(bad.nonzero()[0])} of batch {i}"
                raise InputError(f"SAE training: NaN or infinite activations of {where}; mend or drop that input")
        yield {layer: batch[layer] for layer in layers}


def _own_options(cfg: TrainingConfig) -> dict:
    """The fields of sae-lens's training configuration that only `cfg.architecture` has."""
    widths = {"matryoshka_widths": [cfg.d_sae // n for n in (8, 4, 2, 1)]}
    given = {"standard": {"l1_coefficient": cfg.l1_coefficient}, "matryoshka_batchtopk": widths}
    return given.get(cfg.architecture, {}) | dict(cfg.options)


class _Trainer:
    """An SAE in training: its weights, optimiser and schedules."""

    def __init__(self, job: Job, d_in: int, sums: list[tuple], device):
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler

        cfg = self.cfg = job.config
        self.job, self.device, self.n_steps = job, device, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            make, shape = get_sae_training_class(cfg.architecture)
            same = {name: getattr(cfg, name) for name in ("d_sae", "normalize_activations", "decoder_init_norm")}
            try:
                self.sae = make(shape(d_in=d_in, **same | _own_options(cfg))).to(device)
            except (TypeError, ValueError, AssertionError) as error:  # an option it lacks, or a value it refuses
                raise InputError(f"SAE training: architecture {cfg.architecture}: {first_line(error)}") from error
        n, norm, total = map(sum, zip(*sums[: cfg.norm_batches], strict=True)) if sums else (1, 0.0, 0)
        if not norm:
            raise InputError(f"SAE training: the first batches of layer {job.layer} are empty or all zero")
        self.trained_norm = norm / n
        self.scale = d_in**0.5 / self.trained_norm if cfg.normalize_activations != "none" else 1.0
        if cfg.b_dec_init == "mean":
            self.sae.b_dec.data = (total / n * self.scale).float().to(device)
        self.weights = list(self.sae.parameters())
        self.optimiser = torch.optim.Adam(self.weights, cfg.lr, (cfg.adam_beta1, cfg.adam_beta2), fused=True)
        spans = cfg.lr_warm_up_steps, cfg.lr_decay_steps
        self.lr = get_lr_scheduler("constant", self.optimiser, cfg.steps, cfg.lr, *spans, cfg.lr, 1)
        warm_up, self.silent = cfg.l1_warm_up_steps, torch.zeros(cfg.d_sae, dtype=torch.long, device=device)
        penalties = {"l1": cfg.l1_coefficient, "l0": getattr(self.sae.cfg, "l0_coefficient", 0.0)}
        self.penalties = {name: CoefficientScheduler(warm_up, value) for name, value in penalties.items()}

    def step(self, x: torch.Tensor) -> None:
        """One Adam step on the loss of x, scaled."""
        x = x * self.scale
        loss = self._standard_loss(x) if self.cfg.architecture == "standard" else self._own_loss(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        with warnings.catch_warnings(action="ignore"):  # torch's SequentialLR calls its own deprecated form
            self.lr.step()
        for penalty in self.penalties.values():
            penalty.step()

    def _own_loss(self, x: torch.Tensor) -> torch.Tensor:
        """sae-lens's own loss of an architecture, auxiliary loss of dead features included."""
        from sae_lens.saes.sae import TrainStepInput

        coefficients = {name: penalty.value for name, penalty in self.penalties.items()}
        with autocast(self.device, self.cfg.autocast):
            out = self.sae.training_forward_pass(
                TrainStepInput(x, coefficients, self.silent > self.cfg.dead_after, self.n_steps, False)
            )
        self.silent = torch.where((out.feature_acts > 0).any(0), 0, self.silent + 1)
        self.n_steps += 1
        return out.loss

    def _standard_loss(self, x: torch.Tensor) -> torch.Tensor:
        """mean_tokens( ||x - x^||^2 + l1 sum_j f_j ||W_dec_j|| ), or the loss as printed."""
        W_enc, b_enc, W_dec, b_dec = self.sae.W_enc, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec
        with autocast(self.device, self.cfg.autocast):
            # Zero in value: carries b_dec's gradient without a product as large as the encoder's.
            b_dec_path = (b_dec.detach() - b_dec) @ W_enc
            f = torch.relu(torch.addmm(b_enc + b_dec_path, x - b_dec.detach(), W_enc))
            x_hat = torch.addmm(b_dec, f, W_dec)
            penalty = f @ W_dec.norm(dim=1)
        l1 = self.penalties["l1"].value
        if self.cfg.loss == "as_printed":
            return (x_hat.float() - x).square().mean() + l1 * f.float().mean()
        return ((x_hat.float() - x).square().sum() + l1 * penalty.float().sum()) / len(x)

    def finish(self):
        from sae_lens import SAE

        self.optimiser = self.lr = None  # twice the weights' memory
        self.sae.fold_activation_norm_scaling_factor(self.scale)
        (layer, seed, _), about = self.job, self.sae.cfg.metadata
        about.trained_norm, about.seed, about.hook_name = self.trained_norm, seed, SAE_ID.format(layer=layer)
        with torch.random.fork_rng(devices=[]):
            sae = SAE.from_dict(self.sae.cfg.get_inference_sae_cfg_dict())
        weights = self.sae.state_dict()
        self.sae.process_state_dict_for_saving_inference(weights)  # BatchTopK's mean threshold becomes a JumpReLU's
        sae.load_state_dict(weights)
        return _usable(sae, f"trained on layer {layer} from seed {seed}")


def obtain(source, *, d_in: int, layers, seeds=(0,), sae_id=SAE_ID, device="cpu", any_hook=False, **training) -> dict:
    """SAEs by (layer, seed); where there is one a layer whatever the seed, under the first seed: go over the keys.

    source: "train", as `trained`, whose options are in `training`, with one `config` for all; a folder in sae-lens
    format, with subfolders `sae_id` or layer_LL_seed_S; or a sae-lens release, e.g. "gemma-2b-res-jb".

    Raises InputError: folder missing, release or id unknown, offline; an SAE unreadable, not finite, not d_in wide,
    scaled by a factor it does not tell, or, unless `any_hook`, meant for another place than the block's output.
    """
    keys = [(layer, seed) for layer in layers for seed in seeds]
    if source == "train":
        config = training.pop("config")
        return trained({key: Job(*key, config) for key in keys}, d_in=d_in, device=device, **training)
    path, found = Path(source).expanduser(), {}
    if not path.is_dir() and (path.is_absolute() or source.startswith((".", "~"))):
        raise InputError(f"no such folder of SAEs: {path}; give a folder, a sae-lens release, or 'train'")
    for layer, seed in keys:
        own, shared = path / FOLDER.format(layer, seed), path / sae_id.format(layer=layer)
        if path.is_dir() and not own.is_dir() and not shared.is_dir():
            raise InputError(f"no SAE for layer {layer} in {path}: no folder {shared.name} or {own.name}")
        if not path.is_dir() and seed == seeds[0]:
            found[layer, seed] = _released(source, sae_id.format(layer=layer), d_in, device)
        elif own.is_dir() or (shared.is_dir() and seed == seeds[0]):
            found[layer, seed] = load(own if own.is_dir() else shared, d_in, device)
    for (layer, _), sae in found.items():
        hook = sae.cfg.metadata.hook_name  # none in some old files
        if not any_hook and hook not in (None, SAE_ID.format(layer=layer), f"blocks.{layer + 1}.hook_resid_pre"):
            raise InputError(f"the SAE for block {layer} of {source} reads {hook}: any_hook=True takes it nevertheless")
    return found


def load(folder: Path | str, d_in: int | None = None, device: str = "cpu"):
    """The SAE saved in `folder` in sae-lens format, a checkpoint's scaling folded in; InputError as of `obtain`."""
    from sae_lens import SAE

    try:
        sae, scaler = SAE.load_from_disk(folder, device=device), Path(folder) / "activation_scaler.json"
        factor = json.loads(scaler.read_text())["scaling_factor"] if scaler.is_file() else None
    except Exception as error:  # missing, truncated, foreign: safetensors, json and sae-lens each fail in their way
        raise InputError(f"cannot read the SAE in {folder} ({first_line(error)}); restore or delete it") from error
    return _usable(sae, f"in {folder}", d_in, factor)


def _released(release: str, sae_id: str, d_in: int, device: str):
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    try:
        sae = SAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # unknown release or id, no network, no such file: whichever library notices
        raise InputError(f"cannot get SAE {sae_id} of release {release}: {first_line(error)}") from error
    return _usable(sae, f"{release}/{sae_id}", d_in, get_norm_scaling_factor(release, sae_id))


def _usable(sae, where: str, d_in: int | None = None, factor: float | None = None):
    if d_in not in (None, sae.cfg.d_in):
        raise InputError(f"the SAE {where} takes activations {sae.cfg.d_in} wide, the model's are {d_in} wide")
    if bad := [name for name, values in sae.state_dict().items() if not values.isfinite().all()]:
        raise InputError(f"the SAE {where} has NaN or infinite values in {', '.join(bad)}: get or train another")
    scaling = sae.cfg.normalize_activations
    if scaling in ("expected_average_only_in", "covariance_whitening"):  # sae-lens would not scale at all
        if scaling == "covariance_whitening" or not factor:
            raise InputError(f"the SAE {where} is a training checkpoint whose {scaling} is not folded in: finish it")
        sae.fold_activation_norm_scaling_factor(factor)
    if factor:
        sae.cfg.metadata.trained_norm = sae.cfg.d_in**0.5 / factor
    return sae.eval().requires_grad_(False)


def trained(
    jobs: Mapping[Hashable, Job], *, folder, description, make, d_in: int, device="cpu", progress=True, together=None
) -> dict:
    """SAEs by job: those in `folder`/<hash of description, config, d_in>/layer_LL_seed_S are loaded, the others trained
    in one `fit` on the batches of `make(layers)` and saved. together: train that many at a time, on a stream each time,
    and leave all SAEs in the CPU's memory (see `lent`)."""
    rest, found, places, texts = "cpu" if together else device, {}, {}, {}
    for key, job in jobs.items():
        about = {"description": description, "config": asdict(job.config), "d_in": d_in, "format": 2}
        texts[key] = json.dumps(about, sort_keys=True)
        root = Path(folder) / hashlib.sha256(texts[key].encode()).hexdigest()[:16]
        place = places[key] = root / FOLDER.format(job.layer, job.seed)
        try:
            if place.is_dir():
                found[key] = load(place, d_in, rest)
        except InputError as error:
            warnings.warn(f"{error}: trained again", stacklevel=3)
            shutil.rmtree(place)
    missing = {key: job for key, job in jobs.items() if key not in found}
    for some in groups(missing, together):
        stream = make(sorted({job.layer for job in some.values()}))
        for key, sae in fit(stream, some, d_in=d_in, device=device, progress=progress).items():
            save(sae, places[key])
            (places[key].parent / "description.json").write_text(texts[key])
            found[key] = sae.to(rest)
    return {key: found[key] for key in jobs}


def save(sae, folder: Path | str) -> None:
    """Write an SAE in sae-lens format, whole or not at all; an SAE already there stays."""
    from safetensors import SafetensorError

    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            sae.save_model(whole := Path(temporary) / "sae")
            if not folder.exists():
                whole.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        raise InputError(f"cannot save an SAE in {folder}: {first_line(error)}; free some space") from error


@torch.no_grad()
def random_sae(like, acts: torch.Tensor, seed: int = 0, matched: bool = False):
    """The control: an SAE of the class and size of `like` whose directions mean nothing.

    Random unit directions in the encoder, b_dec the mean of `acts` [N, d_in] as `like` scales them, and for each
    feature the bias at which all fire equally often and mean L0 on `acts` equals `like`'s; ``matched``: at which it
    fires on as many of `acts` as the feature of `like` with its number. A JumpReLU feature starts at its own threshold;
    a TopK's control is a standard SAE, since K a token leaves no choice of counts. The decoder is the same directions
    times one factor, that of least squared error on `acts`. Activations are in the unit of `like`'s, lest a threshold
    above 0 mean another thing: of inputs whose mean norm is sqrt(d_in), where `cfg.metadata.trained_norm` tells it.
    Raises InputError for other architectures.
    """
    from sae_lens import SAE

    kind, reshaped = like.cfg.architecture(), like.cfg.reshape_activations
    if kind not in ("standard", "jumprelu", "topk") or reshaped != "none":
        shape = f"{kind} (reshape_activations: {reshaped})"
        raise InputError(f"no random control of an SAE of architecture {shape}: give a standard, jumprelu or topk one")
    acts = acts.to(like.device, torch.float32)
    counts = sum((like.encode(x) > 0).sum(0) for x in acts.split(1024))
    if not matched:
        counts = torch.full_like(counts, round(counts.double().mean().item()))
    about = {"architecture": kind.replace("topk", "standard")}
    about["metadata"] = {"hook_name": like.cfg.metadata.hook_name, "random_seed": seed}
    with torch.random.fork_rng(devices=[]):
        sae = SAE.from_dict(like.cfg.to_dict() | about).eval().requires_grad_(False)
    directions = torch.randn(like.cfg.d_sae, like.cfg.d_in, generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(directions, dim=1).to(sae.W_dec)
    norm, folded = like.cfg.metadata.trained_norm, like.cfg.normalize_activations == "none"
    unit = like.cfg.d_in**0.5 / norm if norm and folded else 1.0
    sae.W_dec.data, sae.W_enc.data = directions, directions.T.contiguous() * unit
    sae.b_dec.data = sae.process_sae_in(acts).mean(0)  # it is zero so far
    start = getattr(like, "threshold", torch.zeros_like(like.b_enc)).to(directions)
    if kind == "jumprelu":
        sae.threshold.data = start
    x = sae.process_sae_in(acts).T * unit
    for part in counts.argsort().split(128):  # like with like, so that few need be ranked
        n = counts[part, None]
        highest = (directions[part] @ x).topk(min(int(n[-1].item()) + 1, len(acts))).values
        last, next_ = (highest.gather(1, (n - i).clamp(0, highest.shape[1] - 1)) for i in (1, 0))
        next_ = torch.where(n < len(acts), next_, last - (highest[:, :1] - last) / len(acts))
        between = (last + next_)[:, 0] / 2  # lest a sum in another order moves a token across
        bias = torch.where(counts[part] > 0, start[part].clamp(min=0) - between, torch.finfo(sae.dtype).min)
        sae.b_enc.data[part] = bias
    overlap = energy = 0
    for x in acts.split(1024):
        sae.process_sae_in(x)  # notes the scaling that the next line undoes
        base = sae.run_time_activation_norm_fn_out(sae.b_dec)
        y = sae.decode(sae.encode(x)) - base
        overlap, energy = overlap + ((x - base) * y).sum(dtype=torch.float64), energy + y.square().sum()
    sae.W_dec.data = directions * (overlap / energy).nan_to_num(1.0).to(like.dtype)  # 0 / 0: silent on acts
    return sae


def random_saes(saes: Mapping, acts: Mapping, scales: Mapping | None = None, first_seed=1000, matched=True) -> dict:
    """A `random_sae` for each SAE by its key (layer, ..., seed), on `acts` {layer: [N, d_in]} times the key's scale.
    Directions depend on seed and layer alone, so that matched on text and on image tokens only thresholds differ."""

    def control(key):
        own = acts[key[0]] * (scales or {}).get(key, 1.0)
        return random_sae(saes[key], own, _mixed(first_seed + key[-1], key[0]), matched)

    with crew(next(iter(saes.values())).device if saes else "cpu") as each:
        return dict(zip(saes, each(control, saes), strict=True))


def _mixed(*seeds: int) -> int:
    """One seed of several, so that no two combinations share a stream of random numbers."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def rescale_factor(acts: torch.Tensor, target_norm: float) -> float:
    """Factor that brings the mean norm of `acts` [N, d] to an SAE's: its `cfg.metadata.trained_norm`, or, where that is
    None (some releases), `Health.mean_norm` on text."""
    return target_norm / acts.norm(dim=1).double().mean().item()
