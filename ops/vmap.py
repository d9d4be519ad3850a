"""``torch.func.vmap`` of the ops: a batch of inputs is more rows, anything else a loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OPS = torch.ops.slope_fx


def _register(name: str, rows: int | None) -> None:
    """Register the rule of an op, whose argument at place ``rows`` has rows of any shape."""
    op = getattr(_OPS, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        batched = [i for i, dim in enumerate(in_dims) if dim is not None]
        if batched == [rows]:
            assert rows is not None
            moved = args[rows].movedim(in_dims[rows], 0)
            return op(*args[:rows], moved, *args[rows + 1 :]), 0
        results = [op(*_at(args, in_dims, i)) for i in range(info.batch_size)]
        return torch.stack(results), 0

    torch.library.register_vmap(f"slope_fx::{name}", rule)


def _at(args: tuple[Any, ...], in_dims: tuple[Any, ...], index: int) -> list[Any]:
    pick: Callable[[Any, Any], Any] = lambda arg, dim: (  # noqa: E731
        arg if dim is None or not isinstance(arg, Tensor) else arg.select(dim, index)
    )
    return [pick(arg, dim) for arg, dim in zip(args, in_dims, strict=False)]


for _name in ("expand", "expand_grad", "add_adapter", "compress", "sparse_weight_grad"):
    _register(_name, None)
for _name in ("sparse_linear", "sparse_input_grad"):
    _register(_name, 0)
