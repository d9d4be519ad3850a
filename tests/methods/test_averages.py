"""Averages of weights whose masks move: torch's ``AveragedModel``, against float64."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import slope_fx
from formulas import top_n_mask
from slope_fx.methods import SRSTE, SSTE, Evolve, Gradual, Slope

WIDTH, STEPS, KEPT = 32, 8, 0.6
METHODS = [Slope(), Evolve(interval=2, rate=0.5), SRSTE(), SSTE(), Gradual(end=0.5)]
X = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))


def run(method, **more):
    """Train, and average after each step. Yields the models and the dense tensors of each step."""
    torch.manual_seed(0)
    model = slope_fx.compile(
        nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)]), "2:4", method=method,
        example_inputs=X, backend="aot_eager", on_fallback="error",
    )  # fmt: skip
    average = AveragedModel(model, **more)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = slope_fx.Schedule(model, STEPS, adapter_start=1.0, backward_mask_interval=1)
    steps = []
    average.update_parameters(model)  # the first one copies
    for _ in range(STEPS):
        (model(X) - X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
        steps.append({name: held(w) for name, w in slope_fx.sparse_weights(model).items()})
    return model, average, steps


def held(weight):
    """What a weight stores, as a dense matrix, and its forward mask."""
    values, mask = weight.values.detach().double(), weight.forward_mask().clone()
    dense = values.clone() if values.shape[1] == WIDTH else weight.to_dense().double()
    return dense, mask


def soft(dense, mask, first):
    """S-STE of an average, with the factor of the initial weights."""

    def moved(w):
        groups = w.view(len(w), -1, 4)
        threshold = groups.abs().sort(-1).values[..., 1, None]
        return (groups.sign() * (groups.abs() - threshold).clamp_min(0)).view_as(w)

    beta = (first * moved(first)).sum() / moved(first).square().sum()
    return beta * moved(dense)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("use_buffers", [pytest.param(False, marks=pytest.mark.full), True])
def test_an_average_is_read_by_its_own_mask(method, use_buffers):
    torch.manual_seed(0)
    first = {f"{i}": nn.Linear(WIDTH, WIDTH).weight.detach().double() for i in range(4)}
    model, average, steps = run(
        method, multi_avg_fn=get_ema_multi_avg_fn(KEPT), use_buffers=use_buffers
    )
    inner, moved = average.module, 0
    weights = slope_fx.sparse_weights(inner)
    dense = {}
    for name, theirs in slope_fx.sparse_weights(model).items():
        mask = top_n_mask(first[name].abs(), 2, 4)
        start = mask.clone()
        total = first[name] if not method.compressed else first[name] * mask
        for found in steps:
            now, mask = found[name]
            total = total * mask if method.compressed else total
            total = KEPT * total + (1 - KEPT) * now
        if method.name in ("sr-ste", "s-ste"):
            mask = top_n_mask(total.abs(), 2, 4)
        want = soft(total, mask, first[name]) if method.name == "s-ste" else total * mask
        moved += (mask != start).sum().item()
        assert torch.equal(weights[name].forward_mask(), mask)
        torch.testing.assert_close(weights[name].to_dense().double(), want, rtol=1e-4, atol=1e-5)
        assert not weights[name].masks_problem()
        assert weights[name].phase.fading is theirs.phase.fading is False
        dense[name] = want
    assert (moved > 0) is (method.name != "slope")
    y = X.double()
    for i in range(4):
        layer = inner[i]
        weight = dense.get(f"{i}", layer.weight.detach().double())
        y = y @ weight.T + layer.bias.double()
    torch.testing.assert_close(average(X).double(), y, rtol=1e-4, atol=1e-4)
    if not method.compressed:
        slope_fx.compress_(inner)
    torch.testing.assert_close(average(X).double(), y, rtol=1e-4, atol=1e-4)
    frozen = slope_fx.freeze(inner.eval())
    torch.testing.assert_close(frozen(X).double(), y, rtol=1e-4, atol=1e-4)


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW, amsgrad": lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True),
    "RMSprop": torch.optim.RMSprop,
    "RMSprop, centered": lambda p, lr: torch.optim.RMSprop(p, lr, centered=True, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
}


DIVISORS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"}
"""The states that their optimizers divide by."""


def dense_of(state, mask):
    dense = torch.zeros(mask.shape, dtype=torch.float64)
    dense[mask] = state.double().flatten()
    return dense


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_states_of_new_elements(make):
    """What an optimizer divides by is the mean of the group, so that first steps are small."""
    torch.manual_seed(0)
    model = slope_fx.compile(
        nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)]), "2:4",
        method=Evolve(interval=3, rate=0.5, end=1.0), example_inputs=X, backend="aot_eager",
    )  # fmt: skip
    optimizer = make(model.parameters(), lr=1e-3)
    schedule = slope_fx.Schedule(model, 6, adapter_start=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) - X).square().mean().backward()
        optimizer.step()
        before = {
            name: (weight.forward_mask().clone(), copy.deepcopy(optimizer.state[weight.values]))
            for name, weight in slope_fx.sparse_weights(model).items()
        }
        schedule.step()
    seen = set()
    for name, weight in slope_fx.sparse_weights(model).items():
        mask, states = before[name]
        new = weight.forward_mask() & ~mask
        assert new.any()
        for key, state in optimizer.state[weight.values].items():
            if not isinstance(state, torch.Tensor) or state.shape != weight.values.shape:
                continue
            want = dense_of(states[key], mask)
            means = want.view(WIDTH, -1, 4).sum(-1).div(2).repeat_interleave(4, -1)
            want[new] = means[new] if key in DIVISORS else 0
            got = dense_of(state, weight.forward_mask())
            torch.testing.assert_close(got, want * weight.forward_mask(), msg=f"{name} {key}")
            seen.add(key)
    assert seen


def test_quantised_states_are_refused():
    model = slope_fx.compile(
        nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)]), "2:4",
        method=Evolve(interval=1, rate=0.5, end=1.0), example_inputs=X, backend="aot_eager",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = slope_fx.Schedule(model, 4, adapter_start=1.0)
    for parameter in model.parameters():
        optimizer.state[parameter]["state1"] = torch.zeros_like(parameter, dtype=torch.uint8)
    model(X).square().mean().backward()
    optimizer.step()
    with pytest.raises(slope_fx.errors.UnsupportedError, match=r"^1: the optimizer stores state1"):
        schedule.step()
