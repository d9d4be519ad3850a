"""The cuSPARSELt engine on the CPU, with a stand-in for NVIDIA's library that checks its arguments.

Only a GPU shows what the library itself computes, and how fast. All code around its calls runs
here: padding, layout and refusal. ``test_operands_*.py`` test the operands that the engine keeps,
``test_cusparselt_choice.py`` its choice.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fake_cusparselt as fake
import models
import slope_fx
from operand_models import (
    B16,
    layer,
)
from oracle import DenseOracle, assert_within_rounding
from slope_fx.errors import ArgumentError, EngineWarning
from slope_fx.kernels import ENGINES, engines, racing, reference, selection
from slope_fx.kernels.cusparselt import Cusparselt, library
from slope_fx.kernels.selection import Request
from slope_fx.planning.patterns import Pattern
from strategies import normal, seeds

CPU = torch.device("cpu")
CONTAINED = [Pattern(*nm) for nm in ((2, 4), (1, 4), (2, 8), (1, 8), (1, 2), (2, 16), (1, 16))]
WHERE = ("cpu", *(["cuda"] if not library.unavailable() else []))


@pytest.fixture(params=WHERE)
def placed(request):
    """The engine and the device it computes on: with the stand-in, and on a GPU truly."""
    if request.param == "cuda":
        return engines.ENGINES["cusparselt"], torch.device("cuda", 0)
    return request.getfixturevalue("engine"), CPU


def strange(shape, seed, dtype, kind):
    """The same numbers in memory that the library wouldn't take as it lies."""
    plain = normal(shape, seed, dtype)
    if kind == "gaps":
        return normal(shape, seed, dtype, contiguous=False)
    if kind == "columns":
        return plain.reshape(-1, shape[-1]).t().contiguous().t().view(shape)
    if kind == "unaligned":
        return torch.cat([plain.new_zeros(1), plain.reshape(-1)])[1:].view(shape)
    return plain


def _moved(tensor, device):
    """On a device, with its strides and its offset in memory."""
    if device == CPU:
        return tensor
    storage = tensor.untyped_storage().to(device=device)
    return tensor.new_empty(0, device=device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.data(),
    st.sampled_from(CONTAINED),
    st.sampled_from([B16, torch.float16]),
    st.sampled_from(["plain", "gaps", "columns", "unaligned"]),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_products_against_the_oracle(placed, data, pattern, dtype, kind, bias, wide, seed):
    engine, device = placed
    n, m = pattern.n, pattern.m
    d_out = data.draw(st.sampled_from([1, 2, 3, 5, 8])) * m
    d_in = data.draw(st.sampled_from([1, 3, 4, 8])) * m
    leading = data.draw(st.sampled_from([(1,), (7,), (8,), (3, 5), (0,), (), (2, 16)]))
    kept_dtype = torch.float32 if wide else dtype
    values, forward, backward = layer(pattern, d_out, d_in, seed, kept_dtype)
    want = DenseOracle.of(values.to(dtype), forward, backward, n, m)
    kind = kind if leading else "plain"
    x = strange((*leading, d_in), seed + 1, dtype, kind)
    grad = strange((*leading, d_out), seed + 2, dtype, kind)
    b = strange((d_out,), seed + 3, dtype, "unaligned") if bias else None
    x, grad, b, values, forward, backward = (
        None if t is None else _moved(t, device) for t in (x, grad, b, values, forward, backward)
    )
    y = engine.sparse_linear(x, values, forward, b, n, m)
    assert_within_rounding(y, *want.forward(x, b), dtype)
    assert y.is_contiguous()
    dx = engine.sparse_input_grad(grad, values, forward, backward, n, m)
    assert_within_rounding(dx, *want.input_grad(grad), dtype)
    dw = engine.sparse_weight_grad(grad, x, forward, n, m, kept_dtype)
    assert dw.dtype == kept_dtype
    assert_within_rounding(dw.to(dtype), *want.weight_grad(grad, x), dtype)


def test_inputs_that_lie_right_are_not_copied(engine, monkeypatch):
    seen = []
    multiply = library.multiply
    monkeypatch.setattr(library, "multiply", lambda *a: (seen.append(a[1:3]), multiply(*a))[1])
    values, forward, backward = layer(Pattern(2, 4), 32, 16, 0)
    x, bias, grad = normal((8, 16), 1, B16), normal((32,), 2, B16), normal((8, 32), 3, B16)
    engine.sparse_linear(x.view(2, 4, 16), values, forward, bias, 2, 4)
    engine.sparse_input_grad(grad, values, forward, backward, 2, 4)
    (got_x, got_bias), (got_grad, _) = seen[0], seen[-1]
    for got, given_tensor in ((got_x, x), (got_bias, bias), (got_grad, grad)):
        assert got.data_ptr() == given_tensor.data_ptr()


def test_nan_and_infinity_show(engine):
    values, forward, backward = layer(Pattern(2, 4), 16, 16, 0)
    x = normal((3, 16), 1, B16)
    x[1, 4] = float("nan")
    y = engine.sparse_linear(x, values, forward, None, 2, 4)
    weight = reference.expand(values, forward, 2, 4)
    assert y[1][weight[:, 4] != 0].isnan().all()
    assert not y[[0, 2]].isnan().any()
    values[0, 0] = float("inf")
    y = engine.sparse_linear(x, values, forward, None, 2, 4)
    assert not y[0, 0].isfinite()
    dx = engine.sparse_input_grad(normal((3, 16), 2, B16), values, forward, backward, 2, 4)
    assert not dx.isfinite().all()


@pytest.mark.parametrize("pattern", [Pattern(3, 4), Pattern(4, 8), Pattern(3, 8), Pattern(8, 16)])
def test_patterns_that_are_not_contained_are_refused_aloud(engine, pattern):
    assert "more than two of four" in engine.why_not_pattern(pattern.n, pattern.m)
    engines.say_once.cache_clear()
    request = Request(8, 16, 16, pattern.n, pattern.m, B16, CPU)
    with pytest.warns(EngineWarning, match=f"not use the cusparselt engine for {pattern}"):
        name = selection.choose("sparse_linear", request)
    assert name == "dense"


def test_contained_patterns_truly_are():
    for n, m in ((p.n, p.m) for p in CONTAINED):
        assert Cusparselt(ENGINES["dense"]).why_not_pattern(n, m) == ""
        # The fullest two neighbouring groups, all of their values next to each other.
        group = torch.zeros(m)
        group[m - n :] = 1
        mask = torch.cat([group, group.flip(0), group, group])
        assert mask.view(-1, 4).sum(-1).max() <= 2


def test_other_dtypes_are_refused_aloud(engine):
    engines.say_once.cache_clear()
    with pytest.warns(EngineWarning, match="bf16 and fp16, not torch.float32"):
        assert (
            selection.choose("sparse_linear", Request(8, 16, 16, 2, 4, torch.float32, CPU))
            == "dense"
        )


def test_the_library_is_not_there_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "built without cuSPARSELt" in library.unavailable() or "no CUDA" in library.unavailable()
    with pytest.raises(ArgumentError, match="engine='cusparselt' is not available"):
        slope_fx.compile(models.gpt2(), engine="cusparselt")


def test_which_devices_the_library_serves(monkeypatch):
    """Sparse tensor cores, and one device a process: PyTorch's handle is bound to the first."""
    capability = {"cuda:0": (7, 5), "cuda:1": (9, 0), "cuda:2": (8, 0)}
    monkeypatch.setattr(library, "_homes", [])
    monkeypatch.setattr(library, "unavailable", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[str(d)])
    why_not = library.why_not.__wrapped__
    assert "NVIDIA GPUs, not on cpu" in why_not(CPU)
    assert "cuda:0 has compute capability 7.5, and sparse tensor" in why_not(torch.device("cuda:0"))
    assert why_not(torch.device("cuda:1")) == ""
    assert "bound to cuda:1" in why_not(torch.device("cuda:2"))
    assert why_not(torch.device("cuda:1")) == ""


@pytest.mark.parametrize(
    ("hip", "built", "gpu", "reason"),
    [
        ("6.0", True, True, "PyTorch is for AMD GPUs"),
        (None, False, True, "built without cuSPARSELt"),
        (None, True, False, "no CUDA device"),
        (None, True, True, ""),
    ],
)
def test_what_the_library_needs(monkeypatch, hip, built, gpu, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert library.unavailable().endswith(reason)
    assert bool(library.unavailable()) == bool(reason)


def test_the_operators_that_it_calls_are_torchs():
    """The names and arguments of the narrow interface, as this PyTorch declares them."""
    aten = torch.ops.aten
    assert [a.name for a in aten._cslt_compress.default._schema.arguments] == ["input"]
    for op in (aten._cslt_sparse_mm, aten._cslt_sparse_mm_search):
        names = [argument.name for argument in op.default._schema.arguments]
        assert names[:3] == ["compressed_A", "dense_B", "bias"]
        assert "transpose_result" in names
    assert "alg_id" in [a.name for a in aten._cslt_sparse_mm.default._schema.arguments]


def test_the_algorithm_is_searched_once_and_kept_with_the_version(engine, monkeypatch):
    version = "800"
    monkeypatch.setattr(library, "version", lambda: version)
    seconds = {"0": 2.0, str(fake.SEARCHED): 1.0}
    monkeypatch.setattr(racing, "race", lambda runs, _: ({k: seconds[k] for k in runs}, True))
    used = []
    multiply = library.multiply
    monkeypatch.setattr(library, "multiply", lambda *a: (used.append(a[3]), multiply(*a))[1])
    values, forward, _ = layer(Pattern(2, 4), 16, 16, 0)

    def product(tokens):
        engine.sparse_linear(normal((tokens, 16), 1, B16), values, forward, None, 2, 4)

    product(33)
    product(64)  # the same power of two
    assert fake.calls["search"] == 1
    assert used == [fake.SEARCHED] * 2
    engine.forget()
    racing.forget_disk()
    product(40)
    assert fake.calls["search"] == 1  # from disk
    product(65)
    assert fake.calls["search"] == 2
    engine.forget()
    version = "801"
    seconds["0"] = 0.5
    product(40)
    assert fake.calls["search"] == 3
    assert used[-1] == 0  # what the search found isn't taken on trust
