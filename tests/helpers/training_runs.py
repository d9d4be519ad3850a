"""A small model that trains in both phases, and what must be true of it afterwards."""

import torch
from torch import nn

import slope_fx
from slope_fx.planning.masks import mask_problem

STEPS, HALF = 8, 4
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
PARTS = torch.randn(4 * STEPS, 4, 32, generator=torch.Generator().manual_seed(1))


def scheduled(model, **more):
    """Compiled; the adapter phase begins half-way, and masks change at steps 3 and 6."""
    slope_fx.compile(model, "2:4", adapter_rank=4, backend="aot_eager", on_fallback="error", **more)
    return model, slope_fx.Schedule(model, STEPS, adapter_start=0.5, backward_mask_interval=3)


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in [(32, 64), (64, 128), (128, 64), (64, 8)]]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])
    return scheduled(model, example_inputs=X)


def error(model, x=X):
    return (model(x) - x[:, :8]).square().mean()


def copied(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def sparse_of(model):
    return slope_fx.sparse_weights(model).values()


def assert_masks_kept(model, before):
    """Forward masks as before; backward ones part of them, N:M along the other dimension."""
    for name, value in model.state_dict().items():
        assert "forward_bits" not in name or torch.equal(value, before[name]), name
    for weight in sparse_of(model):
        forward, backward = weight.forward_mask(), weight.backward_mask()
        assert not mask_problem(forward, weight.pattern)
        assert not (backward & ~forward).any()
        assert backward.view(-1, weight.m, weight.d_in).sum(1).max() <= weight.n


def assert_trained(model, start, middle):
    """Values all the way; adapters in the second phase and no earlier."""
    end = copied(model)
    assert_masks_kept(model, start)
    for name, value in end.items():
        if name.endswith("weight_values"):
            assert not torch.equal(middle[name], start[name]), name
            assert not torch.equal(value, middle[name]), name
        elif "lora_" in name:
            assert torch.equal(middle[name], start[name]), name
            assert not torch.equal(value, middle[name]), name
