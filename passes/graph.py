"""Helpers for FX graphs: fake values, nested graphs, insertion and replacement of nodes."""

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import is_contiguous_or_false
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from slope_fx.ops.dispatch import local

aten = torch.ops.aten


def value_of(node: Node) -> object:
    """The fake value that the trace recorded for ``node``, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def rank_of(node: object) -> int | None:
    """The number of dimensions of the tensor that ``node`` computes, or None if unknown."""
    value = value_of(node) if isinstance(node, Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def is_row(bias: Node) -> bool:
    """Whether a bias has an element for each output. Of one element, torch makes a row too."""
    value = value_of(bias)
    return isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] != 1


def nested_calls(gm: GraphModule) -> Iterator[tuple[Node, GraphModule, list[Node] | None]]:
    """Yields the calls of nested graphs (checkpointed regions, autocast and no_grad blocks, cond).

    Yields:
        The calling node, the nested graph, and the nodes that are passed for its placeholders,
        or None if these are unknown.
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
            inputs = len(nested.graph.find_nodes(op="placeholder"))
            # Some calls have the name of the graph between the graph and its operands.
            known = flat[-inputs:] if inputs and len(flat) >= inputs else flat
            known = [a for a in known if isinstance(a, Node)]
            yield node, nested, known if len(known) == inputs else None


def nested_graph(gm: GraphModule, arg: object) -> GraphModule | None:
    """The GraphModule that a ``get_attr`` node of ``gm`` refers to, or None."""
    if not isinstance(arg, Node) or arg.op != "get_attr":
        return None
    target: object = gm
    for part in str(arg.target).split("."):
        target = getattr(target, part, None)
    return target if isinstance(target, GraphModule) else None


def graphs_of(gm: GraphModule) -> Iterator[GraphModule]:
    """Yields ``gm`` and all GraphModules nested in it, each once."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield module


def emit(before: Node, build: Callable[..., Any], *operands: Any) -> Any:
    """Insert the nodes of a computation before the node ``before``.

    Args:
        before: the node after the new nodes, which the result replaces.
        build: a function of tensors, written with torch's functions and methods.
        operands: arguments of ``build``. Nodes are passed as proxies, other objects unchanged.

    Returns:
        The result of ``build``, with nodes in place of proxies.
    """
    graph = before.graph
    tracer = _Tracer(graph)
    with graph.inserting_before(before), autocast_at(before):
        result = build(*[Proxy(o, tracer) if isinstance(o, Node) else o for o in operands])
        # In the `with` block, because an attribute such as .mT becomes a node when .node is read.
        if isinstance(result, tuple):
            return tuple(part.node if isinstance(part, Proxy) else part for part in result)
        return _as_recorded(result, value_of(before)).node


def _as_recorded(result: Proxy, recorded: object) -> Proxy:
    """``result`` with the dtype and the contiguity that the trace recorded for the old node.

    Nodes after it depend on both: a view needs the strides, and a write in place the dtype, which
    is that of autocast for ``addmm`` and not for a sum.
    """
    value = value_of(result.node)
    if not isinstance(value, Tensor) or not isinstance(recorded, Tensor):
        return result
    if value.dtype != recorded.dtype:
        result = result.to(recorded.dtype)
    if is_contiguous_or_false(recorded) and not is_contiguous_or_false(value):
        result = result.contiguous()
    return result


@contextmanager
def autocast_at(node: Node) -> Iterator[None]:
    """Enter the autocast regions of a graph that are open at a node, in a ``with`` block."""
    graph, autocast = node.graph, torch.amp.autocast_mode
    exits = graph.find_nodes(op="call_function", target=autocast._exit_autocast)
    closed = {exit.args[0] for exit in exits if exit < node}
    with ExitStack() as regions:
        for enter in graph.find_nodes(op="call_function", target=autocast._enter_autocast):
            if enter < node and enter not in closed:
                device, dtype, enabled, *_ = enter.args
                regions.enter_context(torch.autocast(device, dtype, enabled))
        yield


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Appends nodes to a graph, and records the fake value of each node as Dynamo does."""

    def create_proxy(self, *args: Any, **kwargs: Any) -> Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        record_value(proxy.node)
        return proxy


def record_value(node: Node) -> None:
    """Compute and record the fake value of a new node, if its operands have fake values.

    Autograd is off during this, because a caller may count saved tensors. The fake value requires
    grad if an operand does.
    """
    if any(value_of(n) is None for n in node.all_input_nodes):
        return
    recorded: Callable[[Node], Any] = value_of
    args, kwargs = map_arg((node.args, node.kwargs), recorded)
    leaves = tree_leaves([value_of(n) for n in node.all_input_nodes])
    inner = [local(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    modes = [leaf.fake_mode for leaf in inner if isinstance(leaf, FakeTensor)]
    if not modes:
        return
    target: Any = node.target
    call: Callable[..., Any] = getattr(torch.Tensor, target) if node.op == "call_method" else target
    differentiable = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)

    def recorded_as(result: object) -> object:
        if not isinstance(result, Tensor):
            return result
        return result.detach().requires_grad_(differentiable and result.is_floating_point())

    with torch.no_grad(), modes[0]:
        node.meta["example_value"] = tree_map(recorded_as, call(*args, **kwargs))


def replace(old: Node, new: Node) -> None:
    """Replace ``old`` by ``new``, and copy the stack trace and the module stack.

    Operands of ``old`` that have no other users are erased.
    """
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "example_value", "val"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    operands = old.all_input_nodes
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    for operand in operands:
        if not operand._erased:  # an earlier iteration may have erased it
            erase_unused(operand)


def erase_unused(node: Node) -> None:
    """Erase ``node`` if it has no users and no side effects, then its unused operands."""
    if node.users or node.op not in ("call_function", "call_method") or not _is_pure(node):
        return
    operands = node.all_input_nodes
    node.graph.erase_node(node)
    for operand in operands:
        if not operand._erased:  # an earlier iteration may have erased it
            erase_unused(operand)


def _is_pure(node: Node) -> bool:
    """Whether ``node`` has no side effects: it does not write, and calls no nested graph."""
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    in_place = name.endswith("_") or name in _IN_PLACE or "out" in node.kwargs
    return not (
        in_place or node.is_impure() or any(n.op == "get_attr" for n in node.all_input_nodes)
    )


_IN_PLACE = {"setitem", *(name for name in dir(operator) if name.startswith("i"))} - {"is", "index"}


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of an op by the names of its schema, in its order, with defaults."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    return {
        a.name: given.get(a.name, a.default_value)
        for a in schema
        if a.name in given or a.has_default_value()
    }


def argument(node: Node, position: int, *names: str) -> Any:
    """The argument of a call at a position or under one of its names; None if it is not given."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)
