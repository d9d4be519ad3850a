"""From an op to the engine that computes it."""

import torch
from torch import Tensor

from slope_fx.kernels.engines import ENGINES, Engine, engines_for
from slope_fx.kernels.selection import choose


def engine(tensor: Tensor) -> Engine:
    """The engine of the ops that aren't products: the first that serves such tensors."""
    return ENGINES[engines_for(tensor.device, tensor.dtype, products=False)[0]]


def choose_engine(
    op: str,
    tokens_of: Tensor,
    values_shape: tuple[int, int],
    n: int,
    m: int,
    engines: str,
    dtype: torch.dtype | None = None,
    values_dtype: torch.dtype | None = None,
    trains: bool = True,
    groups: int = 1,
) -> str:
    """The engine of a product, as it goes into the graph.

    Args:
        op: "sparse_linear", "sparse_input_grad" or "sparse_weight_grad".
        tokens_of: (..., features): the input or the output's gradient, real or fake.
        values_shape: (d_out, d_in * N / M), of one weight.
        n, m: the pattern.
        engines: who may compute it: "auto", or names separated by commas.
        dtype: of the product, if it will not be that of ``tokens_of``.
        values_dtype: of the values, if not that of the product.
        trains: whether the values change between one use and the next.
        groups: how many weights share the tokens.
    """
    tokens = 1
    for length in tokens_of.shape[:-1]:
        tokens *= _hint(length)
    tokens = -(-tokens // groups)
    shape = (_hint(values_shape[0]), _hint(values_shape[1]))
    return choose(
        op, tokens, shape, n, m, dtype or tokens_of.dtype, tokens_of.device, engines,
        values_dtype, trains,
    )  # fmt: skip


def _hint(size: int | torch.SymInt) -> int:
    """A size as a number, without tying the graph to it if it is dynamic."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.has_hint() else 1024
