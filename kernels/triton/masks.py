"""The kernels that compute the forward and the backward mask, and store them packed."""

import triton
import triton.language as tl

from slope_fx.kernels.triton.tiles import (
    compress_planes,
    expand_planes,
    keep_top,
    load_groups,
    load_planes,
    magnitude,
    place,
    planes,
    store_codes,
    tile_of,
)


@triton.jit
def magnitude_mask(
    weight, bits,
    d_out, d_in, row_stride, column_stride, bits_stride,
    N: tl.constexpr, M: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The packed forward mask of a weight.

    Oracle: ``reference.magnitude_mask``.

    Traffic per weight of s bytes: reads s, writes 1/8.
    """
    out_block, first = place(d_in // M, GROUPS)
    row = out_block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    rows_within = row < d_out
    columns = load_planes(
        weight, row * row_stride, first * M, rows_within, d_in, column_stride, M, GROUPS
    )
    scores = ()
    for j in tl.static_range(M):
        scores = scores + (magnitude(columns[j]),)
    group = first + tl.arange(0, GROUPS)[None, :]
    code = tl.where(group < d_in // M, keep_top(scores, N), 0)
    store_codes(bits, bits_stride, row, first, code, rows_within, M)


@triton.jit
def backward_mask(
    values, forward, bits,
    d_out, d_in, forward_stride, bits_stride,
    N: tl.constexpr, M: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The packed backward mask from the kept values. Groups are expanded in registers only.

    Oracle: ``reference.backward_mask``.

    Traffic per weight of s bytes: reads s * N / M and 1/8, writes N / M / 8.
    """
    out_block, first = place(d_in // M, GROUPS)
    row = out_block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    rows_within = row < d_out
    kept, code, within = load_groups(
        values, forward, forward, forward_stride, 0, row, first, rows_within, d_in,
        N, M, False, GROUPS,
    )  # fmt: skip
    scores = ()
    for i in tl.static_range(N):
        scores = scores + (magnitude(kept[i]),)
    # The score of a pruned element is lower than that of any kept element, zero included.
    score = tile_of(expand_planes(scores, code, N, M, -1))
    # Groups of M consecutive rows, side by side.
    C: tl.constexpr = GROUPS * M
    grouped = tl.permute(tl.reshape(score, BLOCK_OUT // M, M, C), 0, 2, 1)
    candidates = planes(tl.reshape(grouped, BLOCK_OUT // M, C * M), M)
    chosen = keep_top(candidates, N)
    flags = ()
    for j in tl.static_range(M):
        flags = flags + (((chosen >> j) & 1).to(tl.int8),)
    both = tl.permute(tl.reshape(tile_of(flags), BLOCK_OUT // M, C, M), 0, 2, 1)
    twice = compress_planes(planes(tl.reshape(both, BLOCK_OUT, C), M), code, N, M)
    packed = tl.zeros(code.shape, tl.int32)
    for i in tl.static_range(N):
        packed = packed | (twice[i].to(tl.int32) << i)
    packed = tl.where(within, packed, 0)
    store_codes(bits, bits_stride, row, first, packed, rows_within, N)
