"""Replaced parameters keep their class, sharing and attributes; lost hooks give a warning."""

import warnings

import pytest
import torch
from torch import nn

import slope_fx
from slope_fx.errors import ArgumentWarning, UnsupportedError
from slope_fx.sparse.mask import Mask

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def tied():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)])
    model[3].weight = model[1].weight
    return slope_fx.compile(
        model, adapter_rank=4, example_inputs=X, backend="aot_eager", on_fallback="error"
    )


@pytest.mark.parametrize(("frozen", "meta"), [(False, False), (False, True), (True, False)])
def test_load_by_assignment(frozen, meta):
    """Shared weights stay shared, and masks stay masks."""
    model, other = tied(), tied()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(1.5)
    if frozen:
        model, other = slope_fx.freeze(model.eval()), slope_fx.freeze(other.eval())
    if meta:
        other = other.to("meta")
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert other[3].weight_values is other[1].weight_values
    weights = slope_fx.sparse_weights(other)
    assert {type(w.forward_bits) for w in weights.values()} == {Mask}
    theirs = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert type(parameter) is type(theirs[name]), name
    torch.testing.assert_close(other(X), model(X))
    if frozen:
        with pytest.raises(UnsupportedError, match="gradients were asked of a weight"):
            other[1].weight_values.requires_grad_()
        return
    for parameter in other.parameters():
        parameter.requires_grad_(True)  # masks ignore it
    other(X).sum().backward()
    model(X).sum().backward()
    torch.testing.assert_close(other[1].weight_values.grad, model[1].weight_values.grad)


def test_attributes_of_a_parameter_are_those_of_its_values():
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)])
    model[1].weight._no_weight_decay = True
    slope_fx.compile(model, example_inputs=X, backend=None)
    assert model[1].weight_values._no_weight_decay
    assert slope_fx.densify(model, inplace=True)[1].weight._no_weight_decay


HOOKS = {
    "register_hook": lambda p: p.register_hook(lambda grad: grad),
    "optimizer in backward": lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_lost_hooks_are_named(hook):
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    for parameter in model.parameters():
        hook(parameter)
    with pytest.warns(ArgumentWarning, match=r"^1.weight and 1 more parameters: their hooks"):
        slope_fx.compile(model, example_inputs=X, backend=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope_fx.compile(
            nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]), example_inputs=X, backend=None
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_copies_of_data_parallel_are_refused(frozen):
    """torch calls this method of each module to make the copies, with two devices or more."""
    model = tied().eval()
    if frozen:
        model = slope_fx.freeze(model)
    weight = slope_fx.sparse_weights(model)["1"]
    with pytest.raises(UnsupportedError, match="DataParallel can't copy a compiled model"):
        weight._replicate_for_data_parallel()
