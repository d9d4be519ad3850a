"""What every pass needs to know of FX graphs: linears, transposes, nested graphs.

One place decides what a linear looks like. It reads both dialects that reach us: the
torch functions of Dynamo's graphs, and the ATen ops of an exported program.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_LINEAR = {torch.nn.functional.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default}
_TRANSPOSE = {
    torch.t,
    torch.transpose,
    torch.permute,
    torch.swapaxes,
    torch.swapdims,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
}
_TRANSPOSE_METHODS = {"t", "transpose", "permute", "swapaxes", "swapdims"}


@dataclass(frozen=True)
class LinearCall:
    """A node that computes ``x W^T + bias``.

    Attributes:
        node: the call.
        x: its input, (..., d_in).
        weight_operand: its weight as the node reads it.
        weight: where the weight comes from, transposes peeled off.
        stored_transposed: the weight's source is laid out (d_in, d_out).
        bias: added to the product, or None. Any shape that broadcasts.
    """

    node: Node
    x: Node
    weight_operand: Node
    weight: Node
    stored_transposed: bool
    bias: Node | None


def value_of(node: Node) -> object:
    """The fake value recorded for ``node`` when its graph was traced, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def match_linear(node: Node) -> LinearCall | None:
    """``node`` as a linear over a two-dimensional weight, or None."""
    if node.op == "call_function":
        target = node.target
    elif node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__"):
        target = torch.matmul
    elif node.op == "call_method" and node.target == "addmm":
        target = torch.addmm
    else:
        return None

    if target in _LINEAR:
        x, weight, bias = (_argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
        flipped = False
    elif target in _ADDMM:
        if _argument(node, 3, "beta") not in (None, 1) or _argument(node, 4, "alpha") not in (
            None,
            1,
        ):
            return None
        bias, x, weight = (_argument(node, i, n) for i, n in enumerate(("input", "mat1", "mat2")))
        flipped = True
    elif target in _MATMUL:
        x = _argument(node, 0, "input", "self")
        weight = _argument(node, 1, "other", "mat2", "tensor2")
        bias, flipped = None, True
    else:
        return None

    if not isinstance(x, Node) or not isinstance(weight, Node):
        return None
    if bias is not None and not isinstance(bias, Node):
        return None
    source, odd = peel_transposes(weight)
    value = value_of(source)
    if isinstance(value, Tensor) and value.dim() != 2:
        return None
    return LinearCall(node, x, weight, source, stored_transposed=flipped != odd, bias=bias)


def is_transpose(node: Node) -> bool:
    """Whether ``node`` swaps the two dimensions of a matrix."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    if (node.op == "call_function" and node.target in _TRANSPOSE) or (
        node.op == "call_method" and node.target in _TRANSPOSE_METHODS
    ):
        dims = node.args[1:]
    else:
        return False
    if node.kwargs:
        return False
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if not dims:
        return True
    if len(dims) != 2 or not all(isinstance(d, int) for d in dims):
        return False
    first, second = (d % 2 for d in dims if isinstance(d, int))
    # transpose(0, 1) and transpose(1, 0) both swap; permute(0, 1) doesn't.
    is_permute = node.target in ("permute", torch.permute, aten.permute.default)
    return (first, second) == (1, 0) if is_permute else first != second


def peel_transposes(node: Node) -> tuple[Node, bool]:
    """The node below any transposes of a matrix, and whether their number is odd."""
    odd = False
    while is_transpose(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node, odd = source, not odd
    return node, odd


def nested_calls(gm: GraphModule) -> Iterator[tuple[Node, GraphModule, list[Node] | None]]:
    """Calls of nested graphs (checkpointed regions, autocast and no_grad blocks, cond).

    Yields:
        The calling node, the nested graph, and the nodes passed for its placeholders,
        or None where they can't be told.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        graphs = [a for a in node.args if isinstance(nested_graph(gm, a), GraphModule)]
        if not graphs:
            continue
        after = node.args[node.args.index(graphs[-1]) + 1 :]
        flat = [a for arg in after for a in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        for graph in graphs:
            nested = nested_graph(gm, graph)
            assert nested is not None
            known = len(flat) == len(nested.graph.find_nodes(op="placeholder"))
            yield node, nested, flat if known else None


def nested_graph(gm: GraphModule, arg: object) -> GraphModule | None:
    """The GraphModule that a ``get_attr`` node of ``gm`` refers to, or None."""
    if not isinstance(arg, Node) or arg.op != "get_attr":
        return None
    target: object = gm
    for part in str(arg.target).split("."):
        target = getattr(target, part, None)
    return target if isinstance(target, GraphModule) else None


def graphs_of(gm: GraphModule) -> Iterator[GraphModule]:
    """``gm`` and every GraphModule nested in it, each once."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield module


def replace(gm: GraphModule, old: Node, new: Node) -> None:
    """Put ``new`` in the place of ``old``, with the source lines it came from.

    What ``old`` read and nothing reads any more goes too.
    """
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "example_value", "val"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    operands = old.all_input_nodes
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
    for operand in operands:
        _erase_if_unused(gm, operand)


def _erase_if_unused(gm: GraphModule, node: Node) -> None:
    """Erase ``node``, and the transposes it came through, if nothing reads them."""
    while not node.users and node.op in ("call_function", "call_method"):
        source = node.args[0] if is_transpose(node) else None
        gm.graph.erase_node(node)
        if not isinstance(source, Node):
            return
        node = source


def _argument(node: Node, position: int, *names: str) -> fx.node.Argument:
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)
