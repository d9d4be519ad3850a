"""The launches of the Triton engine: traffic, configurations, models, autocast, availability."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import models
import slope_fx
import traffic
from oracle import assert_within_rounding
from slope_fx import ops
from slope_fx.errors import ArgumentError
from slope_fx.kernels import ENGINES, reference
from slope_fx.kernels.quantised import DEFAULT_GROUP, quantise
from slope_fx.kernels.triton import configs, tuning
from slope_fx.planning.patterns import Pattern
from strategies import normal
from triton_cases import (
    DEVICE,
    ON_GPU,
    configuration,
    pruned,
    triton,
    why_not,
)

FULL = pytest.mark.full
pytestmark = pytest.mark.skipif(bool(why_not), reason=why_not or "-")


@pytest.mark.skipif(ON_GPU, reason="the interpreter counts")
@pytest.mark.parametrize("pattern", ["2:4", *(pytest.param(p, marks=FULL) for p in ("1:2", "2:8"))])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=FULL), torch.bfloat16])
def test_traffic_is_what_it_is_on_paper(monkeypatch, pattern, dtype):
    """Every byte that a kernel loads or stores, counted, for whole tiles."""
    from triton.runtime import interpreter

    counted = [0, 0]
    loaded = interpreter.InterpreterBuilder.create_masked_load
    stored = interpreter.InterpreterBuilder.create_masked_store

    def load(self, pointers, mask, *more):
        counted[0] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return loaded(self, pointers, mask, *more)

    def store(self, pointers, value, mask, *more):
        counted[1] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return stored(self, pointers, value, mask, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)
    n, m = Pattern.parse(pattern).n, Pattern.parse(pattern).m
    d_out, d_in = 64, 256  # whole groups of codes that share a scale
    weight = normal((d_out, d_in), 0, dtype)
    values, forward = pruned(weight, n, m)
    backward = triton.backward_mask(values, forward, n, m)
    x, grad = normal((1, d_in), 1, dtype), normal((1, d_out), 2, dtype)
    quantised_weights = {
        kind: (*quantise(values, kind, group), forward) for kind, group in DEFAULT_GROUP.items()
    }
    calls = {
        "magnitude_mask": (triton.magnitude_mask, weight, n, m),
        "backward_mask": (triton.backward_mask, values, forward, n, m),
        "expand": (triton.expand, values, forward, n, m),
        "expand_twice_pruned": (triton.expand_twice_pruned, values, forward, backward, n, m),
        "compress": (triton.compress, weight, forward, n, m),
        "linear": (triton.sparse_linear, x, values, forward, None, n, m),
        "input_grad": (triton.sparse_input_grad, grad, values, forward, backward, n, m),
        "weight_grad": (triton.sparse_weight_grad, grad, x, forward, n, m),
    }
    for kind, weight in quantised_weights.items():
        more = (n, m, DEFAULT_GROUP[kind])
        calls[f"expand_{kind}"] = (triton.expand_quantised, *weight, *more, d_in, dtype)
        calls[f"linear_{kind}"] = (triton.quantised_linear, x, *weight, None, *more)
    # One program for the products, so that no input is read twice and no sum is split.
    whole = configs.Config((("BLOCK_OUT", d_out), ("BLOCK_TOKENS", 16), ("GROUPS", d_in // m)), 4)

    def best(kernel, key, space, run, device):
        names = [name for name, _ in space[0].blocks]
        blocks = tuple((name, size) for name, size in whole.blocks if name in names)
        return dataclasses.replace(whole, blocks=blocks)

    monkeypatch.setattr(tuning, "best", best)
    besides = {  # inputs read, outputs written
        **dict.fromkeys(("linear", "linear_int8", "linear_int4"), (x, grad)),
        "input_grad": (grad, x), "weight_grad": ((x, grad), ()),
    }  # fmt: skip
    for kernel, (operation, *arguments) in calls.items():
        counted[:] = 0, 0
        operation(*arguments)
        for side, tensors in enumerate(besides.get(kernel, ((), ()))):
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            counted[side] -= sum(t.nbytes for t in tensors)
        paper = traffic.bytes_per_weight(kernel, dtype.itemsize, n, m)
        assert tuple(counted) == tuple(each * d_out * d_in for each in paper), kernel


@FULL
@pytest.mark.skipif(ON_GPU, reason="test_cuda.py does this, and under a sanitizer")
def test_the_sanitizers_script_launches_every_configuration():
    import compiled_kernels
    import launch_kernels

    launched = launch_kernels.launch_all(DEVICE, (3, 5), patterns=((2, 4),))
    assert launched == {
        (kernel, config.name)
        for kernel in compiled_kernels.KERNELS
        for config in compiled_kernels.spaces(kernel, 4, 2)
        if kernel != "add_up"  # which has one, and comes after those that split
    }


def test_no_tokens():
    values, forward = pruned(normal((8, 16), 0).to(DEVICE), 2, 4)
    backward = triton.backward_mask(values, forward, 2, 4)
    x, grad = (torch.empty(0, 3, width, device=DEVICE) for width in (16, 8))
    assert triton.sparse_linear(x, values, forward, None, 2, 4).shape == (0, 3, 8)
    assert triton.sparse_input_grad(grad, values, forward, backward, 2, 4).shape == (0, 3, 16)
    dw = triton.sparse_weight_grad(grad, x, forward, 2, 4)
    assert torch.equal(dw, torch.zeros_like(values))


@pytest.mark.parametrize(
    ("engine", "autocast"),
    [
        ("triton", False),
        pytest.param("triton", True, marks=pytest.mark.full),
        pytest.param("triton-dense", False, marks=pytest.mark.full),
    ],
)
def test_a_model_trains_as_on_the_dense_engine(engine, autocast):
    """Two steps, the second in the adapter phase: loss and every gradient."""

    def train(name):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = models.gpt2(layers=1).to(DEVICE)
        model = slope_fx.compile(model, adapter_rank=2, backend="aot_eager", engine=name)
        schedule = slope_fx.Schedule(model, total_steps=2, adapter_start=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.arange(24, device=DEVICE).view(2, 12)
        losses, grads = [], {}
        for _ in range(2):
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
            optimizer.step(), optimizer.zero_grad(), schedule.step()
        return losses, grads

    # The interpreter truncates to bf16, where a GPU rounds.
    tolerance = (5e-2 if ON_GPU else 1e-1) if autocast else 1e-3
    with configuration(0):
        losses, grads = train(engine)
    want_losses, want_grads = train("dense")
    assert losses == pytest.approx(want_losses, rel=tolerance)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        want = want_grads[name]
        assert (grad - want).norm() <= tolerance * want.norm() + 1e-6, name


def _pruned(weight, n, m):
    forward = reference.magnitude_mask(weight, n, m)
    return reference.compress(weight, forward, n, m), forward


def test_autocast_neither_copies_the_values_nor_rounds_their_gradient(monkeypatch):
    """fp32 values go to the kernels as they are; on other engines they are cast first."""
    n, m = 2, 4
    weight = normal((16, 32), 0)
    values, forward = (t.to(DEVICE) for t in _pruned(weight, n, m))
    backward = ENGINES["dense"].backward_mask(values, forward, n, m)
    x = normal((5, 32), 1).to(DEVICE)
    results = {}
    for engine in ("triton", "dense"):
        met = []
        operation = ENGINES[engine].sparse_linear
        monkeypatch.setattr(
            ENGINES[engine], "sparse_linear",
            lambda *a, met=met, operation=operation: met.append(a[1].dtype) or operation(*a),
            raising=False,
        )  # fmt: skip
        leaf = values.clone().requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            names = dict.fromkeys(("engine", "input_engine", "weight_engine"), engine)
            y = ops.sparse_linear(x, leaf, forward, backward, None, n, m, **names)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert leaf.grad.dtype == torch.float32
        results[engine] = met, leaf.grad
    assert results["triton"][0] == [torch.float32]
    assert results["dense"][0] == [torch.bfloat16]
    exact, rounded = results["triton"][1], results["dense"][1]
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())
    torch.testing.assert_close(exact, rounded, rtol=1e-2, atol=1e-2)
    want = x.cpu().bfloat16().double().sum(0).expand(16, 32)
    assert_within_rounding(exact, *[w[reference.unpack_bits(forward.cpu(), 32)].view(16, 16)
                                    for w in (want, want.abs())], torch.float32)  # fmt: skip


def test_what_it_cannot_serve_is_told(monkeypatch):
    assert "no kernels for torch.float64" in triton.why_not(DEVICE, torch.float64)
    assert "NVIDIA GPUs, not on meta" in triton.why_not(torch.device("meta"), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "NVIDIA GPUs, not on cpu" in triton.why_not(torch.device("cpu"), torch.float32)
    if not ON_GPU:
        assert triton.unavailable() == "there is no CUDA device"
        with pytest.raises(ArgumentError, match=r"engine='triton' is not available: there is"):
            slope_fx.compile(models.gpt2(), engine="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton.unavailable() == "triton is not installed"


def test_every_space_is_one_of_different_configurations():
    for m in (2, 4, 8, 16):
        for space in (
            configs.mask_configs(m), configs.backward_mask_configs(m), configs.copy_configs(m),
            *(configs.linear_configs(m, t, s) for t in (1, 20, 60, 500) for s in (2, 4)),
            *(configs.input_grad_configs(m, t, s) for t in (1, 20, 60, 500) for s in (2, 4)),
            *(configs.weight_grad_configs(m, s) for s in (2, 4)),
        ):  # fmt: skip
            assert len({config.name for config in space}) == len(space)
