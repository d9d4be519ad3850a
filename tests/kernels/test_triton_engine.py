"""The Triton engine against the oracle: in Triton's interpreter, or on the GPU where there is one.

Each test that takes a configuration draws which of the configurations of the kernel runs, so that
every tile size occurs with every kind of edge.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from oracle import DenseOracle, assert_same, assert_within_rounding
from slope_fx.kernels import ENGINES, quantised, reference
from slope_fx.kernels.triton import launch
from strategies import normal, seeds, weights
from triton_cases import (
    DEVICE,
    DTYPES,
    ON_GPU,
    common,
    configuration,
    dtypes,
    layers,
    numbers,
    pruned,
    sizes,
    tokens,
    triton,
    why_not,
)

pytestmark = pytest.mark.skipif(bool(why_not), reason=why_not or "-")
kinds, groups = st.sampled_from(list(quantised.BITS)), st.sampled_from(quantised.GROUPS)


def assert_rounded(got, want) -> None:
    """To nearest on a GPU; the interpreter truncates to bf16."""
    if got.dtype == torch.float32:
        assert_same(got.double(), want)
        return
    finfo = torch.finfo(got.dtype)
    bound = finfo.eps * want.abs() / (2 if ON_GPU else 1) + finfo.smallest_normal * finfo.eps
    assert ((got.cpu().double() - want).abs() <= bound).all()


@settings(max_examples=20)
@given(st.data(), common, dtypes, numbers, st.booleans())
def test_masks_compress_and_expand(data, pattern, dtype, number, turned):
    """Bit for bit: ties, zeros, NaN and infinity, a weight that is stored transposed."""
    n, m = pattern.n, pattern.m
    weight = data.draw(weights(data.draw(sizes(pattern)), dtype))
    forward = reference.magnitude_mask(weight, n, m)
    values = reference.compress(weight, forward, n, m)
    backward = reference.backward_mask(values, forward, n, m)
    on_device = weight.to(DEVICE)
    if turned:
        on_device = on_device.t().contiguous().t()
    with configuration(number):
        assert_same(triton.magnitude_mask(on_device, n, m), forward)
        bits = forward.to(DEVICE)
        kept = triton.compress(on_device, bits, n, m)
        assert_same(kept, values)
        assert_same(triton.expand(kept, bits, n, m), reference.expand(values, forward, n, m))
        twice = triton.backward_mask(kept, bits, n, m)
        assert_same(twice, backward)
        want = ENGINES["reference"].expand_twice_pruned(values, forward, backward, n, m)
        assert_same(triton.expand_twice_pruned(kept, bits, twice, n, m), want)


@settings(max_examples=25)
@given(layers(), tokens, numbers, st.booleans(), st.booleans(), seeds)
def test_products(layer, count, number, has_bias, contiguous, seed):
    n, m, values, forward, backward = layer
    d_out, d_in, dtype = values.shape[0], values.shape[1] * m // n, values.dtype
    oracle = DenseOracle.of(values, forward, backward, n, m)
    x = normal((count, d_in), seed, dtype, contiguous).to(DEVICE)
    grad = normal((count, d_out), seed + 1, dtype, contiguous).to(DEVICE)
    bias = normal((d_out,), seed + 2, dtype).to(DEVICE) if has_bias else None
    with configuration(number):
        y = triton.sparse_linear(x, values, forward, bias, n, m)
        dx = triton.sparse_input_grad(grad, values, forward, backward, n, m)
        dw = triton.sparse_weight_grad(grad, x, forward, n, m)
    assert_within_rounding(y, *oracle.forward(x, bias), dtype)
    assert_within_rounding(dx, *oracle.input_grad(grad), dtype)
    assert_within_rounding(dw, *oracle.weight_grad(grad, x), dtype)


@settings(max_examples=20)
@given(layers(), tokens, numbers, st.sampled_from(DTYPES[1:]), seeds)
def test_fp32_values_with_16_bit_inputs(layer, count, number, dtype, seed):
    """As under autocast: the values are rounded in registers, their gradient isn't rounded."""
    n, m, values, forward, backward = layer
    values = values.float()
    d_out, d_in = values.shape[0], values.shape[1] * m // n
    x = normal((count, d_in), seed, dtype).to(DEVICE)
    grad = normal((count, d_out), seed + 1, dtype).to(DEVICE)
    oracle = DenseOracle.of(values.to(dtype), forward, backward, n, m)
    with configuration(number):
        y = triton.sparse_linear(x, values, forward, None, n, m)
        dx = triton.sparse_input_grad(grad, values, forward, backward, n, m)
        dw = triton.sparse_weight_grad(grad, x, forward, n, m, torch.float32)
    assert_within_rounding(y, *oracle.forward(x), dtype)
    assert_within_rounding(dx, *oracle.input_grad(grad), dtype)
    assert_within_rounding(dw, *oracle.weight_grad(grad, x), torch.float32)


@settings(max_examples=30)
@given(layers(), tokens, numbers, st.booleans(), kinds, groups, seeds)
def test_quantised_values(layer, count, number, has_bias, kind, group, seed):
    n, m, values, forward, backward = layer
    d_out, d_in, dtype = values.shape[0], values.shape[1] * m // n, values.dtype
    codes, scales = quantised.quantise(values, kind, group)
    decoded = quantised.dequantise(codes, scales, kind, group, values.shape[1])
    oracle = DenseOracle.of(decoded, forward, backward, n, m)
    x = normal((count, d_in), seed, dtype).to(DEVICE)
    bias = normal((d_out,), seed + 2, dtype).to(DEVICE) if has_bias else None
    weight = (codes, scales, forward)
    with configuration(number):
        y = triton.quantised_linear(x, *weight, bias, n, m, group)
        dense = triton.expand_quantised(*weight, n, m, group, d_in, dtype)
    assert_within_rounding(y, *oracle.forward(x, bias), dtype)
    assert_rounded(dense, oracle.weight)


@pytest.mark.full
@pytest.mark.parametrize("kind", list(quantised.BITS))
@pytest.mark.parametrize(
    ("n", "group"),
    [(2, 32), *(pytest.param(*c, marks=pytest.mark.full) for c in ((2, 128), (1, 64), (3, 32)))],
)
def test_quantised_values_across_the_edges_of_every_tile(kind, n, group):
    """Groups of scales that are longer and shorter than the tiles, in every configuration."""
    m, d_out, d_in, dtype = 4, 132, 648, torch.bfloat16
    weight = normal((d_out, d_in), 0, dtype).to(DEVICE)
    x = normal((3, d_in), 1, dtype).to(DEVICE)
    for number in range(4):
        with configuration(number):
            values, forward = pruned(weight, n, m)
            codes, scales = quantised.quantise(values, kind, group)
            decoded = quantised.dequantise(codes, scales, kind, group, values.shape[1])
            backward = triton.backward_mask(values, forward, n, m)
            oracle = DenseOracle.of(decoded, forward, backward, n, m)
            y = triton.quantised_linear(x, codes, scales, forward, None, n, m, group)
            dense = triton.expand_quantised(codes, scales, forward, n, m, group, d_in, dtype)
        assert_within_rounding(y, *oracle.forward(x), dtype)
        assert_rounded(dense, oracle.weight)


@pytest.mark.parametrize("kind", list(quantised.BITS))
def test_a_group_of_a_row_with_two_scales(kind):
    """N is no power of two, so that 32 consecutive values end within a group of M."""
    n, m, group, weight = 3, 4, 32, normal((12, 96), 0).to(DEVICE)
    values, forward = pruned(weight, n, m)
    codes, scales = quantised.quantise(values, kind, group)
    decoded = quantised.dequantise(codes, scales, kind, group, values.shape[1])
    oracle = DenseOracle.of(decoded, forward, triton.backward_mask(values, forward, n, m), n, m)
    dense = triton.expand_quantised(codes, scales, forward, n, m, group, 96, torch.float32)
    assert_rounded(dense, oracle.weight)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        pytest.param(k, dtype, marks=() if k in (1, 3) else pytest.mark.full)
        for k, dtype in [(0, torch.float32), *((k, torch.bfloat16) for k in range(4))]
    ],
)
@pytest.mark.parametrize("count", [1, pytest.param(40, marks=pytest.mark.full), 130])
def test_across_the_edges_of_every_tile(count, number, dtype):
    """Sizes a little over the largest tiles, with every configuration."""
    n, m, d_out, d_in = 2, 4, 132, 264
    weight = normal((d_out, d_in), 0, dtype).to(DEVICE)
    with configuration(number):
        values, forward = pruned(weight, n, m)
        backward = triton.backward_mask(values, forward, n, m)
        oracle = DenseOracle.of(values, forward, backward, n, m)
        x, grad = normal((count, d_in), 1, dtype), normal((count, d_out), 2, dtype)
        x, grad = x.to(DEVICE), grad.to(DEVICE)
        y = triton.sparse_linear(x, values, forward, None, n, m)
        dx = triton.sparse_input_grad(grad, values, forward, backward, n, m)
        dw = triton.sparse_weight_grad(grad, x, forward, n, m)
        twice = triton.expand_twice_pruned(values, forward, backward, n, m)
    assert_within_rounding(y, *oracle.forward(x), dtype)
    assert_within_rounding(dx, *oracle.input_grad(grad), dtype)
    assert_within_rounding(dw, *oracle.weight_grad(grad, x), dtype)
    assert_same(twice.double(), oracle.twice)


@pytest.mark.full
def test_sums_are_split_where_programs_are_few(monkeypatch):
    """... over no more parts than there are blocks, none of them empty; and are the same sums."""
    parts = []
    split = launch._Split

    class Noted(split):
        def __init__(self, config, tiles, blocks, result):
            super().__init__(config, tiles, blocks, result)
            parts.append((self.count, blocks))

    monkeypatch.setattr(launch, "_Split", Noted)
    n, m, d_out, d_in = 2, 4, 64, 1280
    values, forward = pruned(normal((d_out, d_in), 0).to(DEVICE), n, m)
    backward = triton.backward_mask(values, forward, n, m)
    oracle = DenseOracle.of(values, forward, backward, n, m)
    x = normal((3, d_in), 1).to(DEVICE)
    for number in range(4):
        with configuration(number):
            y = triton.sparse_linear(x, values, forward, None, n, m)
            assert_same(triton.sparse_linear(x, values, forward, None, n, m), y)
        assert_within_rounding(y, *oracle.forward(x), torch.float32)
    assert all(1 < count <= blocks for count, blocks in parts)
    assert all((count - 1) * math.ceil(blocks / count) < blocks for count, blocks in parts)


@given(layers(special=True), st.sampled_from([1, 3]), numbers)
@settings(max_examples=20)
def test_weights_that_are_not_finite_reach_their_own_outputs_only(layer, count, number):
    """A product with a NaN or infinite value isn't finite; outputs without one are."""
    n, m, values, forward, _ = layer
    d_in = values.shape[1] * m // n
    x = torch.ones(count, d_in, dtype=values.dtype, device=DEVICE)
    with configuration(number):
        y = triton.sparse_linear(x, values, forward, None, n, m)
    assert torch.equal(y.isfinite().all(0), values.isfinite().all(1))


@given(layers(), numbers)
@settings(max_examples=10)
def test_groups_that_keep_nothing_are_dropped_by_their_mask(layer, number):
    """Never by multiplying with zero: a dropped NaN is gone."""
    n, m, values, forward, backward = layer
    nothing, nans = torch.zeros_like(backward), torch.full_like(values, float("nan"))
    grad = torch.ones(2, values.shape[0], dtype=values.dtype, device=DEVICE)
    with configuration(number):
        dx = triton.sparse_input_grad(grad, nans, forward, nothing, n, m)
        twice = triton.expand_twice_pruned(nans, forward, nothing, n, m)
    assert torch.equal(dx, torch.zeros_like(dx))
    assert torch.equal(twice, torch.zeros_like(twice))


@pytest.mark.full
@given(layers(), numbers)
@settings(max_examples=25)
def test_a_mask_that_something_wrote_into_gives_nan(layer, number):
    """A kernel can't raise: the loss must show it."""
    n, m, values, forward, backward = layer
    forward = forward.clone()
    forward[-1, 0] ^= 1
    d_out, d_in = values.shape[0], values.shape[1] * m // n
    x = torch.ones(1, d_in, dtype=values.dtype, device=DEVICE)
    grad = torch.ones(1, d_out, dtype=values.dtype, device=DEVICE)
    with configuration(number):
        y = triton.sparse_linear(x, values, forward, None, n, m)
        assert y[0, -1].isnan()
        assert y[0, :-1].isfinite().all()
        dx = triton.sparse_input_grad(grad, values, forward, backward, n, m)
        assert dx.isnan().any()
        dw = triton.sparse_weight_grad(grad, x, forward, n, m)
        assert dw[-1].isnan().any()
        assert dw[:-1].isfinite().all()
        assert triton.expand(values, forward, n, m)[-1].isnan().any()
        twice = triton.expand_twice_pruned(values, forward, backward, n, m)
        assert twice[-1].isnan().any()


def test_offsets_past_32_bits():
    """Rows that lie 2^31 elements apart, of which only the pages that are touched exist."""
    n, m, d_out, d_in = 2, 4, 8, 16
    apart = 2**31 + 8
    storage = torch.empty(apart + 64, dtype=torch.float16, device=DEVICE)

    def far(source):
        view = storage.as_strided(source.shape, (apart, 1))
        return view.copy_(source)

    weight = normal((d_out, d_in), 0, torch.float16).to(DEVICE)
    values, forward = pruned(weight, n, m)
    backward = triton.backward_mask(values, forward, n, m)
    x, grad = normal((2, d_in), 1, torch.float16), normal((2, d_out), 2, torch.float16)
    x, grad = x.to(DEVICE), grad.to(DEVICE)
    assert_same(
        triton.sparse_linear(far(x), values, forward, None, n, m),
        triton.sparse_linear(x, values, forward, None, n, m),
    )
    assert_same(
        triton.sparse_input_grad(far(grad), values, forward, backward, n, m),
        triton.sparse_input_grad(grad, values, forward, backward, n, m),
    )
    assert_same(
        triton.sparse_weight_grad(grad, far(x), forward, n, m),
        triton.sparse_weight_grad(grad, x, forward, n, m),
    )
    assert_same(triton.magnitude_mask(far(weight[:2]), n, m), forward[:2])
    assert_same(triton.compress(far(weight[:2]), forward[:2], n, m), values[:2])
    # The same where a weight's columns are far apart, as those of one stored transposed.
    wide = storage.as_strided((2, m), (1, apart // (m - 1)))
    wide.copy_(weight[:2, :m])
    assert_same(triton.magnitude_mask(wide, n, m), triton.magnitude_mask(weight[:2, :m], n, m))
