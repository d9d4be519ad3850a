"""The options of ``torch.compile``: each reaches the backend, and a wrong one is refused."""

import copy

import pytest
import torch
from torch import nn

import slope_fx
from pipeline_cases import X, compiled, graphs, layers


def test_options_reach_the_backend():
    got = []

    def inner(gm, example_inputs, **more):
        got.append(more)
        return gm.forward

    compiled(backend=inner, options={"a": 1})(X)
    compiled(backend=inner, mode="max-autotune")(X)
    assert got == [{"options": {"a": 1}}, {"mode": "max-autotune"}]


def test_options_of_inductor_are_its_own():
    settings = slope_fx.rewriting_backend(mode="reduce-overhead").settings
    assert settings.replays
    assert not slope_fx.rewriting_backend().settings.replays
    settings = slope_fx.rewriting_backend(options={"max-autotune": True}).settings
    assert settings.inductor_options() == {"max_autotune": True}
    same = slope_fx.rewriting_backend(options={"max-autotune": True})
    assert same is slope_fx.rewriting_backend(options={"max-autotune": True})
    assert same is not slope_fx.rewriting_backend(options={"max-autotune": False})
    assert copy.deepcopy(same) is same


def test_dynamic_sizes_make_one_graph():
    torch._dynamo.reset()
    model = compiled(layers(), dynamic=True)
    start = graphs(model)
    for rows in (6, 7, 9):
        model(X.repeat(2, 1)[:rows]).sum().backward()
    assert graphs(model) == start + 1


def test_fullgraph_says_where_a_graph_breaks():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers()

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.layers(x)

    model = compiled(Breaks(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(X)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mode": "fast"}, "mode='fast'; allowed are 'default'"),
        ({"options": {"no_such": 1}}, "'no_such'] is not an option of Inductor"),
        ({"options": [1]}, "options is a list; it must be a mapping"),
        ({"mode": "default", "options": {"max_autotune": True}}, "can't both be given"),
        ({"disable_passes": ["sparsify"]}, "disable_passes has 'sparsify'; there are prune_exp"),
        (
            {"enable_passes": ["x"]},
            "there is no argument 'enable_passes'; there are",
        ),
        ({"passes": "mine"}, "passes is a str; it must be a list"),
        ({"passes": [3]}, "passes has 3, which is neither a function"),
        ({"passes": [..., ...]}, "`...` more than once"),
        ({"region": "all"}, "region='all'; allowed are 'auto', 'model', 'blocks'"),
        ({"dynamic": 1}, "dynamic=1; allowed are True, False, None"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(wrong, words):
    model = layers()
    with pytest.raises(slope_fx.errors.ArgumentError) as error:
        compiled(model, **{"backend": "inductor", **wrong})
    assert words in str(error.value)
    assert not slope_fx.record.sparse_weights_in(model)


def test_without_a_backend_its_arguments_are_told():
    with pytest.warns(slope_fx.errors.ArgumentWarning, match="disable_passes=.*has no effect"):
        compiled(backend=None, disable_passes=["prune_expands"])
