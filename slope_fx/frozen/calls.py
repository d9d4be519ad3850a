"""The call of a frozen model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slope_fx.errors import StateError
from slope_fx.frozen.weight import UNFROZEN


def guard_calls(model: nn.Module) -> None:
    """Refuse calls of a frozen model that ask for gradients of nothing.

    Args:
        model: a frozen model. Its compiled call is replaced.
    """
    inner: Callable[..., Any] = model._compiled_call_impl or model._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        if model.training and torch.is_grad_enabled() and not _asks(model, args, kwargs):
            raise StateError(
                f"a frozen {type(model).__name__} was called in training mode, and none of its "
                f"parameters trains. Call .eval(), or torch.no_grad(). {UNFROZEN}"
            )
        return inner(*args, **kwargs)

    model._compiled_call_impl = call


def _asks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether something trains: a parameter, such as an adapter of PEFT, or an input."""
    given = (*args, *kwargs.values())
    return any(p.requires_grad for p in model.parameters()) or any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in given
    )
