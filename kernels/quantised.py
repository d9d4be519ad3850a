"""Quantised values of a frozen weight: the format, the quantiser, and its exact inverse.

A *kind* is ``"int8"`` or ``"int4"``. A value is the product of its code, an integer, and the scale
of its group, which is ``group`` consecutive kept values of a row; the last group of a row may be
short. Zero is always the code 0. The packed mask of the weight stays as it is.

``scales``: bf16 ``(d_out, ceil(kept / group))``, where kept is ``d_in * N / M``.

``codes`` of int8: int8 ``(d_out, kept)``, in [-127, 127].

``codes`` of int4: uint8 ``(d_out, ceil(kept / 2))``. Byte ``b`` of a row has code ``2 * b`` in its
low half and code ``2 * b + 1`` in its high half, in two's complement, in [-8, 7]. Since there is
one more code below zero than above, a scale may be negative: the largest value of a group then gets
the code -8. The half that an odd number of codes leaves is 0.

Source: symmetric quantisation by groups, as in GPTQ (arXiv 2210.17323) and Q4_0 of llama.cpp; the
range is shrunk for the least squared error, as in AWQ (arXiv 2306.00978).
"""

import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4}
GROUPS = (32, 64, 128)
DEFAULT_GROUP = {"int8": 64, "int4": 32}

_CHUNK = 1 << 22
"""Values that are quantised at a time: the search needs several fp32 copies of them."""


def quantise(values: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of kept values.

    For each group, several scales are tried, rounded to bf16. The scale with the smallest squared
    error is kept.

    Args:
        values: floating ``(d_out, kept)``, finite.
        kind: ``"int8"`` or ``"int4"``.
        group: 32, 64 or 128.

    Returns:
        ``codes`` and ``scales``, as this module describes them, on the device of the values.

    Raises:
        ValueError: the kind, the group or the values are not as above.
    """
    _check(kind, group)
    rows = max(1, _CHUNK // max(1, values.shape[1]))
    parts = [_quantise(part, kind, group) for part in values.detach().split(rows)]
    codes = torch.cat([part[0] for part in parts])
    return codes, torch.cat([part[1] for part in parts])


def _quantise(values: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    rows, kept = values.shape
    missing = -kept % group
    padded = torch.nn.functional.pad(values.float(), (0, missing)).view(rows, -1, group)
    if not padded.isfinite().all():
        raise ValueError("values has NaN or infinity, which has no code: quantise finite values.")
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    lowest, highest = _range(kind)
    best = error = torch.zeros(())
    for index, reach in enumerate(_reaches(kind)):
        scale = (largest / reach).bfloat16().float()
        away = (_codes(padded, scale, lowest, highest) * scale - padded).square_().sum(-1, True)
        better = away < error if index else torch.ones_like(away, dtype=torch.bool)
        best = torch.where(better, scale, best)
        error = torch.where(better, away, error)
    codes = _codes(padded, best, lowest, highest).to(torch.int8).view(rows, -1)[:, :kept]
    scales = best.squeeze(-1).bfloat16()
    return (_pack(codes) if kind == "int4" else codes.contiguous()), scales


def _range(kind: str) -> tuple[int, int]:
    return (-127, 127) if kind == "int8" else (-8, 7)


def _reaches(kind: str) -> list[float]:
    """The codes, not rounded, that the largest value of a group may get. The others of the group
    have the codes in proportion, up to the ends of the range."""
    if kind == "int8":
        return [127.0, 129.0, 132.0, 136.0]
    below = [-8.0 - 0.25 * step for step in range(-2, 9)]
    return below + [7.0 + 0.25 * step for step in range(-1, 9)]


def _codes(padded: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """The nearest codes; 0 where the scale is 0."""
    codes = torch.where(scale == 0, 0, padded / torch.where(scale == 0, 1, scale))
    return codes.round_().clamp_(lowest, highest)


def _pack(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7] as two a byte."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8)
    return (even[:, 0::2] & 15) | (even[:, 1::2] << 4)


def unpacked(codes: Tensor, kind: str, kept: int) -> Tensor:
    """The codes as int8 ``(d_out, kept)``."""
    if kind == "int8":
        return codes
    low = codes << 4
    return torch.stack((low, codes), -1).view(torch.int8).flatten(1)[:, :kept] >> 4


def dequantise(codes: Tensor, scales: Tensor, kind: str, group: int, kept: int) -> Tensor:
    """The values, exactly: a product of a code and a scale is always an fp32 number.

    Args:
        codes, scales: of :func:`quantise`.
        kind, group: what they were made with.
        kept: values of a row.

    Returns:
        fp32 ``(d_out, kept)``.

    Raises:
        ValueError: the kind or the group is not as in :func:`quantise`.
    """
    _check(kind, group)
    wide = scales.float().repeat_interleave(group, 1)[:, :kept]
    return unpacked(codes, kind, kept) * wide


def kind_of(codes: Tensor) -> str:
    """``"int8"`` or ``"int4"``: their codes have dtypes of their own."""
    return "int8" if codes.dtype == torch.int8 else "int4"


def bytes_of(kind: str, group: int, n: int, m: int) -> float:
    """Bytes for each element of the dense weight: codes, scales and mask."""
    return n / m * (BITS[kind] / 8 + 2 / group) + 1 / 8


def _check(kind: str, group: int) -> None:
    if kind not in BITS:
        raise ValueError(f"kind={kind!r}: it must be 'int8' or 'int4'.")
    if group not in GROUPS:
        raise ValueError(f"group={group!r}: it must be 32, 64 or 128.")
