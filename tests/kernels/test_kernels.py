"""Each engine against the oracle, and the oracle against METHOD."""

import inspect

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import formulas
from oracle import assert_same, assert_within_rounding
from peak import Peak
from slope_fx.kernels import ENGINES, conversions, packing, reference
from slope_fx.kernels.engine import Engine
from slope_fx.planning.patterns import Pattern
from strategies import dtypes, normal, patterns, seeds, sizes, tokens, weights

engines = st.sampled_from(["cpu", "cpu-dense", "dense"]).map(ENGINES.get)
"""Those for a CPU; ``test_triton_engine.py`` has the others."""
OPERATIONS = (
    "magnitude_mask",
    "backward_mask",
    "expand",
    "expand_twice_pruned",
    "compress",
    "sparse_linear",
    "sparse_input_grad",
    "sparse_weight_grad",
)


def serves(engine, dtype) -> bool:
    return not engine.why_not(torch.device("cpu"), dtype)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_offer_every_operation_with_one_signature(name):
    for operation in OPERATIONS:
        ours, theirs = (
            inspect.signature(getattr(engine, operation)) for engine in (ENGINES[name], Engine())
        )
        assert ours == theirs, operation


def test_engines_are_listed_by_name():
    assert list(ENGINES) == [engine.name for engine in ENGINES.values()]
    assert all(isinstance(engine, Engine) for engine in ENGINES.values())


@pytest.mark.parametrize("name", ENGINES)
def test_values_for_gives_a_dtype_that_the_products_accept(name):
    engine, values = ENGINES[name], torch.zeros(4, 2)
    assert engine.values_for(values, torch.float32) is values
    wide = engine.values_for(values, torch.bfloat16)
    assert wide.dtype == (torch.float32 if engine.takes_wider_values else torch.bfloat16)
    assert engine.values_for(values.half(), torch.bfloat16).dtype == torch.bfloat16


@given(st.integers(1, 5), st.integers(1, 40), seeds)
def test_packing_round_trip_in_one_layout(rows, columns, seed):
    mask = normal((rows, columns), seed) > 0
    bits = packing.pack(mask)
    assert bits.shape == (rows, packing.packed_width(columns))
    assert torch.equal(bits, reference.pack_bits(mask))
    assert torch.equal(packing.unpack(bits, columns), mask)
    assert torch.equal(reference.unpack_bits(bits, columns), mask)
    assert torch.equal(packing.pack(mask.t().contiguous().t()), bits)


@given(st.data(), patterns, dtypes, engines)
def test_forward_mask(data, pattern, dtype, engine):
    weight = data.draw(weights(data.draw(sizes(pattern)), dtype))
    bits = engine.magnitude_mask(weight, *(pattern.n, pattern.m))
    assert torch.equal(bits, reference.magnitude_mask(weight, pattern.n, pattern.m))
    mask = reference.unpack_bits(bits, weight.shape[1])
    assert (mask.view(len(mask), -1, pattern.m).sum(-1) == pattern.n).all()
    if not weight.isnan().any():
        scores = weight.double().abs()
        assert torch.equal(mask, formulas.top_n_mask(scores, pattern.n, pattern.m))


@given(st.data(), patterns, dtypes, engines)
def test_backward_mask(data, pattern, dtype, engine):
    weight = data.draw(weights(data.draw(sizes(pattern)), dtype))
    n, m = pattern.n, pattern.m
    forward = reference.magnitude_mask(weight, n, m)
    values = reference.compress(weight, forward, n, m)
    bits = engine.backward_mask(values, forward, n, m)
    assert torch.equal(bits, reference.backward_mask(values, forward, n, m))
    kept = reference.unpack_bits(forward, weight.shape[1])
    both = torch.zeros_like(kept)
    both[kept] = reference.unpack_bits(bits, values.shape[1]).view(-1)
    assert (both.t().reshape(weight.shape[1], -1, m).sum(-1) <= n).all()
    if not weight.isnan().any():
        assert torch.equal(both, formulas.backward_mask(weight, kept, n, m))


@pytest.mark.parametrize("m", [4, 8])
def test_masks_of_a_large_weight_are_chosen_in_parts(monkeypatch, m):
    """The same masks as at once, with less memory than the weight's."""
    weight = normal((8192, 1024), 0)
    with Peak() as counted:
        forward = conversions.magnitude_mask(weight, 2, m)
        assert counted.peak < 1.5 * weight.nbytes  # with the weight; at once: 4
        values = conversions.compress(weight, forward, 2, m)
        before = sum(counted.alive.values())
        counted.restart()
        backward = conversions.backward_mask(values, forward, 2, m)
        assert counted.peak - before < 0.5 * weight.nbytes  # at once: 3.3
    monkeypatch.setattr(conversions, "_BLOCK", weight.numel())
    assert torch.equal(conversions.magnitude_mask(weight, 2, m), forward)
    assert torch.equal(conversions.backward_mask(values, forward, 2, m), backward)


@given(st.data(), patterns, dtypes, engines)
def test_compress_and_expand(data, pattern, dtype, engine):
    assume(serves(engine, dtype))
    n, m = pattern.n, pattern.m
    weight = data.draw(weights(data.draw(sizes(pattern)), dtype))
    forward = reference.magnitude_mask(weight, n, m)
    kept = reference.unpack_bits(forward, weight.shape[1])
    if data.draw(st.booleans()):
        weight = weight.t().contiguous().t()
    values = engine.compress(weight, forward, n, m)
    assert values.shape == (weight.shape[0], weight.shape[1] * n // m)
    assert_same(values, reference.compress(weight, forward, n, m))
    dense = engine.expand(values, forward, n, m)
    assert_same(dense, torch.where(kept, weight, torch.zeros_like(weight)))
    assert_same(dense, reference.expand(values, forward, n, m))
    backward = reference.backward_mask(values, forward, n, m)
    twice = engine.expand_twice_pruned(values, forward, backward, n, m)
    assert_same(twice, ENGINES["reference"].expand_twice_pruned(values, forward, backward, n, m))
    assert_same(engine.compress(dense, forward, n, m), values)


@given(st.data(), patterns, dtypes, engines, tokens, seeds, st.booleans(), st.booleans())
def test_products(data, pattern, dtype, engine, leading, seed, has_bias, contiguous):
    assume(serves(engine, dtype))
    n, m = pattern.n, pattern.m
    d_out, d_in = data.draw(sizes(pattern))
    weight = data.draw(weights((d_out, d_in), dtype, special=False))
    forward = reference.magnitude_mask(weight, n, m)
    values = reference.compress(weight, forward, n, m)
    backward = reference.backward_mask(values, forward, n, m)
    x = normal((*leading, d_in), seed, dtype, contiguous)
    grad = normal((*leading, d_out), seed + 1, dtype, contiguous)
    bias = normal((d_out,), seed + 2, dtype) if has_bias else None

    wide = [t.double() for t in (x, grad, values)]
    bias64 = None if bias is None else bias.double()
    x64, grad64, values64 = wide
    sizes_of = [t.abs() for t in wide]

    y = engine.sparse_linear(x, values, forward, bias, n, m)
    want = reference.sparse_linear(x64, values64, forward, bias64, n, m)
    size = reference.sparse_linear(sizes_of[0], sizes_of[2], forward, None, n, m)
    size = size if bias64 is None else size + bias64.abs()
    assert_within_rounding(y, want, size, dtype)

    dx = engine.sparse_input_grad(grad, values, forward, backward, n, m)
    want = reference.sparse_input_grad(grad64, values64, forward, backward, n, m)
    size = reference.sparse_input_grad(sizes_of[1], sizes_of[2], forward, backward, n, m)
    assert_within_rounding(dx, want, size, dtype)

    dw = engine.sparse_weight_grad(grad, x, forward, n, m)
    assert_same(engine.sparse_weight_grad(grad, x, forward, n, m, torch.float64), dw.double())
    want = reference.sparse_weight_grad(grad64, x64, forward, n, m)
    size = reference.sparse_weight_grad(sizes_of[1], sizes_of[0], forward, n, m)
    assert_within_rounding(dw, want, size, dtype)


@given(patterns, seeds, engines)
def test_nan_and_inf_spread_as_in_the_pruned_product(pattern, seed, engine):
    """A non-finite weight reaches just its own output; a pruned one reaches none."""
    n, m = pattern.n, pattern.m
    weight = normal((2 * m, 2 * m), seed)
    forward = reference.magnitude_mask(weight, n, m)
    values = reference.compress(weight, forward, n, m)
    values[0, 0], values[1, -1] = float("nan"), float("inf")
    x = normal((3, 2 * m), seed + 1)
    y = engine.sparse_linear(x, values, forward, None, n, m)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isinf().all()
    assert y[:, 2:].isfinite().all()
    # The twice pruned weight drops a value by its mask, never by multiplying with zero.
    nothing = torch.zeros_like(reference.backward_mask(values, forward, n, m))
    dx = engine.sparse_input_grad(normal((3, 2 * m), seed), values, forward, nothing, n, m)
    assert torch.equal(dx, torch.zeros_like(dx))


@given(patterns, seeds)
def test_reference_products_are_the_formulas(pattern, seed):
    n, m = pattern.n, pattern.m
    weight = normal((2 * m, 3 * m), seed, torch.float64)
    forward = formulas.top_n_mask(weight.abs(), n, m)
    backward = formulas.backward_mask(weight, forward, n, m)
    x = normal((5, 3 * m), seed + 1, torch.float64).requires_grad_()
    w = weight.clone().requires_grad_()
    y = formulas.SlopeProduct.apply(x, w, forward, backward)
    grad = normal(y.shape, seed + 2, torch.float64)
    y.backward(grad)

    bits = reference.magnitude_mask(weight, n, m)
    values = reference.compress(weight, bits, n, m)
    twice = reference.backward_mask(values, bits, n, m)
    got = (
        reference.sparse_linear(x.detach(), values, bits, None, n, m),
        reference.sparse_input_grad(grad, values, bits, twice, n, m),
        reference.sparse_weight_grad(grad, x.detach(), bits, n, m),
    )
    want = (y.detach(), x.grad, w.grad[forward].view(values.shape))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", formulas.TABLE)
def test_extra_zeros_match_the_table(text):
    """Lemma 4.3.1, by formula and by pruning a large random mask."""
    pattern = Pattern.parse(text)
    n, m = pattern.n, pattern.m
    assert reference.extra_zeros(n, m) == pytest.approx(formulas.TABLE[text], abs=5e-6)
    size = 1024
    engine = ENGINES["dense"]
    forward = engine.magnitude_mask(torch.rand(size, size), n, m)
    values = torch.rand(size, size * n // m) + 0.1
    twice = packing.unpack(engine.backward_mask(values, forward, n, m), values.shape[1])
    density = twice.sum().item() / size**2
    # Three standard deviations of a fraction over size**2 / m groups.
    assert pattern.density - density == pytest.approx(formulas.TABLE[text], abs=3 / size)
