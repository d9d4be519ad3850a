"""The oracle: METHOD's formulas, written the plain way.

Slow, obviously right, for any device and floating dtype. Nothing here shares code
with another engine, its bit unpacking included. Masks reach the functions packed,
as the ops hold them; :func:`unpack_bits` shows the layout.

Source: SLoPe, arXiv 2405.16325. ``W^R`` is the weight pruned N:M along its inputs,
``W^{R,C}`` is ``W^R`` pruned again N:M along its outputs.
"""

import math

import torch
from torch import Tensor

DEVICES = None
"""It serves everywhere."""


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps this engine from serving such tensors: nothing does."""
    return ""


def unavailable() -> str:
    """What keeps this engine from serving at all on this machine: nothing does."""
    return ""


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """uint8 ``(rows, ceil(columns / 8))`` to bool ``(rows, columns)``, low bit first."""
    rows = [
        [bool(byte >> j & 1) for byte in row for j in range(8)][:columns] for row in bits.tolist()
    ]
    return torch.tensor(rows, dtype=torch.bool, device=bits.device).view(len(rows), columns)


def pack_bits(mask: Tensor) -> Tensor:
    """bool ``(rows, columns)`` to uint8 ``(rows, ceil(columns / 8))``, low bit first."""
    rows = []
    for row in mask.tolist():
        row = row + [False] * (-len(row) % 8)
        rows.append(
            [sum(bit << j for j, bit in enumerate(row[b : b + 8])) for b in range(0, len(row), 8)]
        )
    return torch.tensor(rows, dtype=torch.uint8, device=mask.device).view(len(rows), -1)


def keep_top(scores: Tensor, n: int, m: int) -> Tensor:
    """The ``n`` largest of each ``m`` consecutive scores of a row, as a bool mask.

    Exactly ``n`` a group; ties go to the lower index; NaN counts as infinity.
    """
    scores = torch.nan_to_num(scores, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    groups = scores.reshape(scores.shape[0], -1, m)
    best = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(scores.shape)


def extra_zeros(n: int, m: int) -> float:
    """Zeros the second pruning adds to a random mask, as a fraction (lemma 4.3.1)."""
    s = n / m
    return sum(
        math.comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1)
    )


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Packed forward mask of ``weight`` (d_out, d_in): the top N magnitudes a group."""
    return pack_bits(keep_top(weight.abs(), n, m))


def backward_mask(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Packed backward mask, one bit a value: N:M along d_out, a subset of the values."""
    kept = unpack_bits(forward_mask, values.shape[1] * m // n)
    # Pruned elements score below any kept one, a kept zero included.
    scores = torch.full(kept.shape, -1.0, dtype=values.dtype, device=values.device)
    scores[kept] = values.abs().reshape(-1)
    both = keep_top(scores.t(), n, m).t() & kept
    return pack_bits(both[kept].view(values.shape))


def expand(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Dense ``W^R`` (d_out, d_in) from its kept values (d_out, d_in * N / M)."""
    kept = unpack_bits(forward_mask, values.shape[1] * m // n)
    dense = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    dense[kept] = values.reshape(-1)
    return dense


def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The kept values (d_out, d_in * N / M) of ``dense`` (d_out, d_in)."""
    return dense[unpack_bits(forward_mask, dense.shape[1])].view(dense.shape[0], -1)


def sparse_linear(
    x: Tensor, values: Tensor, forward_mask: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """``Y = X (W^R)^T + b``."""
    y = x @ expand(values, forward_mask, n, m).t()
    return y if bias is None else y + bias


def sparse_input_grad(
    grad: Tensor, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """``grad_X = grad_Y W^{R,C}``."""
    kept = unpack_bits(backward_mask, values.shape[1])
    twice_pruned = torch.where(kept, values, torch.zeros_like(values))
    return grad @ expand(twice_pruned, forward_mask, n, m)


def sparse_weight_grad(grad: Tensor, x: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """``grad_W = grad_Y^T X`` at the forward mask's positions, compressed."""
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return compress(dense, forward_mask, n, m)


def transpose(
    values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> tuple[Tensor, Tensor]:
    """The compressed transpose of ``W^{R,C}``: values (d_in, d_out * N / M), packed mask.

    A group with fewer than N kept is filled up with zeros, at its lowest free places.
    """
    kept = unpack_bits(forward_mask, values.shape[1] * m // n)
    twice = torch.zeros_like(kept)
    twice[kept] = unpack_bits(backward_mask, values.shape[1]).reshape(-1)
    dense = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    dense[kept] = values.reshape(-1)
    # What is kept comes first, then what is free, each from the lowest index on.
    full = keep_top(twice.t().double(), n, m)
    return torch.where(twice, dense, 0).t()[full].view(dense.shape[1], -1), pack_bits(full)


def low_rank_update(y: Tensor, down: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``Y + scale * down B^T``, where ``down`` is ``X A^T``."""
    return y + scale * (down @ lora_b.t())
