"""What ``compile`` and compiled models refuse: each mistake is named, and nothing has changed."""

import copy
import warnings

import pytest
import torch
from torch import nn

import slope_fx
from compile_cases import X, assert_untouched, plain, snapshot
from models import Plain
from slope_fx.errors import ArgumentError


def test_a_mask_of_another_pattern_does_not_load():
    two, four = plain(sparsity="2:4"), plain(sparsity="4:8", mask="random")
    before = copy.deepcopy(two.state_dict())
    with pytest.raises(RuntimeError, match=r"forward_bits: the mask keeps .* the layer is 2:4"):
        two.load_state_dict(four.state_dict())
    assert torch.equal(two.w_in_sparse.forward_bits, before["w_in_sparse.forward_bits"])


def test_a_backward_mask_that_is_not_n_of_m_does_not_load():
    model = plain()
    state = copy.deepcopy(model.state_dict())
    state["w_in_sparse.backward_bits"].fill_(255)
    with pytest.raises(RuntimeError, match=r"backward_bits: the mask keeps more than 2 of 4"):
        model.load_state_dict(state)


def test_a_dense_checkpoint_does_not_load_silently():
    with pytest.raises(RuntimeError, match="w_in_values"):
        plain().load_state_dict(Plain().state_dict())


def test_a_key_that_matches_nothing_is_told():
    with pytest.warns(slope_fx.errors.ArgumentWarning, match=r"sparsity\['\*\.mpl\.\*'\] matches"):
        plain(sparsity={"*.mpl.*": "2:8", "*": "2:4"})


def wrong_shape(name, weight):
    return torch.ones(3, 3, dtype=torch.bool)


def not_bool(name, weight):
    return torch.ones_like(weight)


def not_n_of_m(name, weight):
    return torch.ones_like(weight, dtype=torch.bool)


def raises(name, weight):
    if name == "w_out":
        raise KeyError("the second layer")
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep[:, ::2] = True
    return keep


MISTAKES = {
    "pattern": ({"sparsity": "5:4"}, ArgumentError, "5:4"),
    "pattern text": ({"sparsity": "2:3x"}, ArgumentError, "2:3x"),
    "pattern in a mapping": ({"sparsity": {"*": "3:3"}}, ArgumentError, "3:3"),
    "rank 0": ({"adapter_rank": 0}, ArgumentError, "adapter_rank=0"),
    "negative rank": ({"adapter_rank": -3}, ArgumentError, "adapter_rank=-3"),
    "rank too large": ({"adapter_rank": 17}, ArgumentError, "w_in, which is only"),
    "rank as a bool": ({"adapter_rank": True}, ArgumentError, "True"),
    "fraction above 1": ({"adapter_rank": 1.5}, ArgumentError, "1.5"),
    "fraction too large": ({"adapter_rank": 0.9}, ArgumentError, "w_out"),
    "skip_first": ({"skip_first": "no"}, ArgumentError, "skip_first='no'"),
    "skip_head": ({"skip_head": 1}, ArgumentError, "skip_head=1"),
    "mask tensor": ({"mask": torch.ones(9)}, ArgumentError, "mask is a Tensor"),
    "mask name": ({"mask": "biggest"}, ArgumentError, "biggest"),
    "mask shape": ({"mask": wrong_shape}, ArgumentError, r"shape \(3, 3\)"),
    "mask dtype": ({"mask": not_bool}, ArgumentError, "float32"),
    "mask not N:M": ({"mask": not_n_of_m}, ArgumentError, "keeps 4 elements in group 0"),
    "mask raises": ({"mask": raises}, KeyError, "the second layer"),
    "backend": ({"backend": "indcutor"}, ArgumentError, "indcutor"),
    "backend list": ({"backend": ["inductor"]}, ArgumentError, "inductor"),
    "backend type": ({"backend": 3}, ArgumentError, "backend=3"),
    "region": ({"region": "block"}, ArgumentError, "'blocks'"),
    "on_fallback": ({"on_fallback": "raise"}, ArgumentError, "'error'"),
    "inputs of the wrong width": (
        {"example_inputs": torch.randn(3, 9)}, ArgumentError, "fails on them",
    ),
    "too many inputs": (
        {"example_inputs": (X, X)}, ArgumentError, "too many positional",
    ),
    "unknown keyword": ({"example_inputs": {"y": X}}, ArgumentError, "'x'"),
    "inputs of the wrong kind": ({"example_inputs": "x"}, ArgumentError, "str"),
    "nothing eligible": (
        {"sparsity": {"*": None}}, slope_fx.errors.NoEligibleLinearError, "w_in: sparsity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_the_model_as_it_was(mistake):
    arguments, error, words = MISTAKES[mistake]
    model = Plain()
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        slope_fx.compile(model, **{"example_inputs": X, "backend": "aot_eager", **arguments})
    assert error is KeyError or isinstance(caught.value, slope_fx.errors.SlopeError)
    assert_untouched(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope_fx.compile(model, example_inputs=X, backend="aot_eager")
    assert model(X).isfinite().all()


def test_a_failure_half_way_through_installing_is_undone(monkeypatch):
    import slope_fx.sparse.install

    model = Plain()
    before = snapshot(model)
    made = []
    real = slope_fx.sparse.install.SparseWeight

    def fails_on_the_second(*args, **kwargs):
        if made:
            raise MemoryError("no room")
        made.append(real(*args, **kwargs))
        return made[0]

    monkeypatch.setattr(slope_fx.sparse.install, "SparseWeight", fails_on_the_second)
    with pytest.raises(MemoryError):
        slope_fx.compile(model, example_inputs=X, backend="aot_eager")
    assert_untouched(model, before)


def test_no_linear_at_all():
    with pytest.raises(slope_fx.errors.NoEligibleLinearError, match="No linear was found"):
        slope_fx.compile(nn.Conv1d(3, 3, 3), example_inputs=torch.randn(1, 3, 8))


def test_compiled_twice():
    model = plain()
    state = snapshot(model)
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.compile(model, example_inputs=X)
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.compile(nn.Sequential(model), example_inputs=X)
    assert_untouched(model, state)


@pytest.mark.parametrize("function", [slope_fx.explain, slope_fx.sparse_weights])
def test_functions_on_compiled_models_refuse_others(function):
    with pytest.raises(slope_fx.errors.StateError, match="Plain"):
        function(Plain())
    with pytest.raises(slope_fx.errors.StateError):
        function(nn.Sequential(plain()))


def test_not_a_module_and_no_data():
    with pytest.raises(ArgumentError, match="function"):
        slope_fx.compile(lambda x: x)
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(ArgumentError, match="meta device"):
        slope_fx.compile(model, example_inputs=X, mask=lambda name, weight: weight > 0)


def test_models_that_are_wrapped_or_compiled_already():
    model = Plain()
    with pytest.raises(ArgumentError, match=r"compiled by torch.compile already"):
        slope_fx.compile(torch.compile(model), example_inputs=X)
    model.head.compile()
    with pytest.raises(ArgumentError, match=r"head is compiled by torch.compile"):
        slope_fx.compile(model, example_inputs=X)
    wrapped = nn.DataParallel(Plain())
    with pytest.raises(ArgumentError, match="wrapped in DataParallel"):
        slope_fx.compile(wrapped, example_inputs=X)


def test_a_lazy_module_is_left_as_it_was():
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))
    with pytest.raises(ArgumentError, match=r"0.weight is not initialised yet"):
        slope_fx.compile(model, example_inputs=X)
    assert isinstance(model[0], nn.LazyLinear)


def test_an_untraceable_forward_leaves_nothing_behind(capfd):
    """It is run to see whether the inputs fit, but on a copy."""

    class Remembers(Plain):
        cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = x.sum()
            scale = float(x.detach().numpy().mean())
            return super().forward(x) * scale

    model = Remembers()
    with pytest.warns(slope_fx.errors.ArgumentWarning, match="torch.export failed"):
        slope_fx.compile(model, {"head": None, "*": "2:4"}, example_inputs=X, skip_first=False,
                         skip_head=False, backend=None)  # fmt: skip
    assert model.cache is None
    with pytest.raises(ArgumentError):
        slope_fx.compile(Plain(), example_inputs=torch.randn(3, 9))
    assert len(capfd.readouterr().err.splitlines()) < 20


def test_an_optimizer_made_too_early_is_told():
    """At its first step, once: it holds weights that no layer has any more."""
    model = Plain()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    slope_fx.compile(model, example_inputs=X, backend="aot_eager")
    model(X).sum().backward()
    with pytest.warns(
        slope_fx.errors.TrainingWarning, match=r"SGD was made before slope_fx.compile and holds 2"
    ):
        early.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early.step()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
