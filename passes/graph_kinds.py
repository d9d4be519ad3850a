"""Finds the modules of a traced model with equal graphs, independent of their names."""

import hashlib
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from slope_fx.passes.graph import nested_graph, value_of


def graph_kinds(gm: GraphModule) -> dict[str, int]:
    """Numbers the modules of an exported graph. Modules with equal graphs have equal numbers.

    Graphs are equal if they have the same ops in the same order, with inputs and parameters of
    equal shapes and dtypes, and equal constants.

    Returns:
        Module path -> number, without the root module.
    """
    written: dict[str, _Writer] = {}
    for node in gm.graph.nodes:
        for path in _paths(node):
            written.setdefault(path, _Writer()).add(gm, node)
    numbers: dict[str, int] = {}
    return {
        path: numbers.setdefault(writer.digest.hexdigest(), len(numbers))
        for path, writer in written.items()
    }


class _Writer:
    """Hashes the nodes of one module without their names."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._known: dict[Node, str] = {}

    def add(self, gm: GraphModule, node: Node) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Name(self._name(gm, n)))
        self._known[node] = f"n{len(self._known)}"
        self.digest.update(f"{node.target} {args} {kwargs} {_shapes(node)}\n".encode())

    def _name(self, gm: GraphModule, node: Node) -> str:
        if node not in self._known:
            nested = nested_graph(gm, node)
            what = _shapes(node) if nested is None else _digest(nested)
            self._known[node] = f"i{len(self._known)}:{what}"
        return self._known[node]


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _digest(gm: GraphModule) -> str:
    writer = _Writer()
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            writer.add(gm, node)
    return writer.digest.hexdigest()


def _paths(node: Node) -> list[str]:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    paths = (path.removeprefix("L['self']").removeprefix(".") for path, _ in stack.values())
    # In one order, so that all processes give a graph the same number.
    return [path for path in dict.fromkeys(paths) if path]


def _shapes(node: Node) -> str:
    value = value_of(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return " ".join(
        f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in values
    )
