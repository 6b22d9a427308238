"""SAEs: the lean training loop against sae-lens's own, saving, sources, controls and measures."""

import math
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsae_helpers import saes
from mmsae_helpers.activations import TokenBatch
from mmsae_helpers.errors import InputError
from mmsae_helpers.meters.feed import feed
from mmsae_helpers.meters.health import HealthMeter, at_equal_l0

D_IN, D_SAE, BATCH = 32, 96, 128
CONFIG = saes.TrainingConfig(
    d_sae=D_SAE, l1_coefficient=1.0, lr=1e-3, steps=60, batch_size=BATCH, l1_warm_up_steps=20, norm_batches=4
)


def sparse_acts(n: int, seed: int = 0, d: int = D_IN, directions: int = 64, p: float = 0.05) -> torch.Tensor:
    """Sparse sums of fixed random directions on a common offset, [n, d]."""
    fixed, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    basis = torch.nn.functional.normalize(torch.randn(directions, d, generator=fixed), dim=1)
    chosen = torch.rand(n, directions, generator=own) < p
    weights = torch.rand(n, directions, generator=own) + 0.5
    return 3 * (chosen * weights) @ basis + 0.5


def token_batch(acts: dict[int, torch.Tensor]) -> TokenBatch:
    n = len(next(iter(acts.values())))
    none = torch.zeros(n, dtype=torch.int64)
    return TokenBatch(acts, none, torch.arange(n), none, none.bool(), none - 1)


def batches(n: int, layers=(0,)):
    return [{layer: sparse_acts(BATCH, seed=100 * layer + i) for layer in layers} for i in range(n)]


OWN = {
    "standard": {"l1_coefficient": 1.0, "l1_warm_up_steps": 20},
    "topk": {"k": 6},
    "batchtopk": {"k": 6, "topk_threshold_lr": 0.1},
    "matryoshka_batchtopk": {"k": 6, "topk_threshold_lr": 0.1, "matryoshka_widths": [24, 96]},
    "jumprelu": {"l0_coefficient": 0.5, "l0_warm_up_steps": 20, "jumprelu_bandwidth": 0.5},
}


def of(kind: str, **changed) -> saes.TrainingConfig:
    own = {} if kind == "standard" else OWN[kind]
    return replace(CONFIG, architecture=kind, options=own, dead_after=15, **changed)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("kind", saes.ARCHITECTURES)
def test_same_weights_as_sae_lens_trainer(kind, normalize):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    config = of(kind, normalize_activations=normalize, lr_warm_up_steps=5, lr_decay_steps=15)
    stream = batches(config.steps)
    ours = saes.train(stream, d_in=D_IN, layers=[0], seeds=[3], config=config, progress=False, keep_order=True)[0, 3]

    torch.manual_seed(3)
    make, shape = get_sae_training_class(kind)
    theirs = make(shape(d_in=D_IN, d_sae=D_SAE, normalize_activations=normalize, **OWN[kind]))
    start = {name: value.clone() for name, value in theirs.state_dict().items()}
    head = stream[: config.norm_batches] if normalize != "none" else []
    SAETrainer(
        SAETrainerConfig(
            total_training_samples=config.steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=config.lr,
            lr_end=config.lr,
            lr_warm_up_steps=config.lr_warm_up_steps,
            lr_decay_steps=config.lr_decay_steps,
            n_batches_for_norm_estimate=config.norm_batches,
            dead_feature_window=config.dead_after,
        ),
        theirs,
        cycle([batch[0] for batch in (*head, *stream)]),
    ).fit()
    trained = theirs.state_dict()
    for weights in (start, trained):
        theirs.process_state_dict_for_saving_inference(weights)
    for name, value in trained.items():
        assert torch.allclose(ours.state_dict()[name], value, atol=2e-4, rtol=1e-3), name
        assert not torch.allclose(start[name], value, atol=5e-3), f"{name} was not trained"


@pytest.mark.parametrize("kind", saes.ARCHITECTURES[1:])
def test_another_architecture_is_saved_reloaded_and_as_sparse_as_asked(kind, tmp_path):
    stream = batches(300)
    made = saes.fit(stream, {0: saes.Job(0, 1, of(kind, steps=300))}, d_in=D_IN, progress=False)[0]
    saes.save(made, tmp_path / "sae")
    again, acts = saes.load(tmp_path / "sae", D_IN), sparse_acts(2000, seed=9)
    assert made.cfg.architecture() == again.cfg.architecture() == ("topk" if kind == "topk" else "jumprelu")
    assert torch.equal(made.encode(acts), again.encode(acts))
    l0 = (made.encode(acts) > 0).sum(1).float()
    if kind == "topk":
        assert (l0 <= 6).all()
    elif kind != "jumprelu":  # a mean threshold stands for the batch's own
        assert 3 < l0.mean() < 9
    assert saes.random_sae(made, acts).encode(acts).count_nonzero(), "there is a control"


def test_deterministic_and_seeds_and_layers_independent():
    first = saes.train(batches(60, (1, 4)), d_in=D_IN, layers=[1, 4], seeds=[0, 1], config=CONFIG, progress=False)
    again = saes.train(batches(60, (4,)), d_in=D_IN, layers=[4], seeds=[1], config=CONFIG, progress=False)
    for name, value in again[4, 1].state_dict().items():
        assert torch.equal(first[4, 1].state_dict()[name], value)
    assert not torch.equal(first[4, 0].W_enc, first[4, 1].W_enc)
    assert not any(p.requires_grad for p in first[4, 0].parameters())


def test_a_seed_orders_the_tokens_of_a_chunk_and_nothing_else_does():
    seen = {}

    class Spy(saes._Trainer):
        def step(self, x):
            seen.setdefault(key, []).append(x[:, 0].clone())
            super().step(x)

    stream = [{0: torch.arange(i * BATCH, (i + 1) * BATCH).float()[:, None].expand(-1, D_IN) / 1e4} for i in range(60)]
    short, given = replace(CONFIG, steps=40), dict(d_in=D_IN, progress=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saes, "_Trainer", Spy)
        for key, options in {(0, 40): {}, (1, 40): {}, (0, "kept"): {"keep_order": True}}.items():
            saes.fit(stream, {0: saes.Job(0, key[0], short)}, **given, **options)
    whole = torch.cat([batch[0][:, 0] for batch in stream])[: 40 * BATCH]
    mine, other, kept = (torch.cat(seen[key]) for key in ((0, 40), (1, 40), (0, "kept")))
    assert torch.equal(kept, whole) and not torch.equal(mine, whole) and not torch.equal(mine, other)
    for order in (mine, other):  # each token once, in its own chunk
        for part in (slice(saes.CHUNK * BATCH), slice(saes.CHUNK * BATCH, None)):
            assert torch.equal(order[part].sort().values, whole[part])
    both = {n: saes.Job(0, 0, replace(CONFIG, steps=n)) for n in (40, 60)}
    beside, alone = saes.fit(batches(60), both, **given)[40], saes.fit(batches(60), {40: both[40]}, **given)[40]
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in beside.state_dict().items())


@pytest.mark.parametrize("at", [2, 50])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_training_refuses_activations_that_are_not_finite(at, value):
    stream = batches(60)
    stream[at][0][17, 3] = value
    with pytest.raises(InputError, match=f"activations of layer 0, first in token 17 of batch {at};"):
        saes.train(stream, d_in=D_IN, layers=[0], seeds=[0], config=CONFIG, progress=False)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_training_refuses_activations_that_are_all_zero(normalize):
    config = replace(CONFIG, normalize_activations=normalize)
    with pytest.raises(InputError, match="the first batches of layer 0 are empty or all zero"):
        saes.train([{0: torch.zeros(BATCH, D_IN)}] * 60, d_in=D_IN, layers=[0], seeds=[0], config=config)


def test_training_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    saes.train(batches(60), d_in=D_IN, layers=[0], seeds=[0], config=CONFIG, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_learns_sparse_code_and_random_control_does_not():
    config = replace(CONFIG, steps=600, l1_coefficient=0.5, lr=3e-3, b_dec_init="mean")
    tokens = [token_batch({2: sparse_acts(2048, seed=i)}) for i in range(20)]
    stream = saes.shuffled(lambda: iter(tokens), BATCH, buffer=8192)
    sae = saes.train(stream, d_in=D_IN, layers=[2], seeds=[0], config=config, progress=False)[2, 0]
    held_out = sparse_acts(4096, seed=777)
    parts = [token_batch({2: held_out[:3000]}), token_batch({2: held_out[3000:]})]
    health = feed({0: HealthMeter(sae, 2)}, parts)[0]
    assert health.explained_variance > 0.9 and health.l0 < 20 and health.n_tokens == 4096

    x_hat = sae(held_out)
    error, spread = (held_out - x_hat).square().sum(), (held_out - held_out.mean(0)).square().sum()
    assert health.explained_variance == pytest.approx(1 - (error / spread).item(), abs=1e-5)
    assert health.normalised_mse == pytest.approx((error / held_out.square().sum()).item(), rel=1e-5)
    assert health.l0 == pytest.approx((sae.encode(held_out) > 0).sum(1).float().mean().item(), rel=1e-6)
    assert health.alive == int((sae.encode(held_out) > 0).any(0).sum())
    assert health.mean_norm == pytest.approx(held_out.norm(dim=1).mean().item(), rel=1e-5)
    assert sae.cfg.metadata.trained_norm == pytest.approx(health.mean_norm, rel=0.05)
    assert saes.rescale_factor(2 * held_out, health.mean_norm) == pytest.approx(0.5)

    control = saes.random_sae(sae, held_out, seed=1)
    assert type(control) is type(sae) and control.cfg.d_sae == D_SAE
    blind = feed({0: HealthMeter(control, 2)}, [token_batch({2: held_out})])[0]
    assert blind.l0 == pytest.approx(health.l0, rel=0.02)
    assert blind.explained_variance < health.explained_variance - 0.3
    x_hat = control(held_out) - control.b_dec
    y = held_out - control.b_dec
    assert (x_hat * (y - x_hat)).sum().abs() < 1e-4 * x_hat.square().sum(), "no factor on the decoder would be better"
    assert not torch.equal(control.W_dec, saes.random_sae(sae, held_out, seed=2).W_dec)


curves = st.lists(st.tuples(st.floats(1, 100), st.floats(0.01, 1)), min_size=2, max_size=5, unique_by=lambda p: p[0])


@given(curves, curves, st.floats(0.1, 10))
def test_errors_are_compared_at_equal_l0(ours, theirs, factor):
    """Against the plain definition, a fine grid over the L0 that both curves reach; never beyond it."""
    found = at_equal_l0(ours, theirs)
    low = max(min(np.log(x) for x, _ in curve) for curve in (ours, theirs))
    high = min(max(np.log(x) for x, _ in curve) for curve in (ours, theirs))
    if low >= high:
        assert math.isnan(found)
        return
    grid = low + (high - low) * (np.arange(20000) + 0.5) / 20000
    mine, other = (np.interp(grid, *np.log(sorted(c)).T) for c in (ours, theirs))
    assert found == pytest.approx((mine - other).mean(), abs=1e-2)
    assert at_equal_l0(theirs, ours) == pytest.approx(-found, abs=1e-9)
    assert at_equal_l0([(x, factor * y) for x, y in ours], ours) == pytest.approx(math.log(factor), abs=1e-9)
    assert at_equal_l0([*ours, (0.0, 1.0)], theirs) == found  # an SAE without a feature that fires
    assert math.isnan(at_equal_l0([(0.0, 1.0)], theirs))


def test_random_control_of_an_sae_on_another_device(monkeypatch):
    from sae_lens import StandardSAE, StandardSAEConfig

    monkeypatch.setattr(torch.Tensor, "item", lambda _: 2.0)  # tensors on meta have shapes but no values
    acts, like = torch.randn(50, D_IN), StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, device="meta"))
    with pytest.raises(RuntimeError, match="same device|meta"):
        like.encode(acts)
    control = saes.random_sae(like, acts)
    assert {p.device.type for p in control.parameters()} == {control(acts.to("meta")).device.type} == {"meta"}


def test_few_at_a_time_is_the_same_as_all_at_once(tmp_path):
    """Lent SAEs end on the CPU; the stream's statistics do not hang on whether its head was held."""
    jobs = {(0, s): saes.Job(0, s, replace(CONFIG, b_dec_init="mean")) for s in range(3)}
    expected = saes.fit(batches(60), jobs, d_in=D_IN, progress=False)
    made = []
    given = dict(description={}, d_in=D_IN, progress=False, folder=tmp_path, together=2)
    found = saes.trained(jobs, make=lambda layers: made.append(layers) or (lambda: iter(batches(60))), **given)
    assert made == [[0], [0]] and list(found) == list(jobs)
    for key, sae in found.items():
        assert all(torch.equal(value, expected[key].state_dict()[name]) for name, value in sae.state_dict().items())
    tokens = [token_batch({0: sparse_acts(300, seed=i)}) for i in range(3)]
    few, whole = (
        feed({key: HealthMeter(sae, key[0]) for key, sae in found.items()}, tokens, **how)
        for how in ({"device": "cpu", "together": 2}, {})
    )
    assert all(few[key].numbers() == whole[key].numbers() for key in found)
    rate, x = whole[0, 1].firing_rate, torch.cat([batch.acts[0] for batch in tokens])
    assert rate == pytest.approx((found[0, 1].encode(x) > 0).double().mean(0).numpy())


def test_several_penalties_on_one_stream():
    jobs = {lam: saes.Job(0, 0, replace(CONFIG, l1_coefficient=lam)) for lam in (0.1, 5.0)}
    trained = saes.fit(batches(60), jobs, d_in=D_IN, progress=False)
    x = sparse_acts(1000, seed=5)
    l0 = {lam: (sae.encode(x) > 0).sum(1).float().mean() for lam, sae in trained.items()}
    assert l0[0.1] > l0[5.0]


def test_autocast_is_close():
    exact = saes.train(batches(60), d_in=D_IN, layers=[0], seeds=[0], config=CONFIG, progress=False)[0, 0]
    config = replace(CONFIG, autocast=True)
    fast = saes.train(batches(60), d_in=D_IN, layers=[0], seeds=[0], config=config, progress=False)[0, 0]
    assert exact.W_dec.dtype == fast.W_dec.dtype == torch.float32
    x = sparse_acts(500, seed=5)
    assert (exact(x) - fast(x)).square().sum() < 1e-2 * x.square().sum()


def test_shuffled_keeps_layers_aligned_and_every_token_once():
    ids = torch.arange(1000.0).unsqueeze(1)
    stream = [token_batch({0: part, 3: part + 5000}) for part in ids.split(70)]
    mixed = list(saes.shuffled(iter(stream), 50, buffer=300, seed=1))
    assert all(len(b[0]) == 50 and torch.equal(b[0] + 5000, b[3]) for b in mixed)
    seen = torch.cat([b[0] for b in mixed]).flatten()
    assert len(seen) == 1000 and torch.equal(seen.sort().values, ids.flatten())
    assert not torch.equal(seen, ids.flatten())
    replayed = saes.shuffled(lambda: iter(stream), 50, buffer=300, seed=1)
    assert len([b for b, _ in zip(replayed, range(100), strict=False)]) == 100
    assert list(saes.shuffled(iter([]), 50)) == [] and list(saes.shuffled(lambda: [], 50)) == []


def test_a_sample_is_the_first_batch_drawn_and_reads_no_more_than_the_buffer(monkeypatch):
    monkeypatch.setattr(saes, "BUFFER", 300)
    stream, read = [token_batch({0: part}) for part in torch.arange(1000.0).unsqueeze(1).split(70)], []
    drawn = saes.sample((read.append(batch) or batch for batch in stream), 50)[0]
    assert torch.equal(drawn, next(saes.shuffled(iter(stream), 50, buffer=300))[0]) and len(read) == 5
    assert sorted(saes.sample(stream[:1])[0].flatten().tolist()) == list(range(70)), "fewer: all of them"


def test_obtain_trains_only_what_is_missing_and_reloads_equal(tmp_path):
    made = []

    def make(layers):
        made.append(layers)
        return batches(60, layers)

    given = dict(d_in=D_IN, folder=tmp_path, description={"text": "a"}, config=CONFIG, make=make)
    first = saes.obtain("train", layers=[0, 2], seeds=[0, 1], progress=False, **given)
    again = saes.obtain("train", layers=[0, 2, 3], seeds=[0, 1], progress=False, **given)
    assert made == [[0, 2], [3]] and list(again) == [(k, s) for k in (0, 2, 3) for s in (0, 1)]
    x = sparse_acts(50)
    for key, sae in first.items():
        assert torch.equal(sae.encode(x), again[key].encode(x))
        assert again[key].cfg.metadata.trained_norm == sae.cfg.metadata.trained_norm
        assert not again[key].W_enc.requires_grad
    other = saes.obtain("train", layers=[0], progress=False, **{**given, "description": {"text": "b"}})
    assert made[-1] == [0] and list(other) == [(0, 0)]

    [root] = [p.parent for p in tmp_path.glob("*/layer_03_seed_0")]
    from_folder = saes.obtain(str(root), d_in=D_IN, layers=[2], seeds=[0, 1])
    assert torch.equal(from_folder[2, 1].encode(x), first[2, 1].encode(x))

    weights = root / "layer_00_seed_0" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot read the SAE in .*layer_00_seed_0"):
        saes.obtain(str(root), d_in=D_IN, layers=[0])
    with pytest.warns(UserWarning, match="trained again"):
        repaired = saes.obtain("train", layers=[0], progress=False, **given)
    assert torch.equal(repaired[0, 0].W_enc, first[0, 0].W_enc) and not list(root.glob(".layer*"))


def test_folder_with_sae_lens_ids_has_one_sae_a_layer(tmp_path):
    sae = saes.train(batches(60, [6]), d_in=D_IN, layers=[6], seeds=[0], config=CONFIG, progress=False)[6, 0]
    saes.save(sae, tmp_path / "blocks.6.hook_resid_post")
    found = saes.obtain(str(tmp_path), d_in=D_IN, layers=[6], seeds=[4, 5])
    assert list(found) == [(6, 4)]
    with pytest.raises(InputError, match="32 wide, the model's are 64 wide"):
        saes.obtain(str(tmp_path), d_in=64, layers=[6])
    with pytest.raises(InputError, match="no SAE for layer 7"):
        saes.obtain(str(tmp_path), d_in=D_IN, layers=[7])


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    sae = saes.train(batches(60), d_in=D_IN, layers=[0], seeds=[0], config=CONFIG, progress=False)[0, 0]

    def full(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sae, "save_model", full)
    with pytest.raises(InputError, match="No space left"):
        saes.save(sae, tmp_path / "layer_00_seed_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./none", "no such folder"),
        ("no-such-release", "no-such-release"),
    ],
)
def test_bad_source_is_one_clear_line(source, message):
    with pytest.raises(InputError, match=message) as error:
        saes.obtain(source, d_in=D_IN, layers=[0])
    assert "\n" not in str(error.value)


def test_unknown_id_of_a_release():
    with pytest.raises(InputError, match="blocks.3.hook_resid_post"):
        saes.obtain("gemma-2b-res-jb", d_in=2048, layers=[3])


@pytest.mark.parametrize(
    "change",
    [
        {"d_sae": 0},
        {"steps": 1.5},
        {"lr": 0.0},
        {"l1_coefficient": -1.0},
        {"architecture": "gated"},
        {"architecture": "topk", "options": {"k": 97}},
        {"architecture": "batchtopk", "options": {"k": 0}},
        {"architecture": "batchtopk", "options": {"k": 8}, "loss": "as_printed"},
        {"normalize_activations": "layer_norm"},
        {"lr_decay_steps": 61},
    ],
)
def test_bad_config(change):
    with pytest.raises(InputError):
        replace(CONFIG, **change)


@pytest.mark.parametrize("options", [{"kay": 8}, {"k": 8, "matryoshka_widths": [5, 4, 96]}])
def test_an_option_that_the_architecture_lacks(options):
    config = replace(CONFIG, architecture="matryoshka_batchtopk", options=options)
    with pytest.raises(InputError, match="architecture matryoshka_batchtopk"):
        saes.train(batches(5), d_in=D_IN, layers=[0], seeds=[0], config=config, progress=False)


def test_stream_too_short_or_too_narrow():
    with pytest.raises(InputError, match="ended after 10 of 60 steps"):
        saes.train(batches(10), d_in=D_IN, layers=[0], seeds=[0], config=CONFIG, progress=False)
    with pytest.raises(InputError, match="32 wide, but d_in is 16"):
        saes.train(batches(10), d_in=16, layers=[0], seeds=[0], config=CONFIG, progress=False)


def test_controls_have_one_direction_a_feature_and_thresholds_of_their_tokens():
    from sae_lens import StandardSAE, StandardSAEConfig

    torch.manual_seed(0)
    pair = {(3, seed): StandardSAE(StandardSAEConfig(d_in=8, d_sae=16)).eval() for seed in (0, 1)}
    for sae in pair.values():
        sae.b_enc.data -= 0.5
    kinds = {"text": torch.randn(400, 8), "image": 3 * torch.randn(300, 8) + 1}
    found = {kind: saes.random_saes(pair, {3: acts}) for kind, acts in kinds.items()}
    for kind, acts in kinds.items():
        for key, sae in pair.items():
            fired = [(s.encode(acts) > 0).sum(0) for s in (sae, found[kind][key])]
            assert torch.equal(*fired), "each feature as often as the one it stands for"
    text, image = found["text"][3, 0], found["image"][3, 0]
    assert torch.equal(text.W_enc, image.W_enc) and not torch.equal(text.b_enc, image.b_enc)
    assert not torch.equal(text.W_enc, found["text"][3, 1].W_enc)


def test_directions_differ_between_blocks_and_even_controls_fire_equally_often():
    from sae_lens import StandardSAE, StandardSAEConfig

    torch.manual_seed(0)
    one = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16)).eval()
    acts = dict.fromkeys((0, 3), torch.randn(400, 8))
    keys = [(layer, "arm", seed) for layer in acts for seed in (0, 1)]
    found = saes.random_saes(dict.fromkeys(keys, one), acts, matched=False)
    firsts = [found[key].W_enc for key in keys]
    assert not any(torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    expected = round((one.encode(acts[0]) > 0).sum(0).double().mean().item())
    assert all(((sae.encode(acts[0]) > 0).sum(0) == expected).all() for sae in found.values())
    assert saes.random_saes({}, acts) == {}


def made(kind="standard", d_in=24, d_sae=96, seed=0, **options):
    """A random inference SAE of sae-lens; JumpReLU thresholds of either sign, some features dead, some always on."""
    from sae_lens import SAE

    torch.manual_seed(seed)
    sae = SAE.from_dict({"architecture": kind, "d_in": d_in, "d_sae": d_sae, **options}).eval().requires_grad_(False)
    sae.b_enc.data = torch.linspace(-4, 1, d_sae) * sae.W_dec.norm(dim=1).mean()
    sae.b_enc.data[0], sae.b_enc.data[-1] = -1e6, 1e6
    sae.b_dec.data = torch.randn(d_in) / 2
    if kind == "jumprelu":
        sae.threshold.data = torch.randn(d_sae) / 5
    return sae


def as_often(like, control, acts, within=0):
    counts = [(sae.encode(acts) > 0).sum(0) for sae in (like, control)]
    assert (counts[0] - counts[1]).abs().max() <= within, (counts[0] - counts[1]).abs().max()
    return counts[0]


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("scaling", ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
def test_random_control_is_exact_whatever_the_architecture_and_input_processing(kind, scaling, apply):
    options = {"k": 9, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {}
    like = made(kind, apply_b_dec_to_input=apply, normalize_activations=scaling, **options)
    acts = 3 * torch.randn(1500, 24) * torch.rand(1500, 1) + 4 * torch.randn(24)
    before = {name: value.clone() for name, value in like.state_dict().items()}
    control = saes.random_sae(like, acts, seed=3, matched=True)
    counts = as_often(like, control, acts)
    assert counts.min() == 0 and counts.max() == 1500 and len(counts.unique()) > 20, "the case says something"
    assert (control.encode(100 * acts)[:, counts == 0] == 0).all()
    assert all(torch.equal(value, before[name]) for name, value in like.state_dict().items())
    assert all(value.isfinite().all() for value in control.state_dict().values()), "it can be saved and loaded"
    if kind == "jumprelu":
        assert control.cfg.architecture() == kind and torch.equal(control.threshold, like.threshold)
        smallest = control.encode(acts).masked_fill(control.encode(acts) == 0, torch.inf).amin(0)
        assert (smallest >= like.threshold).all()
    even = saes.random_sae(like, acts, seed=3)
    expected = round(counts.double().mean().item())
    assert ((even.encode(acts) > 0).sum(0) == expected).all() and torch.equal(even.W_enc, control.W_enc)
    for sae in (control, even):  # the decoder's factor is that of least squared error, through the scaling
        silent = sae.decode(0 * sae.encode(acts))
        y = sae(acts) - silent
        assert (y * (acts - silent - y)).sum().abs() < 1e-3 * y.square().sum()


def test_random_control_has_the_activations_of_its_model_in_whatever_unit_residuals_come():
    acts, like, larger = torch.randn(500, 24) + 1, made(d_in=24), made(d_in=24)
    like.cfg.metadata.trained_norm = 5.0
    larger.load_state_dict(like.state_dict())
    larger.W_enc.data /= 7  # the same SAE, of a model whose residuals are seven times as long
    larger.W_dec.data *= 7
    larger.b_dec.data *= 7
    larger.cfg.metadata.trained_norm = 35.0
    of, of_larger = (saes.random_sae(sae, x, matched=True) for sae, x in ((like, acts), (larger, 7 * acts)))
    as_often(like, of, acts)
    assert torch.allclose(of.encode(acts), of_larger.encode(7 * acts), atol=1e-5)
    assert torch.allclose(7 * of(acts), of_larger(7 * acts), atol=1e-4)
    assert of.W_enc.norm(dim=0).allclose(torch.tensor(24**0.5 / 5))


def test_random_control_without_subtracted_decoder_bias_is_that_with_it():
    torch.manual_seed(0)
    acts, d_sae = torch.randn(4000, 64) + 5 * torch.randn(64), 512
    pair = [made(d_in=64, d_sae=d_sae, apply_b_dec_to_input=apply) for apply in (True, False)]
    mean = acts.mean(0)
    for sae in pair:
        sae.W_dec.data = torch.nn.functional.normalize(pair[0].W_dec.data, dim=1)
        sae.W_enc.data, sae.b_dec.data = sae.W_dec.data.T.contiguous(), mean
        sae.b_enc.data = torch.full((d_sae,), -2.0) - (0 if sae.cfg.apply_b_dec_to_input else mean @ sae.W_enc)
    as_often(*pair, acts, within=2)
    controls = [saes.random_sae(sae, acts, matched=True) for sae in pair]
    for sae, control in zip(pair, controls, strict=True):
        as_often(sae, control, acts)
    errors = [(control(acts) - acts).square().sum() / (acts - mean).square().sum() for control in controls]
    assert errors[0] == pytest.approx(errors[1].item(), abs=0.01) and errors[1] < 1


@pytest.mark.parametrize("kind", ["gated", "temporal", "transcoder", "matching_pursuit"])
def test_no_random_control_of_another_architecture(kind):
    from sae_lens import SAE

    # sae-lens knows constant_scalar_rescale for temporal SAEs alone
    options = {"transcoder": {"apply_b_dec_to_input": False}, "temporal": {
        "normalize_activations": "constant_scalar_rescale", "n_heads": 2, "bottleneck_factor": 4}}  # fmt: skip
    like = SAE.from_dict({"architecture": kind, "d_in": 8, "d_sae": 16, **options.get(kind, {})})
    with pytest.raises(InputError, match=f"no random control of an SAE of architecture {kind}"):
        saes.random_sae(like, torch.randn(50, 8))


def test_no_random_control_of_attention_heads():
    like = made(reshape_activations="hook_z")
    with pytest.raises(InputError, match="reshape_activations: hook_z"):
        saes.random_sae(like, torch.randn(50, 4, 6))


def test_an_sae_with_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path):
    for i, (name, value) in enumerate({"W_dec": torch.nan, "b_enc": torch.inf}.items()):
        sae = made()
        getattr(sae, name).data.view(-1)[5] = value
        saes.save(sae, tmp_path / saes.SAE_ID.format(layer=i))
        with pytest.raises(InputError, match=rf"blocks.{i}.hook_resid_post has NaN or infinite values in {name}: "):
            saes.obtain(str(tmp_path), d_in=24, layers=[i])
    with pytest.raises(InputError, match="the SAE trained on layer 0 from seed 0 has NaN or infinite .*W_enc"):
        saes.train(batches(60), d_in=D_IN, layers=[0], seeds=[0], config=replace(CONFIG, lr=1e38), progress=False)


def test_a_training_checkpoint_is_folded_or_refused(tmp_path):
    folded = made()
    sae = made(normalize_activations="expected_average_only_in")
    saes.save(sae, tmp_path)
    place = tmp_path / "checkpoint"
    saes.save(sae, place)
    with pytest.raises(InputError, match="checkpoint is a training checkpoint whose expected_average_only_in is not"):
        saes.load(place)
    (place / "activation_scaler.json").write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    found, x = saes.load(place), torch.randn(100, 24)
    folded.fold_activation_norm_scaling_factor(0.25)
    assert torch.equal(found(x), folded(x)) and found.cfg.normalize_activations == "none"
    assert found.cfg.metadata.trained_norm == pytest.approx(24**0.5 * 4)
    (place / "activation_scaler.json").write_text('{"scaling_factor": null}')
    with pytest.raises(InputError, match="not folded in"):
        saes.load(place)


@pytest.mark.parametrize("hook", ["blocks.7.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"])
def test_an_sae_of_another_hook_is_refused_unless_asked_for(tmp_path, hook):
    sae = made()
    sae.cfg.metadata.hook_name = hook
    saes.save(sae, tmp_path / saes.SAE_ID.format(layer=0))
    with pytest.raises(InputError, match=f"the SAE for block 0 of .* reads {hook}: any_hook=True"):
        saes.obtain(str(tmp_path), d_in=24, layers=[0])
    assert list(saes.obtain(str(tmp_path), d_in=24, layers=[0], any_hook=True)) == [(0, 0)]


@pytest.mark.parametrize("hook", [None, "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_an_sae_of_the_blocks_output_by_any_name_is_taken(tmp_path, hook):
    sae = made()
    sae.cfg.metadata.hook_name = hook
    saes.save(sae, tmp_path / saes.SAE_ID.format(layer=0))
    assert list(saes.obtain(str(tmp_path), d_in=24, layers=[0])) == [(0, 0)]


@pytest.mark.parametrize("normalised", [False, True, "none", "expected_average_only_in"])
def test_files_of_sae_lens_2_and_3(tmp_path, normalised):
    """As gemma-2b-res-jb lies on the hub: scaling_factor of ones, the hook under its old name, a text or a boolean."""
    import json

    from safetensors.torch import save_file

    sae, place = made(apply_b_dec_to_input=False), tmp_path / "blocks.6.hook_resid_post"
    place.mkdir()
    weights = sae.state_dict() | {"scaling_factor": torch.ones(96)}
    save_file(weights, place / "sae_weights.safetensors")
    settings = {"d_in": 24, "d_sae": 96, "dtype": "float32", "activation_fn": "relu", "apply_b_dec_to_input": False}
    settings |= {"hook_point": place.name, "hook_point_layer": 6, "normalize_activations": normalised}
    (place / "cfg.json").write_text(json.dumps(settings))
    if normalised in (True, "expected_average_only_in"):
        with pytest.raises(InputError, match="expected_average_only_in is not folded in"):
            saes.obtain(str(tmp_path), d_in=24, layers=[6])
        (place / "activation_scaler.json").write_text('{"scaling_factor": 0.2138}')
        sae.fold_activation_norm_scaling_factor(0.2138)
    found, x = saes.obtain(str(tmp_path), d_in=24, layers=[6])[6, 0], torch.randn(50, 24)
    assert torch.equal(found(x), sae(x)) and found.cfg.metadata.hook_name == place.name
    place.rename(tmp_path / "blocks.7.hook_resid_post")
    with pytest.raises(InputError, match="the SAE for block 7 of .* reads blocks.6.hook_resid_post"):
        saes.obtain(str(tmp_path), d_in=24, layers=[7])
