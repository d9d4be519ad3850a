"""Notes which parameters the optimizers of this process have trained, and which optimizer.

Ranks of a pipeline hold parameters that they do not train. A checkpoint must take each parameter
from a rank that does.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

_trained = WeakTensorKeyDictionary()
_optimizers = WeakTensorKeyDictionary()


def note_trained(groups: Iterable[Mapping[str, Any]]) -> None:
    """Note the parameters that a step of an optimizer changes. One process needs no notes.

    Args:
        groups: the parameter groups of the optimizer.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for group in groups:
        rate = group.get("lr")
        # torch.distributed.checkpoint takes a step with lr=0, to make an optimizer's state.
        if not isinstance(rate, Tensor) and rate == 0:
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and parameter not in _trained:
                _trained[parameter] = True


def note_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Note the optimizer of some parameters. It is held weakly."""
    for parameter in parameters:
        _optimizers[parameter] = weakref.ref(optimizer)


def states_of(parameter: Tensor) -> list[tuple[str, Tensor]]:
    """The states of the shape of a parameter in its optimizer, by name."""
    optimizer = _optimizers.get(parameter, lambda: None)()
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return [
        (name, tensor)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape
    ]


def was_trained(parameter: Tensor) -> bool:
    """Whether an optimizer of this process has trained ``parameter``."""
    return parameter in _trained
