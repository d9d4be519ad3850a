"""The CPU engine against the oracle where its own structure shows: across the limits of its
panels, blocks and chunks, any number of threads, awkward memory, NaN and infinity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_fx.kernels import ENGINES, reference
from strategies import normal, patterns, seeds

CPU = torch.device("cpu")
cpu = ENGINES["cpu"]
pytestmark = pytest.mark.skipif(
    bool(cpu.why_not(CPU, torch.float32)), reason=cpu.why_not(CPU, torch.float32) or "-"
)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
tokens = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 31, 65, 127, 129, 257, 400])
threads = st.sampled_from([1, 2, 3, 5])


@st.composite
def layers(draw, most: int = 600):
    """A weight's values, masks and dtype, with sizes around the engine's blocks of 16 and 64."""
    pattern, dtype, seed = draw(patterns), draw(dtypes), draw(seeds)
    n, m = pattern.n, pattern.m
    sizes = st.sampled_from([1, 15, 16, 17, 48, 63, 64, 65, 80, 128, 200, most])
    d_out, d_in = (-(-draw(sizes) // m) * m for _ in range(2))
    weight = normal((d_out, d_in), seed, dtype)
    forward = cpu.magnitude_mask(weight, n, m)
    values = cpu.compress(weight, forward, n, m)
    return n, m, values, forward, cpu.backward_mask(values, forward, n, m)


def misaligned(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that starts ``offset`` elements into its storage, its rows apart by as many more."""
    rows, columns = tensor.shape
    storage = tensor.new_full((offset + rows * (columns + offset),), float("nan"))
    view = storage[offset:].view(rows, columns + offset)[:, :columns]
    return view.copy_(tensor)


def assert_product(got, want, magnitude) -> None:
    bound = 4 * torch.finfo(got.dtype).eps * magnitude + torch.finfo(got.dtype).tiny
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= bound).all()


@settings(max_examples=60)
@given(layers(), tokens, threads, st.integers(0, 3), st.booleans(), seeds)
def test_products_at_any_size(layer, count, workers, offset, has_bias, seed):
    n, m, values, forward, backward = layer
    d_out, d_in = values.shape[0], values.shape[1] * m // n
    dtype = values.dtype
    x = misaligned(normal((count, d_in), seed, dtype), offset)
    grad = misaligned(normal((count, d_out), seed + 1, dtype), offset)
    bias = normal((d_out,), seed + 2, dtype) if has_bias else None
    torch.set_num_threads(workers)

    # The oracle on matrices: its own unpacking, once, then float64 products.
    kept = reference.unpack_bits(forward, d_in)
    w = torch.zeros(d_out, d_in, dtype=torch.float64)
    w[kept] = values.double().view(-1)
    twice = reference.unpack_bits(backward, values.shape[1])
    w2 = torch.zeros_like(w)
    w2[kept] = torch.where(twice, values.double(), 0.0).view(-1)
    x64, grad64 = x.double(), grad.double()
    bias64 = torch.zeros(d_out).double() if bias is None else bias.double()

    assert_product(
        cpu.sparse_linear(x, values, forward, bias, n, m),
        x64 @ w.t() + bias64, x64.abs() @ w.abs().t() + bias64.abs(),
    )  # fmt: skip
    assert_product(
        cpu.sparse_input_grad(grad, values, forward, backward, n, m),
        grad64 @ w2, grad64.abs() @ w2.abs(),
    )  # fmt: skip
    assert_product(
        cpu.sparse_weight_grad(grad, x, forward, n, m),
        (grad64.t() @ x64)[kept].view(values.shape),
        (grad64.abs().t() @ x64.abs())[kept].view(values.shape),
    )  # fmt: skip


@given(layers())
def test_the_compressed_transpose_is_the_twice_pruned_weight(layer):
    n, m, values, forward, backward = layer
    transposed, bits = cpu.transpose(values, forward, backward, n, m)
    kept = reference.unpack_bits(backward, values.shape[1])
    want = reference.expand(torch.where(kept, values, torch.zeros_like(values)), forward, n, m)
    assert torch.equal(reference.expand(transposed, bits, n, m), want.t())
    mask = reference.unpack_bits(bits, values.shape[0])
    assert (mask.view(len(mask), -1, m).sum(-1) == n).all()


@given(layers(most=300), tokens, seeds)
def test_repeats_bit_for_bit_on_any_number_of_threads(layer, count, seed):
    n, m, values, forward, backward = layer
    x = normal((count, values.shape[1] * m // n), seed, values.dtype)
    grad = normal((count, values.shape[0]), seed + 1, values.dtype)

    def products():
        return (
            cpu.sparse_linear(x, values, forward, None, n, m),
            cpu.sparse_input_grad(grad, values, forward, backward, n, m),
            cpu.sparse_weight_grad(grad, x, forward, n, m),
        )

    first = products()
    for workers in (1, 2, 3, 1):
        torch.set_num_threads(workers)
        assert all(torch.equal(a, b) for a, b in zip(products(), first, strict=True))


def test_more_tokens_than_are_packed_at_once():
    """The weight gradient then adds up in fp32 over several rounds, in 16 bits too."""
    n, m = 2, 4
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = normal((5000, 3072), 0, dtype), normal((5000, 64), 1, dtype)
        forward = cpu.magnitude_mask(normal((64, 3072), 2, dtype), n, m)
        kept = reference.unpack_bits(forward, 3072)
        want = (grad.double().t() @ x.double())[kept].view(64, -1)
        size = (grad.double().abs().t() @ x.double().abs())[kept].view(64, -1)
        assert_product(cpu.sparse_weight_grad(grad, x, forward, n, m), want, size)


@given(layers(most=200), tokens, st.sampled_from([float("nan"), float("inf")]), st.data())
def test_nan_and_inf_show_and_spoil_no_other_token(layer, count, special, data):
    """What the kept terms alone make of them is the least that must show, what a dense product
    would make of them (zeros times infinity are NaN) the most that may."""
    n, m, values, forward, _backward = layer
    d_in = values.shape[1] * m // n
    x = normal((count, d_in), 3, values.dtype)
    token, feature = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, d_in - 1))
    x[token, feature] = special
    y = cpu.sparse_linear(x, values, forward, None, n, m)
    reaches = reference.expand(values, forward, n, m)[:, feature] != 0
    assert not y[token][reaches].isfinite().any()
    assert y[torch.arange(count) != token].isfinite().all()


@given(layers(most=200), tokens)
def test_a_non_finite_gradient_spoils_no_other_token(layer, count):
    n, m, values, forward, backward = layer
    grad = normal((count, values.shape[0]), 3, values.dtype)
    grad[0, 0] = float("inf")
    dx = cpu.sparse_input_grad(grad, values, forward, backward, n, m)
    assert dx[1:].isfinite().all()
    x = normal((count, values.shape[1] * m // n), 4, values.dtype)
    dw = cpu.sparse_weight_grad(grad, x, forward, n, m)
    assert dw[1:].isfinite().all()
    assert not dw[0].isfinite().any()


@given(layers(most=200), st.sampled_from([1, 9, 40]))
def test_a_mask_that_something_wrote_into_is_refused(layer, count):
    n, m, values, forward, backward = layer
    forward = forward.clone()
    forward.view(-1)[-1] ^= 1
    x = normal((count, values.shape[1] * m // n), 0, values.dtype)
    grad = normal((count, values.shape[0]), 1, values.dtype)
    for product in (
        lambda: cpu.sparse_linear(x, values, forward, None, n, m),
        lambda: cpu.sparse_input_grad(grad, values, forward, backward, n, m),
        lambda: cpu.sparse_weight_grad(grad, x, forward, n, m),
        lambda: cpu.expand(values, forward, n, m),
    ):
        with pytest.raises(ValueError, match=f"A forward mask is no longer {n}:{m}"):
            product()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_rounded_as_torch_rounds(dtype):
    """Every finite bit pattern, and the ends of the range, through a product with one."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = bits[bits.isfinite()][: 2 * (len(bits) // 4)]
    x = torch.stack([bits, torch.zeros_like(bits)], 1)
    forward = cpu.magnitude_mask(torch.tensor([[1.0, 0.0]] * 4, dtype=dtype), 1, 2)
    y = cpu.sparse_linear(x, torch.ones(4, 1, dtype=dtype), forward, None, 1, 2)
    normal_range = bits.abs() >= torch.finfo(dtype).smallest_normal
    assert torch.equal(y[normal_range, 0], bits[normal_range])
    # Sums that no 16-bit number is: to nearest, ties to even, overflow to infinity.
    a = torch.linspace(-7e4, 7e4, 4001).to(dtype)
    b = torch.linspace(-3, 90, 4001).to(dtype)
    x = torch.stack([a, b, b, a], 1)
    forward = cpu.magnitude_mask(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4, dtype=dtype), 2, 4)
    y = cpu.sparse_linear(x, torch.ones(4, 2, dtype=dtype), forward, None, 2, 4)
    assert torch.equal(y[:, 0], (a.float() + b.float()).to(dtype))


def test_transposes_are_kept_between_micro_batches_and_never_stale(monkeypatch):
    """Made once an optimizer step where they are used more often; the gradients are the same."""
    import slope_fx

    made, transpose = [], cpu.transpose
    monkeypatch.setattr(cpu, "transpose", lambda *args: made.append(1) or transpose(*args))

    def train(policy):
        monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", policy)
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)])
        x = torch.randn(3, 5, 16)
        slope_fx.compile(model, example_inputs=x[0], backend="eager", engine="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        schedule = slope_fx.Schedule(model, 4, backward_mask_interval=2)
        counts, grads = [], []
        for _ in range(4):
            made.clear()
            for part in x:
                model(part).square().sum().backward()
            counts.append(len(made))
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            optimizer.step()
            assert cpu.operands.nbytes() == 0
            optimizer.zero_grad()
            schedule.step()
        return counts, grads

    kept, grads = train("")
    anew, want = train("0")
    assert anew == [6, 6, 6, 6]  # two layers, three micro-batches
    assert kept == [6, 2, 2, 2]  # the first step learns that they are used again
    for mine, others in zip(grads, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
