"""The ops of a frozen model against float64: every route, dtype, pattern and shape."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from oracle import assert_within_rounding
from slope_fx import ops
from slope_fx.kernels import reference
from slope_fx.kernels.cpu.build import BuildError
from slope_fx.kernels.cpu.routes import DENSE, FEWEST_ROWS, FORM_DTYPES, PANELS, STREAM
from slope_fx.kernels.errors import EngineWarning
from slope_fx.kernels.quantised import BITS, dequantise, quantise
from slope_fx.ops import frozen
from slope_fx.ops.frozen import (
    FROZEN_EXPAND,
    FROZEN_GROUPED_LINEAR,
    FROZEN_LINEAR,
    FROZEN_LINEAR_WITH_GRAD,
    FROZEN_LINEARS,
    why_not_native,
)
from strategies import normal, patterns, seeds, sizes, tokens, weights

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def test_the_library_is_built_here():
    assert why_not_native() == ""


@st.composite
def products(draw):
    """The operands of a product, and the routes that can compute it."""
    pattern, dtype = draw(patterns), draw(DTYPES)
    d_out, d_in = draw(sizes(pattern))
    seed, rank = draw(seeds), draw(st.sampled_from([0, 1, 3, 8, 17]))
    weight = draw(weights((d_out, d_in), torch.float32, special=False)).to(dtype)
    mask = ops.magnitude_mask(weight, pattern.n, pattern.m)
    values = ops.compress(weight, mask, pattern.n, pattern.m)
    x = normal((*draw(tokens), d_in), seed, dtype, contiguous=draw(st.booleans()))
    a = normal((rank, d_in), seed + 1, dtype) if rank else None
    b = normal((d_out, rank), seed + 2, dtype) if rank else None
    if b is not None and draw(st.booleans()):
        b = b.t().contiguous().t()
    bias = normal((d_out,), seed + 3, dtype) if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        bias = bias.repeat_interleave(2)[::2]
    routes = [PANELS, DENSE] + ([STREAM] if d_out >= FEWEST_ROWS else [])
    form = [pattern.n, pattern.m, 0, 0, 0, d_in, 0, draw(st.sampled_from(routes))]
    return x, values, mask, bias, a, b, form


def oracle(x, values, mask, bias, a, b, form):
    """The product in float64, and the sum of the magnitudes of its terms."""
    kept = reference.unpack_bits(mask, x.shape[-1])
    weight = torch.zeros(kept.shape, dtype=torch.float64)
    weight[kept] = values.double().reshape(-1)
    x = x.double()
    y, size = x @ weight.t(), x.abs() @ weight.abs().t()
    if a is not None:
        y, size = (
            y + x @ a.double().t() @ b.double().t(),
            size + (x.abs() @ a.double().abs().t() @ b.double().abs().t()),
        )
    return (y, size) if bias is None else (y + bias, size + bias.abs())


@given(products())
def test_each_route_is_the_product(product):
    x, values, mask, bias, a, b, form = product
    y = FROZEN_LINEAR(x, values, mask, None, bias, a, b, form)
    want, size = oracle(*product)
    assert_within_rounding(y, want, size, x.dtype)


@st.composite
def joined(draw):
    """Weights that read one input, as operands of each product and of one call for all."""
    quantised = draw(st.booleans())
    if quantised:
        (x, values, mask, scales, bias, a, _, form), _ = draw(quantised_products())
    else:
        (x, values, mask, bias, a, _, form), scales = draw(products()), None
    routes = [STREAM, DENSE] if quantised else [STREAM, PANELS, DENSE]
    each = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(1, len(values)))
        allowed = routes if quantised or rows >= FEWEST_ROWS else routes[1:]
        rank = draw(st.integers(1, 20))
        tensors = values[:rows], mask[:rows], scales[:rows] if quantised else None
        factors = None if a is None else normal((rank, form[5]), rank, x.dtype), None
        if a is not None:
            factors = factors[0], normal((rows, rank), rank + 1, x.dtype)
        few, many = draw(st.sampled_from(allowed)), draw(st.sampled_from(allowed))
        last = [*form[:-2], 0, few, 3, many]
        each.append((*tensors, None if bias is None else bias[:rows], *factors, last))
    return x, each


@given(joined())
def test_joined_products_are_those_of_each_weight(products):
    x, each = products
    *lists, forms = zip(*each, strict=True)
    values, masks, *rest = ([t for t in tensors if t is not None] or None for tensors in lists)
    together = x, values, masks, *rest, [number for form in forms for number in form]
    got = FROZEN_LINEARS(*together)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "_is_native", lambda tensor: False)
        engines = frozen._linears(*together)
    for mine, other, (*operands, form) in zip(got, engines, each, strict=True):
        want = FROZEN_LINEAR(x, *operands, form)
        torch.testing.assert_close(mine, want, rtol=0, atol=0)
        torch.testing.assert_close(other, want, rtol=0, atol=0)


@given(products(), seeds)
def test_the_gradient_of_the_input_is_that_of_the_whole_weight(product, seed):
    x, values, mask, bias, a, b, form = product
    x = x.float().contiguous().requires_grad_()
    values, *factors = (t if t is None else t.float() for t in (values, bias, a, b))
    if bias is not None:
        factors[0] = factors[0].detach().requires_grad_()
    y = FROZEN_LINEAR_WITH_GRAD(x, values, mask, None, *factors, form)
    grad = normal(y.shape, seed)
    leaves = [x] if bias is None else [x, factors[0]]
    got = torch.autograd.grad(y, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    factors[0] = None if bias is None else wide[1]
    y = oracle(wide[0], values, mask, *factors, form)[0]
    want = torch.autograd.grad(y, wide, grad.double())
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4)


@st.composite
def quantised_products(draw):
    x, values, mask, bias, a, b, form = draw(products())
    kind, group = draw(st.sampled_from(["int8", "int4"])), draw(st.sampled_from([32, 64]))
    codes, scales = quantise(values.float(), kind, group)
    code = FORM_DTYPES.index(x.dtype)
    route = draw(st.sampled_from([STREAM, DENSE]))
    form = [*form[:2], BITS[kind], group, code, form[5], 0, route]
    return (x, codes, mask, scales, bias, a, b, form), kind


@given(quantised_products())
def test_quantised_values_are_those_that_the_codes_stand_for(product):
    (x, codes, mask, scales, bias, a, b, form), kind = product
    kept = form[5] * form[0] // form[1]
    values = dequantise(codes, scales, kind, form[3], kept)
    y = FROZEN_LINEAR(x, codes, mask, scales, bias, a, b, form)
    want, size = oracle(x, values, mask, bias, a, b, form)
    inputs = 2**-15 * x.double().abs().max() * values.double().abs().sum(-1) if x.numel() else 0
    bound = 4 * torch.finfo(x.dtype).eps * size + inputs + 1e-30
    if x.dtype in (torch.float64, torch.float32):
        bound = bound + 2**-20 * size
    assert ((y.double() - want).abs() <= bound).all()
    dense = FROZEN_EXPAND(codes, mask, scales, None, None, form)
    assert dense.dtype == x.dtype
    eye = torch.eye(form[5], dtype=torch.float64)
    want, size = oracle(eye, values, mask, None, None, None, form)
    assert ((dense.double() - want.t()).abs() <= torch.finfo(x.dtype).eps * size.t() + 1e-7).all()


@given(products())
def test_the_dense_weight_has_the_adapter(product):
    _, values, mask, _, a, b, form = product
    dense = FROZEN_EXPAND(values, mask, None, a, b, form)
    eye = torch.eye(dense.shape[1], dtype=torch.float64)
    want, size = oracle(eye, values, mask, None, a, b, form)
    assert_within_rounding(dense, want.t(), size.t(), values.dtype)


@given(products(), seeds)
def test_rows_of_an_adapter(product, seed):
    """A product reads some rows of a weight, and the same rows of B, whose columns are stored."""
    x, values, mask, bias, _, _, form = product
    d_out, rank = values.shape[0], 3
    a, whole = normal((rank, form[5]), seed, x.dtype), normal((rank, 2 * d_out), seed + 1, x.dtype)
    for start in (0, d_out):
        b = whole.t()[start : start + d_out]
        y = FROZEN_LINEAR(x, values, mask, None, bias, a, b, form)
        want, size = oracle(x, values, mask, bias, a, b, form)
        assert_within_rounding(y, want, size, x.dtype)


@st.composite
def stacks(draw):
    """The operands of a grouped product: experts with many, few and no rows, with codes or not."""
    pattern, dtype, seed = draw(patterns), draw(DTYPES), draw(seeds)
    (d_out, d_in), groups = draw(sizes(pattern)), draw(st.integers(1, 5))
    rank, kind = draw(st.sampled_from([0, 2, 8])), draw(st.sampled_from([None, "int8", "int4"]))
    weight = normal((groups * d_out, d_in), seed, dtype)
    mask = ops.magnitude_mask(weight, pattern.n, pattern.m)
    values, scales = ops.compress(weight, mask, pattern.n, pattern.m), None
    decoded, route, group = values, draw(st.sampled_from([PANELS, DENSE])), 0
    if kind is not None:
        group, route = 32, DENSE
        values, scales = quantise(values.float(), kind, group)
        decoded = dequantise(values, scales, kind, group, decoded.shape[1])
    if d_out >= FEWEST_ROWS and draw(st.booleans()):
        route = STREAM
    a = normal((groups * rank, d_in), seed + 1, dtype) if rank else None
    b = normal((rank, groups * d_out), seed + 2, dtype).t() if rank else None
    rows = draw(st.lists(st.sampled_from([0, 0, 1, 2, 17]), min_size=groups, max_size=groups))
    offsets = torch.tensor(rows).cumsum(0).to(draw(st.sampled_from([torch.int32, torch.int64])))
    x = normal((sum(rows) + draw(st.sampled_from([0, 3])), d_in), seed + 3, dtype)
    if draw(st.booleans()):
        offsets, x = None, normal((groups, draw(st.integers(0, 4)), d_in), seed + 3, dtype)
    code, bits = FORM_DTYPES.index(dtype), 0 if kind is None else BITS[kind]
    form = [pattern.n, pattern.m, bits, group, code, d_in, 0, route]
    return (x, values, mask, scales, a, b, offsets, groups, form), decoded


@given(stacks())
def test_each_weight_of_a_stack_has_its_own_rows(stack):
    (x, values, mask, scales, a, b, offsets, groups, form), decoded = stack
    y = FROZEN_GROUPED_LINEAR(x, values, mask, scales, a, b, offsets, groups, form)
    d_out, rank = values.shape[0] // groups, 0 if b is None else b.shape[1]
    assert y.shape == (*x.shape[:-1], d_out)
    ends = [] if offsets is None else [0, *offsets.tolist()]
    for group in range(groups):
        rows = slice(ends[group], ends[group + 1]) if ends else group
        part = slice(group * d_out, (group + 1) * d_out)
        factors = (a[group * rank : (group + 1) * rank], b[part]) if rank else (None, None)
        want, size = oracle(x[rows], decoded[part], mask[part], None, *factors, form)
        inputs = 0.0
        if scales is not None and x[rows].numel():
            inputs = 2**-15 * x[rows].double().abs().max() * decoded[part].double().abs().sum(-1)
        bound = 4 * torch.finfo(x.dtype).eps * size + inputs + 1e-30
        if scales is not None:
            bound = bound + 2**-20 * size
        assert ((y[rows].double() - want).abs() <= bound).all()
    if ends:
        assert not y[ends[-1] :].any()
    dense = FROZEN_EXPAND(values, mask, scales, a, b, form)
    for group in range(groups):
        part = slice(group * d_out, (group + 1) * d_out)
        factors = (a[group * rank : (group + 1) * rank], b[part]) if rank else (None, None)
        eye = torch.eye(form[5], dtype=torch.float64)
        want, size = oracle(eye, decoded[part], mask[part], None, *factors, form)
        bound = 4 * torch.finfo(dense.dtype).eps * size.t() + 1e-7
        assert ((dense[part].double() - want.t()).abs() <= bound).all()


@given(stacks())
def test_the_engines_compute_stacks_too(stack):
    """As on a device without the C++ ops."""
    (x, values, mask, scales, a, b, offsets, groups, form), _ = stack
    assume(scales is None or x.dtype != torch.float64)  # the CPU engine has no such expansion
    operands = (x, values, mask, scales, a, b, offsets, groups, form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "_is_native", lambda tensor: False)
        y = frozen._grouped_linear(*operands)
        dense = frozen._expand(values, mask, scales, a, b, form)
    tolerance = 64 * torch.finfo(x.dtype).eps
    for got, want in (
        (y, FROZEN_GROUPED_LINEAR(*operands)),
        (dense, FROZEN_EXPAND(values, mask, scales, a, b, form)),
    ):
        scale = want.double().abs().max() if want.numel() else 0.0
        assert got.shape == want.shape
        assert ((got.double() - want.double()).abs() <= tolerance * scale + 1e-6).all()


def test_rows_past_the_end_are_refused():
    weight = torch.randn(16, 16)
    mask = ops.magnitude_mask(weight, 2, 4)
    values, offsets = ops.compress(weight, mask, 2, 4), torch.tensor([1, 4])
    form = [2, 4, 0, 0, 0, 16, 0, STREAM]
    with pytest.raises(RuntimeError, match="group 1 ends at row 4 of 3"):
        FROZEN_GROUPED_LINEAR(torch.randn(3, 16), values, mask, None, None, None, offsets, 2, form)


def test_more_tokens_take_another_route():
    """The last pair whose fewest tokens the call has decides."""
    weight = torch.randn(8, 16)
    mask = ops.magnitude_mask(weight, 2, 4)
    values = ops.compress(weight, mask, 2, 4)
    wrong = [2, 4, 0, 0, 0, 16, 0, DENSE, 3, STREAM, 5, PANELS]
    for count in range(1, 9):
        x = torch.randn(count, 16)
        route = DENSE if count < 3 else STREAM if count < 5 else PANELS
        same = FROZEN_LINEAR(x, values, mask, None, None, None, None, [*wrong[:6], 0, route])
        torch.testing.assert_close(
            FROZEN_LINEAR(x, values, mask, None, None, None, None, wrong), same, rtol=0, atol=0
        )


@pytest.mark.parametrize("change", ["features", "dtype", "dtype of the bias"])
def test_wrong_operands_are_refused(change):
    weight = torch.randn(8, 16)
    mask = ops.magnitude_mask(weight, 2, 4)
    values = ops.compress(weight, mask, 2, 4)
    x = torch.randn(3, 12) if change == "features" else torch.randn(3, 16, dtype=torch.float16)
    said = "12 features, the weight reads 16" if change == "features" else "dtype"
    bias = torch.zeros(8, dtype=torch.bfloat16) if change == "dtype of the bias" else None
    form = [2, 4, 0, 0, 0, 16, 0, STREAM]
    with pytest.raises(RuntimeError, match=said):
        FROZEN_LINEAR(x, values, mask, None, bias, None, None, form)
    biases = None if bias is None else [bias]
    with pytest.raises(RuntimeError, match=said):
        FROZEN_LINEARS(x, [values], [mask], None, biases, None, None, form)


def test_autocast_keeps_the_weight_as_it_is():
    """The inputs and the bias get its dtype."""
    weight = torch.randn(8, 16)
    mask = ops.magnitude_mask(weight, 2, 4)
    values = ops.compress(weight, mask, 2, 4)
    x, bias = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(8, dtype=torch.bfloat16)
    form = [2, 4, 0, 0, 0, 16, 0, STREAM]
    want = x.float() @ ops.expand(values, mask, mask, 2, 4).t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = FROZEN_LINEAR(x, values, mask, None, None, None, None, form)
        biased = FROZEN_LINEAR(x, values, mask, None, bias, None, None, form)
        (joined,) = FROZEN_LINEARS(x, [values], [mask], None, [bias], None, None, form)
        graded = FROZEN_LINEAR_WITH_GRAD(x, values, mask, None, bias, None, None, form)
    torch.testing.assert_close(y, want)
    for each in (biased, joined, graded):
        torch.testing.assert_close(each, want + bias.float())


def test_a_library_that_cannot_be_built_is_told(monkeypatch):
    def fail():
        raise BuildError("there is no C++ compiler")

    monkeypatch.setattr(frozen, "ops_library", fail)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    with pytest.warns(EngineWarning, match=r"frozen models by the engines.*no C\+\+ compiler"):
        assert frozen.why_not_native.__wrapped__() == "there is no C++ compiler"


@given(products())
def test_without_the_library_the_engines_compute_it(product):
    """As on another device, or without a C++ compiler."""
    x, values, mask, bias, a, b, form = product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "_is_native", lambda tensor: False)
        y = frozen._linear(x, values, mask, None, bias, a, b, form)
        dense = frozen._expand(values, mask, None, a, b, form)
    want, size = oracle(*product)
    assert_within_rounding(y, want, 4 * size, x.dtype)
    eye = torch.eye(x.shape[-1], dtype=torch.float64)
    whole, size = oracle(eye, values, mask, None, a, b, form)
    assert_within_rounding(dense, whole.t(), size.t(), x.dtype)
