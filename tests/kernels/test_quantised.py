"""Quantised values: the format and the quantiser, and the CPU engine's product and expansion, on
each of its roads, against float64 products of values that are decoded here by themselves."""

import ctypes
import platform
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_fx.kernels import ENGINES, quantised, reference
from slope_fx.kernels import cpu as cpu_module
from slope_fx.kernels.cpu import build
from strategies import normal, patterns, seeds

CPU = torch.device("cpu")
cpu = ENGINES["cpu"]
needs_engine = pytest.mark.skipif(
    bool(cpu.why_not(CPU, torch.float32)), reason=cpu.why_not(CPU, torch.float32) or "-"
)

kinds = st.sampled_from(["int8", "int4"])
groups = st.sampled_from(quantised.GROUPS)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
tokens = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 19, 32])


def decoded(codes, scales, kind: str, group: int, kept: int) -> torch.Tensor:
    """The values in float64, byte by byte, as the format is described."""
    rows = []
    for row, scale_row in zip(codes.tolist(), scales.view(torch.int16).tolist(), strict=True):
        scale = [struct.unpack("<f", struct.pack("<I", (s & 0xFFFF) << 16))[0] for s in scale_row]
        if kind == "int4":
            halves = [half for byte in row for half in (byte & 15, byte >> 4)]
            row = [half - 16 if half > 7 else half for half in halves]
        rows.append([code * scale[k // group] for k, code in enumerate(row[:kept])])
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), kept)


@st.composite
def layers(draw, most: int = 600):
    """A quantised weight: pattern, kind, group, codes, scales, mask, and ``W^R`` in float64."""
    pattern, kind, group, seed = draw(patterns), draw(kinds), draw(groups), draw(seeds)
    n, m = pattern.n, pattern.m
    d_out = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 40]))
    d_in = -(-draw(st.sampled_from([1, 16, 63, 64, 65, 128, 200, 256, most])) // m) * m
    forward = cpu.magnitude_mask(normal((d_out, d_in), seed), n, m)
    codes, scales = quantised.quantise(normal((d_out, d_in * n // m), seed + 1), kind, group)
    weight = torch.zeros(d_out, d_in, dtype=torch.float64)
    values = decoded(codes, scales, kind, group, d_in * n // m)
    weight[reference.unpack_bits(forward, d_in)] = values.view(-1)
    return n, m, group, codes, scales, forward, weight


def assert_product(got, x, weight, bias) -> None:
    """Within rounding, of the inputs too: to 2^-15 of the largest input, where no weight is 0."""
    x, size = x.double(), x.double().abs()
    want, magnitude = x @ weight.t() + bias, size @ weight.abs().t() + bias.abs()
    rounding = 2**-15 * size.amax(1, keepdim=True) * weight.abs().sum(1)
    finfo = torch.finfo(got.dtype)
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= 4 * finfo.eps * magnitude + rounding + finfo.tiny).all()


# --- the format -------------------------------------------------------------------------------


@given(kinds, groups, st.integers(1, 5), st.integers(1, 300), seeds)
def test_dequantise_decodes_the_format(kind, group, rows, kept, seed):
    values = normal((rows, kept), seed)
    codes, scales = quantised.quantise(values, kind, group)
    width = kept if kind == "int8" else -(-kept // 2)
    assert codes.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert (codes.shape, scales.shape) == ((rows, width), (rows, -(-kept // group)))
    assert scales.dtype == torch.bfloat16
    got = quantised.dequantise(codes, scales, kind, group, kept)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), decoded(codes, scales, kind, group, kept))
    assert quantised.kind_of(codes) == kind


@given(kinds, groups, st.sampled_from([1, 31, 64, 65, 200]), seeds)
def test_the_error_is_that_of_the_best_scale_or_less(kind, group, kept, seed):
    """Never more than with the range at the largest value of a group, rounded."""
    values = normal((3, kept), seed) * torch.tensor([[1e-3], [1.0], [1e3]])
    got = quantised.dequantise(*quantised.quantise(values, kind, group), kind, group, kept)
    highest = 127 if kind == "int8" else 7
    for part, mine in zip(values.split(group, 1), got.split(group, 1), strict=True):
        step = part.abs().amax(1, keepdim=True) / highest
        scale = step.bfloat16().float()
        plain = (part / scale).round().clamp(-highest, highest) * scale
        worst = (plain - part).square().sum(1)
        assert ((mine - part).square().sum(1) <= worst * (1 + 1e-5)).all()
        # The largest value of a group may be cut from nine codes to seven.
        assert ((mine - part).abs() <= 14 / 9 * (1 + 2**-7) * step).all()


def test_extremes_of_the_quantiser():
    zeros = torch.zeros(2, 40)
    for kind in quantised.BITS:
        codes, scales = quantised.quantise(zeros, kind, 32)
        assert torch.equal(quantised.dequantise(codes, scales, kind, 32, 40), zeros)
        values = torch.tensor([[1e-38, -3e-39, 0.0, 1.0]]).repeat(1, 10)
        values[:, 3::4] = 0
        codes, scales = quantised.quantise(values, kind, 32)
        assert scales.isfinite().all()
        got = quantised.dequantise(codes, scales, kind, 32, 40)
        assert (got[values == 0] == 0).all()
    codes, scales = quantised.quantise(torch.tensor([[8.0, -7.0, 1.0, 0.0]]), "int4", 32)
    assert scales.tolist() == [[-1.0]]  # one more code below zero than above: the largest gets it
    assert codes.tolist() == [[0x78, 0x0F]]


def test_large_weights_are_quantised_in_parts(monkeypatch):
    values = normal((50, 70), 0)
    whole = quantised.quantise(values, "int4", 32)
    monkeypatch.setattr(quantised, "_CHUNK", 200)
    for part, want in zip(quantised.quantise(values, "int4", 32), whole, strict=True):
        assert torch.equal(part, want)


@pytest.mark.parametrize(
    ("values", "kind", "group", "match"),
    [
        (torch.ones(2, 4), "int3", 32, "kind='int3': it must be 'int8' or 'int4'"),
        (torch.ones(2, 4), "int8", 48, "group=48: it must be 32, 64 or 128"),
        (torch.tensor([[1.0, float("nan")]]), "int8", 32, "NaN or infinity"),
        (torch.tensor([[float("inf"), 0.0]]), "int4", 32, "NaN or infinity"),
    ],
)
def test_what_cannot_be_quantised_is_refused(values, kind, group, match):
    with pytest.raises(ValueError, match=match):
        quantised.quantise(values, kind, group)


def test_bytes():
    """Codes, scales and mask, counted on the tensors."""
    for kind in quantised.BITS:
        for n, m in ((2, 4), (1, 4)):
            weight = normal((64, 512), 0)
            codes, scales = quantised.quantise(weight[:, : 512 * n // m], kind, 64)
            mask = cpu.magnitude_mask(weight, n, m)
            total = sum(t.nbytes for t in (codes, scales, mask))
            assert total / weight.numel() == quantised.bytes_of(kind, 64, n, m)


# --- products and expansion ---------------------------------------------------------------------


@given(layers(), tokens, dtypes, seeds)
def test_the_default_of_an_engine(layer, count, dtype, seed):
    n, m, group, codes, scales, forward, weight = layer
    engine = ENGINES["reference"]
    x = normal((count, weight.shape[1]), seed, dtype)
    arguments = (codes, scales, forward, n, m, group, weight.shape[1], dtype)
    dense = engine.expand_quantised(*arguments)
    assert torch.equal(dense, weight.to(dtype))
    got = engine.quantised_linear(x, codes, scales, forward, None, n, m, group)
    assert torch.equal(got, torch.nn.functional.linear(x, dense))


ROADS = ["native"]
if platform.machine() in ("x86_64", "AMD64") and Path("/proc/cpuinfo").exists():
    flags = Path("/proc/cpuinfo").read_text().split()
    ROADS += ["x86-64-v3"] * ("avx2" in flags)
    others = ["x86-64-v4"] * ("avx512vl" in flags) + ["x86-64"]
    ROADS += [pytest.param(name, marks=pytest.mark.full) for name in others]


@pytest.fixture(scope="module", params=ROADS)
def road(request, tmp_path_factory):
    """The engine with a library of each vector width that this machine has: 16 lanes to 4."""
    if reason := cpu.why_not(CPU, torch.float32):
        pytest.skip(reason)
    if request.param == "native":
        yield request.param
        return
    path = tmp_path_factory.mktemp("road") / "cpu.so"
    build.compile_library(path, (f"-march={request.param}", "-O1"))
    library = build._declared(ctypes.CDLL(str(path)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_module, "library", lambda: library)
        yield request.param


threads = st.sampled_from([1, 2, 3])


@settings(max_examples=100)
@given(layers(), tokens, dtypes, threads, st.integers(0, 3), st.booleans(), seeds)
def test_products_and_expansion(road, layer, count, dtype, workers, gap, has_bias, seed):
    n, m, group, codes, scales, forward, weight = layer
    d_out, d_in = weight.shape
    torch.set_num_threads(workers)
    x = normal((count, d_in + gap), seed, dtype)[:, gap:]
    bias = normal((d_out,), seed + 1, dtype) if has_bias else None
    got = cpu.quantised_linear(x, codes, scales, forward, bias, n, m, group)
    assert_product(got, x, weight, torch.zeros(d_out).double() if bias is None else bias.double())
    dense = cpu.expand_quantised(codes, scales, forward, n, m, group, d_in, dtype)
    assert torch.equal(dense, weight.to(dtype))


@given(layers(most=300), tokens, dtypes, st.sampled_from([1, 3, 8, 20]), st.booleans(), seeds)
def test_the_product_of_a_frozen_weight_with_its_adapter(
    road, layer, count, dtype, rank, has_bias, seed
):
    """The C function that frozen models call, with a second weight with the same inputs."""
    n, m, group, codes, scales, forward, weight = layer
    d_out, d_in = weight.shape
    x, bias = normal((count, d_in), seed, dtype), normal((d_out,), seed + 1, dtype)
    a, b = normal((rank, d_in), seed + 2, dtype), normal((d_out, rank), seed + 3, dtype)
    y, beside = x.new_empty(count, d_out), x.new_empty(count, fewer := d_out // 2)
    weight_at = [codes.data_ptr(), scales.data_ptr(), forward.data_ptr()]
    factors = [a.data_ptr(), b.data_ptr(), rank]
    products = torch.tensor(  # frozen_t of frozen.h
        [
            [*weight_at, 0, 0, 0, 0, fewer, beside.data_ptr()],
            [*weight_at, bias.data_ptr() * has_bias, *factors, d_out, y.data_ptr()],
        ]
    )
    format = (weight.shape[1], n, m, quantised.BITS[quantised.kind_of(codes)], group)
    cpu_module._call(
        "slope_stream", x, d_in, count, products, 2, *format, dtype=dtype, pattern=(n, m)
    )
    a64, b64, bias64 = a.double(), b.double(), bias.double() * has_bias
    down, size = x.double() @ a64.t(), x.double().abs() @ a64.abs().t()
    want = x.double() @ weight.t() + bias64 + down @ b64.t()
    magnitude = x.double().abs() @ weight.abs().t() + bias64.abs() + size @ b64.abs().t()
    rounding = 2**-15 * x.double().abs().amax(1, keepdim=True) * weight.abs().sum(1)
    assert ((y.double() - want).abs() <= 4 * torch.finfo(dtype).eps * magnitude + rounding).all()
    want = x.double() @ weight[:fewer].t()
    magnitude = x.double().abs() @ weight[:fewer].abs().t()
    apart = (beside.double() - want).abs()
    assert (apart <= 4 * torch.finfo(dtype).eps * magnitude + rounding[:, :fewer]).all()


@needs_engine
@given(layers(most=300), tokens, dtypes, seeds)
def test_repeats_bit_for_bit_on_any_number_of_threads_and_beside_other_tokens(
    layer, count, dtype, seed
):
    n, m, group, *weight, _dense = layer
    x = normal((count, _dense.shape[1]), seed, dtype)
    first = cpu.quantised_linear(x, *weight, None, n, m, group)
    for workers in (2, 3):
        torch.set_num_threads(workers)
        assert torch.equal(cpu.quantised_linear(x, *weight, None, n, m, group), first)
    alone = [cpu.quantised_linear(row, *weight, None, n, m, group) for row in x.split(1)]
    assert torch.equal(torch.cat(alone), first)


@needs_engine
@pytest.mark.parametrize("shape", [(33,), (4, 10), (1, 1, 50)])
def test_more_tokens_are_a_dense_product(shape):
    n, m, group, d_in = 2, 4, 32, 96
    forward = cpu.magnitude_mask(normal((24, d_in), 0), n, m)
    codes, scales = quantised.quantise(normal((24, d_in // 2), 1), "int4", group)
    x, bias = normal((*shape, d_in), 2), normal((24,), 3)
    got = cpu.quantised_linear(x, codes, scales, forward, bias, n, m, group)
    dense = reference.expand(decoded(codes, scales, "int4", group, 48), forward, n, m)
    torch.testing.assert_close(got.double(), x.double() @ dense.t() + bias, rtol=1e-5, atol=1e-5)


@given(layers(most=300), dtypes, seeds)
def test_16_bit_inputs_of_like_size_are_exact(road, layer, dtype, seed):
    """bf16 to 2^-7 of the largest, fp16 to 2^-4: the product is that of the inputs as they are."""
    n, m, group, codes, scales, forward, weight = layer
    bits = {torch.float32: 15, torch.bfloat16: 8, torch.float16: 11}[dtype]
    x = normal((2, weight.shape[1]), seed).sign() * 2 ** (bits - 1)
    x = (x + normal(x.shape, seed + 1).clamp(-0.9, 0.9) * x.abs()).round().to(dtype)
    got = cpu.quantised_linear(x, codes, scales, forward, None, n, m, group)
    want, magnitude = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    assert ((got.double() - want).abs() <= 2 * torch.finfo(dtype).eps * magnitude).all()


@pytest.mark.parametrize("kind", list(quantised.BITS))
@pytest.mark.parametrize(("n", "m", "block"), [(2, 4, 128), (1, 4, 256), (3, 8, 64), (15, 16, 64)])
def test_a_large_input_spoils_no_other_block(road, kind, n, m, block):
    """A feature that is 2^14 times larger: outputs without its block are as exact as without it."""
    d_in, group = 512, 64
    forward = cpu.magnitude_mask(normal((20, d_in), 0), n, m)
    values = normal((20, d_in), 1)
    values[:, :block] = 0
    kept = cpu.compress(values, forward, n, m)
    codes, scales = quantised.quantise(kept, kind, group)
    weight = reference.expand(decoded(codes, scales, kind, group, kept.shape[1]), forward, n, m)
    x = normal((3, d_in), 2)
    x[:, 0] = 2.0**14
    got = cpu.quantised_linear(x, codes, scales, forward, None, n, m, group)
    x[:, 0] = 0
    assert_product(got, x, weight, torch.zeros(20).double())


@given(layers(most=300), tokens, st.sampled_from([float("nan"), float("inf"), -float("inf")]),
       dtypes, st.data())  # fmt: skip
def test_nan_and_inf_show_and_spoil_no_other_token(road, layer, count, special, dtype, data):
    n, m, group, codes, scales, forward, weight = layer
    x = normal((count, weight.shape[1]), 3, dtype)
    token = data.draw(st.integers(0, count - 1))
    feature = data.draw(st.integers(0, weight.shape[1] - 1))
    x[token, feature] = special
    y = cpu.quantised_linear(x, codes, scales, forward, None, n, m, group)
    assert not y[token][weight[:, feature] != 0].isfinite().any()
    assert y[torch.arange(count) != token].isfinite().all()


@given(layers(most=200), st.sampled_from([1, 9, 40]))
def test_a_mask_that_something_wrote_into_is_refused(road, layer, count):
    n, m, group, codes, scales, forward, weight = layer
    forward = forward.clone()
    forward.view(-1)[-1] ^= 1
    x = normal((count, weight.shape[1]), 0)
    with pytest.raises(ValueError, match=f"A forward mask is no longer {n}:{m}"):
        cpu.quantised_linear(x, codes, scales, forward, None, n, m, group)
    with pytest.raises(ValueError, match=f"A forward mask is no longer {n}:{m}"):
        cpu.expand_quantised(codes, scales, forward, n, m, group, weight.shape[1], torch.float32)


@needs_engine
def test_another_group_is_refused():
    forward = cpu.magnitude_mask(normal((4, 96), 0), 2, 4)
    codes, scales = quantised.quantise(normal((4, 48), 1), "int8", 32)
    for count in (1, 40):
        with pytest.raises(ValueError, match="groups of 32, 64 or 128"):
            cpu.quantised_linear(normal((count, 96), 2), codes, scales, forward, None, 2, 4, 48)


@needs_engine
def test_large_and_small_inputs():
    """The ends of fp32: no overflow on the way, and no scale that is NaN or a denormal number."""
    forward = cpu.magnitude_mask(normal((4, 64), 0), 2, 4)
    for kind in quantised.BITS:
        codes, scales = quantised.quantise(torch.ones(4, 32), kind, 32)
        weight = (codes, scales, forward, None, 2, 4, 32)
        one = quantised.dequantise(codes, scales, kind, 32, 32)[0, 0]
        for size in (2.0**122, 1 - 2.0**-24, 1.0, 2.0**-90):
            y = cpu.quantised_linear(torch.full((1, 64), size), *weight)
            torch.testing.assert_close(y, (32 * size * one).expand(1, 4), rtol=2**-14, atol=0)
        y = cpu.quantised_linear(torch.full((1, 64), 1e-42), *weight)
        assert (y.abs() <= 1e-35).all()
