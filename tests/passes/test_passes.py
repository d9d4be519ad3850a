"""Each pass on graphs of its own: op counts before and after, equal results, idempotence."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import slope_fx
from slope_fx import ops
from slope_fx.ops.targets import ADD_ADAPTER, EXPAND, SPARSE_LINEAR
from slope_fx.passes import NAMES, PASSES, Context, find_linears, run_passes
from slope_fx.passes.graph import graphs_of
from slope_fx.passes.markers import MARKERS
from strategies import normal, seeds

N, M, D_OUT, D_IN, RANK = 2, 4, 8, 16, 3

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
    "scaled addmm": lambda x, w, b: torch.addmm(b, x, w.t(), beta=2, alpha=0.5),
    "W on the left": lambda x, w, b: (w @ x.t()).t() + b,
    "einsum": lambda x, w, b: torch.einsum("ti,oi->to", x, w),
    "cast": lambda x, w, b: F.linear(x, w.to(x.dtype), b),
    "addmm with one bias for all": lambda x, w, b: torch.addmm(b[:1], x, w.t()),
}
"""Ways to write ``x W^T + b``."""

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
    """The graph that Dynamo makes of ``function``; its inputs' places among ``arguments``."""
    graphs = []

    def keep(gm, examples):
        names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
        places = {id(argument): i for i, argument in enumerate(arguments)}
        gm.order = {n: places.get(id(e)) for n, e in zip(names, examples, strict=True)}
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


def run(gm, arguments):
    """Outputs and gradients of a captured graph, in the order of ``arguments``."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in arguments]
    names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    out = gm(*[leaves[gm.order[name]] for name in names])
    out = out[0] if isinstance(out, (tuple, list)) else out
    if out.requires_grad:
        out.sin().sum().backward()
    return [out.detach(), *(t.grad for t in leaves if t.requires_grad)]


def assert_same(got, want):
    for mine, expected in zip(got, want, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def assert_same_results(function, gm, arguments):
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in arguments]
    out = function(*leaves)
    out.sin().sum().backward()
    want = [out.detach(), *(t.grad for t in leaves if t.requires_grad)]
    assert_same(run(gm, arguments), want)


def the(name):
    return next(p for p in PASSES if p.name == name)


def apply(gm, *names, training=True):
    """Run some passes; the matches of the last."""
    context = Context(training=training)
    return run_passes(gm, context, passes=[the(name) for name in names]).reports[-1].matches


def before(name):
    """The passes that come ahead of one."""
    return NAMES[: NAMES.index(name)]


def adapted(form):
    return program(form, True)


def twice(x, values, forward, backward, bias, a, b):
    """A weight that is read twice, and once for nothing."""
    one, two, _ = (EXPAND(values, forward, backward, N, M) for _ in range(3))
    return F.linear(x, one) + F.linear(x * 2, two, bias)


def attention(x, values, forward, backward, bias, a, b):
    """torch's own, with weights made of the one there is."""
    w = EXPAND(values, forward, backward, N, M)
    packed, out = torch.cat([w[:, :8]] * 3), w[:, 8:]
    h = x[:, None, :8]
    packed_bias = torch.cat([bias] * 3)
    mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    y, weights = F.multi_head_attention_forward(
        h, h, h, 8, 2, packed, packed_bias, None, None, False, 0.0, out, bias, attn_mask=mask
    )
    return y.squeeze(1) + weights.sum() * F.linear(x, w)


LINEAR, MHA = F.linear, F.multi_head_attention_forward
CASES = {
    "prune_expands": (twice, {EXPAND: -2}, True),
    "decompose_attention": (attention, {MHA: -1, LINEAR: 2}, True),
    "normalize_linears": (program(FORMS["@ of .T"], False), {operator.matmul: -1, LINEAR: 1}, True),
    "insert_adapters": (
        adapted(FORMS["linear"]), {ADD_ADAPTER: -1, LINEAR: 2, operator.add: 1, operator.mul: 1},
        True,
    ),
    "sparsify_linears": (
        program(FORMS["linear"], False), {EXPAND: -1, LINEAR: -1, SPARSE_LINEAR: 1}, True,
    ),
}  # fmt: skip
"""Of each pass: a program it has work in, what that does to the counts, whether it trains."""


def test_each_pass_is_tested():
    assert tuple(CASES) == NAMES
    assert all(p.does and p.here for p in PASSES)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_by_itself(name):
    """Op counts before and after, equal results, and nothing more to do the second time."""
    function, changes, training = CASES[name]
    arguments = inputs()
    with torch.set_grad_enabled(training):
        gm = capture(function, arguments)
        want = run(gm, arguments)
        if before(name):
            apply(gm, *before(name), training=training)
        old = counts(gm)
        assert apply(gm, name, training=training) >= 1
        new = counts(gm)
        changed = {t: new.get(t, 0) - old.get(t, 0) for t in {*old, *new}}
        assert {t: changed.get(t, 0) for t in changes} == changes
        assert_same(run(gm, arguments), want)
        code = gm.code
        assert apply(gm, name, training=training) == 0
        assert gm.code == code


@pytest.mark.inductor
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_through_inductor(name):
    """Its graph as users run it: Inductor fuses what passes write, and may drop a part of it."""
    function, _, training = CASES[name]
    rewritten = []
    backend = slope_fx.rewriting_backend("inductor", "dense", passes=[..., rewritten.append])
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    def results(call):
        leaves = [
            t.detach().float().requires_grad_() if t.is_floating_point() else t for t in inputs()
        ]
        with torch.set_grad_enabled(training):
            out = call(*leaves)
        if training:
            out.sin().sum().backward()
        return [out.detach(), *(t.grad for t in leaves if t.requires_grad)]

    for mine, expected in zip(results(compiled), results(function), strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            error = (mine - expected).abs().max() / expected.abs().max()
            assert error < 1e-5
    marked = {"decompose_attention": 1}.get(name, 0)  # a mask that is added to its weight
    assert sum(counts(gm).get(t, 0) for gm in rewritten for t in MARKERS) == marked


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_leaves_foreign_graphs_alone(name):
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.w, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

        def forward(self, x):
            h = self.layer(x) @ self.w + self.head.bias.sum()
            return torch.einsum("bti,oi->bto", h, self.w) + self.head(h).sum() + self.head(h).mean()

    gm = capture(Foreign(), [torch.randn(2, 3, 8)])
    code = gm.code
    assert apply(gm, name) == 0
    assert apply(gm, name, training=False) == 0
    assert gm.code == code


@settings(max_examples=10)
@given(st.sampled_from(NAMES), seeds, st.integers(1, 5), st.integers(0, 3))
def test_a_pass_keeps_the_numbers(name, seed, tokens, more):
    """On graphs that mix its program with others, after each pass up to it and beyond."""
    function, _, training = CASES[name]
    mixed = [function, *[CASES[other][0] for other in NAMES[more :: max(more, 2)]]]

    def program(*arguments):
        return sum(part(*arguments).sin() for part in mixed)

    arguments = inputs(seed, tokens)
    with torch.set_grad_enabled(training):
        gm = capture(program, arguments)
        want = run(gm, arguments)
        for step in NAMES:
            apply(gm, step, training=training)
            assert_same(run(gm, arguments), want)


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
