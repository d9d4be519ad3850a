"""Double backward: the gradient ops raise an error, because they have no gradients."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from slope_fx.kernels.errors import UnsupportedError

_GRADIENTS = ("expand_grad", "sparse_input_grad", "sparse_weight_grad")


def _refuse(ctx: Any, grad: Tensor) -> NoReturn:
    raise UnsupportedError(
        f"slope_fx::{ctx.op}: sparse linears have no second derivatives, which gradient penalties "
        "and Hessians (create_graph=True) need. Keep the affected layers dense with "
        "sparsity={...: None}, or use slope_fx.densify(model)."
    )


def _register(name: str) -> None:
    def note(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = name

    torch.library.register_autograd(f"slope_fx::{name}", _refuse, setup_context=note)


for _name in _GRADIENTS:
    _register(_name)
