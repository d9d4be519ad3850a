"""The weight gradient, compressed in registers before it is stored."""

import triton
import triton.language as tl

from slope_fx.kernels.triton.tiles import (
    compress_planes,
    dot,
    load_codes,
    nan_where_bad,
    planes,
    store_planes,
)


@triton.jit
def weight_grad(
    grad, x, forward, dw,
    tokens, d_out, d_in, forward_stride, grad_stride, x_stride, parts,
    N: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``grad_W = grad_Y^T X`` at the kept positions.

    The sums over tokens are fp32. Only the sums at kept positions are stored. With several parts,
    ``dw`` is fp32 (parts, d_out, d_in * N / M), the partial sums.

    Oracle: ``reference.sparse_weight_grad``.

    Traffic per weight of s bytes: reads 1/8, writes s * N / M. A dense product writes s, and the
    compression of its result moves another s * (1 + N / M). (Inputs are read as by a dense
    product.)
    """
    BLOCK_IN: tl.constexpr = GROUPS * M
    in_tiles = tl.cdiv(d_in, BLOCK_IN)
    tile = tl.program_id(0)
    out_first = (tile // in_tiles) * BLOCK_OUT
    group_first = (tile % in_tiles) * GROUPS
    part = tl.program_id(1)

    wide = (out_first + tl.arange(0, BLOCK_OUT))[None, :]
    column = (group_first * M + tl.arange(0, BLOCK_IN))[None, :]
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    each = tl.cdiv(blocks, parts)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for block in range(part * each, min(blocks, (part + 1) * each)):
        token = (block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
        within = token < tokens
        outputs = tl.load(grad + token * grad_stride + wide, mask=within & (wide < d_out), other=0)
        inputs = tl.load(x + token * x_stride + column, mask=within & (column < d_in), other=0)
        total = dot(tl.trans(outputs), inputs, total, PRECISION)

    row = (out_first + tl.arange(0, BLOCK_OUT)).to(tl.int64)[:, None]
    rows_within = row < d_out
    group = group_first + tl.arange(0, GROUPS)[None, :]
    code = load_codes(forward, forward_stride, row, group_first, rows_within, d_in // M, M, GROUPS)
    kept = compress_planes(planes(total, M), code, N, M)
    kept = nan_where_bad(kept, code, rows_within & (group < d_in // M), N, M)
    results = ()
    for i in tl.static_range(N):
        results = results + (kept[i].to(dw.dtype.element_ty),)
    d_kept = d_in // M * N
    start = dw + part.to(tl.int64) * d_out * d_kept
    store_planes(start, row * d_kept, group_first * N, results, rows_within, d_kept)
