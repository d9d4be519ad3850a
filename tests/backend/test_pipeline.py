"""The pipeline as its user meets it: regions, passes of one's own, what is shown of each step."""

import copy
import dataclasses
import operator
import os
import re
import subprocess
import sys

import pytest
import torch

import models
import slope_fx
from formulas import assert_gradients_match, formula_model
from models import batch, loss_of
from pipeline_cases import X, assert_trains_right, compiled, graphs, layers
from slope_fx.passes import NAMES, PASSES
from slope_fx.record import record_of

# --- regions ---------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_auto_compiles_blocks_and_needs_no_word_about_the_cache(name):
    """Training never meets the cache; evaluation with one is compiled as a whole."""
    model = models.TRANSFORMERS[name](layers=6)
    dense = copy.deepcopy(model)
    slope_fx.compile(model, adapter_rank=2, backend="aot_eager", on_fallback="error")
    assert len(record_of(model).regions.paths) == 6
    ids, before = batch(), graphs(model)
    reference = formula_model(dense, model)
    loss_of(reference, ids).backward()
    out = model(input_ids=ids, labels=ids)
    assert out.past_key_values is None
    out.loss.backward()
    assert_gradients_match(model, reference, rtol=2e-4)
    assert graphs(model) == before + 2  # the first block, whose inputs stay dense, and the rest
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    loss_of(model, ids).backward()
    assert graphs(model) == before + 4  # each once more, in the adapter phase
    model.eval()
    with torch.no_grad():
        cached = model(ids)
        assert graphs(model) == before + 5
        torch.testing.assert_close(cached.logits, model(ids, use_cache=False).logits)
    assert cached.past_key_values is not None
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 19)
    assert "use_cache=False" in slope_fx.explain(model).note


def test_auto_compiles_a_model_without_blocks_as_a_whole():
    model = compiled()
    assert record_of(model).regions.whole
    assert "one by one" not in slope_fx.explain(model).note


# --- own passes, disabled passes --------------------------------------------------------------


def test_own_passes_run_before_and_after_ours():
    seen = []

    def targets(gm):
        return [str(node.target) for node in gm.graph.nodes]

    def first(gm):
        seen.append(("first", "slope_fx.expand.default" in targets(gm)))

    def last(gm):
        seen.append(("last", "slope_fx.sparse_linear.default" in targets(gm)))
        return torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))

    dense = layers()
    model = compiled(copy.deepcopy(dense), passes=[first, ..., last])
    assert_trains_right(dense, model)
    assert seen == [("first", True), ("last", True)]
    compiled(passes=[last])(X)
    assert seen[-1] == ("last", True)


def test_an_own_pass_that_returns_nonsense_is_told():
    model = compiled(passes=[lambda gm: 3])
    with pytest.raises(slope_fx.errors.ArgumentError, match="returned a int; a pass changes its"):
        model(X)


IN_CI = ("normalize_linears", "insert_adapters", "sparsify_linears")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_CI else pytest.mark.full) for n in NAMES]
)
def test_each_pass_can_be_left_out(name):
    """The numbers are right all the same, but for what only the sparse product does."""
    dense = models.llama()
    model = slope_fx.compile(
        copy.deepcopy(dense), backend="aot_eager", disable_passes=[name], on_fallback="ignore",
    )  # fmt: skip
    ids = batch()
    reference = formula_model(dense, model)
    want, got = loss_of(reference, ids), loss_of(model, ids)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    want.backward()
    got.backward()
    if name != "sparsify_linears":
        assert_gradients_match(model, reference, rtol=2e-4)


def test_a_disabled_pass_is_named_where_a_layer_is_left():
    model = compiled(disable_passes=["sparsify_linears"], on_fallback="warn")
    with pytest.warns(
        slope_fx.errors.ExpandedWeightWarning, match="disabled passes: sparsify_linears"
    ):
        model(X).sum().backward()


# --- what is shown ----------------------------------------------------------------------------


def test_the_structured_trace_has_the_graph_around_each_pass(tmp_path):
    """As users look at it: ``TORCH_TRACE=folder``, read by tlparse."""
    program = (
        "import torch, slope_fx\n"
        "from torch import nn\n"
        "model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])\n"
        "x = torch.randn(6, 16)\n"
        "slope_fx.compile(model, example_inputs=x, backend='aot_eager')\n"
        "model(x).sum().backward()\n"
    )
    env = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+slope_fx"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sparsify_linears: 2 matches" in done.stderr
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    names = re.findall(r'"name": "slope_fx_(\w+)"', log)
    assert names == ["before_passes", "after_sparsify_linears"]
    assert "slope_fx.sparse_linear.default" in log.split("slope_fx_after_sparsify_linears")[1]


def test_debug_finds_the_pass_at_fault(monkeypatch):
    model = compiled(adapter_rank=2)
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert slope_fx.debug.first_difference(model, X) is None

    def wrong(gm, context):
        """Scales what the adapters add."""
        scaled = gm.graph.find_nodes(op="call_function", target=operator.mul)
        nodes = [n for n in scaled if n.args[1] == 0.5]
        for node in nodes:
            node.update_arg(1, 9.0)
        return len(nodes)

    faulty = [
        step if step.name != "sparsify_linears" else dataclasses.replace(step, run=wrong)
        for step in PASSES
    ]
    monkeypatch.setattr(slope_fx.debug, "PASSES", faulty)
    found = slope_fx.debug.first_difference(model, X)
    assert (found.name, found.graph, found.matches) == ("sparsify_linears", 0, 2)
    assert "output 0" in str(found)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(X)  # as it was before


def test_debug_refuses_what_it_cannot_look_at():
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.debug.first_difference(layers(), X)
    with pytest.raises(slope_fx.errors.ArgumentError, match="backend=None"):
        slope_fx.debug.first_difference(compiled(backend=None), X)
    with pytest.raises(slope_fx.errors.ArgumentError, match="tolerance=0"):
        slope_fx.debug.first_difference(compiled(), X, tolerance=0)
