"""Each method, trained with adapters that are active and large, against its paper in float64."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import slope_fx
from oracle_of_methods import BETAS, Layer, Run
from slope_fx.methods import SRSTE, SSTE, Evolve, Gradual, Slope
from strategies import seeds

STEPS, RATE, DECAY, INTERVAL = 8, 4e-3, 0.1, 3
METHODS = [
    Slope(),
    SRSTE(decay=0.05),
    SSTE(),
    Gradual(end=0.5),
    Evolve(interval=2, rate=0.4, end=0.75),
]


def chain(widths, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    parts = [part for layer in layers for part in (nn.GELU(), layer)]
    return nn.Sequential(*parts[1:])


def compiled(dense, x, method, pattern, backend):
    model = slope_fx.compile(
        dense, pattern, method=method, adapter_rank=2, skip_first=False, skip_head=False,
        example_inputs=x, backend=backend, on_fallback="error",
    )  # fmt: skip
    schedule = slope_fx.Schedule(model, STEPS, adapter_start=0.0, backward_mask_interval=INTERVAL)
    weights = slope_fx.sparse_weights(model)
    for weight in weights.values():
        with torch.no_grad():
            weight.lora_B.normal_(0, 0.3)
    return model, schedule, weights


def check(method, widths, pattern, seed, backend):
    x = torch.randn(STEPS, 6, widths[0], generator=torch.Generator().manual_seed(seed))
    dense, n, m = chain(widths, seed), int(pattern[0]), int(pattern[2:])
    numbers = dataclasses.asdict(method)
    layers = [
        Layer(
            method.name, layer.weight.detach().clone(), layer.bias.detach().clone(), n, m, numbers
        )
        for layer in dense
        if isinstance(layer, nn.Linear)
    ]
    model, schedule, weights = compiled(dense, x[0], method, pattern, backend)
    for layer, weight in zip(layers, weights.values(), strict=True):
        factors = (f.detach().double().requires_grad_() for f in (weight.lora_A, weight.lora_B))
        layer.adapter = (*factors, weight.scale)
    groups = slope_fx.param_groups(model, RATE, weight_decay=DECAY)
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    run = Run(layers, RATE, DECAY, STEPS, INTERVAL)
    moved = 0
    for step in range(STEPS):
        loss = model(x[step]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        assert loss.item() == pytest.approx(run.train(x[step]), rel=1e-4), step
        for layer, weight in zip(layers, weights.values(), strict=True):
            assert torch.equal(weight.forward_mask(), layer.mask), step
            assert torch.equal(weight.backward_mask(), layer.twice), step
            moved += int(layer.scouts)
    for layer, weight in zip(layers, weights.values(), strict=True):
        whole = weight.values if not method.compressed else weight.to_dense()
        torch.testing.assert_close(whole.double(), layer.weight.data, rtol=2e-3, atol=2e-4)
    return model, x


@settings(max_examples=15)
@example(METHODS[1], [16, 24, 16], "2:4", 0)
@example(METHODS[2], [16, 24, 16], "2:4", 0)
@example(METHODS[3], [16, 24, 16], "2:4", 0)
@example(METHODS[4], [16, 24, 16], "2:4", 0)
@given(
    st.sampled_from(METHODS),
    st.lists(st.sampled_from([8, 16, 24, 40]), min_size=2, max_size=4),
    st.sampled_from(["1:2", "2:4", "1:4", "3:4", "2:8"]),
    seeds,
)
def test_trajectory(method, widths, pattern, seed):
    check(method, widths, pattern, seed, "aot_eager")


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m.name == "evolve" else pytest.mark.full) for m in METHODS],
    ids=lambda method: method.name,
)
def test_trajectory_with_inductor(method):
    model, x = check(method, [32, 48, 32], "2:4", 1, "inductor")
    want = model(x[0])
    if method.compressed:
        with pytest.raises(slope_fx.errors.StateError, match="Leave compress_ out"):
            slope_fx.compress_(model)
        return
    before = {n: w.values for n, w in slope_fx.sparse_weights(model).items()}
    slope_fx.compress_(model)
    torch.testing.assert_close(model(x[0]), want)
    for name, weight in slope_fx.sparse_weights(model).items():
        assert weight.method == Slope()
        assert weight.values.numel() == before[name].numel() // 2
        assert weight.factor is None
        assert not weight.masks_problem()
    model(x[0]).sum().backward()  # with the gradients of SLoPe
    assert all(w.values.grad is not None for w in slope_fx.sparse_weights(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS[1:4], ids=lambda method: method.name)
def test_under_autocast(method, dtype):
    """The master weights stay fp32 and get fp32 gradients of products in 16 bits."""
    x = torch.randn(64, 32)
    dense = chain([32, 32], 0)
    layer = Layer(method.name, dense[0].weight.detach().clone(), dense[0].bias.detach(), 2, 4, {})
    model, _, weights = compiled(dense, x, method, "2:4", "aot_eager")
    (weight,) = weights.values()
    factors = (f.detach().double() for f in (weight.lora_A, weight.lora_B))
    layer.adapter = (*factors, weight.scale)
    with torch.autocast("cpu", dtype):
        y = model(x)
    y.float().square().sum().backward()
    want = layer(x.double())
    want.square().sum().backward()
    assert weight.values.dtype == weight.values.grad.dtype == torch.float32
    scale = layer.weight.grad.abs().max()
    assert (weight.values.grad.double() - layer.weight.grad).abs().max() < 0.03 * scale
    assert (y.double() - want).abs().max() < 0.03 * want.abs().max()


class Experts(nn.Module):
    """Three linears in one parameter."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(3, 16, 24))

    def forward(self, x):
        return torch.bmm(x, self.inner.mT)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("method", METHODS[1:4], ids=lambda method: method.name)
@pytest.mark.filterwarnings("ignore:.*no pass rewrites:slope_fx.errors.ExpandedWeightWarning")
def test_a_linear_that_no_pass_rewrites(method, backend):
    """Stacks of experts, and eager models: the same numbers, of dense products."""
    torch.manual_seed(0)
    experts, x = Experts(), torch.randn(3, 5, 24)
    layers = [Layer(method.name, w.clone(), torch.zeros(16), 2, 4, {}) for w in experts.inner.data]
    model = slope_fx.compile(
        experts, method=method, skip_first=False, skip_head=False, example_inputs=x,
        backend=backend,
    )  # fmt: skip
    (weight,) = slope_fx.sparse_weights(model).values()
    if weight.factor is not None and method.name == "s-ste":
        for layer in layers:  # one scale for the whole parameter
            layer.beta = weight.factor.double()
    y, want = model(x), torch.stack([f(part.double()) for f, part in zip(layers, x, strict=True)])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    want.square().sum().backward()
    got = weight.values.grad.view(3, 16, 24).double()
    torch.testing.assert_close(
        got, torch.stack([f.weight.grad for f in layers]), rtol=1e-4, atol=1e-4
    )
