"""A mask method of one's own, by the recipe in CONTRIBUTING: a function in the registry."""

import pytest
import torch
from torch import nn

import slope_fx
from slope_fx.planning import MASK_METHODS, SlopeConfig, mask_method
from slope_fx.planning.masks import Chosen

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])


@pytest.fixture
def registry():
    before = set(MASK_METHODS)
    yield
    for name in set(MASK_METHODS) - before:
        del MASK_METHODS[name]


def test_a_method_that_scores(registry):
    @mask_method("first")
    def first(weight, pattern, inputs):
        """The first N of each M."""
        place = torch.arange(weight.shape[-1]) % pattern.m
        return (pattern.m - place).to(weight.dtype).expand_as(weight)

    model = slope_fx.compile(net(), "1:4", mask="first", example_inputs=X, backend=None)
    for weight in slope_fx.sparse_weights(model).values():
        columns = weight.forward_mask()[0].nonzero().flatten()
        assert columns.tolist() == [0, 4, 8, 12]
    assert slope_fx.record.record_of(model).config.mask == "first"


def test_a_method_that_updates_the_weight(registry):
    """As SparseGPT does: what stays makes up for what goes."""

    @mask_method("doubled", needs_inputs=True)
    def doubled(weight, pattern, inputs):
        assert inputs.gram is None
        assert inputs.squares.shape == (1, 16)
        flat = weight.view(-1, weight.shape[-1])
        bits = slope_fx.ops.magnitude_mask(flat, pattern.n, pattern.m)
        return Chosen(bits, weight.mul(2).view(16, 16))

    dense = net()
    with pytest.raises(slope_fx.errors.ArgumentError, match='mask="doubled" needs calibration='):
        slope_fx.compile(net(), mask="doubled", example_inputs=X)
    model = slope_fx.compile(net(), mask="doubled", calibration=[X], example_inputs=X, backend=None)
    for name, weight in slope_fx.sparse_weights(model).items():
        want = dense.get_submodule(name).weight * 2 * weight.forward_mask()
        assert torch.equal(weight.to_dense(), want)


def test_config_as_json_and_back():
    config = SlopeConfig({"*.0": None, "*": "1:4"}, adapter_rank=0.25, adapter_init="svd")
    assert SlopeConfig.from_json(config.to_json()) == config
    assert SlopeConfig.from_dict(SlopeConfig().to_dict()) == SlopeConfig()
    model = slope_fx.compile(net(), config, example_inputs=X, backend=None)
    assert slope_fx.record.record_of(model).config == config


def test_a_function_is_named_in_json_and_refused_when_it_is_read_back():
    given = SlopeConfig(mask=lambda name, weight: weight > 0)
    read = SlopeConfig.from_json(given.to_json())
    assert read.mask == "callable"
    with pytest.raises(
        slope_fx.errors.ArgumentError, match="stands for a function in a stored configuration"
    ):
        slope_fx.compile(net(), read, example_inputs=X)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SlopeConfig.from_dict({"sparsty": "2:4"}), "has no 'sparsty'; its fields are"),
        (lambda: SlopeConfig.from_json("[1]"), "is a list, not an object"),
        (lambda: SlopeConfig.from_json("{"), "the text is not JSON"),
        (lambda: SlopeConfig("5:4"), "5:4"),
        (lambda: SlopeConfig(mask="best"), "mask is 'best'; allowed are \"magnitude\""),
        (
            lambda: slope_fx.compile(net(), SlopeConfig(), adapter_rank=2, example_inputs=X),
            "adapter_rank can't be given beside a SlopeConfig",
        ),
        (
            lambda: slope_fx.compile(net(), adpter_rank=2, example_inputs=X),
            "no argument 'adpter_rank'",
        ),
    ],
)
def test_mistakes_in_a_configuration(call, words):
    with pytest.raises(slope_fx.errors.ArgumentError, match=words):
        call()


def test_typed_options_are_the_fields():
    """Type checkers see the keywords of compile in two TypedDicts; they may not drift."""
    from dataclasses import fields

    from slope_fx.backend.settings import RunOptions, Settings
    from slope_fx.planning.config import ConfigOptions

    names = {field.name for field in fields(SlopeConfig)} - {"sparsity"}
    assert set(ConfigOptions.__annotations__) == names
    assert set(RunOptions.__annotations__) == {field.name for field in fields(Settings)}
