"""A rewritten node has the dtype and contiguity of the node that it replaces, and its gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slope_fx
from formulas import formula_model

W, E = 16, 3
BF16 = torch.bfloat16
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


ALIKE = {
    "w @ x": ((W, W), lambda x, w, b: w @ x.mT),
    "addmm of the weight first": ((W, W), lambda x, w, b: torch.addmm(b, w, x[0].mT)),
    "addmm with a row": ((W, W), lambda x, w, b: torch.addmm(b, x[0], w)),
    "addmm with one number": ((W, W), lambda x, w, b: torch.addmm(b[:1], x[0], w)),
    "scaled addmm": ((W, W), lambda x, w, b: torch.addmm(b, x[0], w, beta=0.5, alpha=2)),
    "linear with one number": ((W, W), lambda x, w, b: F.linear(x, w, b[:1])),
    "one input, all of a stack": ((E, W, W), lambda x, w, b: torch.matmul(x[0], w)),
    "baddbmm": ((E, W, W), lambda x, w, b: torch.baddbmm(b, x.repeat(2, 1, 1)[:E], w)),
    "baddbmm of the weight first": (
        (E, W, W), lambda x, w, b: torch.baddbmm(b, w, x.mT.repeat(2, 1, 1)[:E]),
    ),
    "bmm of the weight first": ((E, W, W), lambda x, w, b: torch.bmm(w, x.mT.repeat(2, 1, 1)[:E])),
    "1x1 convolution": ((W, W, 1), lambda x, w, b: F.conv1d(x, w, b)),
    "2-d convolution": ((W, W, 1, 1), lambda x, w, b: F.conv2d(x.unflatten(-1, (4, 4)), w, b)),
    "einsum, turned": ((W, W), lambda x, w, b: torch.einsum("bti,oi->bot", x, w)),
}  # fmt: skip
"""Products of x (2, W, W) as they come out, before anything makes them contiguous."""


class AsTheyAre(nn.Module):
    """Each product is flattened by a view where a dense one can be, and added to in place."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList(weight(*shape) for shape, _ in ALIKE.values())
        self.bias = nn.Parameter(torch.randn(W))

    def forward(self, x):
        found = []
        for w, (name, (_, form)) in zip(self.w, ALIKE.items(), strict=True):
            y = form(x, w, self.bias)
            if name != "einsum, turned":  # this one is not contiguous if it is dense
                y = y.view(-1)
            found.append(y)
        return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.full), True])
def test_views_and_writes_after_a_product(backend, autocast):
    torch.manual_seed(0)
    dense, x = AsTheyAre(), torch.randn(2, W, W)
    model = slope_fx.compile(
        copy.deepcopy(dense), example_inputs=x, backend=backend, skip_first=False, skip_head=False,
        skip_router=False, on_fallback="error",
    )  # fmt: skip
    assert len(slope_fx.sparse_weights(model)) == len(ALIKE)
    want = formula_model(dense, model)(x.double())
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        like, got = dense(x), model(x)
    for name, mine, plain, right in zip(ALIKE, got, like, want, strict=True):
        assert mine.dtype == plain.dtype, name
        assert mine.is_contiguous() or not plain.is_contiguous(), name
        tolerance = 0.1 if autocast else 1e-4
        torch.testing.assert_close(mine.double(), right, rtol=tolerance, atol=tolerance, msg=name)


class Added(nn.Module):
    """A sum in place into a tensor of the product's dtype, which refuses another dtype."""

    def __init__(self):
        super().__init__()
        self.w, self.bias = weight(E, W, W), nn.Parameter(torch.randn(W))

    def forward(self, x):
        y = torch.baddbmm(self.bias, x, self.w)
        out = torch.zeros(4, W, dtype=y.dtype)
        return out.index_add_(0, torch.arange(x.shape[1]) % 4, y[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_into_the_autocast_dtype(backend):
    torch.manual_seed(0)
    dense, x = Added(), torch.randn(E, 8, W)
    how = {"skip_first": False, "skip_head": False, "example_inputs": x, "backend": backend}
    model = slope_fx.compile(copy.deepcopy(dense), on_fallback="error", **how)
    with torch.autocast("cpu", dtype=BF16):
        assert model(x).dtype == dense(x).dtype == BF16


class Rounded(nn.Module):
    """A linear with a weight that is rounded on purpose, by casts to a smaller dtype and back."""

    def __init__(self, *dtypes):
        super().__init__()
        self.w, self.dtypes = weight(W, W), dtypes

    def forward(self, x):
        w = self.w
        for dtype in self.dtypes:
            w = w.to(dtype)
        return F.linear(x, w)


CASTS = [
    (torch.float8_e4m3fn, torch.float32),
    (BF16, torch.float32),
    (torch.float64, BF16, torch.float32),
    (torch.float16, BF16, torch.float32),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize("dtypes", CASTS, ids=str)
@pytest.mark.parametrize("adapter", [False, True])
def test_each_cast_rounds(dtypes, adapter):
    """With an adapter, the sum is rounded. The layer may then stay expanded, with a warning."""
    torch.manual_seed(0)
    x = torch.randn(8, W)
    model = slope_fx.compile(
        Rounded(*dtypes), example_inputs=x, backend="aot_eager", skip_first=False, skip_head=False,
        adapter_rank=4 if adapter else None, on_fallback="ignore" if adapter else "error",
    )  # fmt: skip
    (sparse,) = slope_fx.sparse_weights(model).values()
    if adapter:
        slope_fx.Schedule(model, 2, adapter_start=0.0)
        sparse.lora_B.data.normal_(0, 0.1)
    want = sparse.expanded().detach()
    for dtype in dtypes:
        want = want.to(dtype)
    got = model(x)
    lossless = dtypes == (torch.float64, torch.float32)
    unrounded = x @ sparse.expanded().detach().T
    assert torch.allclose(got, unrounded, rtol=0, atol=1e-5) is lossless
    torch.testing.assert_close(got, x @ want.T, rtol=0, atol=1e-5)


class WithoutGradient(nn.Module):
    """A weight that is read under ``no_grad``, for a product with gradients."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x):
        with torch.no_grad():
            w = self.fc.weight.t()
        return x @ w + self.fc.bias


class OnceWithout(nn.Module):
    """Two products with the same weight. The first one runs under ``no_grad``."""

    def __init__(self):
        super().__init__()
        self.w = weight(W, W)

    def forward(self, x):
        with torch.no_grad():
            scale = F.linear(x, self.w).abs().mean()
        return F.linear(x, self.w) / scale


@pytest.mark.parametrize("kind", [WithoutGradient, OnceWithout])
@pytest.mark.parametrize("disabled", [(), ("sparsify_linears",)])
@pytest.mark.parametrize("trains_input", [True, False])
def test_a_weight_that_was_read_without_gradients(kind, disabled, trains_input):
    """A read under ``no_grad`` gives no gradient, other reads do: compiled as eager."""
    torch.manual_seed(0)
    x = torch.randn(8, W, requires_grad=trains_input)
    how = {"example_inputs": x, "skip_first": False, "skip_head": False, "on_fallback": "ignore"}
    model = slope_fx.compile(kind(), backend="aot_eager", disable_passes=disabled, **how)
    eager = copy.deepcopy(model)
    eager._compiled_call_impl = None
    gradients = []
    for each in (model, eager):
        each(x).sum().backward()
        (sparse,) = slope_fx.sparse_weights(each).values()
        gradients.append(sparse.values.grad)
    got, want = gradients
    assert (got is None) == (want is None) == (kind is WithoutGradient)
    if want is not None:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_attention_weights_after_dropout():
    """As torch returns them: with a dropout of everything, none is left."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, W)
    dense = nn.MultiheadAttention(W, 2, dropout=1.0, batch_first=True)
    model = slope_fx.compile(
        copy.deepcopy(dense), example_inputs=(x, x, x), backend="aot_eager", skip_first=False,
        skip_head=False, on_fallback="error",
    )  # fmt: skip
    for each in (dense, model):
        assert not each.train()(x, x, x)[1].any()


def test_a_bias_of_another_dtype():
    """4-d inputs take one in a dense model: it is added after the product."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(weight(W, W).to(BF16))
            self.bias = nn.Parameter(torch.randn(W))

        def forward(self, x):
            return F.linear(x, self.w, self.bias)

    torch.manual_seed(0)
    dense, x = Mixed(), torch.randn(3, 2, 4, W, dtype=BF16).transpose(0, 1)
    model = slope_fx.compile(
        copy.deepcopy(dense), example_inputs=x, backend="aot_eager", skip_first=False,
        skip_head=False, on_fallback="error",
    )  # fmt: skip
    (sparse,) = slope_fx.sparse_weights(model).values()
    got, want = model(x), x.float() @ sparse.to_dense().float().T + model.bias
    assert dense(x).isfinite().all()
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (torch.zeros(W, dtype=BF16), r"the bias is torch.bfloat16 \(16,\), the output"),
        (torch.zeros(1), r"the bias is torch.float32 \(1,\)"),
        (torch.zeros(W - 1), r"with 16 features"),
    ],
)
def test_the_op_reads_no_bias_that_it_would_misread(bias, words):
    dense = torch.randn(W, W)
    forward = slope_fx.ops.magnitude_mask(dense, 2, 4)
    values = slope_fx.ops.compress(dense, forward, 2, 4)
    masks = forward, slope_fx.ops.backward_mask(values, forward, 2, 4)
    with pytest.raises(RuntimeError, match=words):
        slope_fx.ops.sparse_linear(torch.randn(3, W), values, *masks, bias, 2, 4)
    with pytest.raises(RuntimeError, match="x has 12 features"):
        slope_fx.ops.sparse_linear(torch.randn(3, 12), values, *masks, None, 2, 4)
