"""Every way of writing a linear, alone and mixed: found, made sparse, and equal to the formulas."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slope_fx
from forms import FORMS, WIDTH, Mixture
from formulas import assert_gradients_match, formula_model
from strategies import seeds

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8"]


def two_steps(forms, shared, sparsity, adapters, seed):
    """Compile a mixture, train it two steps and evaluate it, against the formulas at each."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    dense = Mixture(forms, shared)
    x = torch.randn(2, 5, WIDTH)
    model = slope_fx.compile(
        copy.deepcopy(dense), sparsity, adapter_rank=2, example_inputs=x, backend="aot_eager",
        on_fallback="error",
    )  # fmt: skip
    kinds = {r.name: (r.kind, r.reason) for r in slope_fx.explain(model).linears}
    silent = {n: r for n, (kind, r) in kinds.items() if kind == "dense"}
    assert set(silent) == {"first", "head"}, silent
    schedule = slope_fx.Schedule(
        model, 2, adapter_start=0.5 if adapters else 1.0, backward_mask_interval=1
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        if step == 1:
            for weight in slope_fx.sparse_weights(model).values():
                weight.lora_B.data.normal_(std=0.1)
        reference = formula_model(dense, model)
        y, want = model(x), reference(x.double())
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        want.square().sum().backward()
        assert_gradients_match(model, reference, rtol=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        want = formula_model(dense, model)(x.double())
        torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-4)
    return model


GROUPS = [list(FORMS)[i::9] for i in range(9)]
"""Each form once, a few in one model: most of the time goes into tracing what is around them."""


@pytest.mark.parametrize(
    "forms",
    [
        pytest.param(forms, marks=pytest.mark.full if i % 2 else ())
        for i, forms in enumerate(GROUPS)
    ],
    ids=" + ".join,
)
def test_every_form(forms):
    two_steps(forms, [], "2:4", adapters=True, seed=0)


@pytest.mark.full
@settings(max_examples=6)
@given(st.data(), seeds)
def test_random_models(data, seed):
    forms = data.draw(st.lists(st.sampled_from(sorted(FORMS)), min_size=1, max_size=4))
    pairs = [(i, j) for i in range(len(forms)) for j in range(i) if forms[i] == forms[j]]
    shared = data.draw(st.lists(st.sampled_from(pairs), max_size=2)) if pairs else []
    sparsity = {
        f"layers.{i}*": data.draw(st.sampled_from(PATTERNS), label=form)
        for i, form in enumerate(forms)
    }
    two_steps(forms, shared, sparsity, data.draw(st.booleans(), label="adapters"), seed)
