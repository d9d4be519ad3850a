"""Linears in autocast regions of a graph: the right numbers, engines for the right dtype."""

import copy

import pytest
import torch
from torch import nn

import slope_fx
from formulas import formula_model
from slope_fx.passes import sparsify_linears

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
BF16 = torch.bfloat16


class Fp32Head(nn.Module):
    """Two linears in a row, without autocast: the second reads a node that a pass wrote."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.b(self.a(x))


class Nested(Fp32Head):
    """A region that names no dtype has that of the region around it."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu"):
            return self.b(self.a(x))


def compiled(model, **more):
    more = {"skip_first": False, "skip_head": False, "skip_router": False, **more}
    return slope_fx.compile(model, example_inputs=X, backend="aot_eager", **more)


@pytest.fixture
def requested(monkeypatch):
    """The dtypes that engines were chosen for."""
    found, real = [], sparsify_linears.choose

    def noted(op, request):
        found.append(request.dtype)
        return real(op, request)

    monkeypatch.setattr(sparsify_linears, "choose", noted)
    return found


@pytest.mark.parametrize(
    ("kind", "outer", "dtype"),
    [(Fp32Head, BF16, torch.float32), (Nested, None, torch.float16), (Nested, BF16, torch.float16)],
)
def test_engines_are_chosen_for_the_dtype_that_runs(kind, outer, dtype, requested):
    torch.manual_seed(0)
    dense = kind()
    model = compiled(copy.deepcopy(dense))
    with torch.autocast("cpu", dtype=outer or BF16, enabled=outer is not None):
        out = model(X)
    assert out.dtype == dtype
    assert set(requested) == {dtype}
    want = formula_model(dense, model)(X.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("weight", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("stack", [True, False])
def test_weights_of_any_dtype_in_a_region(weight, stack):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            shape = (4, 16, 32) if stack else (16, 32)
            self.w = nn.Parameter(torch.randn(shape, dtype=weight) * 0.1)

        def forward(self, x):
            with torch.autocast("cpu", dtype=BF16):
                return x @ self.w.mT

    torch.manual_seed(0)
    dense, x = Inside(), torch.randn(4, 8, 32)
    model = slope_fx.compile(
        copy.deepcopy(dense), example_inputs=x, backend="aot_eager", skip_first=False,
        skip_head=False, skip_router=False,
    )  # fmt: skip
    out = model(x.requires_grad_())
    assert out.dtype == BF16
    want = formula_model(dense, model)(x.detach().double())
    torch.testing.assert_close(out.double(), want, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert model.w_values.grad.dtype == weight


def test_a_graph_that_is_called_in_two_contexts_lets_the_ops_choose(requested):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)

        def forward(self, x):
            @torch.compiler.nested_compile_region
            def region(t):
                return self.a(t).float()

            with torch.autocast("cpu", dtype=BF16):
                h = region(x)
            return h + region(x)

    model = compiled(Shared())
    assert model(X).isfinite().all()
    assert not requested
