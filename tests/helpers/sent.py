"""Counts what torch.distributed sends."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {  # the label, and the place of the argument that is sent
    "all_gather_single": ("all_gather", 1),  # since torch 2.13
    "all_gather_into_tensor": ("all_gather", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "all_reduce": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "all_to_all_single": ("all_to_all", 1),
}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts the bytes of this rank's part in each kind of collective.

    For an all-gather it is the part that this rank has, for a reduce-scatter the whole input. DDP
    reduces in C++, which is not seen.
    """
    sent: Counter[str] = Counter()
    before = {name: getattr(dist, name) for name in KINDS if hasattr(dist, name)}

    inside: list[str] = []

    def counted(name: str) -> Any:
        label, place = KINDS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if not inside:  # some of these functions call others
                keys = [key for key in ("input_tensor", "input", "tensor") if key in kwargs]
                tensor = args[place] if len(args) > place else kwargs[keys[0]]
                sent[label] += tensor.nbytes
            inside.append(name)
            try:
                return before[name](*args, **kwargs)
            finally:
                inside.pop()

        return call

    for name in before:
        setattr(dist, name, counted(name))
    try:
        yield sent
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


_WAITS = ("wait_tensor", "_wrap_tensor_autograd")


class Functional(TorchDispatchMode):
    """Counts the functional collectives, such as those of DTensor, as :func:`counting` does."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its local tensors are counted
        name = func.__name__.split(".")[0]
        if func.namespace == "_c10d_functional" and name not in _WAITS:
            self.sent[KINDS[name][0]] += args[0].nbytes
        return func(*args, **(kwargs or {}))
