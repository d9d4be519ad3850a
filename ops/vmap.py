"""The vmap rules of the ops: a batch of inputs becomes more rows; other batches are looped."""

from typing import Any

import torch
from torch import Tensor

from slope_fx.ops.groups import batched_stack, is_plain, unbatched_stack

_OPS = torch.ops.slope_fx


def _register(name: str, *, rows: bool = False) -> None:
    """Register the rule of an op.

    Args:
        name: name of the op.
        rows: whether the first argument is (..., features).
    """
    op = getattr(_OPS, name).default
    names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        batched = [i for i, dim in enumerate(in_dims) if dim is not None]
        given = dict(zip(names, args, strict=False))
        offsets, groups = given.get("offsets"), given.get("groups", 1)
        if rows and batched == [0] and offsets is None:
            moved = args[0].movedim(in_dims[0], 0)
            if is_plain(groups, offsets):
                return op(moved, *args[1:]), 0
            return unbatched_stack(op(batched_stack(moved, groups), *args[1:]), info.batch_size), 0
        results = [op(*_at(args, in_dims, i)) for i in range(info.batch_size)]
        return torch.stack(results), 0

    torch.library.register_vmap(f"slope_fx::{name}", rule)


def _at(args: tuple[Any, ...], in_dims: tuple[Any, ...], index: int) -> list[Any]:
    return [
        arg if dim is None or not isinstance(arg, Tensor) else arg.select(dim, index)
        for arg, dim in zip(args, in_dims, strict=False)
    ]


for _name in ("expand", "expand_grad", "add_adapter", "compress", "sparse_weight_grad"):
    _register(_name)
for _name in ("sparse_linear", "sparse_input_grad"):
    _register(_name, rows=True)
