"""The ops as torch.library sees them: schema, fake kernels, autograd, autocast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from slope_fx import ops
from slope_fx.kernels import reference
from slope_fx.planning.patterns import Pattern
from strategies import dtypes, normal, patterns, seeds, sizes, tokens

NAMESPACE = torch.ops.slope_fx


def layer(pattern: Pattern, d_out: int, d_in: int, seed: int, dtype=torch.float32):
    """Values and both masks of a random layer."""
    weight = normal((d_out, d_in), seed, dtype)
    forward = ops.magnitude_mask(weight, pattern.n, pattern.m)
    values = ops.compress(weight, forward, pattern.n, pattern.m)
    backward = ops.backward_mask(values, forward, pattern.n, pattern.m)
    return weight, values, forward, backward


@settings(max_examples=5)
@given(st.data(), patterns, dtypes, tokens, seeds)
def test_opcheck_every_op(data, pattern, dtype, leading, seed):
    d_out, d_in = data.draw(sizes(pattern))
    n, m = pattern.n, pattern.m
    weight, values, forward, backward = layer(pattern, d_out, d_in, seed, dtype)
    x = normal((*leading, d_in), seed + 1, dtype)
    grad = normal((*leading, d_out), seed + 2, dtype)
    a, b = normal((2, d_in), seed, dtype), normal((d_out, 2), seed, dtype)
    bias = normal((d_out,), seed, dtype)

    rows, of_rows = normal((7, d_in), seed, dtype), normal((7, d_out), seed, dtype)
    ends = torch.tensor([3, 5], dtype=torch.int32)  # two rows belong to no group

    def leaf(t):
        return t.clone().requires_grad_()

    calls = {
        "magnitude_mask": (weight, n, m),
        "backward_mask": (values, forward, n, m),
        "compress": (weight, forward, n, m),
        "expand_grad": (weight, forward, n, m),
        "expand": (leaf(values), forward, backward, n, m),
        "add_adapter": (leaf(weight), leaf(a), leaf(b), 0.5),
        "sparse_linear": (leaf(x), leaf(values), forward, backward, leaf(bias), n, m),
        "sparse_input_grad": (grad, values, forward, backward, n, m),
        "sparse_weight_grad": (grad, x, forward, n, m),
    }
    stack = [torch.cat([t, t]) for t in (values, forward, backward)]
    of_stacks = {
        "sparse_linear": (leaf(rows), leaf(stack[0]), *stack[1:], None, n, m, 2, ends),
        "sparse_input_grad": (of_rows, *stack, n, m, 2, ends),
        "sparse_weight_grad": (of_rows, rows, stack[1], n, m, 2, ends),
    }
    assert set(calls) == set(ops.__all__)
    for name, args in [*calls.items(), *of_stacks.items()]:
        opcheck(getattr(NAMESPACE, name).default, args)
    opcheck(NAMESPACE.sparse_linear.default, (x, values, forward, backward, None, n, m))


@settings(max_examples=10)
@given(st.data(), patterns, seeds)
def test_gradcheck_where_the_gradient_is_the_derivative(data, pattern, seed):
    """All but the input gradient of ``sparse_linear``, which is an approximation by design.

    With a backward mask of all kept values it isn't one, and is checked too.
    """
    d_out, d_in = data.draw(sizes(pattern))
    n, m = pattern.n, pattern.m
    weight, values, forward, backward = layer(pattern, d_out, d_in, seed, torch.float64)
    weight, values = weight.requires_grad_(), values.requires_grad_()
    everything = torch.full_like(backward, 255)
    a = normal((2, d_in), seed, torch.float64).requires_grad_()
    b = normal((d_out, 2), seed, torch.float64).requires_grad_()
    x = normal((3, d_in), seed + 1, torch.float64).requires_grad_()
    bias = normal((d_out,), seed + 2, torch.float64).requires_grad_()

    check = torch.autograd.gradcheck
    assert check(lambda v: ops.expand(v, forward, backward, n, m), values, fast_mode=True)
    assert check(lambda *t: ops.add_adapter(*t, 0.5), (weight, a, b), fast_mode=True)
    assert check(
        lambda x, v, c: ops.sparse_linear(x, v, forward, everything, c, n, m),
        (x, values, bias),
        fast_mode=True,
    )
    frozen = x.detach()
    assert check(
        lambda v, c: ops.sparse_linear(frozen, v, forward, backward, c, n, m),
        (values, bias),
        fast_mode=True,
    )


@given(st.data(), patterns, tokens, seeds, st.booleans(), st.booleans(), st.booleans())
def test_only_needed_gradients(data, pattern, leading, seed, needs_x, needs_values, needs_bias):
    d_out, d_in = data.draw(sizes(pattern))
    _, values, forward, backward = layer(pattern, d_out, d_in, seed)
    x, bias = normal((*leading, d_in), seed + 1), normal((d_out,), seed + 2)
    for tensor, needed in ((x, needs_x), (values, needs_values), (bias, needs_bias)):
        tensor.requires_grad_(needed)
    y = ops.sparse_linear(x, values, forward, backward, bias, pattern.n, pattern.m)
    assert y.requires_grad == (needs_x or needs_values or needs_bias)
    if y.requires_grad:
        y.sum().backward()
    for tensor, needed in ((x, needs_x), (values, needs_values), (bias, needs_bias)):
        assert (tensor.grad is not None) == needed
        assert not needed or tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_follows_the_context(dtype, x_dtype):
    """The product runs in the context's dtype; fp32 values get fp32 gradients."""
    n, m = 2, 4
    _, values, forward, backward = layer(Pattern(n, m), 8, 16, seed=0)
    values.requires_grad_()
    bias = torch.randn(8, requires_grad=True)
    x = torch.randn(5, 16).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = ops.sparse_linear(x, values, forward, backward, bias, n, m)
    assert y.dtype == dtype
    grad = torch.randn_like(y)
    y.backward(grad)
    assert values.grad.dtype == bias.grad.dtype == torch.float32
    assert x.grad.dtype == x_dtype
    want = reference.sparse_linear(
        x.detach().to(dtype).double(), values.detach().to(dtype).double(), forward, None, n, m
    )
    want = want + bias.detach().to(dtype).double()
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)
    want = reference.sparse_weight_grad(grad.double(), x.detach().to(dtype).double(), forward, n, m)
    torch.testing.assert_close(values.grad.double(), want, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone():
    n, m = 2, 4
    _, values, forward, backward = layer(Pattern(n, m), 8, 16, seed=0, dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.sparse_linear(x, values, forward, backward, None, n, m)
    assert y.dtype == torch.float64


def test_misfits_are_refused_under_fake_tensors():
    n, m = 2, 4
    _, values, forward, backward = layer(Pattern(n, m), 8, 16, seed=0)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match="x has 12 features, the weight reads 16"):
            ops.sparse_linear(torch.randn(5, 12), values, forward, backward, None, n, m)
        with pytest.raises(RuntimeError, match=r"x is torch.float64, the weight torch.float32"):
            ops.sparse_linear(torch.randn(5, 16).double(), values, forward, backward, None, n, m)


def grouped_by_hand(x, values, forward, backward, ends, n, m):
    """The stack's products and gradients from the reference, group by group, in float64."""
    groups, start = len(ends), 0
    each = values.shape[0] // groups
    y, dx = x.new_zeros(x.shape[0], each).double(), torch.zeros_like(x).double()
    dw = torch.zeros_like(values).double()
    grad = normal((x.shape[0], each), 9, x.dtype).double()
    for g, end in enumerate(ends.tolist()):
        own = slice(g * each, (g + 1) * each)
        v, f, b, part = values[own].double(), forward[own], backward[own], slice(start, end)
        rows, grads = x[part].double(), grad[part]
        y[part] = reference.sparse_linear(rows, v, f, None, n, m)
        dx[part] = reference.sparse_input_grad(grads, v, f, b, n, m)
        dw[own] = reference.sparse_weight_grad(grads, rows, f, n, m)
        start = max(start, end)
    return y, dx, dw, grad


@settings(max_examples=25)
@given(
    st.data(), patterns, st.sampled_from([torch.float32, torch.float64]), seeds,
    st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_grouped_products(data, pattern, dtype, seed, counts, rest, contiguous):
    """Groups of any size, empty ones too; rows that belong to none give and get nothing."""
    d_out, d_in = data.draw(sizes(pattern))
    n, m = pattern.n, pattern.m
    stack = [layer(pattern, d_out, d_in, seed + i, dtype) for i in range(len(counts))]
    values, forward, backward = (torch.cat([part[i] for part in stack]) for i in (1, 2, 3))
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = normal((sum(counts) + rest, d_in), seed, dtype, contiguous)
    want_y, want_dx, want_dw, grad = grouped_by_hand(x, values, forward, backward, ends, n, m)
    x, values = x.detach().requires_grad_(), values.requires_grad_()
    y = ops.sparse_linear(x, values, forward, backward, None, n, m, len(counts), ends)
    y.backward(grad.to(dtype))
    for got, want in ((y, want_y), (x.grad, want_dx), (values.grad, want_dw)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(st.data(), patterns, seeds, st.integers(0, 4), st.integers(1, 3))
def test_equal_groups(data, pattern, seed, tokens, groups):
    """Without offsets: a batch of matrices, as ``bmm`` has it."""
    d_out, d_in = data.draw(sizes(pattern))
    stack = [layer(pattern, d_out, d_in, seed + i) for i in range(groups)]
    values, forward, backward = (torch.cat([part[i] for part in stack]) for i in (1, 2, 3))
    x = normal((groups, tokens, d_in), seed)
    args = (values, forward, backward)
    y = ops.sparse_linear(x, *args, None, pattern.n, pattern.m, groups)
    for g, (_, v, f, _) in enumerate(stack):
        want = reference.sparse_linear(x[g].double(), v.double(), f, None, pattern.n, pattern.m)
        torch.testing.assert_close(y[g].double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stack_under_autocast_is_its_weights_one_by_one(dtype):
    """fp32 values beside 16-bit inputs: the same numbers and dtypes as those of plain weights."""
    n, m = 2, 4
    layers = [layer(Pattern(n, m), 8, 16, seed=i) for i in range(3)]
    x = torch.randn(3, 5, 16, requires_grad=True)
    stacked = [torch.cat([part[i] for part in layers]) for i in (1, 2, 3)]
    stacked[0].requires_grad_()
    grad = torch.randn(3, 5, 8).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = ops.sparse_linear(x, *stacked, None, n, m, 3)
    got = y, *torch.autograd.grad(y, (x, stacked[0]), grad)
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32]
    for g, (_, v, f, b) in enumerate(layers):
        rows, v = x.detach()[g].requires_grad_(), v.requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            one = ops.sparse_linear(rows, v, f, b, None, n, m)
        want = one, *torch.autograd.grad(one, (rows, v), grad[g])
        for mine, expected in zip(got, want, strict=True):
            part = mine.view(3, -1, mine.shape[-1])[g]
            assert torch.equal(part, expected.view_as(part))


def test_a_stack_takes_no_bias():
    _, values, forward, backward = layer(Pattern(2, 4), 8, 16, seed=0)
    args = (torch.randn(2, 3, 16), *(torch.cat([t, t]) for t in (values, forward, backward)))
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="a stack of weights takes no bias"),
    ):
        ops.sparse_linear(*args, torch.zeros(8), 2, 4, 2)


@pytest.mark.parametrize("batched", ["x", "weights", "both"])
def test_vmap(batched):
    """A batch of inputs, an ensemble of weights, and each input with its own weights."""
    n, m = 2, 4
    _, values, forward, backward = layer(Pattern(n, m), 8, 16, seed=0)
    bias, many = torch.randn(8), torch.stack([values, values * 2, values.flip(0)])
    x = torch.randn(3, 5, 16)

    def one(x, v):
        expanded = ops.expand(v, forward, backward, n, m)
        y = ops.sparse_linear(x, v, forward, backward, bias, n, m)
        return y, expanded, ops.sparse_input_grad(y, v, forward, backward, n, m)

    dims = {"x": (0, None), "weights": (None, 0), "both": (0, 0)}[batched]
    inputs = (x if dims[0] == 0 else x[0], many if dims[1] == 0 else values)
    with torch.no_grad():
        got = torch.func.vmap(one, dims)(*inputs)
        for i in range(3):
            want = one(*(t[i] if d == 0 else t for t, d in zip(inputs, dims, strict=True)))
            for mine, expected in zip(got, want, strict=True):
                torch.testing.assert_close(mine[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ends", [None, [3, 5]])
def test_vmap_of_a_stack(ends):
    n, m = 2, 4
    _, values, forward, backward = layer(Pattern(n, m), 16, 16, seed=0)  # two of 8 rows
    x = torch.randn(4, 6, 16) if ends else torch.randn(4, 2, 3, 16)
    offsets = torch.tensor(ends) if ends else None

    def one(x):
        y = ops.sparse_linear(x, values, forward, backward, None, n, m, 2, offsets)
        return y, ops.sparse_input_grad(y, values, forward, backward, n, m, 2, offsets)

    with torch.no_grad():
        for mine, want in zip(torch.func.vmap(one)(x), zip(*map(one, x), strict=True), strict=True):
            torch.testing.assert_close(mine, torch.stack(want), rtol=1e-5, atol=1e-5)
