"""What a node reads of a weight: all of it, some of its rows, or a stack of matrices.

A weight reaches its linear through transposes, views, slices and casts. Rather than to know each
combination, the chain is run on a tensor without data, and its strides tell what is read.
"""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from slope_fx.passes.graph import aten, value_of

Views = Tensor | tuple["Views", ...]

_FUNCTIONS: set[object] = {
    getattr,
    operator.getitem,
    torch.t,
    torch.transpose,
    torch.permute,
    torch.swapaxes,
    torch.swapdims,
    torch.movedim,
    torch.moveaxis,
    torch.adjoint,
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.squeeze,
    torch.unsqueeze,
    torch.select,
    torch.narrow,
    torch.split,
    torch.tensor_split,
    torch.chunk,
    torch.unbind,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.chunk.default,
    aten.unbind.int,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.alias.default,
    aten.contiguous.default,
    aten.mT.default,
    aten.matrix_H.default,
}
_METHODS = {
    "t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "view",
    "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "select", "narrow", "split",
    "tensor_split", "chunk", "unbind", "contiguous", "__getitem__",
}  # fmt: skip
_CASTS: set[object] = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    "to",
    "type",
    "type_as",
    "float",
    "double",
    "half",
    "bfloat16",
}
_ATTRIBUTES = ("T", "mT", "H", "mH")


@dataclass(frozen=True)
class View:
    """What a node sees of the tensor it is a view of.

    Attributes:
        source: the node whose result that tensor is.
        tensor: without data, strided over a contiguous tensor of the source's shape.
        dtype: what it was cast to on the way, or None.
    """

    source: Node
    tensor: Tensor
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Read:
    """The rows that a linear reads of a weight, which holds one matrix or a stack of them.

    Attributes:
        transposed: each matrix lies there as (d_in, d_out).
        d_in: columns.
        block: rows of one matrix if they are transposed, of all together if not: what must be
            known, and agree, for the whole to be taken for (rows, d_in).
        start, stop: the rows it reads, counted over all of the stack.
        groups: how many matrices it reads at once, of equal size.
    """

    transposed: bool
    d_in: int
    block: int
    start: int
    stop: int
    groups: int


def is_cast(node: Node) -> bool:
    """Whether ``node`` is another tensor in another dtype, on the same device."""
    if node.target not in _CASTS or not _operand(node):
        return False
    before, after = value_of(node.all_input_nodes[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.device == after.device and after.is_floating_point()


def is_view(node: Node) -> bool:
    """Whether ``node`` may be a view of another, which is its first argument."""
    if node.op == "call_function" and node.target is getattr:
        return len(node.args) == 2 and node.args[1] in _ATTRIBUTES and bool(_operand(node))
    known = (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )
    return known and bool(_operand(node)) and len(node.all_input_nodes) == 1


def apply_view(node: Node, operand: Views) -> Views | None:
    """What ``node``, for which :func:`is_view` holds, makes of the tensor it reads.

    None if that is not a view of it, but a copy.
    """
    if isinstance(operand, tuple):
        index = node.args[1] if node.target is operator.getitem else None
        return operand[index] if isinstance(index, int) else None
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: operand)
    target: Any = node.target
    call: Callable[..., Any] = getattr(torch.Tensor, target) if node.op == "call_method" else target
    try:
        with torch.no_grad():
            result = call(*args, **kwargs)
    except Exception:
        return None  # a failing view fails when the model runs, with a better message
    return _checked(result, operand)


def view_of(node: Node) -> View | None:
    """What ``node`` is a view of, itself if of nothing else; None if it can't be told."""
    chain = []
    while is_view(node) or is_cast(node):
        chain.append(node)
        node = node.all_input_nodes[0]
    value = value_of(node)
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    views: Views = meta_like(value)
    dtype = None
    for step in reversed(chain):
        if is_cast(step):
            dtype = value_of(step).dtype  # type: ignore[attr-defined]
            continue
        seen = apply_view(step, views)
        if seen is None:
            return None
        views = seen
    return View(node, views, dtype) if isinstance(views, Tensor) else None


def source_of(node: Node) -> Node:
    """The node that ``node`` may be a view of."""
    while is_view(node) or is_cast(node):
        node = node.all_input_nodes[0]
    return node


def meta_like(value: Tensor) -> Tensor:
    """A contiguous tensor of that shape, without data and without history."""
    with torch.no_grad():
        return torch.empty(tuple(value.shape), device="meta")


def read_of(matrix: Tensor) -> Read | None:
    """What a linear with the weight ``matrix`` reads of the tensor that this is a view of.

    Args:
        matrix: (d_out, d_in), or (groups, d_out, d_in), from :func:`view_of`.

    Returns:
        None unless it is whole rows of that tensor, seen as one matrix or as a stack.
    """
    total = matrix.untyped_storage().nbytes() // matrix.element_size()
    groups, stride = 1, 0
    if matrix.dim() == 3:
        groups, stride = matrix.shape[0], matrix.stride(0)
        matrix = matrix[0]
    if matrix.dim() != 2 or not matrix.numel():
        return None
    (rows, d_in), (down, right), offset = matrix.shape, matrix.stride(), matrix.storage_offset()
    if (right == 1 or d_in == 1) and (down == d_in or rows == 1) and offset % d_in == 0:
        if groups > 1 and stride != rows * d_in:
            return None
        start = offset // d_in
        return Read(False, d_in, total // d_in, start, start + groups * rows, groups)
    if (down == 1 or rows == 1) and right >= rows and total % (d_in * right) == 0:
        block = right
        if groups > 1 and (stride != d_in * block or rows != block):
            return None
        index, first = divmod(int(offset), d_in * block)
        if first + rows > block:
            return None
        start = index * block + first
        return Read(True, d_in, block, start, start + groups * rows, groups)
    return None


def _operand(node: Node) -> bool:
    """Whether the first argument is a node: what a view is of."""
    return bool(node.args) and isinstance(node.args[0], Node)


def _checked(result: object, operand: Tensor) -> Views | None:
    if isinstance(result, Tensor):
        same = result.untyped_storage()._cdata == operand.untyped_storage()._cdata
        return result if same else None
    if isinstance(result, (tuple, list)):
        parts = tuple(_checked(part, operand) for part in result)
        return parts if all(part is not None for part in parts) else None  # type: ignore[return-value]
    return None


@dataclass(frozen=True)
class Layout:
    """How a parameter holds a matrix, or a stack of them.

    Attributes:
        stack: matrices.
        d_out, d_in: of each.
        transposed: each lies there as (d_in, d_out).
        shape: of the parameter.
    """

    stack: int
    d_out: int
    d_in: int
    transposed: bool
    shape: tuple[int, ...]

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """(stack * d_out, d_in): the matrices one below the other."""
        if self.transposed:
            stacked = parameter.reshape(self.stack, self.d_in, self.d_out)
            parameter = stacked.transpose(1, 2)
        return parameter.reshape(self.stack * self.d_out, self.d_in)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`, a view."""
        if self.transposed and self.stack == 1:
            matrix = matrix.t()
        elif self.transposed:
            matrix = matrix.view(self.stack, self.d_out, self.d_in).transpose(1, 2)
        return matrix if matrix.shape == self.shape else matrix.view(self.shape)


def common_layout(reads: Iterable[Read], shape: tuple[int, ...]) -> Layout | str:
    """The layout of a parameter that linears read so; or why there is none for all of them."""
    reads = list(reads)
    first = reads[0]
    if any(read.transposed != first.transposed for read in reads):
        return "its weight is used both as it is and transposed"
    if any((read.d_in, read.block) != (first.d_in, first.block) for read in reads):
        return "its weight is used as matrices of different sizes"
    rows = math.prod(shape) // first.d_in
    each = first.block if first.transposed else _rows_of_each(reads, shape, rows)
    layout = Layout(rows // each, each, first.d_in, first.transposed, shape)
    try:
        layout.to_parameter(torch.empty(rows, first.d_in, device="meta"))
    except RuntimeError:
        return f"its linears use it as other matrices than its shape {shape} tells"
    return layout


def _rows_of_each(reads: list[Read], shape: tuple[int, ...], rows: int) -> int:
    """The rows of one matrix, where those of all lie one below the other."""
    sizes = {(read.stop - read.start) // read.groups for read in reads if read.groups > 1}
    if not sizes and len(shape) > 2 and shape[-1] * rows == math.prod(shape):
        sizes = {shape[-2]}  # each read alone, if none goes across
    each = sizes.pop() if len(sizes) == 1 else rows
    inside = all(read.groups > 1 or read.start // each == (read.stop - 1) // each for read in reads)
    return each if inside and rows % each == 0 else rows
