"""Matches the nodes that compute linears, in all forms.

The matchers accept the torch functions of Dynamo's graphs and the ATen ops of exported programs.
Each operand of a matrix product can be the weight, so a product gives one match per operand. The
caller checks which operand is a weight.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.passes.graph import argument, aten, rank_of, value_of

Matrix = Callable[[Tensor], Tensor | None]
Build = Callable[..., Any]

_LINEAR = {F.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm.default}
_BADDBMM = {torch.baddbmm, aten.baddbmm.default}
_MATMUL = {
    torch.matmul, torch.mm, torch.mv, torch.bmm, operator.matmul, aten.matmul.default,
    aten.mm.default, aten.mv.default, aten.bmm.default,
}  # fmt: skip
_INNER = {torch.inner, aten.inner.default}
_EINSUM = {torch.einsum, aten.einsum.default}
_TENSORDOT = {torch.tensordot, aten.tensordot.default}
_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
}  # fmt: skip
_METHODS = {
    "matmul": torch.matmul,
    "mm": torch.mm,
    "mv": torch.mv,
    "bmm": torch.bmm,
    "inner": torch.inner,
    "__matmul__": torch.matmul,
    "addmm": torch.addmm,
    "baddbmm": torch.baddbmm,
}


@dataclass(frozen=True)
class LinearCall:
    """A node that computes a linear with one of its operands as the weight.

    Attributes:
        node: the call.
        x: the input.
        weight: the operand that is the weight.
        bias: the tensor that is added to the product, or None.
        matrix: maps the weight to its view (d_out, d_in) or (groups, d_out, d_in), or to None if
            there is no such view.
        build: computes the call in plain form from x, weight and bias. None if the call has plain
            form: ``F.linear`` with a matrix, ``torch.bmm`` with a stack of matrices (groups,
            d_in, d_out), or a grouped product.
        offsets: for a grouped product, the end of each group in the rows of x.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    matrix: Matrix
    build: Build | None = None
    offsets: Node | None = None


def is_product(node: Node) -> bool:
    """Whether ``node`` computes a matrix product of any form, or a convolution of one pixel."""
    matcher = _matcher(node) if node.op in ("call_function", "call_method") else None
    return matcher is not None and (matcher is not _convolution or any(True for _ in matcher(node)))


def match_linears(node: Node) -> Iterator[LinearCall]:
    """Yields ``node`` as a linear, once for each operand that can be its weight."""
    matcher = _matcher(node) if node.op in ("call_function", "call_method") else None
    if matcher is not None:
        for call in matcher(node):
            operands = (call.x, call.weight, *([] if call.bias is None else [call.bias]))
            if all(isinstance(o, Node) for o in operands):
                yield call


def find_linears(gm: GraphModule) -> Iterator[LinearCall]:
    """Yields the linears of ``gm`` itself, without nested graphs, in execution order.

    Each node is matched when it is reached. A pass may therefore replace a linear before it takes
    the next one.
    """
    for node in list(gm.graph.nodes):
        for call in match_linears(node):
            yield call
            if node._erased:
                break


def _matcher(node: Node) -> Callable[[Node], Iterator[LinearCall]] | None:
    target: object = node.target
    if node.op == "call_method":
        target = _METHODS.get(str(target))
    for targets, matcher in _MATCHERS:
        if target in targets:
            return matcher
    return _grouped if _is_grouped(target) else None


def _linear(node: Node) -> Iterator[LinearCall]:
    x, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    if rank_of(weight) in (2, None):
        yield LinearCall(node, x, weight, bias, _same)
    elif rank_of(weight) == 1:
        yield LinearCall(
            node, x, weight, bias, lambda w: w.unsqueeze(0),
            lambda x, w, b: F.linear(x, w.unsqueeze(0), b).squeeze(-1),
        )  # fmt: skip


def _addmm(node: Node) -> Iterator[LinearCall]:
    bias, left, right = (argument(node, i, n) for i, n in enumerate(("input", "mat1", "mat2")))
    add = _scaled_add(node)
    vector = add is None and rank_of(bias) == 1 and _size(bias, 0) != 1

    def plain(x: Any, w: Any, b: Any) -> Any:
        return F.linear(x, w.mT, b) if vector else (add or _add)(F.linear(x, w.mT), b)

    yield LinearCall(node, left, right, bias, _transposed, plain)
    turned = lambda x, w, b: (add or _add)(F.linear(x.mT, w).mT, b)  # noqa: E731
    yield LinearCall(node, right, left, bias, _same, turned)


def _baddbmm(node: Node) -> Iterator[LinearCall]:
    bias, left, right = (
        argument(node, i, *names)
        for i, names in enumerate((("input",), ("batch1", "mat1"), ("batch2", "mat2")))
    )
    add = _scaled_add(node) or _add
    plain = lambda x, w, b: add(torch.bmm(x, w), b)  # noqa: E731
    yield LinearCall(node, left, right, bias, _transposed, plain)
    turned = lambda x, w, b: add(torch.bmm(x.mT, w.mT).mT, b)  # noqa: E731
    yield LinearCall(node, right, left, bias, _same, turned)


def _scaled_add(node: Node) -> Callable[[Any, Any], Any] | None:
    """The addition of an addmm with ``alpha`` and ``beta``; None if both are 1."""
    beta = argument(node, 3, "beta")
    alpha = argument(node, 4, "alpha")
    beta, alpha = (1 if factor is None else factor for factor in (beta, alpha))
    if beta == alpha == 1:
        return None

    def add(product: Any, bias: Any) -> Any:
        product = product if alpha == 1 else product * alpha
        if beta == 0:  # torch then ignores the bias, even NaN
            return product
        return product + bias * beta

    return add


def _matmul(node: Node) -> Iterator[LinearCall]:
    left = argument(node, 0, "input", "self")
    right = argument(node, 1, "other", "mat2", "tensor2", "vec")
    ranks = rank_of(left), rank_of(right)
    if ranks[1] == 2 or ranks == (None, None):
        yield LinearCall(node, left, right, None, _transposed, lambda x, w, b: F.linear(x, w.mT))
    if ranks[0] == 2:
        if ranks[1] == 1:
            yield LinearCall(node, right, left, None, _same, lambda x, w, b: F.linear(x, w))
        elif ranks[1] is not None:
            build = lambda x, w, b: F.linear(x.mT, w).mT  # noqa: E731
            yield LinearCall(node, right, left, None, _same, build)
    if ranks == (3, 3):
        plain = node.target in (torch.bmm, "bmm") and _size(left, 0) == _size(right, 0)
        if _size(left, 0) == _size(right, 0):
            bmm = None if plain else lambda x, w, b: torch.bmm(x, w)
            yield LinearCall(node, left, right, None, _transposed, bmm)
            build = lambda x, w, b: torch.bmm(x.mT, w.mT).mT  # noqa: E731
            yield LinearCall(node, right, left, None, _same, build)
    if ranks == (2, 3):
        groups, rows = _size(right, 0), _size(right, 2)

        def all_groups(x: Any, w: Any, b: Any) -> Any:
            """The products of all matrices with the same input, as one product."""
            y = F.linear(x, w.mT.flatten(0, 1))
            return y.unflatten(-1, (groups, rows)).movedim(-2, 0)

        yield LinearCall(node, left, right, None, _transposed, all_groups)


def _inner(node: Node) -> Iterator[LinearCall]:
    left, right = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if rank_of(right) == 2:
        yield LinearCall(node, left, right, None, _same, lambda x, w, b: F.linear(x, w))


def _convolution(node: Node) -> Iterator[LinearCall]:
    """A convolution of one pixel, which is a linear over the channels."""
    x, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
    stride, padding = argument(node, 3, "stride"), argument(node, 4, "padding")
    groups = argument(node, 6, "groups")
    rank = rank_of(weight)
    value = value_of(weight) if isinstance(weight, Node) else None
    if rank is None or groups not in (None, 1) or not isinstance(value, Tensor):
        return
    if any(size != 1 for size in value.shape[2:]):
        return
    dims = rank - 2
    if padding not in (None, "valid", "same") and any(_each(padding, dims)):
        return
    strides = _each(1 if stride is None else stride, dims)
    channels = 1 if rank_of(x) == rank else 0

    def pixels(x: Any, w: Any, b: Any) -> Any:
        if any(s != 1 for s in strides):
            x = x[(..., *(slice(None, None, s) for s in strides))]
        return F.linear(x.movedim(channels, -1), w.flatten(1), b).movedim(-1, channels)

    yield LinearCall(node, x, weight, bias, lambda w: w.flatten(1), pixels)


def _is_grouped(target: object) -> bool:
    """Whether ``target`` is a grouped product, which multiplies each expert with its own rows."""
    name = str(target).removesuffix(".default")
    return name in ("transformers.grouped_mm_fallback", "aten._grouped_mm") or (
        target is not None
        and target in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    )


def _grouped(node: Node) -> Iterator[LinearCall]:
    x, weight = argument(node, 0, "input", "self"), argument(node, 1, "weight", "mat_b", "mat2")
    offsets = argument(node, 2, "offs")
    if rank_of(x) == 2 and rank_of(weight) == 3 and isinstance(offsets, Node):
        yield LinearCall(node, x, weight, None, _transposed, None, offsets)


def _einsum(node: Node) -> Iterator[LinearCall]:
    equation, operands = argument(node, 0, "equation"), node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if isinstance(equation, str) and len(operands) == 2:
        yield from _contraction(node, equation, operands[0], operands[1])
        yield from _contraction(node, equation, operands[1], operands[0], swapped=True)


def _tensordot(node: Node) -> Iterator[LinearCall]:
    left, right = argument(node, 0, "a", "self"), argument(node, 1, "b", "other")
    dims = argument(node, 2, "dims", "dims_self")
    if dims is not None and "aten" in str(node.target):
        dims = (dims, argument(node, 3, "dims_other"))
    ranks = rank_of(left), rank_of(right)
    if ranks[0] is None or ranks[1] is None:
        return
    if dims is None or isinstance(dims, int):
        count = 2 if dims is None else dims
        dims = (range(ranks[0] - count, ranks[0]), range(count))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in range(ranks[0])]
    second = [next(letters) for _ in range(ranks[1])]
    for mine, other in zip(*dims, strict=True):
        second[other] = first[mine]
    both = set(first) & set(second)
    out = [letter for letter in (*first, *second) if letter not in both]
    equation = f"{''.join(first)},{''.join(second)}->{''.join(out)}"
    yield from _contraction(node, equation, left, right)
    yield from _contraction(node, equation, right, left, swapped=True)


def _contraction(
    node: Node, equation: str, x: Any, weight: Any, *, swapped: bool = False
) -> Iterator[LinearCall]:
    """An einsum of two operands as a linear or as a stack of linears."""
    terms = _parse(equation, (weight, x) if swapped else (x, weight))
    if terms is None:
        return
    of_x, of_w, out = (terms[1], terms[0], terms[2]) if swapped else terms
    batch = [c for c in of_w if c in of_x and c in out]
    summed = [c for c in of_w if c in of_x and c not in out]
    rows = [c for c in of_w if c not in of_x and c in out]
    left = [c for c in of_x if c not in of_w and c in out]
    complete = len(batch + summed + rows) == len(of_w) and len(batch + summed + left) == len(of_x)
    value = value_of(weight)
    if not (complete and summed and rows and isinstance(value, Tensor)):
        return
    sizes = dict(zip(of_w, value.shape, strict=True))
    if not all(isinstance(size, int) for size in sizes.values()):
        return

    def stacked(w: Any) -> Any:
        w = _ordered(w, of_w, [*batch, *rows, *summed])
        w = w.flatten(-len(summed)) if len(summed) > 1 else w
        w = w.flatten(len(batch), -2) if len(rows) > 1 else w
        return w.flatten(0, -3) if len(batch) > 1 else w

    def matrix(w: Tensor) -> Tensor | None:
        result: Tensor = stacked(w)
        same = result.untyped_storage()._cdata == w.untyped_storage()._cdata
        return result if same else None

    def one(x: Any, w: Any, b: Any) -> Any:
        x = _ordered(x, of_x, [*left, *summed])
        x = x.flatten(-len(summed)) if len(summed) > 1 else x
        y = F.linear(x, stacked(w))
        y = y.unflatten(-1, tuple(sizes[c] for c in rows)) if len(rows) > 1 else y
        return _ordered(y, [*left, *rows], out)

    def several(x: Any, w: Any, b: Any) -> Any:
        lengths = [x.size(of_x.index(c)) for c in left]
        groups, d_in = prod(sizes[c] for c in batch), prod(sizes[c] for c in summed)
        x = _ordered(x, of_x, [*batch, *left, *summed]).reshape(groups, -1, d_in)
        y = torch.bmm(x, stacked(w).mT)
        y = y.reshape(*(sizes[c] for c in batch), *lengths, *(sizes[c] for c in rows))
        return _ordered(y, [*batch, *left, *rows], out)

    yield LinearCall(node, x, weight, None, matrix, several if batch else one)


def _parse(
    equation: str, operands: tuple[Any, Any]
) -> tuple[list[str], list[str], list[str]] | None:
    """The letters of both operands and of the result; None for an unsupported equation."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    free = iter(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation)
    dots: list[str] = []
    read = []
    for term, operand in zip(terms, operands, strict=True):
        rank = rank_of(operand)
        if rank is None or term.count("...") > 1:
            return None
        if "..." in term:
            if dots:
                return None
            dots = [next(free) for _ in range(rank - len(term) + 3)]
            term = term.replace("...", "".join(dots))
        if len(set(term)) != len(term) or len(term) != rank:
            return None
        read.append(list(term))
    letters = read[0] + read[1]
    once = sorted(c for c in letters if letters.count(c) == 1 and c not in dots)
    out = right.replace("...", "".join(dots)) if arrow else "".join([*dots, *once])
    return (read[0], read[1], list(out)) if set(out) <= set(letters) else None


def _ordered(tensor: Any, have: list[str], want: list[str]) -> Any:
    order = [have.index(c) for c in want]
    return tensor if order == list(range(len(order))) else tensor.permute(*order)


def _same(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.mT


def _add(product: Any, bias: Any) -> Any:
    return product + bias


def _each(value: Any, dims: int) -> list[Any]:
    given = list(value) if isinstance(value, (tuple, list)) else [value]
    return given * dims if len(given) == 1 else given


def _size(node: object, dim: int) -> Any:
    value = value_of(node) if isinstance(node, Node) else None
    return value.shape[dim] if isinstance(value, Tensor) and value.dim() > dim else None


_MATCHERS: tuple[tuple[set[Any], Callable[[Node], Iterator[LinearCall]]], ...] = (
    (_LINEAR, _linear),
    (_ADDMM, _addmm),
    (_MATMUL, _matmul),
    (_EINSUM, _einsum),
    (_BADDBMM, _baddbmm),
    (_INNER, _inner),
    (_TENSORDOT, _tensordot),
    (_CONVOLUTIONS, _convolution),
)
