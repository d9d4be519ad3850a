"""A pass of one's own, by the recipe in CONTRIBUTING: a function and an entry in the registry."""

import torch
import torch.nn.functional as F
from torch import nn

import slope_fx
from slope_fx.ops.targets import SPARSE_LINEAR
from slope_fx.passes import PASSES, Context, Pass, run_passes
from slope_fx.passes.graph import arguments, emit, replace

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


def drop_biases(gm, context):
    """``sparse_linear(x, W, b)`` to ``sparse_linear(x, W) + b``."""
    matches = 0
    for node in gm.graph.find_nodes(op="call_function", target=SPARSE_LINEAR):
        call = arguments(node)
        if call["bias"] is None:
            continue
        tensors = [call.pop(name) for name in ("x", "values", "forward_mask", "backward_mask")]
        bias = call.pop("bias")

        def build(*operands, rest=call):
            return SPARSE_LINEAR(*operands[:4], None, **rest) + operands[4]

        replace(node, emit(node, build, *tensors, bias))
        matches += 1
    return matches


def test_a_new_pass_runs_in_its_place(monkeypatch):
    step = Pass("drop_biases", drop_biases, "adds biases apart", "last")
    torch.manual_seed(0)
    dense = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    seen = []

    def backend(gm, inputs):
        with torch.no_grad():
            before = gm(*inputs)[0]
            reports = run_passes(gm, Context.here(), passes=(*PASSES, step)).reports
            seen.append((reports[-1].name, reports[-1].matches))
            torch.testing.assert_close(gm(*inputs)[0], before)
        again = run_passes(gm, Context.here(), passes=(step,)).reports
        assert again[0].matches == 0
        return gm.forward

    model = slope_fx.compile(dense, example_inputs=X, backend=None)
    torch.compile(model, backend=backend)(X)
    assert seen == [("drop_biases", 2)]


def test_arguments_are_read_by_name_with_defaults():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(SPARSE_LINEAR, (x, x, x, x, None, 2), {"m": 4, "engine": "cpu"})
    call = arguments(node)
    assert (call["n"], call["m"], call["groups"], call["offsets"]) == (2, 4, 1, None)
    assert (call["engine"], call["engines"], call["x"]) == ("cpu", "auto", x)
    assert F.linear not in {n.target for n in graph.nodes}
