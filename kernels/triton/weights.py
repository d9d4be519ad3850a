"""The kernels that expand and compress weights."""

import triton
import triton.language as tl

from slope_fx.kernels.triton.tiles import (
    compress_planes,
    load_codes,
    load_planes,
    load_tile,
    nan_where_bad,
    place,
    store_planes,
)


@triton.jit
def expand(
    values, scales, forward, backward, dense,
    d_out, d_in, forward_stride, backward_stride,
    N: tl.constexpr, M: tl.constexpr, TWICE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The dense ``W^R``, or with ``TWICE`` the dense ``W^{R,C}``.

    With ``BITS``, ``values`` holds codes. GROUP consecutive codes share a scale.

    Oracle: ``reference.expand``; with codes, of the values of ``quantised.dequantise``.

    Traffic per weight of s bytes: reads s * N / M and 1/8, and N / M / 8 with ``TWICE``;
    with codes (BITS / 8 + 2 / GROUP) * N / M and 1/8. Writes s.
    """
    out_block, first = place(d_in // M, GROUPS)
    row = out_block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    rows_within = row < d_out
    tile = load_tile(
        values, forward, backward, forward_stride, backward_stride, row, first, rows_within, d_in,
        N, M, TWICE, GROUPS, scales, BITS, GROUP, dense.dtype.element_ty,
    )  # fmt: skip
    column = first * M + tl.arange(0, GROUPS * M)[None, :]
    tl.store(dense + row * d_in + column, tile, mask=rows_within & (column < d_in))


@triton.jit
def compress(
    dense, forward, values,
    d_out, d_in, row_stride, column_stride, forward_stride,
    N: tl.constexpr, M: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The kept values of a dense weight.

    Oracle: ``reference.compress``.

    Traffic per weight of s bytes: reads s and 1/8, writes s * N / M.
    """
    out_block, first = place(d_in // M, GROUPS)
    row = out_block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    rows_within = row < d_out
    group = first + tl.arange(0, GROUPS)[None, :]
    within = rows_within & (group < d_in // M)
    columns = load_planes(
        dense, row * row_stride, first * M, rows_within, d_in, column_stride, M, GROUPS
    )
    code = load_codes(forward, forward_stride, row, first, rows_within, d_in // M, M, GROUPS)
    kept = nan_where_bad(compress_planes(columns, code, N, M), code, within, N, M)
    d_kept = d_in // M * N
    store_planes(values, row * d_kept, first * N, kept, rows_within, d_kept)
