"""A small compiled model, and whether it trains as the formulas say."""

import torch
from torch import nn

import slope_fx
from formulas import assert_gradients_match, formula_model
from slope_fx.backend.rewriting import backend_of
from slope_fx.record import record_of

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


def layers(count=4):
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)])


def compiled(model=None, **more):
    more = {"backend": "aot_eager", "on_fallback": "error", **more}
    return slope_fx.compile(model or layers(), example_inputs=X, **more)


def graphs(model):
    return backend_of(record_of(model).settings).graphs


def assert_trains_right(dense, model, x=X):
    reference = formula_model(dense, model)
    y, want = model(x), reference(x.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    want.sum().backward()
    assert_gradients_match(model, reference, rtol=1e-4)
