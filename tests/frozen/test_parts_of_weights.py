"""Frozen linears whose operands are parts: few rows of a weight, a bias of one number, writes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slope_fx
from slope_fx.kernels import racing
from slope_fx.kernels.cpu.routes import STREAM
from slope_fx.ops.frozen import FROZEN_LINEAR

W = 32
X = torch.randn(3, W, generator=torch.Generator().manual_seed(0))


class OneNumber(nn.Module):
    """A bias of one element, which torch adds to all outputs."""

    def __init__(self):
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(W, W)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return F.linear(x, self.w, self.bias)


class FewRows(nn.Module):
    """The first, the last and the middle two rows of a weight. Groups of 1:2 have two rows."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(W, W))

    def forward(self, x):
        return [F.linear(x, self.w[a:b]) for a, b in ((0, 2), (14, 16), (W - 2, W))]


class Written(nn.Module):
    """An input that an activation changes in place between two linears."""

    def __init__(self, activation):
        super().__init__()
        self.one, self.two, self.activation = nn.Linear(W, W), nn.Linear(W, W), activation

    def forward(self, x):
        x = x * 1
        one = self.one(x)
        self.activation(x)
        return one, self.two(x)


IN_PLACE = {
    "LeakyReLU": nn.LeakyReLU(0.1, inplace=True),
    "ELU": nn.ELU(0.5, inplace=True),
    "ReLU": nn.ReLU(inplace=True),
    "Hardtanh": nn.Hardtanh(-0.1, 0.1, inplace=True),
    "Threshold": nn.Threshold(0.1, 0.2, inplace=True),
    "CELU": nn.CELU(0.5, inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "F.relu_": F.relu_,
}
MODELS = {
    "a bias of one number": OneNumber,
    "few rows": FewRows,
    **{name: lambda f=function: Written(f) for name, function in IN_PLACE.items()},
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("values", ["float", "int8"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_the_numbers_of_the_dense_model(make, values, backend, monkeypatch):
    """By the route STREAM, which computes several rows at a time."""

    def recall(entry, names, device):
        return racing.Result("stream" if "stream" in names else names[0], {})

    monkeypatch.setattr(racing, "recall", recall)
    torch.manual_seed(0)
    model = slope_fx.compile(
        make(), "1:2", example_inputs=X, backend=backend, skip_first=False, skip_head=False,
        on_fallback="error",
    ).eval()  # fmt: skip
    frozen = slope_fx.freeze(model, values=values)
    want = slope_fx.densify(copy.deepcopy(frozen))
    want._compiled_call_impl = None
    with torch.no_grad():
        got, right = frozen(X), want(X)
    torch.testing.assert_close(got, right, rtol=2e-3, atol=2e-3)


def test_a_bias_that_is_too_short_is_refused():
    dense = torch.randn(W, W)
    mask = slope_fx.ops.magnitude_mask(dense, 2, 4)
    values = slope_fx.ops.compress(dense, mask, 2, 4)
    form = [2, 4, 0, 0, 0, W, 0, STREAM]
    with pytest.raises(RuntimeError, match="bias has 1 elements, the weight 32 rows"):
        FROZEN_LINEAR(X, values, mask, None, torch.zeros(1), None, None, form)
