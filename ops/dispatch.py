"""The choice of the engine of an op."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from slope_fx.kernels.engine import Engine
from slope_fx.kernels.engines import ENGINES, engines_for
from slope_fx.kernels.errors import UnsupportedError
from slope_fx.kernels.selection import Request


def engine(tensor: Tensor) -> Engine:
    """The engine of the ops that are not products: the first one for the device and dtype."""
    return ENGINES[engines_for(tensor.device, tensor.dtype, products=False)[0]]


def request_of(
    tokens_of: Tensor, values: Tensor, n: int, m: int, groups: int = 1, **more: Any
) -> Request:
    """Returns the request for an engine from real or fake tensors.

    The sizes are those of the local tensors of DTensors, which the engine gets.

    Args:
        tokens_of: (..., features): the input, or the gradient of the output.
        values: (groups * d_out, d_in * N / M).
        n, m: the N:M pattern.
        groups: number of weights that share the tokens.
        more: attributes of :class:`Request` that do not follow from the tensors.
    """
    tokens_of, values = local(tokens_of), local(values)
    tokens = 1
    for length in tokens_of.shape[:-1]:
        tokens *= _hint(length)
    d_out, kept = _hint(values.shape[0]) // groups, _hint(values.shape[1])
    about = {
        "dtype": tokens_of.dtype, "device": tokens_of.device, "values_dtype": values.dtype, **more
    }  # fmt: skip
    return Request(-(-tokens // groups), d_out, kept * m // n, n, m, **about)


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, without autograd; other tensors unchanged."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _hint(size: int | torch.SymInt) -> int:
    """A size as a number. A dynamic size gets no guard."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.has_hint() else 1024


def refuse_onnx() -> None:
    """Refuse an export to ONNX. All strategies of torch.onnx run the fake kernels.

    Raises:
        UnsupportedError: a model is exported to ONNX.
    """
    if torch.onnx.is_in_onnx_export():
        raise UnsupportedError(
            "The model has sparse weights, for which ONNX has no op. Export a dense copy: "
            "slope_fx.densify(model)."
        )
