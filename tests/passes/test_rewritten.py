"""A compiled layer, as the rewritten graph computes it, against METHOD's formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import formulas
import slope_fx
from strategies import dtypes, normal, patterns, seeds, sizes


class OwnLinear(nn.Module):
    """``F.linear`` on a parameter of its own."""

    def __init__(self, d_in, d_out, bias):
        super().__init__()
        self.w = nn.Parameter(torch.randn(d_out, d_in))
        self.bias = nn.Parameter(torch.randn(d_out)) if bias else None

    def forward(self, x):
        return F.linear(x, self.w, self.bias)


class OwnMatmul(nn.Module):
    """``x @ w`` on a parameter of its own."""

    def __init__(self, d_in, d_out, bias):
        super().__init__()
        self.w = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.randn(d_out)) if bias else None

    def forward(self, x):
        y = x @ self.w
        return y if self.bias is None else y + self.bias


KINDS = {
    "Linear": lambda d_in, d_out, bias: nn.Linear(d_in, d_out, bias),
    "Conv1D": lambda d_in, d_out, bias: Conv1D(d_out, d_in),
    "F.linear": OwnLinear,
    "x @ w": OwnMatmul,
}


class Model(nn.Module):
    """One layer, in a model of which it isn't the whole."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@settings(max_examples=8)
@given(
    st.data(),
    st.sampled_from(sorted(KINDS)),
    patterns,
    dtypes,
    st.booleans(),
    st.sampled_from([None, "asleep", "active"]),
    seeds,
)
def test_layer_matches_the_formulas(data, kind, pattern, dtype, bias, adapter, seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    d_out, d_in = data.draw(sizes(pattern))
    leading = data.draw(st.sampled_from([(1,), (7,), (2, 3), (1, 1)]))
    model = Model(KINDS[kind](d_in, d_out, bias)).to(dtype)
    name = "layer" if kind in ("Linear", "Conv1D") else "layer.w"
    weight = (model.layer.weight if name == "layer" else model.layer.w).detach()
    weight = weight.t().clone() if kind in ("Conv1D", "x @ w") else weight.clone()
    model_bias = getattr(model.layer, "bias", None)
    bias_value = None if model_bias is None else model_bias.detach().double()

    slope_fx.compile(
        model, str(pattern), adapter_rank=1 if adapter else None, skip_first=False,
        skip_head=False, example_inputs=torch.randn(*leading, d_in, dtype=dtype),
        backend="aot_eager", on_fallback="error",
    )  # fmt: skip
    (sparse,) = slope_fx.sparse_weights(model).values()
    assert slope_fx.sparse_weights(model) == {name: sparse}
    scale = 0.0
    if adapter == "active":
        slope_fx.Schedule(model, total_steps=1, adapter_start=0.0)
        sparse.lora_B.data.normal_()
        scale = 1.0

    # METHOD, written out.
    n, m = pattern.n, pattern.m
    w = weight.double()
    forward = formulas.top_n_mask(w.abs(), n, m)
    backward = formulas.backward_mask(w, forward, n, m)
    assert torch.equal(sparse.forward_mask(), forward)
    assert torch.equal(sparse.backward_mask(), backward)
    pruned, twice = w * forward, w * backward

    contiguous = data.draw(st.booleans())
    x = normal((*leading, d_in), seed, dtype, contiguous).detach().requires_grad_()
    grad = normal((*leading, d_out), seed + 1, dtype)
    y = model(x)
    y.backward(grad)

    x64, grad64 = x.detach().double(), grad.double()
    a, b = (torch.zeros(1, d_in), torch.zeros(d_out, 1))
    if adapter:
        a, b = sparse.lora_A.detach().double(), sparse.lora_B.detach().double()
    want_y = x64 @ pruned.t() + (0 if bias_value is None else bias_value)
    want_y = want_y + scale * (x64 @ a.double().t()) @ b.double().t()
    flat_x, flat_grad = x64.reshape(-1, d_in), grad64.reshape(-1, d_out)
    want_x = grad64 @ twice + scale * (grad64 @ b.double()) @ a.double()
    want_w = (flat_grad.t() @ flat_x)[forward].view(d_out, -1)

    def near(got, want, terms):
        # `terms` is what the sum would be if nothing cancelled; a few roundings of that.
        bound = 8 * torch.finfo(dtype).eps * (terms + want.abs()) + torch.finfo(dtype).tiny
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert ((got.double() - want).abs() <= bound).all()

    low = scale * (x64.abs() @ a.abs().double().t()) @ b.abs().double().t()
    low_x = scale * (grad64.abs() @ b.abs().double()) @ a.abs().double()
    size_y = x64.abs() @ pruned.abs().t() + (0 if bias_value is None else bias_value.abs())
    near(y, want_y, size_y + low)
    near(x.grad, want_x, grad64.abs() @ twice.abs() + low_x)
    near(sparse.values.grad, want_w, (flat_grad.abs().t() @ flat_x.abs())[forward].view(d_out, -1))
    assert sparse.values.grad.shape == (d_out, d_in * n // m)
    if bias_value is not None:
        near(model.layer.bias.grad, flat_grad.sum(0), flat_grad.abs().sum(0))
    if adapter == "active":
        want_b = flat_grad.t() @ (flat_x @ a.t())
        near(sparse.lora_B.grad, want_b, flat_grad.abs().t() @ (flat_x.abs() @ a.abs().t()))
        want_a = (flat_grad @ b).t() @ flat_x
        near(sparse.lora_A.grad, want_a, (flat_grad.abs() @ b.abs()).t() @ flat_x.abs())
    elif adapter == "asleep":
        assert sparse.lora_A.grad is None
        assert sparse.lora_B.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_reads_as_the_pruned_one(kind):
    model = Model(KINDS[kind](16, 8, True))
    dense = getattr(model.layer, "weight", getattr(model.layer, "w", None)).detach().clone()
    slope_fx.compile(
        model, skip_first=False, skip_head=False, example_inputs=torch.randn(2, 16), backend=None
    )
    (sparse,) = slope_fx.sparse_weights(model).values()
    mask = sparse.forward_mask()
    with torch.no_grad():
        read = getattr(model.layer, "weight", getattr(model.layer, "w", None))
    assert read.shape == dense.shape
    mask = mask.t() if kind in ("Conv1D", "x @ w") else mask
    assert torch.equal(read, dense * mask)
    oriented = dense.t() if kind in ("Conv1D", "x @ w") else dense
    assert torch.equal(sparse.to_dense(), oriented * sparse.forward_mask())


def test_adapter_switch_is_continuous():
    """METHOD: B = 0, so the first output after the switch equals the last before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(5, 16)
    slope_fx.compile(model, adapter_rank=4, example_inputs=x, backend="aot_eager")
    schedule = slope_fx.Schedule(model, total_steps=2, adapter_start=0.5)
    before = model(x)
    schedule.step()
    assert schedule.phase == "adapter"
    after = model(x)
    assert torch.equal(before, after)
    after.sum().backward()
    (sparse,) = slope_fx.sparse_weights(model).values()
    assert sparse.lora_B.grad.abs().sum() > 0
    assert sparse.values.grad.abs().sum() > 0
    assert sparse.lora_A.std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_compiled_model(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(5, 16)
    slope_fx.compile(model, adapter_rank=4, example_inputs=x, backend="aot_eager")
    slope_fx.Schedule(model, total_steps=1, adapter_start=0.0)
    full = model(x)
    with torch.autocast("cpu", dtype=dtype):
        half = model(x)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
    half.float().sum().backward()
    (sparse,) = slope_fx.sparse_weights(model).values()
    assert sparse.values.grad.dtype == sparse.lora_B.grad.dtype == torch.float32
