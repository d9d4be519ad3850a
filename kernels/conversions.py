"""Masks and conversions of a weight in PyTorch operations, for any device and floating dtype.

Expand is one scatter and compress is one gather. Both use a list of flat positions, which a
table lookup makes from each byte of the packed mask. A ``cumsum`` over the mask or a
``masked_select`` would take more time than the matrix product that follows.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from slope_fx.kernels.packing import byte_table, pack, packed_width, unpack

_NOWHERE = 2**60
_BLOCK = 2**19
"""Most elements of a dense weight that are worked on at a time."""


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The packed forward mask: exactly N elements of each group, those with the top magnitudes.

    Ties go to the lower index. NaN counts as infinity.

    Args:
        weight: (d_out, d_in).
        n, m: the pattern.

    Returns:
        uint8 (d_out, ceil(d_in / 8)).
    """
    rows, columns = weight.shape
    bits = weight.new_empty(rows, packed_width(columns), dtype=torch.uint8)
    for block in _row_blocks(rows, columns):
        groups = _magnitude(weight[block]).reshape(-1, columns // m, m)
        bits[block] = pack(_keep_top(groups, n, dim=2).view(-1, columns))
    return bits


def backward_mask(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The packed backward mask: one bit per kept value, N:M along d_out.

    Args:
        values: (d_out, d_in * N / M).
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        n, m: the pattern.

    Returns:
        uint8 (d_out, ceil(d_in * N / M / 8)).
    """
    rows, kept = values.shape
    columns = kept * m // n
    bits = values.new_empty(rows, packed_width(kept), dtype=torch.uint8)
    for block in _row_blocks(rows, columns, m):
        positions = _positions(forward_mask[block], columns, n, m)
        magnitudes = _magnitude(values[block]).reshape(-1)
        # The score of a pruned element is lower than that of any kept element, zero included.
        scores = values.new_full((magnitudes.numel() * m // n,), -1.0)
        scores.index_copy_(0, positions, magnitudes)
        both = _keep_top(scores.view(-1, m, columns), n, dim=1)
        bits[block] = pack(both.reshape(-1).index_select(0, positions).view(-1, kept))
    return bits


def expand(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Dense ``W^R`` (d_out, d_in) from its kept values (d_out, d_in * N / M)."""
    rows, kept = values.shape
    dense = values.new_zeros(rows, kept * m // n)
    for block in _row_blocks(*dense.shape):
        positions = _positions(forward_mask[block], dense.shape[1], n, m)
        with _checked_masks(n, m):
            dense[block].view(-1).index_copy_(0, positions, values[block].reshape(-1))
    return dense


def expand_twice_pruned(
    values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """Dense ``W^{R,C}`` (d_out, d_in) from the kept values and both masks."""
    twice_pruned = values.masked_fill(~unpack(backward_mask, values.shape[1]), 0)
    return expand(twice_pruned, forward_mask, n, m)


def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The kept values (d_out, d_in * N / M) of ``dense`` (d_out, d_in)."""
    rows, columns = dense.shape
    values = dense.new_empty(rows, columns * n // m)
    for block in _row_blocks(*dense.shape):
        positions = _positions(forward_mask[block], columns, n, m)
        with _checked_masks(n, m):
            torch.index_select(dense[block].reshape(-1), 0, positions, out=values[block].view(-1))
    return values


def _magnitude(weight: Tensor) -> Tensor:
    return torch.nan_to_num(weight.abs(), nan=float("inf"), posinf=float("inf"))


def _keep_top(scores: Tensor, n: int, dim: int) -> Tensor:
    """A bool mask of the ``n`` largest scores along ``dim``; ties go to the lower index.

    The rank of an element is the number of elements with a higher score. M is at most 16, so
    M (M - 1) / 2 comparisons of whole tensors are several times faster than a sort.
    """
    elements = scores.unbind(dim)
    ranks = [torch.zeros_like(e, dtype=torch.uint8) for e in elements]
    for later in range(1, len(elements)):
        for earlier in range(later):
            wins = elements[earlier] >= elements[later]
            ranks[later] += wins
            ranks[earlier] += ~wins
    return torch.stack([rank < n for rank in ranks], dim)


@contextlib.contextmanager
def _checked_masks(n: int, m: int) -> Iterator[None]:
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if "index" not in str(error).lower():
            raise
        raise bad_forward_mask(n, m) from error


def bad_forward_mask(n: int, m: int) -> ValueError:
    """The error for a forward mask without exactly N set bits in each group."""
    return ValueError(
        f"A forward mask is no longer {n}:{m}: something wrote to it, for example a moving "
        "average or a clamp over all of model.parameters(). Masks are frozen uint8 parameters. "
        "Apply such code to the parameters with requires_grad only."
    )


def _row_blocks(rows: int, columns: int, unit: int = 1) -> Iterator[slice]:
    """Slices of rows, in whole units. What is made of a slice fits the cache and is soon freed."""
    step = max(1, _BLOCK // columns // unit) * unit
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _positions(forward_mask: Tensor, columns: int, n: int, m: int) -> Tensor:
    """Flat positions of the kept elements in a (rows, columns) tensor: int64, ascending."""
    unit = max(8, m)
    if columns % unit:  # the last byte of each row has padding
        mask = unpack(forward_mask, columns).reshape(-1)
        positions = mask.nonzero().view(-1)
        valid = bool((mask.view(-1, m).sum(-1) == n).all())
        return positions if valid else positions.fill_(_NOWHERE)
    codes = forward_mask.reshape(-1)
    if unit == 16:
        codes = codes.view(torch.int16).to(torch.int32) & 0xFFFF
    positions = _position_table(n, m, forward_mask.device).index_select(0, codes.to(torch.int32))
    starts = torch.arange(0, codes.numel() * unit, unit, device=codes.device)
    return positions.add_(starts.unsqueeze(1)).view(-1)


def make_tables(n: int, m: int, device: torch.device) -> None:
    """Make the tables for a device and a pattern, which are otherwise made at their first use."""
    byte_table(device)
    _position_table(n, m, device)


@functools.cache
def _position_table(n: int, m: int, device: torch.device) -> Tensor:
    """For each code of max(8, M) mask bits, the places of its set bits, ascending.

    The places of a code that is not N:M are out of range. Each use of a corrupted mask then
    raises an error, at no cost.
    """
    unit = max(8, m)
    codes = torch.arange(2**unit, dtype=torch.int32, device=device)
    bits = codes.unsqueeze(1) >> torch.arange(unit, dtype=torch.int32, device=device) & 1
    order = torch.sort(bits, dim=1, descending=True, stable=True).indices
    places = order[:, : unit * n // m].contiguous()
    invalid = (bits.view(len(codes), -1, m).sum(-1) != n).any(-1)
    return places.masked_fill_(invalid.unsqueeze(1), _NOWHERE)
