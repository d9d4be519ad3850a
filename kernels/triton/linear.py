"""The products with a compressed weight. Its tiles are expanded in registers before ``tl.dot``.

Tile sizes and parts depend on the number of tokens. With few tokens, nearly all traffic is the
weight, and many programs must share its columns to use the whole bandwidth. Each program then
stores a partial sum in fp32, and ``reduce.py`` adds the partial sums in a fixed order.
"""

import triton
import triton.language as tl

from slope_fx.kernels.triton.tiles import dot, load_tile


@triton.jit
def linear(
    x, values, scales, forward, bias, y,
    tokens, d_out, d_in, forward_stride, x_stride, parts,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``Y = X (W^R)^T + b``.

    With several parts, ``y`` is fp32 (parts, tokens, d_out), the partial sums. With ``BITS``,
    ``values`` holds codes. GROUP consecutive codes share a scale.

    Oracle: ``reference.sparse_linear``; with codes, of the values of ``quantised.dequantise``.

    Traffic with one tile of tokens, per weight of s bytes: reads s * N / M and 1/8, at 2:4 in
    16 bits 9/16 of the dense bytes; with codes (BITS / 8 + 2 / GROUP) * N / M and 1/8.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    tile = tl.program_id(0)
    # Programs with the same outputs run side by side and share the weight in the L2 cache.
    out_first = (tile // token_tiles) * BLOCK_OUT
    token_first = (tile % token_tiles) * BLOCK_TOKENS
    part = tl.program_id(1)

    row = (out_first + tl.arange(0, BLOCK_OUT)).to(tl.int64)[:, None]
    rows_within = row < d_out
    token = (token_first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[None, :]
    tokens_within = token < tokens

    BLOCK_IN: tl.constexpr = GROUPS * M
    blocks = tl.cdiv(d_in, BLOCK_IN)
    each = tl.cdiv(blocks, parts)
    total = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    for block in range(part * each, min(blocks, (part + 1) * each)):
        weight = load_tile(
            values, forward, forward, forward_stride, 0, row, block * GROUPS, rows_within, d_in,
            N, M, False, GROUPS, scales, BITS, GROUP, x.dtype.element_ty,
        )  # fmt: skip
        column = block * BLOCK_IN + tl.arange(0, BLOCK_IN)[:, None]
        inputs = tl.load(
            x + token * x_stride + column, mask=tokens_within & (column < d_in), other=0
        )
        total = dot(weight.to(inputs.dtype), inputs, total, PRECISION)

    if BIAS:  # noqa: SIM102 (a constant of the compiler)
        if part == 0:
            total += tl.load(bias + row, mask=rows_within, other=0).to(tl.float32)

    start = y + part.to(tl.int64) * tokens * d_out
    tl.store(
        tl.trans(start + token * d_out + row),
        tl.trans(total).to(y.dtype.element_ty),
        mask=tl.trans(rows_within & tokens_within),
    )


@triton.jit
def input_grad(
    grad, values, forward, backward, dx,
    tokens, d_out, d_in, forward_stride, backward_stride, grad_stride, parts,
    N: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``grad_X = grad_Y W^{R,C}``, without a transpose of the weight.

    With several parts, ``dx`` is fp32 (parts, tokens, d_in), the partial sums.

    Oracle: ``reference.sparse_input_grad``.

    Traffic with one tile of tokens, per weight of s bytes: reads s * N / M, 1/8 and N / M / 8.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    tile = tl.program_id(0)
    group_first = (tile // token_tiles) * GROUPS
    token_first = (tile % token_tiles) * BLOCK_TOKENS
    part = tl.program_id(1)

    token = (token_first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    tokens_within = token < tokens
    blocks = tl.cdiv(d_out, BLOCK_OUT)
    each = tl.cdiv(blocks, parts)
    total = tl.zeros((BLOCK_TOKENS, GROUPS * M), tl.float32)
    for block in range(part * each, min(blocks, (part + 1) * each)):
        tall = (block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)[:, None]
        wide = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
        weight = load_tile(
            values, forward, backward, forward_stride, backward_stride, tall, group_first,
            tall < d_out, d_in, N, M, True, GROUPS,
        )  # fmt: skip
        outputs = tl.load(
            grad + token * grad_stride + wide, mask=tokens_within & (wide < d_out), other=0
        )
        total = dot(outputs, weight.to(outputs.dtype), total, PRECISION)

    column = group_first * M + tl.arange(0, GROUPS * M)[None, :]
    tl.store(
        dx + part.to(tl.int64) * tokens * d_in + token * d_in + column,
        total.to(dx.dtype.element_ty),
        mask=tokens_within & (column < d_in),
    )
