"""The groups of a grouped product, which map rows of the input to weights of a stack."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def is_plain(groups: int, offsets: Tensor | None) -> bool:
    """Whether a product has one weight for all rows of the input."""
    return groups == 1 and offsets is None


def each(groups: int, offsets: Tensor | None, tensor: Tensor) -> Iterator[tuple[int, int | slice]]:
    """Yields the groups that have rows, with the index of their rows in ``tensor``.

    Args:
        groups: number of weights.
        offsets: integers (groups,), the end of the rows of each group; None for a tensor of shape
            (groups, rows, features). They are read on the host.
        tensor: the input, or the gradient of the output.
    """
    if offsets is None:
        if tensor.shape[1]:
            yield from ((group, group) for group in range(groups))
        return
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            yield group, slice(start, end)
            start = end


def of_stack(stacked: Tensor, group: int, groups: int) -> Tensor:
    """The rows of one weight in a tensor of a stack."""
    rows = stacked.shape[0] // groups
    return stacked[group * rows : (group + 1) * rows]


def map_rows(
    product: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
    x: Tensor,
    features: int,
    groups: int,
    offsets: Tensor | None,
) -> Tensor:
    """Run a product on the rows of each group.

    Args:
        product: called with the rows of a group, and with a function that selects the group's part
            of a stacked tensor. Returns (rows, features).
        x: (groups, rows, _), or (rows, _) with ``offsets``.
        features: number of features of the result.
        groups, offsets: as for :func:`each`.

    Returns:
        (groups, rows, features), or (rows, features). Rows without a group are zero.
    """
    result = x.new_zeros(*x.shape[:-1], features)
    for group, rows in each(groups, offsets, x):
        part = functools.partial(of_stack, group=group, groups=groups)
        result[rows] = product(x[rows], part)
    return result


def batched_stack(x: Tensor, groups: int) -> Tensor:
    """Reshapes (batch, groups, rows, features) of vmap to (groups, batch * rows, features)."""
    return x.transpose(0, 1).reshape(groups, -1, x.shape[-1])


def unbatched_stack(y: Tensor, batch: int) -> Tensor:
    """The inverse of :func:`batched_stack`, for a result."""
    return torch.movedim(y.unflatten(1, (batch, -1)), 1, 0)
