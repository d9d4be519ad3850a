"""Each pass on graphs of its own: op counts before and after, equal results, idempotence."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from slope_fx import ops
from slope_fx.passes import find_linears, insert_adapters, run_passes, sparsify_linears
from slope_fx.passes.graph import graphs_of
from strategies import normal, seeds

N, M, D_OUT, D_IN, RANK = 2, 4, 8, 16, 3
EXPAND = torch.ops.slope_fx.expand.default
ADD_ADAPTER = torch.ops.slope_fx.add_adapter.default
SPARSE_LINEAR = torch.ops.slope_fx.sparse_linear.default

FORMS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear without bias": lambda x, w, b: F.linear(x, w),
    "linear by keyword": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "linear of twice transposed": lambda x, w, b: F.linear(x, w.t().t(), b),
    "matmul of .t()": lambda x, w, b: torch.matmul(x, w.t()),
    "@ of .T": lambda x, w, b: x @ w.T,
    "@ of .mT, then bias": lambda x, w, b: x @ w.mT + b,
    "method matmul of transpose": lambda x, w, b: x.matmul(w.transpose(0, 1)),
    "matmul of negative transpose": lambda x, w, b: x @ w.transpose(-1, -2),
    "mm of permute": lambda x, w, b: x.mm(w.permute(1, 0)),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "method addmm": lambda x, w, b: b.addmm(x, w.t()),
    "addmm with a matrix bias": lambda x, w, b: torch.addmm(b.expand(x.shape[0], -1), x, w.t()),
    "addmm with one bias for all": lambda x, w, b: torch.addmm(b[:1], x, w.t()),
}
"""Ways to write ``x W^T + b``."""

OTHERS = {
    "x W, the wrong way round": lambda x, w, b: x[:, :D_OUT] @ w,
    "W on the left": lambda x, w, b: w @ x.t(),
    "scaled addmm": lambda x, w, b: torch.addmm(b, x, w.t(), beta=2),
    "elementwise": lambda x, w, b: w * 2,
    "a slice": lambda x, w, b: F.linear(x, w[:4]),
    "not a transpose": lambda x, w, b: x[:, :D_OUT] @ w.permute(0, 1),
}
"""Uses of a weight that no pass may touch."""


def inputs(seed=0, tokens=5, adapter=False):
    """x, values, masks, bias and an adapter, leaves that need gradients where they are floats."""
    weight = normal((D_OUT, D_IN), seed, torch.float64)
    forward = ops.magnitude_mask(weight, N, M)
    values = ops.compress(weight, forward, N, M)
    # All kept values, so that the rewritten graph's gradients are those of the plain one.
    everything = torch.full_like(ops.backward_mask(values, forward, N, M), 255)
    floats = [
        normal(shape, seed + i, torch.float64)
        for i, shape in enumerate([(tokens, D_IN), (D_OUT,), (RANK, D_IN), (D_OUT, RANK)])
    ]
    x, bias, a, b = floats
    leaves = [t.requires_grad_() for t in (x, values, bias, a, b)]
    return [leaves[0], leaves[1], forward, everything, *leaves[2:]]


def program(form, adapter):
    def run(x, values, forward, backward, bias, a, b):
        weight = EXPAND(values, forward, backward, N, M)
        if adapter:
            weight = ADD_ADAPTER(weight, a, b, 0.25)
        return form(x, weight, bias)

    return run


def capture(function, arguments):
    """The graph that Dynamo makes of ``function``."""
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*arguments)
    (gm,) = graphs
    return gm


def counts(gm):
    """Calls in a graph and the graphs nested in it, by target."""
    found = {}
    for graph_module in graphs_of(gm):
        for node in graph_module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                found[node.target] = found.get(node.target, 0) + 1
    return found


def call(gm, function, arguments):
    """Run ``gm`` with Dynamo's order of ``function``'s arguments; outputs and gradients."""
    gm_backend = lambda *_: gm.forward  # noqa: E731
    torch._dynamo.reset()
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in arguments]
    out = torch.compile(function, backend=gm_backend)(*leaves)
    out.sin().sum().backward()
    return [out.detach(), *(t.grad for t in leaves if t.requires_grad)]


def assert_same_results(function, gm, arguments):
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in arguments]
    out = function(*leaves)
    out.sin().sum().backward()
    want = [out.detach(), *(t.grad for t in leaves if t.requires_grad)]
    for got, expected in zip(call(gm, function, arguments), want, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


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
    assert (rewrites.sparse_linears, rewrites.adapters) == (1, adapter)
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
    assert (again.sparse_linears, again.adapters) == (0, 0)
    assert gm.code == once


@pytest.mark.parametrize("form", OTHERS)
def test_other_uses_are_left_alone_and_told(form):
    arguments = inputs()
    function = program(OTHERS[form], False)
    gm = capture(function, arguments)
    code = gm.code
    rewrites = run_passes(gm)
    assert rewrites.sparse_linears == 0
    assert gm.code == code
    (leftover,) = rewrites.leftovers
    assert leftover.used_by
    assert_same_results(function, gm, arguments)


def test_foreign_graphs_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    gm = capture(model, [torch.randn(3, 8)])
    code = gm.code
    rewrites = run_passes(gm)
    assert (rewrites.linears, rewrites.sparse_linears, rewrites.leftovers) == (2, 0, ())
    assert gm.code == code


def test_a_weight_used_twice_is_rewritten_at_both_and_kept_for_a_third():
    def function(x, values, forward, backward, bias, a, b):
        weight = EXPAND(values, forward, backward, N, M)
        return F.linear(x, weight) + F.linear(x * 2, weight, bias) + weight.sum()

    arguments = inputs()
    gm = capture(function, arguments)
    rewrites = run_passes(gm)
    assert rewrites.sparse_linears == 2
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
    assert (rewrites.sparse_linears, rewrites.adapters) == (1, 1)
    assert_same_results(function, gm, arguments)


def test_the_order_of_the_two_rewrites_is_what_makes_them_work():
    gm = capture(program(FORMS["linear"], True), inputs())
    assert sparsify_linears(gm) == 0
    assert insert_adapters(gm) == 1
    assert sparsify_linears(gm) == 1


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
    assert run_passes(gm).sparse_linears == 6
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
        assert [c.stored_transposed for c in calls] == [False, True]
        assert [c.bias is None for c in calls] == [False, False]
        assert all(c.weight.op == "placeholder" for c in calls)


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
    assert counts(gm)[SPARSE_LINEAR] == rewrites.sparse_linears
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
    assert not found.stored_transposed
