"""All passes together: every form of a linear becomes sparse, and other uses are left alone."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from pass_graphs import (
    D_OUT,
    FORMS,
    M,
    N,
    apply,
    assert_same_results,
    capture,
    counts,
    inputs,
    program,
)
from slope_fx.ops.targets import ADD_ADAPTER, EXPAND, SPARSE_LINEAR
from slope_fx.passes import find_linears, run_passes
from slope_fx.passes.graph import graphs_of
from strategies import seeds

OTHERS = {
    "x W, the wrong way round": lambda x, w, b: x[:, :D_OUT] @ w,
    "elementwise": lambda x, w, b: w * 2,
    "some columns": lambda x, w, b: F.linear(x[:, :8], w[:, :8]),
    "rows that aren't whole groups": lambda x, w, b: F.linear(x, w[2:6]),
    "every other row": lambda x, w, b: F.linear(x, w[::2]),
    "not a transpose": lambda x, w, b: x[:, :D_OUT] @ w.permute(0, 1),
    "another shape": lambda x, w, b: F.linear(x[:, :8], w.view(16, 8)),
}
"""Uses of a weight that no pass may touch."""


@pytest.mark.parametrize("adapter", [False, True], ids=["sparse", "adapter"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_a_sparse_linear(form, adapter):
    arguments = inputs()
    function = program(FORMS[form], adapter)
    gm = capture(function, arguments)
    before = counts(gm)
    assert before[EXPAND] == 1
    assert before.get(ADD_ADAPTER, 0) == adapter
    rewrites = run_passes(gm)
    after = counts(gm)
    assert rewrites.matches("sparsify_linears") == 1
    assert rewrites.matches("insert_adapters") == adapter
    assert rewrites.leftovers == ()
    assert after[SPARSE_LINEAR] == 1
    assert EXPAND not in after
    assert ADD_ADAPTER not in after
    assert after.get(F.linear, 0) == 2 * adapter
    assert_same_results(function, gm, arguments)


@pytest.mark.parametrize("form", FORMS)
def test_running_twice_changes_nothing(form):
    gm = capture(program(FORMS[form], True), inputs())
    run_passes(gm)
    once = gm.code
    again = run_passes(gm)
    assert all(report.matches == 0 for report in again.reports)
    assert gm.code == once


@pytest.mark.parametrize("form", OTHERS)
def test_other_uses_are_left_alone_and_told(form):
    arguments = inputs()
    function = program(OTHERS[form], False)
    gm = capture(function, arguments)
    code = gm.code
    rewrites = run_passes(gm)
    assert rewrites.matches("sparsify_linears") == 0
    assert gm.code == code
    (leftover,) = rewrites.leftovers
    assert leftover.used_by
    assert_same_results(function, gm, arguments)


def test_foreign_graphs_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    gm = capture(model, [torch.randn(3, 8)])
    code = gm.code
    rewrites = run_passes(gm)
    assert all(report.matches == 0 for report in rewrites.reports)
    assert rewrites.leftovers == ()
    assert gm.code == code


def test_a_weight_used_twice_is_rewritten_at_both_and_kept_for_a_third():
    def function(x, values, forward, backward, bias, a, b):
        weight = EXPAND(values, forward, backward, N, M)
        return F.linear(x, weight) + F.linear(x * 2, weight, bias) + weight.sum()

    arguments = inputs()
    gm = capture(function, arguments)
    rewrites = run_passes(gm)
    assert rewrites.matches("sparsify_linears") == 2
    assert len(rewrites.leftovers) == 1
    assert counts(gm)[EXPAND] == 1
    assert_same_results(function, gm, arguments)


def test_checkpointed_regions_are_reached():
    """Activation checkpointing hides linears in nested graphs."""

    def function(x, values, forward, backward, bias, a, b):
        def body(x):
            weight = ADD_ADAPTER(EXPAND(values, forward, backward, N, M), a, b, 0.25)
            return F.linear(x, weight, bias).relu()

        return checkpoint(body, x, use_reentrant=False)

    arguments = inputs()
    gm = capture(function, arguments)
    assert len(list(graphs_of(gm))) == 2
    assert EXPAND not in {n.target for n in gm.graph.nodes}
    rewrites = run_passes(gm)
    assert (rewrites.matches("sparsify_linears"), rewrites.matches("insert_adapters")) == (1, 1)
    assert_same_results(function, gm, arguments)


def test_the_order_of_the_two_rewrites_is_what_makes_them_work():
    gm = capture(program(FORMS["linear"], True), inputs())
    assert apply(gm, "sparsify_linears") == 0
    assert apply(gm, "insert_adapters") == 1
    assert apply(gm, "sparsify_linears") == 1


@pytest.mark.parametrize("adapter", [False, True], ids=["sparse", "adapter"])
def test_a_linear_that_reads_another(adapter):
    """Each is replaced while the next still refers to it."""

    def function(x, values, forward, backward, bias, a, b):
        for _ in range(3):
            weight = EXPAND(values, forward, backward, N, M)
            if adapter:
                weight = ADD_ADAPTER(weight, a, b, 0.25)
            x = F.linear(F.linear(x, weight), weight.t()[:D_OUT], bias).repeat(1, 2)
            x = F.linear(x, weight).repeat(1, 2) / 100
        return x

    arguments = inputs()
    gm = capture(function, arguments)
    assert run_passes(gm).matches("sparsify_linears") == 6
    assert_same_results(function, gm, arguments)


def test_find_linears_reads_both_dialects():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return torch.addmm(x.sum(-1, keepdim=True), self.first(x), self.w)

    model, x = Model(), torch.randn(3, 8)
    torch_level = capture(model, [x])
    aten_level = torch.export.export(model, (x,), strict=False).graph_module
    for gm in (torch_level, aten_level):
        calls = list(find_linears(gm))
        # The product of two tensors that may be weights either way is both.
        assert [c.weight.op for c in calls] == ["placeholder", "placeholder", "call_function"]
        assert [c.build is None for c in calls] == [True, False, False]
        assert all(c.bias is not None for c in calls)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(FORMS)), st.booleans()), min_size=1, max_size=4),
    seeds,
    st.integers(1, 5),
)
def test_generated_graphs_agree(choices, seed, tokens):
    """Sums of linears written in any of the forms, some of them with adapters."""

    def function(x, values, forward, backward, bias, a, b):
        total = 0
        for form, adapter in choices:
            weight = EXPAND(values, forward, backward, N, M)
            if adapter:
                weight = ADD_ADAPTER(weight, a, b, 0.25)
            total = total + FORMS[form](x, weight, bias)
        return total

    arguments = inputs(seed, tokens)
    gm = capture(function, arguments)
    rewrites = run_passes(gm)
    assert rewrites.leftovers == ()
    assert rewrites.matches("sparsify_linears") == len(choices)
    assert_same_results(function, gm, arguments)


def test_rewritten_nodes_keep_their_source_lines():
    gm = capture(program(FORMS["linear"], False), inputs())
    run_passes(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=SPARSE_LINEAR)
    assert "FORMS" in node.meta["stack_trace"] or "F.linear" in node.meta["stack_trace"]


def test_a_plain_fx_trace_without_shapes_works_too():
    def function(x, w, b):
        return operator.matmul(x, w.t()) + b

    (found,) = find_linears(fx.symbolic_trace(function))
    assert found.weight.name == "t"
