"""The gradient ops have no gradients of their own: a double backward says so, by name."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from slope_fx.kernels.errors import UnsupportedError

_GRADIENTS = ("expand_grad", "sparse_input_grad", "sparse_weight_grad")


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise UnsupportedError(
        f"slope_fx::{ctx.op}: sparse linears have no second derivatives, as gradient penalties and "
        "Hessians (create_graph=True) want. Keep the layers that they go through dense, with "
        "sparsity={...: None}, or take them of slope_fx.densify(model)."
    )


def _register(name: str) -> None:
    def note(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = name

    torch.library.register_autograd(f"slope_fx::{name}", _refuse, setup_context=note)


for _name in _GRADIENTS:
    _register(_name)
