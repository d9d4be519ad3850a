"""Graphs for the passes to work on, and whether they compute the same afterwards."""

import torch
import torch.nn.functional as F

from slope_fx import ops
from slope_fx.ops.targets import ADD_ADAPTER, EXPAND
from slope_fx.passes import PASSES, Context, run_passes
from slope_fx.passes.graph import graphs_of
from strategies import normal

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
