"""The oracle: METHOD's formulas in their plain form, for any device and floating dtype.

The functions are slow and simple. Nothing here shares code with another engine, not even the
unpacking of bits. The masks are packed, as in the ops; :func:`unpack_bits` shows the layout.

Source: SLoPe, arXiv 2405.16325. ``W^R`` is the weight pruned N:M along its inputs, ``W^{R,C}`` is
``W^R`` pruned again N:M along its outputs.
"""

import math

import torch
from torch import Tensor

from slope_fx.kernels.engine import Engine


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
    """A bool mask of the ``n`` largest of each ``m`` consecutive scores of a row.

    Each group has exactly ``n``. Ties go to the lower index. NaN counts as infinity.
    """
    scores = torch.nan_to_num(scores, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    groups = scores.reshape(scores.shape[0], -1, m)
    best = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(scores.shape)


def extra_zeros(n: int, m: int) -> float:
    """The fraction of zeros that the second pruning adds to a random mask (lemma 4.3.1)."""
    s = n / m
    return sum(
        math.comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1)
    )


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Packed forward mask of ``weight`` (d_out, d_in): the N top magnitudes of each group."""
    return pack_bits(keep_top(weight.abs(), n, m))


def backward_mask(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Packed backward mask, one bit per value: N:M along d_out, a subset of the values."""
    kept = unpack_bits(forward_mask, values.shape[1] * m // n)
    # The score of a pruned element is lower than that of any kept element, zero included.
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
    """``grad_W = grad_Y^T X`` at the kept positions, compressed."""
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return compress(dense, forward_mask, n, m)


def transpose(
    values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> tuple[Tensor, Tensor]:
    """The compressed transpose of ``W^{R,C}``: values (d_in, d_out * N / M), packed mask.

    A group with fewer than N kept values gets zeros at its lowest free places.
    """
    kept = unpack_bits(forward_mask, values.shape[1] * m // n)
    twice = torch.zeros_like(kept)
    twice[kept] = unpack_bits(backward_mask, values.shape[1]).reshape(-1)
    dense = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    dense[kept] = values.reshape(-1)
    # Kept places come first, then free places, each from the lowest index on.
    full = keep_top(twice.t().double(), n, m)
    return torch.where(twice, dense, 0).t()[full].view(dense.shape[1], -1), pack_bits(full)


class Reference(Engine):
    """The functions of this module as an engine."""

    name = "reference"
    competes = False

    def magnitude_mask(self, weight: Tensor, n: int, m: int) -> Tensor:
        return magnitude_mask(weight, n, m)

    def backward_mask(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return backward_mask(values, forward_mask, n, m)

    def expand(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return expand(values, forward_mask, n, m)

    def expand_twice_pruned(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
    ) -> Tensor:
        return expand(*transpose(values, forward_mask, backward_mask, n, m), n, m).t()

    def compress(self, dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return compress(dense, forward_mask, n, m)

    def sparse_linear(
        self,
        x: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        bias: Tensor | None,
        n: int,
        m: int,
        training: bool = False,
    ) -> Tensor:
        return sparse_linear(x, values, forward_mask, bias, n, m)

    def sparse_input_grad(
        self,
        grad: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor,
        n: int,
        m: int,
    ) -> Tensor:
        return sparse_input_grad(grad, values, forward_mask, backward_mask, n, m)

    def sparse_weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        forward_mask: Tensor,
        n: int,
        m: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return sparse_weight_grad(grad, x, forward_mask, n, m).to(dtype or grad.dtype)
