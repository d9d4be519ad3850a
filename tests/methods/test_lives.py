"""A model of each method is saved, resumed, compressed, frozen, made on meta, and refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import models
import slope_fx
from models import batch, loss_of
from slope_fx.checkpoints.pair import sparse_of_pair
from slope_fx.errors import ArgumentError, ArgumentWarning, CheckpointError, StateError
from slope_fx.methods import (
    METHODS,
    SRSTE,
    SSTE,
    Evolve,
    Gradual,
    Method,
    Slope,
    WeightState,
    method_of,
)
from slope_fx.record import record_of

STEPS = 8
ALL = [SRSTE(decay=0.01), SSTE(), Gradual(end=0.6), Evolve(interval=2, rate=0.3)]
MASTERS = ALL[:3]
FULL = pytest.mark.full
HARDEST = [pytest.param(m, marks=() if m.name in ("gradual", "evolve") else FULL) for m in ALL]
"""Those with most state, which CI runs; the others run in make test-full."""


def named(method):
    return method.name


def start(method, model=None):
    torch.manual_seed(0)
    if model is None:
        model = slope_fx.compile(
            models.gpt2(), "2:4", method=method, adapter_rank=4, backend="aot_eager",
            on_fallback="error",
        )  # fmt: skip
    optimizer = torch.optim.AdamW(slope_fx.param_groups(model, 3e-3, weight_decay=0.1))
    schedule = slope_fx.Schedule(model, STEPS, adapter_start=0.5, backward_mask_interval=3)
    return model, {"optimizer": optimizer, "schedule": schedule}


def train(model, parts, first, last):
    losses = []
    for step in range(first, last):
        loss = loss_of(model, batch(seed=step))
        loss.backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["schedule"].step()
        losses.append(loss.item())
    return losses


@FULL
@pytest.mark.parametrize("method", ALL, ids=named)
@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_equals_uninterrupted(method, stop, tmp_path):
    whole, parts = start(method)
    want = train(whole, parts, 0, STEPS)
    model, parts = start(method)
    got = train(model, parts, 0, stop)
    path = slope_fx.save_pretrained(model, tmp_path / "c", training=parts)
    again = slope_fx.load_pretrained(path, backend="aot_eager", on_fallback="error").train()
    assert slope_fx.sparse_weights(again).keys() == slope_fx.sparse_weights(model).keys()
    assert all(w.method == method for w in slope_fx.sparse_weights(again).values())
    again, parts = start(method, again)
    slope_fx.load_training(path, parts)
    assert got + train(again, parts, stop, STEPS) == want
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.full
@pytest.mark.parametrize("method", ALL, ids=named)
def test_killed_and_resumed(method, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import kill_and_resume

    result = kill_and_resume.kill_and_resume(tmp_path, steps=8, kills=2, seed=2, method=method)
    assert result["identical"]


@pytest.mark.full
@pytest.mark.parametrize("method", HARDEST, ids=named)
def test_each_way_out_agrees(method, tmp_path):
    model, parts = start(method)
    train(model, parts, 0, 2)
    ids = batch(seed=9)

    def logits(of):
        with torch.no_grad():
            return of.eval()(input_ids=ids).logits

    torch.testing.assert_close(logits(slope_fx.densify(model)), logits(model))
    if method.fades:  # the pruned part is not gone
        for refused in (slope_fx.compress_, slope_fx.freeze):
            with pytest.raises(StateError, match=r"with factor 0\.58.*Train to the end"):
                refused(model)
        path = slope_fx.save_pretrained(model, tmp_path / "fading")
        torch.testing.assert_close(
            logits(slope_fx.load_pretrained(path, backend="eager")), logits(model)
        )
        with pytest.raises(CheckpointError, match=r"still takes part, with factor 0\.58"):
            slope_fx.load_pretrained(path, frozen=True)
    train(model.train(), parts, 2, STEPS)
    want = logits(model)
    torch.testing.assert_close(logits(slope_fx.densify(model)), want)
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    torch.testing.assert_close(logits(slope_fx.load_pretrained(path, frozen=True)), want)
    opened = AutoModelForCausalLM.from_pretrained(path)
    torch.testing.assert_close(logits(opened), want)
    dense, adapter = tmp_path / "dense", tmp_path / "adapter"
    slope_fx.densify(model, "drop").save_pretrained(dense)
    slope_fx.export_peft(model, adapter)
    both = sparse_of_pair(AutoModelForCausalLM.from_pretrained(dense), adapter)
    assert method_of(record_of(both).config.method).compressed
    torch.testing.assert_close(logits(both), want)
    torch.testing.assert_close(logits(slope_fx.freeze(model)), want)


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m.name == "sr-ste" else FULL) for m in MASTERS],
    ids=named,
)
def test_compressed_model_is_saved_and_read(method, tmp_path):
    model, parts = start(method)
    train(model, parts, 0, STEPS)
    assert "dense weights are stored" in str(slope_fx.explain(model))
    assert (
        slope_fx.explain(model).sparse[0].bytes_after
        > slope_fx.explain(model).sparse[0].bytes_before
    )
    slope_fx.compress_(model)
    assert "method=" not in str(slope_fx.explain(model))
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    again = slope_fx.load_pretrained(path, backend="eager")
    ids = batch(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
        )
    with pytest.warns(slope_fx.errors.TrainingWarning, match=r"made before slope_fx\.compress_"):
        train(model.train(), {**parts, "schedule": slope_fx.Schedule(model, 1)}, 0, 1)


@pytest.mark.parametrize("method", ALL, ids=named)
def test_made_on_meta(method):
    def net():
        return nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])

    x = torch.randn(4, 16)
    with torch.device("meta"):
        model = net()
    about = {"method": method, "example_inputs": x, "backend": "aot_eager"}
    model = slope_fx.compile(model, **about).to_empty(device="cpu")
    torch.manual_seed(3)
    for layer in model:
        layer.reset_parameters()
    torch.manual_seed(3)
    want = slope_fx.compile(net(), **about)
    assert want.state_dict().keys() == model.state_dict().keys()
    for name, value in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("method", MASTERS, ids=named)
def test_a_write_keeps_all_elements_and_chooses_the_masks(method):
    x = torch.randn(4, 16)
    model = slope_fx.compile(
        nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)]), method=method, example_inputs=x,
        backend=None,
    )  # fmt: skip
    weight = slope_fx.sparse_weights(model)["1"]
    new = torch.randn(16, 16)
    weight.write_(new)
    assert torch.equal(weight.values, new)
    kept = new.abs().view(16, 4, 4).topk(2).indices
    assert weight.forward_mask().view(16, 4, 4).gather(-1, kept).all()
    assert not weight.masks_problem()


def test_dense_is_the_dense_model():
    torch.manual_seed(0)
    dense, ids = models.gpt2(), batch(seed=0)
    torch.manual_seed(0)
    told = 'adapter_rank=4 has no effect: method="dense" prunes nothing'
    with pytest.warns(slope_fx.errors.ArgumentWarning, match=told):
        model = slope_fx.compile(models.gpt2(), method="dense", adapter_rank=4)
    schedule = slope_fx.Schedule(model, 2)
    for one in (dense, model):
        loss_of(one, ids).backward()
    for (name, p), (_, q) in zip(dense.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    schedule.step()
    assert schedule.phase == "sparse"
    report = slope_fx.explain(model)
    assert not report.sparse
    assert {r.reason for r in report.linears} > {'method="dense"'}
    assert "Compiled one by one" in str(report) or model._compiled_call_impl is not None


def test_configurations(tmp_path):
    config = slope_fx.SlopeConfig(method=SRSTE(decay=0.5))
    assert slope_fx.SlopeConfig.from_json(config.to_json()) == config
    assert slope_fx.SlopeConfig(method="evolve").method == Evolve()
    assert slope_fx.SlopeConfig.from_dict({"storage": "values"}) == slope_fx.SlopeConfig()
    with pytest.raises(ArgumentError, match="method='zip'; allowed are 'slope', 'dense', 'sr-ste'"):
        slope_fx.SlopeConfig(method="zip")
    with pytest.raises(ArgumentError, match="'s-ste' has no such field"):
        slope_fx.SlopeConfig.from_dict({"method": {"name": "s-ste", "decay": 1.0}})
    model = slope_fx.compile(models.gpt2(), method="sr-ste", backend=None)
    text = (slope_fx.save_pretrained(model, tmp_path / "c") / "slope_fx.json").read_text()
    assert '"format_version": 5' in text


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        (SRSTE, {"decay": -1.0}, r"SRSTE\(decay=-1\.0\); allowed is a number from 0 up"),
        (Gradual, {"start": 0.6}, r"Gradual\(start=0\.6\); .* from 0 to end=0\.5"),
        (Gradual, {"end": float("nan")}, r"Gradual\(end=nan\)"),
        (Evolve, {"interval": 0.5}, r"Evolve\(interval=0\.5\); .* whole number of steps"),
        (Evolve, {"rate": True}, r"Evolve\(rate=True\)"),
    ],
)
def test_a_number_out_of_range_is_refused(method, fields, said):
    with pytest.raises(ArgumentError, match=said):
        method(**fields)


def test_a_mask_that_is_only_the_first_is_told():
    told = """mask='random' chooses the first mask alone: method="s-ste" chooses by magnitude"""
    with pytest.warns(slope_fx.errors.ArgumentWarning, match=told):
        slope_fx.compile(models.gpt2(), method="s-ste", mask="random", backend=None)


def test_groups():
    model = slope_fx.compile(models.gpt2(), adapter_rank=2, backend=None)
    groups = slope_fx.param_groups(model, 1e-3, weight_decay=0.1, sparse_lr=2e-3, adapter_lr=5e-3)
    about = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert about == {
        "sparse": (2e-3, 0.1), "adapters": (5e-3, 0.0), "matrices": (1e-3, 0.1),
        "vectors": (1e-3, 0.0),
    }  # fmt: skip
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(trained)
    assert set(held) == trained


class Halved(Method):
    """A method of one's own, by the recipe in CONTRIBUTING: the values are read times a half."""

    name = "halved"
    source = "none"

    def values(self, kept, forward_bits, factor, pattern):
        return kept * 0.5


def test_a_new_method_trains_saves_and_reads(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "halved", Halved)
    model = slope_fx.compile(models.gpt2(), method="halved", backend="aot_eager")
    ids, weights = batch(seed=0), slope_fx.sparse_weights(model)
    loss_of(model, ids).backward()
    weight = next(iter(weights.values()))
    kept = weight.forward_mask().sum(-1)
    assert (kept == weight.d_in // 2).all()
    assert weight.values.grad is not None
    assert weight.to_dense().abs().sum() == pytest.approx(
        weight.values.abs().sum().item() / 2, rel=1e-5
    )
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    again = slope_fx.load_pretrained(path, backend="eager")
    assert all(isinstance(w.method, Halved) for w in slope_fx.sparse_weights(again).values())
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
        )


@pytest.mark.parametrize("method", ALL, ids=named)
def test_a_missing_schedule_is_reported(method):
    model = slope_fx.compile(models.gpt2(), method=method, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_of(model, batch(seed=0)).backward()
    told = f'train by method="{method.name}", but no slope_fx.Schedule .* masks never change'
    with pytest.warns(slope_fx.errors.TrainingWarning, match=told):
        optimizer.step()


def test_slope_is_the_default():
    model = slope_fx.compile(models.gpt2(), backend=None)
    assert all(w.method == Slope() for w in slope_fx.sparse_weights(model).values())
    assert sys.modules["slope_fx.methods"] is slope_fx.methods


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscales", [False, True])
def test_the_decay_of_sr_ste_is_not_that_of_a_scaled_gradient(fused, unscales):
    """A fused optimizer divides the gradient by a GradScaler's scale within its step."""
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = slope_fx.compile(models.gpt2(), "2:4", method=SRSTE(decay=0.5), backend=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        slope_fx.Schedule(model, STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(2):
            scaler.scale(loss_of(model, batch(seed=step))).backward()
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Twice(torch.optim.Optimizer):
    """An optimizer that takes the step of another one, which has the same gradients."""

    def __init__(self, parameters):
        self.base = torch.optim.SGD(parameters, lr=0.1)
        super().__init__(self.base.param_groups, {})

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), Twice])
def test_the_decay_of_sr_ste_is_added_once(make, closure):
    """To the gradient of the step, by whatever road it comes: Lightning passes a closure."""
    decay, method = 0.5, SRSTE(decay=0.5)
    torch.manual_seed(0)
    model = slope_fx.compile(models.gpt2(), "2:4", method=method, backend=None)
    optimizer, lr = make(list(model.parameters())), 0.1
    slope_fx.Schedule(model, STEPS)
    for step in range(3):  # gradients of a later step may be at the place of an earlier one
        weights = slope_fx.sparse_weights(model)
        before = {n: w.values.detach().clone() for n, w in weights.items()}
        pruned = {n: ~w.forward_mask() for n, w in weights.items()}
        clean = {}

        def gradients(step=step, weights=weights, clean=clean):
            optimizer.zero_grad()
            loss = loss_of(model, batch(seed=step))
            loss.backward()
            clean.update({n: w.values.grad.clone() for n, w in weights.items()})
            return loss

        if closure:
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()
        for name, weight in weights.items():
            want = before[name] - lr * (clean[name] + decay * before[name] * pruned[name])
            torch.testing.assert_close(weight.values.detach(), want)


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0.9, 1.0, 5), (1.0, 1.0, 4), (0.999, 1.0, 100), (0.0, 0.5, 7)]
)
def test_a_fading_ends_within_the_run(start, end, steps):
    factors = [Gradual(start=start, end=end).factor_at(step, steps) for step in range(steps + 1)]
    assert factors[-1] == 0.0
    assert factors == sorted(factors, reverse=True)
    assert all(f == 1.0 for step, f in enumerate(factors) if step < start * steps)


def test_masks_that_cannot_move_in_a_run_are_told():
    model = slope_fx.compile(models.gpt2(), "2:4", method="evolve", backend=None)
    with pytest.warns(ArgumentWarning, match=r"never move: interval=100, .* 90 of 120 steps"):
        slope_fx.Schedule(model, 120)


def test_a_group_without_a_gradient_keeps_its_mask():
    """As of an expert without tokens: its weakest weight is not dropped for nothing."""
    pattern, rows = slope_fx.planning.patterns.Pattern(2, 4), 8
    kept = torch.randn(rows, 8)
    bits = slope_fx.ops.magnitude_mask(torch.randn(rows, 16), 2, 4)
    probe = torch.zeros(rows, 8, requires_grad=True)
    probe.grad = torch.zeros(rows, 8)
    probe.grad[3, 0] = 1.0
    read = WeightState(bits, bits, pattern, None, False, probe)
    moved = Evolve(interval=1, rate=1.0).next_mask(kept, read, 1, 100)
    assert (moved != bits).any(1).nonzero().flatten().tolist() == [3]
