"""The dense engine: rebuild the weight, then the vendor's matrix product.

It saves state, not arithmetic: the dense weight lives for one product. The work
beside the product is one scatter (expand) or one gather (compress), both through a
list of flat positions that a table turns the packed mask into, a byte at a time; a
``cumsum`` over the mask or a ``masked_select`` costs more than the product itself.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from slope_fx.kernels.packing import byte_table, pack, unpack

_NOWHERE = 2**60
_BLOCK = 2**19
"""Elements whose positions are listed at a time."""


DEVICES = None
"""It serves everywhere."""


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps this engine from serving such tensors: nothing does."""
    return ""


def unavailable() -> str:
    """What keeps this engine from serving at all on this machine: nothing does."""
    return ""


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Packed forward mask of ``weight`` (d_out, d_in): the top N magnitudes a group.

    Exactly N a group, ties to the lower index, NaN counts as infinity.
    """
    rows, columns = weight.shape
    groups = _magnitude(weight).reshape(rows, columns // m, m)
    return pack(_keep_top(groups, n, dim=2).view(rows, columns))


def backward_mask(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Packed backward mask, one bit a value: N:M along d_out, a subset of the values."""
    rows, kept = values.shape
    columns = kept * m // n
    positions = _positions(forward_mask, columns, n, m)
    # Pruned elements score below any kept one, a kept zero included.
    scores = values.new_full((rows * columns,), -1.0)
    scores.index_copy_(0, positions, _magnitude(values).reshape(-1))
    both = _keep_top(scores.view(rows // m, m, columns), n, dim=1)
    return pack(both.reshape(-1).index_select(0, positions).view(rows, kept))


def expand(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Dense ``W^R`` (d_out, d_in) from its kept values (d_out, d_in * N / M)."""
    rows, kept = values.shape
    dense = values.new_zeros(rows, kept * m // n)
    for block in _row_blocks(dense):
        positions = _positions(forward_mask[block], dense.shape[1], n, m)
        with _told_of_bad_masks(n, m):
            dense[block].view(-1).index_copy_(0, positions, values[block].reshape(-1))
    return dense


def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The kept values (d_out, d_in * N / M) of ``dense`` (d_out, d_in)."""
    rows, columns = dense.shape
    values = dense.new_empty(rows, columns * n // m)
    for block in _row_blocks(dense):
        positions = _positions(forward_mask[block], columns, n, m)
        with _told_of_bad_masks(n, m):
            torch.index_select(dense[block].reshape(-1), 0, positions, out=values[block].view(-1))
    return values


def sparse_linear(
    x: Tensor, values: Tensor, forward_mask: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """``Y = X (W^R)^T + b``."""
    return torch.nn.functional.linear(x, expand(values, forward_mask, n, m), bias)


def sparse_input_grad(
    grad: Tensor, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """``grad_X = grad_Y W^{R,C}``."""
    twice_pruned = values.masked_fill(~unpack(backward_mask, values.shape[1]), 0)
    return grad @ expand(twice_pruned, forward_mask, n, m)


def sparse_weight_grad(grad: Tensor, x: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """``grad_W = grad_Y^T X`` at the forward mask's positions, compressed."""
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return compress(dense, forward_mask, n, m)


def low_rank_update(y: Tensor, down: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``Y + scale * down B^T``, into ``y`` if that is contiguous."""
    flat = y.reshape(-1, y.shape[-1])
    return flat.addmm_(down.reshape(-1, down.shape[-1]), lora_b.t(), alpha=scale).view(y.shape)


def _magnitude(weight: Tensor) -> Tensor:
    return torch.nan_to_num(weight.abs(), nan=float("inf"), posinf=float("inf"))


def _keep_top(scores: Tensor, n: int, dim: int) -> Tensor:
    """The ``n`` largest along ``dim`` as a bool mask; ties go to the lower index.

    Each element's rank is the number of elements that beat it. M is at most 16, so
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
def _told_of_bad_masks(n: int, m: int) -> Iterator[None]:
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if "index" not in str(error).lower():
            raise
        raise bad_forward_mask(n, m) from error


def bad_forward_mask(n: int, m: int) -> ValueError:
    """The error for a mask that has not exactly N set bits in each group."""
    return ValueError(
        f"a forward mask isn't {n}:{m} any more: something wrote into it, such as a moving "
        "average or a clamp over all of model.parameters(). Masks are frozen uint8 "
        "parameters; let it take just those with requires_grad."
    )


def _row_blocks(dense: Tensor) -> Iterator[slice]:
    """Slices of rows whose lists of positions stay in cache, and don't fragment the heap."""
    rows, columns = dense.shape
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _positions(forward_mask: Tensor, columns: int, n: int, m: int) -> Tensor:
    """Flat positions of the kept elements in a (rows, columns) tensor, ascending, int64."""
    unit = max(8, m)
    if columns % unit:  # the last byte of a row is partly padding
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
    """Make what this engine keeps on a device from its first use on."""
    byte_table(device)
    _position_table(n, m, device)


@functools.cache
def _position_table(n: int, m: int, device: torch.device) -> Tensor:
    """For each code of max(8, M) mask bits, the places of its set bits, ascending.

    A code that isn't N:M has places out of any range, so that a mask which something
    wrote into (a moving average over all parameters, say) makes an error of every use
    instead of wrong numbers, at no cost.
    """
    unit = max(8, m)
    codes = torch.arange(2**unit, dtype=torch.int32, device=device)
    bits = codes.unsqueeze(1) >> torch.arange(unit, dtype=torch.int32, device=device) & 1
    order = torch.sort(bits, dim=1, descending=True, stable=True).indices
    places = order[:, : unit * n // m].contiguous()
    invalid = (bits.view(len(codes), -1, m).sum(-1) != n).any(-1)
    return places.masked_fill_(invalid.unsqueeze(1), _NOWHERE)
