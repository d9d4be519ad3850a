"""Bit-packed masks: one bit per element, rows padded to whole bytes.

Bit ``j`` of byte ``b`` in a row belongs to column ``8 * b + j``. Each row is padded by itself, so
that a shard of rows has exactly the bits of its rows.
"""

import functools

import torch
from torch import Tensor


def packed_width(columns: int) -> int:
    """The number of bytes of a packed row of ``columns`` bits."""
    return (columns + 7) // 8


def pack(mask: Tensor) -> Tensor:
    """Pack a bool mask ``(rows, columns)`` into uint8 ``(rows, ceil(columns / 8))``."""
    rows, columns = mask.shape
    width = packed_width(columns)
    if columns != 8 * width:
        mask = torch.nn.functional.pad(mask, (0, 8 * width - columns))
    bits = mask.contiguous().view(torch.uint8).view(rows, width, 8)
    packed = bits[..., 0].clone()
    for j in range(1, 8):
        packed |= bits[..., j] << j
    return packed


def unpack(bits: Tensor, columns: int) -> Tensor:
    """Unpack uint8 ``(rows, ceil(columns / 8))`` into a bool mask ``(rows, columns)``."""
    rows, width = bits.shape
    table = byte_table(bits.device)
    flat = table.index_select(0, bits.reshape(-1).to(torch.int32)).view(torch.bool)
    return flat.view(rows, 8 * width)[:, :columns]


def unpack_by_shifts(bits: Tensor, columns: int) -> Tensor:
    """As :func:`unpack`, for a graph: without a table, so that Inductor fuses it with its user."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[:, :columns].bool()


@functools.cache
def byte_table(device: torch.device) -> Tensor:
    """For each of the 256 bytes, its eight bits as bools, viewed as one int64.

    Unpacking is then one table lookup per byte.
    """
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bools = (codes.unsqueeze(1) >> shifts) & 1
    return bools.contiguous().view(torch.int64).view(256)
