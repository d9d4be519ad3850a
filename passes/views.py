"""The part of a weight that a node reads: the whole weight, some rows, or a stack of matrices.

A weight reaches its linear through transposes, views, slices and casts. :func:`view_of` runs this
chain on a meta tensor, and :func:`read_of` derives the rows from the strides of the result.
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
    """A node as a view of the result of another node.

    Attributes:
        source: the node at the start of the chain of views.
        tensor: the view as a meta tensor, over a contiguous tensor of the source's shape.
        dtypes: the dtypes of the casts in the chain, in order. Those that change no value are left
            out, such as fp32 between bf16 and fp16, but for the last one.
    """

    source: Node
    tensor: Tensor
    dtypes: tuple[torch.dtype, ...]

    def cast(self, tensor: Any) -> Any:
        """A tensor, or its proxy, after the casts."""
        for dtype in self.dtypes:
            tensor = tensor.to(dtype)
        return tensor


@dataclass(frozen=True)
class Read:
    """The rows that a linear reads of a weight. The weight is one matrix or a stack of matrices.

    Attributes:
        transposed: whether each matrix is stored as (d_in, d_out).
        d_in: number of columns.
        block: number of rows of one matrix if the matrices are transposed, else of all matrices.
            All reads of a weight must have equal blocks to have a common layout.
        start, stop: the range of rows, counted over all matrices of the stack.
        groups: number of matrices of equal size that the linear reads.
    """

    transposed: bool
    d_in: int
    block: int
    start: int
    stop: int
    groups: int


def is_cast(node: Node) -> bool:
    """Whether ``node`` casts a tensor to a floating dtype on the same device."""
    if node.target not in _CASTS or not _operand(node):
        return False
    before, after = value_of(node.all_input_nodes[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.device == after.device and after.is_floating_point()


def is_view(node: Node) -> bool:
    """Whether ``node`` may be a view of its first argument."""
    if node.op == "call_function" and node.target is getattr:
        return len(node.args) == 2 and node.args[1] in _ATTRIBUTES and bool(_operand(node))
    known = (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )
    return known and bool(_operand(node)) and len(node.all_input_nodes) == 1


def apply_view(node: Node, operand: Views) -> Views | None:
    """Applies the view ``node`` to a tensor.

    Args:
        node: a node for which :func:`is_view` returns True.
        operand: the tensor, or a tuple of tensors.

    Returns:
        The view, or None if the result is a copy.
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
    """``node`` as a view of its source; None if this is unknown.

    A node that is not a view of another node is its own source.
    """
    chain = []
    while is_view(node) or is_cast(node):
        chain.append(node)
        node = node.all_input_nodes[0]
    value = value_of(node)
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    views: Views = meta_like(value)
    dtypes: list[torch.dtype] = []
    for step in reversed(chain):
        if is_cast(step):
            dtypes.append(value_of(step).dtype)  # type: ignore[attr-defined]
            continue
        seen = apply_view(step, views)
        if seen is None:
            return None
        views = seen
    if not isinstance(views, Tensor):
        return None
    return View(node, views, _that_round(value.dtype, dtypes))


_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""The dtypes that have all values of a dtype."""


def _that_round(dtype: torch.dtype, casts: list[torch.dtype]) -> tuple[torch.dtype, ...]:
    """The casts of a tensor that may change a value, and the last one."""
    kept = []
    for cast in casts[:-1]:
        if cast != dtype and cast not in _WIDER.get(dtype, ()):
            kept.append(cast)
            dtype = cast
    return (*kept, *casts[-1:])


def source_of(node: Node) -> Node:
    """The node at the start of the chain of views and casts that ends in ``node``."""
    while is_view(node) or is_cast(node):
        node = node.all_input_nodes[0]
    return node


def meta_like(value: Tensor) -> Tensor:
    """A contiguous meta tensor with the shape of ``value``, without autograd history."""
    with torch.no_grad():
        return torch.empty(tuple(value.shape), device="meta")


def read_of(matrix: Tensor) -> Read | None:
    """The rows that a linear with the weight ``matrix`` reads of the source of this view.

    Args:
        matrix: (d_out, d_in), or (groups, d_out, d_in), from :func:`view_of`.

    Returns:
        The rows, or None if ``matrix`` is not made of complete rows of the source.
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
    """Whether the first argument is a node."""
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
    """The layout of a matrix, or of a stack of matrices, in a parameter.

    Attributes:
        stack: number of matrices.
        d_out, d_in: size of each matrix.
        transposed: whether each matrix is stored as (d_in, d_out).
        shape: shape of the parameter.
    """

    stack: int
    d_out: int
    d_in: int
    transposed: bool
    shape: tuple[int, ...]

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """The rows of all matrices as one matrix (stack * d_out, d_in)."""
        if self.transposed:
            stacked = parameter.reshape(self.stack, self.d_in, self.d_out)
            parameter = stacked.transpose(1, 2)
        return parameter.reshape(self.stack * self.d_out, self.d_in)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`. The result is a view."""
        if self.transposed and self.stack == 1:
            matrix = matrix.t()
        elif self.transposed:
            matrix = matrix.view(self.stack, self.d_out, self.d_in).transpose(1, 2)
        return matrix if matrix.shape == self.shape else matrix.view(self.shape)


def common_layout(reads: Iterable[Read], shape: tuple[int, ...]) -> Layout | str:
    """The layout of a parameter for all its reads, or the reason why they have no common layout."""
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
        return f"its linears use it as other matrices than its shape {shape} has"
    return layout


def _rows_of_each(reads: list[Read], shape: tuple[int, ...], rows: int) -> int:
    """The number of rows of one matrix, for matrices that are not transposed."""
    sizes = {(read.stop - read.start) // read.groups for read in reads if read.groups > 1}
    if not sizes and len(shape) > 2 and shape[-1] * rows == math.prod(shape):
        sizes = {shape[-2]}  # linears read the matrices one by one, unless a read crosses them
    each = sizes.pop() if len(sizes) == 1 else rows
    inside = all(read.groups > 1 or read.start // each == (read.stop - 1) // each for read in reads)
    return each if inside and rows % each == 0 else rows
