"""From an op to the engine that computes it."""

import torch
from torch import Tensor

from slope_fx.kernels.engines import ENGINES, KEEP_OPERANDS, TAKE_WIDER_VALUES, Engine, engines_for
from slope_fx.kernels.selection import choose


def engine(tensor: Tensor) -> Engine:
    """The engine of the ops that aren't products: the first that serves such tensors."""
    return ENGINES[engines_for(tensor.device, tensor.dtype, products=False)[0]]


def takes_wider_values(name: str) -> bool:
    return name in TAKE_WIDER_VALUES


class engine_named:
    def __init__(self, name):
        self.name, self.e = name, ENGINES[name]

    def _n(self, values, like):
        wide = values.dtype == like.dtype or self.name in TAKE_WIDER_VALUES
        return values if wide else values.to(like.dtype)

    def forward(self, x, values, mask, bias, n, m, training):
        more = (training,) if self.name in KEEP_OPERANDS else ()
        return self.e.sparse_linear(x, self._n(values, x), mask, bias, n, m, *more)

    def input_grad(self, grad, values, f, b, n, m):
        return self.e.sparse_input_grad(grad, self._n(values, grad), f, b, n, m)

    def weight_grad(self, grad, x, f, n, m, dtype):
        if dtype in (None, grad.dtype):
            return self.e.sparse_weight_grad(grad, x, f, n, m)
        if self.name in TAKE_WIDER_VALUES:
            return self.e.sparse_weight_grad(grad, x, f, n, m, dtype)
        return self.e.sparse_weight_grad(grad, x, f, n, m).to(dtype)


class Product:
    def __init__(self, *a):
        self.a = a

    @classmethod
    def of(
        cls,
        rows,
        size,
        n,
        m,
        groups=1,
        *,
        dtype=None,
        values_dtype=None,
        trains=True,
        engines="auto",
    ):
        tokens = 1
        for length in rows.shape[:-1]:
            tokens *= hint(length)
        tokens = -(-tokens // groups)
        shape = (hint(size[0]), hint(size[1]))
        return cls(
            tokens, shape, n, m, dtype or rows.dtype, rows.device, engines, values_dtype, trains
        )

    def engine(self, op):
        return choose(op, *self.a)


def hint(size: int | torch.SymInt) -> int:
    """A size as a number, without tying the graph to it if it is dynamic."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.has_hint() else 1024
