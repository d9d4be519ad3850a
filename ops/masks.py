"""The ops that choose the forward and the backward mask, and how a graph reads a mask.

They have no gradients.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from slope_fx.kernels.packing import packed_width, unpack_by_shifts
from slope_fx.ops.dispatch import engine


@torch.library.custom_op("slope_fx::magnitude_mask", mutates_args=())
def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Returns the forward mask: the top N magnitudes of each M consecutive inputs.

    Source: METHOD, "Masks".

    Args:
        weight: (d_out, d_in), any floating dtype. d_in is a multiple of ``m``.
        n, m: the N:M pattern.

    Returns:
        The packed forward mask, uint8 (d_out, ceil(d_in / 8)).
    """
    packed: Tensor = engine(weight).magnitude_mask(weight, n, m)
    return packed


@magnitude_mask.register_fake
def _(weight: Tensor, n: int, m: int) -> Tensor:
    torch._check(weight.shape[1] % m == 0, lambda: f"d_in {weight.shape[1]} is not in {m}s")
    return weight.new_empty((weight.shape[0], packed_width(weight.shape[1])), dtype=torch.uint8)


@torch.library.custom_op("slope_fx::backward_mask", mutates_args=())
def backward_mask(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Returns the backward mask: the top N magnitudes of ``W^R`` of each M consecutive outputs.

    Source: METHOD, "Masks".

    Args:
        values: (d_out, d_in * N / M). d_out is a multiple of ``m``.
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        n, m: the N:M pattern.

    Returns:
        The packed backward mask, one bit per value: uint8 (d_out, ceil(d_in * N / M / 8)).
    """
    packed: Tensor = engine(values).backward_mask(values, forward_mask, n, m)
    return packed


@backward_mask.register_fake
def _(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    torch._check(values.shape[0] % m == 0, lambda: f"d_out {values.shape[0]} is not in {m}s")
    return values.new_empty((values.shape[0], packed_width(values.shape[1])), dtype=torch.uint8)


def unpacked(bits: Tensor, columns: int) -> Tensor:
    """The bool mask (rows, ``columns``) of packed bits, by operations that Inductor fuses.

    DTensor has no rules for operations on bits, so each rank unpacks its own. Shards of the columns
    have whole bytes.
    """
    if not isinstance(bits, DTensor):
        return unpack_by_shifts(bits, columns)
    own = bits.to_local()
    mask = unpack_by_shifts(own, min(columns, 8 * own.shape[-1]))
    return DTensor.from_local(mask, bits.device_mesh, bits.placements, run_check=False)
