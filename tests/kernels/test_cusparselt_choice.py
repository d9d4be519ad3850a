"""The choice between the cuSPARSELt engine, with a stand-in for its library, and another engine."""

import dataclasses
import warnings

import pytest
import torch

import fake_cusparselt as fake
import slope_fx
from operand_models import (
    B16,
    compiled,
)
from slope_fx.kernels import engines, racing, selection
from slope_fx.kernels.cusparselt import library
from slope_fx.kernels.selection import Request
from strategies import normal

REQUEST = Request(8, 32, 32, 2, 4, B16, torch.device("cpu"))


@pytest.fixture
def race(engine, monkeypatch):
    """cusparselt against cpu-dense, with made-up times."""
    monkeypatch.setenv("SLOPE_FX_ENGINES", "cpu-dense,cusparselt")
    seconds = {"cpu-dense": 2.0, "cusparselt": 1.0, "plain": 1.5, "0": 2.0, str(fake.SEARCHED): 1.0}

    def run(runs, device):
        for thunk in runs.values():
            thunk()
            thunk()
        return {name: seconds[name] for name in runs}, True

    monkeypatch.setattr(racing, "race", run)
    return seconds


@pytest.mark.parametrize("policy", ["", "0", "1"])
def test_making_the_operand_is_part_of_the_price(race, monkeypatch, policy):
    """Unless it will be kept for good."""
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", policy)
    chosen = {}
    for trains in (True, False):
        selection.forget()
        makes_operand = trains or policy != "1"
        before = fake.calls["compress"]
        request = dataclasses.replace(REQUEST, trains=trains)
        chosen[trains] = selection.choose("sparse_linear", request)
        # The race runs it twice, after once for trying whether it can be run.
        assert fake.calls["compress"] - before == (3 if makes_operand else 1)
        assert [p.makes_operand for p, *_ in selection._made] == [makes_operand]
    assert set(chosen.values()) == {"cusparselt"}


def test_forward_and_backward_are_chosen_separately(race):
    race["cusparselt"] = 1.0
    assert selection.choose("sparse_linear", REQUEST) == "cusparselt"
    race["cusparselt"] = 3.0
    assert selection.choose("sparse_input_grad", REQUEST) == "cpu-dense"
    assert selection.choose("sparse_weight_grad", REQUEST) == "cpu-dense"


def test_what_the_library_refuses_is_not_chosen_and_that_is_said(race, monkeypatch):
    def refuse(*_):
        raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmul`")

    monkeypatch.setattr(library, "multiply", refuse)
    engines.say_once.cache_clear()
    with pytest.warns(
        slope_fx.errors.EngineWarning, match="cusparselt engine for sparse_linear of 32x32, 8 to"
    ):
        assert selection.choose("sparse_linear", REQUEST) == "cpu-dense"


def test_wider_values_are_another_problem(race):
    for dtype in (None, torch.float32):
        selection.choose("sparse_linear", dataclasses.replace(REQUEST, values_dtype=dtype))
    assert [p.values_dtype for p, *_ in selection._made] == ["", "float32"]


def test_explain_names_engine_and_gain_of_each_product(race):
    net = compiled()
    net(normal((5, 24), 0, B16).requires_grad_()).sum().backward()
    text = str(slope_fx.explain(net))
    # The weight gradient has one candidate here, which nothing was measured against.
    assert text.count("cusparselt 1.50x 1.50x cpu-dense  ") == 3


@pytest.mark.parametrize(("seconds", "told"), [(3.0, True), (0.5, False)])
def test_a_model_too_small_to_gain_is_told_in_one_line(race, seconds, told):
    race["cusparselt"] = race["cpu-dense"] = seconds
    slope_fx.rewriting_backend("aot_eager")._told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = compiled()
        x = normal((5, 24), 0, B16)
        net(x.requires_grad_()).sum().backward()
        with torch.no_grad():
            net(x)
    lines = [str(w.message) for w in caught if "too small to gain" in str(w.message)]
    assert len(lines) == int(told)
    assert ("at best 0.50x, for 8 tokens" in str(slope_fx.explain(net))) == told
    if told:
        assert slope_fx.explain(net).note == lines[0]
        assert "\n" not in lines[0]
