"""Each architecture: every linear accounted for, outputs and gradients as the formulas say.

``docs/make_coverage.py`` writes the table of it.
"""

import copy

import pytest
import torch

import slope_fx
from architectures import ARCHITECTURES, inputs_of, logits_of, plain_experts
from formulas import assert_gradients_match, formula_model

REASONS = ("skip_first", "skip_head", "skip_router", "shared: its weight is also used by embedding")


IN_CI = ("Llama", "Mixtral", "BERT")


@pytest.mark.parametrize(
    "name",
    [n if n in IN_CI else pytest.param(n, marks=pytest.mark.full) for n in ARCHITECTURES],
)
def test_architecture(name):
    dense = ARCHITECTURES[name]().train()
    inputs = inputs_of(dense)
    # Linears by another road than the one under test: all matrices, stacks of them, 1x1 kernels.
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    expected = {id(p) for n, p in parameters.items() if p.dim() > 1 and _is_linear(dense, n, p)}
    model = slope_fx.compile(
        copy.deepcopy(dense), adapter_rank=2, example_inputs=inputs, backend="aot_eager",
        on_fallback="error",
    )  # fmt: skip
    linears = slope_fx.explain(model).linears
    names = [r.name if r.name in parameters else f"{r.name}.weight" for r in linears]
    assert {id(parameters[name]) for name in names} == expected
    assert len(names) == len(expected)
    assert all(any(word in r.reason for word in REASONS) for r in linears if r.kind == "dense")
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_(std=0.1)
    formulas = formula_model(plain_experts(dense), model)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    got, want = logits_of(model, inputs), logits_of(formulas, wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    grad = torch.randn(got.shape)
    got.backward(grad)
    want.backward(grad.double())
    assert_gradients_match(model, formulas, rtol=1e-3)


def _is_linear(model, name, parameter):
    """Whether a parameter is a linear's by its module's type, or by what its name says."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, torch.nn.Embedding):
        return False  # a tied one is the head's too, under another name
    if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)):
        return parameter[0, 0].numel() == 1 and module.groups == 1
    return "bias" not in attribute and "embed" not in attribute and "token" not in attribute
