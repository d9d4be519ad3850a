"""The roles of the parameters in a traced model.

The graph shows which linears read the embeddings or compute the logits, and which weights have
users other than linears. Names of modules do not.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.passes.graph import aten, nested_calls, nested_graph, value_of
from slope_fx.passes.linears import LinearCall, is_product, match_linears
from slope_fx.passes.views import Read, Views, apply_view, is_cast, is_view, meta_like, read_of

_CHECKS = {aten._assert_tensor_metadata.default}  # torch.export adds these before casts
_RANKINGS = {
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default,
    aten.argsort.stable, aten.argmax.default, aten.max.dim, aten.multinomial.default,
}  # fmt: skip
_EMBEDDINGS = {aten.embedding.default, aten.embedding_bag.default}


@dataclass
class WeightRole:
    """The role of one parameter in the model.

    Attributes:
        scopes: paths of the modules whose forward calls a linear with this weight.
        reads: the rows that these linears read. Empty if they do not read complete rows.
        other_uses: names of the ops that read the parameter and are not linears.
        reads_embeddings, reads_input: whether a linear with this weight reads an embedding, or
            the model's input, with no other linear before it.
        makes_output: whether a linear with this weight computes the model's output, with no other
            linear after it and no other activation combined with its result.
        chooses: whether the result of a linear with this weight is ranked, as the scores of a
            router are, with no other linear and no other activation in between.
    """

    scopes: list[str] = field(default_factory=list)
    reads: set[Read] = field(default_factory=set)
    other_uses: list[str] = field(default_factory=list)
    reads_embeddings: bool = False
    reads_input: bool = False
    makes_output: bool = False
    chooses: bool = False


@dataclass(frozen=True)
class _Flow:
    """The origin of a value.

    Attributes:
        parameter: name of the parameter if the value is a parameter, or a view or cast of one;
            else None.
        view: the value as a meta tensor that is a view of that parameter.
        derived: name of the parameter if the value is computed from one parameter only.
        on_input, on_parameter: whether the value depends on the model's input, on a parameter.
        embedded: whether an embedding is among the ancestors.
        linears: ids of the linears among the ancestors.
        fresh: ids of the linears that computed the value directly (see ``makes_output``).
    """

    parameter: str | None = None
    view: Tensor | None = None
    derived: str | None = None
    on_input: bool = False
    on_parameter: bool = False
    embedded: bool = False
    linears: frozenset[int] = frozenset()
    fresh: frozenset[int] = frozenset()


_Value = _Flow | tuple["_Value", ...]


def weight_roles(
    gm: GraphModule, parameters: Mapping[str, str], inputs: Iterable[str]
) -> dict[str, WeightRole]:
    """Returns the role of each parameter that a linear of ``gm`` uses as its weight.

    Args:
        gm: an exported graph.
        parameters: placeholder name -> parameter name, for the placeholders of parameters.
        inputs: names of the placeholders of the model's inputs.

    Returns:
        Parameter name -> role. Parameters that no linear uses are not included.
    """
    inputs = set(inputs)
    walk = _Walk()
    arguments: list[_Value] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        name, value = parameters.get(node.name), value_of(node)
        view = meta_like(value) if name is not None and isinstance(value, Tensor) else None
        arguments.append(
            _Flow(name, view, on_parameter=name is not None, on_input=node.name in inputs)
        )
    results = walk.run(gm, arguments)
    for flow in _leaves(results):
        for linear in flow.fresh - walk.inner:
            walk.roles[walk.weights[linear]].makes_output = True
    for name, uses in walk.other_uses.items():
        if name in walk.roles:
            walk.roles[name].other_uses = uses
    return walk.roles


class _Walk:
    """One forward traversal of a graph and its nested graphs."""

    def __init__(self) -> None:
        self.roles: dict[str, WeightRole] = {}
        self.other_uses: dict[str, list[str]] = {}
        self.weights: list[str] = []  # name of the weight of each linear; the index is its id
        self.inner: set[int] = set()  # ids of linears with another linear after them

    def run(self, gm: GraphModule, arguments: list[_Value]) -> _Value:
        flows: dict[Node, _Value] = {}
        nested = {node: (graph, operands) for node, graph, operands in nested_calls(gm)}
        remaining = iter(arguments)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                flows[node] = next(remaining, _Flow())
            elif node.op == "output":
                return tuple(flows[n] for n in node.all_input_nodes)
            elif node.op == "get_attr":
                flows[node] = _Flow()
            elif node in nested and nested[node][1] is not None:
                graph, operands = nested[node]
                assert operands is not None
                flows[node] = self.run(
                    graph, [flows[o] if isinstance(o, Node) else _Flow() for o in operands]
                )
            elif node.target is operator.getitem and isinstance(flows[node.args[0]], tuple):
                flows[node] = flows[node.args[0]][node.args[1]]  # type: ignore[index]
            else:
                flows[node] = self.step(gm, node, flows)
        raise AssertionError("an FX graph ends in its output node")

    def step(self, gm: GraphModule, node: Node, flows: dict[Node, _Value]) -> _Value:
        operands = {
            n: _merge(flows[n]) for n in node.all_input_nodes if nested_graph(gm, n) is None
        }
        if is_view(node) or is_cast(node):
            operand = operands[node.all_input_nodes[0]]
            if operand.view is not None:
                seen = operand.view if is_cast(node) else apply_view(node, operand.view)
                if seen is not None:
                    return _viewed(operand, seen)
        call, name, read = self._match(node, flows)
        for operand_node, flow in operands.items():
            is_weight = call is not None and operand_node is call.weight
            if flow.parameter and not is_weight and node.target not in _CHECKS:
                self.other_uses.setdefault(flow.parameter, []).append(_op_name(node))
        merged = _merge(tuple(operands.values()))
        if call is not None and read is not None:
            return self.linear(call, name, read, operands[call.x], merged)
        if is_product(node):
            # A linear whose weight is computed, or is a part of the columns. It cannot be
            # compressed, so its role has no reads.
            for operand_node, flow in operands.items():
                value, name = value_of(operand_node), flow.parameter or flow.derived or ""
                if name and isinstance(value, Tensor) and value.dim() > 1:
                    self.roles.setdefault(name, WeightRole()).scopes.append(_scope(node))
        if node.target in _RANKINGS:
            for linear in merged.fresh:
                self.roles[self.weights[linear]].chooses = True
        embedded = merged.embedded or node.target in _EMBEDDINGS
        activations = [f for f in operands.values() if f.on_input and f.on_parameter]
        fresh = {f.fresh for f in activations}
        sources = {f.parameter or f.derived for f in operands.values() if f.on_parameter}
        return _Flow(
            derived=sources.pop() if len(sources) == 1 and not merged.on_input else None,
            on_input=merged.on_input,
            on_parameter=merged.on_parameter,
            embedded=embedded,
            linears=merged.linears,
            fresh=fresh.pop() if len(fresh) == 1 else frozenset(),
        )

    def _match(
        self, node: Node, flows: dict[Node, _Value]
    ) -> tuple[LinearCall | None, str, Read | None]:
        """``node`` as a linear with a parameter as its weight, its name and the rows it reads."""
        for call in match_linears(node):
            weight = _merge(flows[call.weight])
            if weight.parameter is not None and weight.view is not None:
                matrix = call.matrix(weight.view)
                read = None if matrix is None else read_of(matrix)
                if read is not None:
                    return call, weight.parameter, read
        return None, "", None

    def linear(self, call: LinearCall, name: str, read: Read, x: _Flow, merged: _Flow) -> _Flow:
        role = self.roles.setdefault(name, WeightRole())
        role.scopes.append(_scope(call.node))
        role.reads.add(read)
        if x.on_input and not x.linears:
            role.reads_embeddings |= x.embedded
            role.reads_input |= not x.embedded
        self.inner |= x.linears
        here = frozenset([len(self.weights)])
        self.weights.append(name)
        return _Flow(
            on_input=merged.on_input,
            on_parameter=True,
            embedded=merged.embedded,
            linears=merged.linears | here,
            fresh=here,
        )


def _viewed(operand: _Flow, seen: Views) -> _Value:
    if isinstance(seen, Tensor):
        return dataclasses.replace(operand, view=seen)
    return tuple(_viewed(operand, part) for part in seen)


def _merge(value: _Value) -> _Flow:
    leaves = _leaves(value)
    if len(leaves) == 1:
        return leaves[0]
    fresh = {f.fresh for f in leaves if f.on_input and f.on_parameter}
    return _Flow(
        on_input=any(f.on_input for f in leaves),
        on_parameter=any(f.on_parameter for f in leaves),
        embedded=any(f.embedded for f in leaves),
        linears=frozenset().union(*(f.linears for f in leaves)),
        fresh=fresh.pop() if len(fresh) == 1 else frozenset(),
    )


def _leaves(value: _Value) -> list[_Flow]:
    if isinstance(value, _Flow):
        return [value]
    return [leaf for item in value for leaf in _leaves(item)]


def _op_name(node: Node) -> str:
    return (
        str(node.target)
        if not callable(node.target)
        else getattr(node.target, "__name__", str(node.target))
    )


def _scope(node: Node) -> str:
    """The path of the module whose forward contains ``node``; "" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return path.removeprefix("L['self']").removeprefix(".")
