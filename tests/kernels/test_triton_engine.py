"""The Triton engine against the oracle: in Triton's interpreter, or on the GPU where there is one.

Each test that takes a configuration draws which one of the kernel's own it runs with, so that
every tile size meets every kind of edge.
"""

import contextlib
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import models
import slope_fx
from oracle import DenseOracle, assert_same, assert_within_rounding
from slope_fx import ops
from slope_fx.kernels import ENGINES, reference, triton
from slope_fx.kernels.triton import configs, launch, traffic, tuning
from slope_fx.planning.patterns import Pattern
from strategies import normal, patterns, seeds, weights

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)
# The fast path as often as all the others together; groups of 16 take the interpreter seconds.
# On a GPU each pattern is compiled, a second a kernel, so there a few stand for all.
few = st.sampled_from([Pattern(*pair) for pair in ((2, 4), (1, 2), (2, 8), (3, 8), (8, 16))])
common = few if ON_GPU else st.one_of(st.just(Pattern(2, 4)), patterns)
numbers = st.integers(0, 3)
tokens = st.sampled_from([1, 2, 7, 16, 17, 33, 65, 130])
pytestmark = pytest.mark.skipif(
    bool(triton.why_not(DEVICE, torch.float32)), reason=triton.why_not(DEVICE, torch.float32) or "-"
)


@contextlib.contextmanager
def configuration(number: int):
    """Every kernel with the configuration of that number in its space.

    The interpreter's time is by instruction, whatever the tile: it gets programs of more rows, and
    fewer of them.
    """
    before = tuning.best

    def best(kernel, key, space, run, device):
        config = space[number % len(space)]
        if kernel in ("magnitude_mask", "expand", "compress") and not ON_GPU:
            blocks = {**dict(config.blocks), "BLOCK_OUT": 64}
            config = dataclasses.replace(config, blocks=tuple(blocks.items()))
        return config

    tuning.best = best
    try:
        yield
    finally:
        tuning.best = before


@st.composite
def sizes(draw, pattern: Pattern):
    """(d_out, d_in): a few groups, whole bytes of masks or not, tiles of the kernels or not."""
    groups = st.sampled_from([1, 2, 3, 5, 9] if pattern.m > 4 else [1, 2, 3, 5, 9, 17, 33])
    return draw(groups) * pattern.m, draw(groups) * pattern.m


@st.composite
def layers(draw, special: bool = False):
    """A compressed weight on the device: pattern, values, both masks."""
    pattern, dtype = draw(common), draw(dtypes)
    n, m = pattern.n, pattern.m
    weight = draw(weights(draw(sizes(pattern)), dtype, special=special))
    forward = ENGINES["dense"].magnitude_mask(weight, n, m)
    values = ENGINES["dense"].compress(weight, forward, n, m)
    backward = ENGINES["dense"].backward_mask(values, forward, n, m)
    return n, m, *(t.to(DEVICE) for t in (values, forward, backward))


@settings(max_examples=20)
@given(st.data(), common, dtypes, numbers, st.booleans())
def test_masks_compress_expand_and_transpose(data, pattern, dtype, number, turned):
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
        for got, want in zip(triton.prune(on_device, n, m), (values, forward), strict=True):
            assert_same(got, want)
        kept = triton.compress(on_device, bits, n, m)
        assert_same(kept, values)
        assert_same(triton.expand(kept, bits, n, m), reference.expand(values, forward, n, m))
        twice = triton.backward_mask(kept, bits, n, m)
        assert_same(twice, backward)
        transposed, packed = triton.transpose(kept, bits, twice, n, m)
        want, want_packed = reference.transpose(values, forward, backward, n, m)
        assert_same(transposed, want)
        assert_same(packed, want_packed)
        want = reference.expand(want, want_packed, n, m).t()
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


@settings(max_examples=25)
@given(layers(), tokens, numbers, st.sampled_from([1, 3, 17]), st.booleans(), seeds)
def test_the_adapter_in_the_epilogue_and_by_itself(layer, count, number, rank, has_bias, seed):
    n, m, values, forward, backward = layer
    d_out, d_in, dtype = values.shape[0], values.shape[1] * m // n, values.dtype
    x = normal((count, d_in), seed, dtype).to(DEVICE)
    bias = normal((d_out,), seed + 2, dtype).to(DEVICE) if has_bias else None
    down = normal((count, rank), seed + 3, dtype).to(DEVICE)
    lora_b = normal((d_out, rank), seed + 4, dtype, contiguous=False).to(DEVICE)
    down64, b64 = down.cpu().double(), lora_b.cpu().double()
    y, size = DenseOracle.of(values, forward, backward, n, m).forward(x, bias)
    size = size + 0.37 * down64.abs() @ b64.abs().t()
    with configuration(number):
        fused = triton.sparse_linear(x, values, forward, bias, n, m, down, lora_b, 0.37)
        base = triton.sparse_linear(x, values, forward, bias, n, m)
        apart = triton.low_rank_update(base, down, lora_b, 0.37)
        in_place = base.clone()
        assert triton.low_rank_update(in_place, down, lora_b, 0.37, out=in_place) is in_place
    assert_within_rounding(fused, reference.low_rank_update(y, down64, b64, 0.37), size, dtype)
    want = reference.low_rank_update(base.cpu().double(), down64, b64, 0.37)
    assert_within_rounding(apart, want, size, dtype)
    assert_same(in_place, apart)


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


@pytest.mark.parametrize(
    ("number", "dtype"), [(0, torch.float32), *((k, torch.bfloat16) for k in range(4))]
)
@pytest.mark.parametrize("count", [1, 40, 130])
def test_across_the_edges_of_every_tile(count, number, dtype):
    """Sizes a little over the largest tiles, with every configuration."""
    n, m, d_out, d_in = 2, 4, 132, 264
    weight = normal((d_out, d_in), 0, dtype).to(DEVICE)
    with configuration(number):
        values, forward = triton.prune(weight, n, m)
        backward = triton.backward_mask(values, forward, n, m)
        oracle = DenseOracle.of(values, forward, backward, n, m)
        x, grad = normal((count, d_in), 1, dtype), normal((count, d_out), 2, dtype)
        x, grad = x.to(DEVICE), grad.to(DEVICE)
        y = triton.sparse_linear(x, values, forward, None, n, m)
        dx = triton.sparse_input_grad(grad, values, forward, backward, n, m)
        dw = triton.sparse_weight_grad(grad, x, forward, n, m)
        transposed, bits = triton.transpose(values, forward, backward, n, m)
    assert_within_rounding(y, *oracle.forward(x), dtype)
    assert_within_rounding(dx, *oracle.input_grad(grad), dtype)
    assert_within_rounding(dw, *oracle.weight_grad(grad, x), dtype)
    back = reference.expand(transposed.cpu(), bits.cpu(), n, m).t()
    assert_same(back.double(), oracle.twice)


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
    values, forward = triton.prune(normal((d_out, d_in), 0).to(DEVICE), n, m)
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
        transposed, bits = triton.transpose(nans, forward, nothing, n, m)
    assert torch.equal(dx, torch.zeros_like(dx))
    assert torch.equal(transposed, torch.zeros_like(transposed))
    mask = reference.unpack_bits(bits.cpu(), values.shape[0])
    assert (mask.view(len(mask), -1, m).sum(-1) == n).all()


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
        assert triton.transpose(values, forward, backward, n, m)[0].isnan().any()


def test_offsets_past_32_bits():
    """Rows that lie 2^31 elements apart, of which only the pages that are touched exist."""
    n, m, d_out, d_in = 2, 4, 8, 16
    apart = 2**31 + 8
    storage = torch.empty(apart + 64, dtype=torch.float16, device=DEVICE)

    def far(source):
        view = storage.as_strided(source.shape, (apart, 1))
        return view.copy_(source)

    weight = normal((d_out, d_in), 0, torch.float16).to(DEVICE)
    values, forward = triton.prune(weight, n, m)
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


@pytest.mark.skipif(ON_GPU, reason="the interpreter counts")
@pytest.mark.parametrize("pattern", ["2:4", "1:2", "2:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_what_it_is_on_paper(monkeypatch, pattern, dtype):
    """Every byte that a kernel loads or stores, counted, for whole tiles."""
    from triton.runtime import interpreter

    counted = [0, 0]
    loaded = interpreter.InterpreterBuilder.create_masked_load
    stored = interpreter.InterpreterBuilder.create_masked_store

    def load(self, pointers, mask, *more):
        counted[0] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return loaded(self, pointers, mask, *more)

    def store(self, pointers, value, mask, *more):
        counted[1] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return stored(self, pointers, value, mask, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)
    n, m = Pattern.parse(pattern).n, Pattern.parse(pattern).m
    d_out, d_in = 64, 128
    weight = normal((d_out, d_in), 0, dtype)
    values, forward = triton.prune(weight, n, m)
    backward = triton.backward_mask(values, forward, n, m)
    x, grad = normal((1, d_in), 1, dtype), normal((1, d_out), 2, dtype)
    calls = {
        "magnitude_mask": (triton.magnitude_mask, weight, n, m),
        "prune": (triton.prune, weight, n, m),
        "backward_mask": (triton.backward_mask, values, forward, n, m),
        "expand": (triton.expand, values, forward, n, m),
        "expand_twice_pruned": (triton.expand_twice_pruned, values, forward, backward, n, m),
        "compress": (triton.compress, weight, forward, n, m),
        "transpose": (triton.transpose, values, forward, backward, n, m),
        "linear": (triton.sparse_linear, x, values, forward, None, n, m),
        "input_grad": (triton.sparse_input_grad, grad, values, forward, backward, n, m),
        "weight_grad": (triton.sparse_weight_grad, grad, x, forward, n, m),
    }
    # One program for the products, so that no input is read twice and no sum is split.
    whole = configs.Config(
        (("BLOCK_OUT", d_out), ("BLOCK_TOKENS", 16), ("GROUPS", d_in // m), ("BLOCK_RANK", 16)), 4
    )

    def best(kernel, key, space, run, device):
        names = [name for name, _ in space[0].blocks]
        blocks = tuple((name, size) for name, size in whole.blocks if name in names)
        return dataclasses.replace(whole, blocks=blocks)

    monkeypatch.setattr(tuning, "best", best)
    besides = {  # inputs read, outputs written
        "linear": (x, grad), "input_grad": (grad, x), "weight_grad": ((x, grad), ()),
    }  # fmt: skip
    for kernel, (operation, *arguments) in calls.items():
        counted[:] = 0, 0
        operation(*arguments)
        for side, tensors in enumerate(besides.get(kernel, ((), ()))):
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            counted[side] -= sum(t.nbytes for t in tensors)
        paper = traffic.bytes_per_weight(kernel, dtype.itemsize, n, m)
        assert tuple(counted) == tuple(each * d_out * d_in for each in paper), kernel


@pytest.mark.skipif(ON_GPU, reason="test_cuda.py does this, and under a sanitizer")
def test_the_sanitizers_script_launches_every_configuration():
    import compiled_kernels
    import launch_kernels

    launched = launch_kernels.launch_all(DEVICE, (3, 5), patterns=((2, 4),))
    assert launched == {
        (kernel, config.name)
        for kernel in compiled_kernels.KERNELS
        for config in compiled_kernels.spaces(kernel, 4, 2)
        if kernel != "add_up"  # which has one, and comes after those that split
    }


def test_no_tokens():
    values, forward = triton.prune(normal((8, 16), 0).to(DEVICE), 2, 4)
    backward = triton.backward_mask(values, forward, 2, 4)
    x, grad = (torch.empty(0, 3, width, device=DEVICE) for width in (16, 8))
    assert triton.sparse_linear(x, values, forward, None, 2, 4).shape == (0, 3, 8)
    assert triton.sparse_input_grad(grad, values, forward, backward, 2, 4).shape == (0, 3, 16)
    dw = triton.sparse_weight_grad(grad, x, forward, 2, 4)
    assert torch.equal(dw, torch.zeros_like(values))
    assert triton.low_rank_update(grad, grad[..., :2], values[:, :2], 1.0).shape == grad.shape


@pytest.mark.parametrize(
    ("engine", "autocast"),
    [
        ("triton", False),
        pytest.param("triton", True, marks=pytest.mark.full),
        pytest.param("triton-dense", False, marks=pytest.mark.full),
    ],
)
def test_a_model_trains_as_on_the_dense_engine(engine, autocast):
    """Two steps, the second in the adapter phase: loss and every gradient."""

    def train(name):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = models.gpt2(layers=1).to(DEVICE)
        model = slope_fx.compile(model, adapter_rank=2, backend="aot_eager", engine=name)
        schedule = slope_fx.Schedule(model, total_steps=2, adapter_start=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.arange(24, device=DEVICE).view(2, 12)
        losses, grads = [], {}
        for _ in range(2):
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
            optimizer.step(), optimizer.zero_grad(), schedule.step()
        return losses, grads

    tolerance = 5e-2 if autocast else 1e-3
    with configuration(0):
        losses, grads = train(engine)
    want_losses, want_grads = train("dense")
    assert losses == pytest.approx(want_losses, rel=tolerance)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        want = want_grads[name]
        assert (grad - want).norm() <= tolerance * want.norm() + 1e-6, name


def _pruned(weight, n, m):
    forward = reference.magnitude_mask(weight, n, m)
    return reference.compress(weight, forward, n, m), forward


def test_autocast_neither_copies_the_values_nor_rounds_their_gradient(monkeypatch):
    """fp32 values go to the kernels as they are; on other engines they are cast first."""
    n, m = 2, 4
    weight = normal((16, 32), 0)
    values, forward = (t.to(DEVICE) for t in _pruned(weight, n, m))
    backward = ENGINES["dense"].backward_mask(values, forward, n, m)
    x = normal((5, 32), 1).to(DEVICE)
    results = {}
    for engine in ("triton", "dense"):
        met = []
        operation = ENGINES[engine].sparse_linear
        monkeypatch.setattr(
            ENGINES[engine], "sparse_linear",
            lambda *a, met=met, operation=operation: met.append(a[1].dtype) or operation(*a),
            raising=False,
        )  # fmt: skip
        leaf = values.clone().requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y = ops.sparse_linear(x, leaf, forward, backward, None, n, m, *[engine] * 3)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert leaf.grad.dtype == torch.float32
        results[engine] = met, leaf.grad
    assert results["triton"][0] == [torch.float32]
    assert results["dense"][0] == [torch.bfloat16]
    exact, rounded = results["triton"][1], results["dense"][1]
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())
    torch.testing.assert_close(exact, rounded, rtol=1e-2, atol=1e-2)
    want = x.cpu().bfloat16().double().sum(0).expand(16, 32)
    assert_within_rounding(exact, *[w[reference.unpack_bits(forward.cpu(), 32)].view(16, 16)
                                    for w in (want, want.abs())], torch.float32)  # fmt: skip


def test_what_it_cannot_serve_is_told(monkeypatch):
    why_not = triton.why_not
    assert "no kernels for torch.float64" in why_not(DEVICE, torch.float64)
    assert "NVIDIA GPUs, not on meta" in why_not(torch.device("meta"), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "NVIDIA GPUs, not on cpu" in why_not(torch.device("cpu"), torch.float32)
    if not ON_GPU:
        assert triton.unavailable() == "there is no CUDA device"
        with pytest.raises(
            slope_fx.errors.ArgumentError, match=r"engine='triton' can't be had: there is"
        ):
            slope_fx.compile(models.gpt2(), engine="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton.unavailable() == "triton isn't installed"


def test_every_space_is_one_of_different_configurations():
    for m in (2, 4, 8, 16):
        for space in (
            configs.mask_configs(m), configs.backward_mask_configs(m), configs.copy_configs(m),
            configs.transpose_configs(m), configs.low_rank_configs(),
            *(configs.linear_configs(m, t, s) for t in (1, 20, 60, 500) for s in (2, 4)),
            *(configs.input_grad_configs(m, t, s) for t in (1, 20, 60, 500) for s in (2, 4)),
            *(configs.weight_grad_configs(m, s) for s in (2, 4)),
        ):  # fmt: skip
            assert len({config.name for config in space}) == len(space)
