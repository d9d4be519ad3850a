"""The products with a compressed weight: tiles of it are rebuilt in registers ahead of ``tl.dot``.

Few tokens or many is a matter of tile sizes, and of parts: with few, the weight is all the
traffic, and many programs must share its columns to keep the memory busy; each then leaves a
partial sum in fp32, which ``reduce.py`` adds up in a fixed order.
"""

import triton
import triton.language as tl

from slope_fx.kernels.triton.tiles import dot, load_tile


@triton.jit
def linear(
    x, values, forward, bias, down, lora_b, y,
    tokens, d_out, d_in, forward_stride, x_stride, down_stride, lora_stride, rank, scale, parts,
    N: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, ADAPTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """``Y = X (W^R)^T + b + scale * down B^T``, where ``down = X A^T`` (tokens, rank).

    With several parts, ``y`` is fp32 (parts, tokens, d_out), to be added up.

    Naive counterpart: ``reference.sparse_linear`` (and ``reference.low_rank_update``).

    Traffic with one tile of tokens, per weight of s bytes: reads s * N / M and 1/8, at 2:4 in
    16 bits 9/16 of the dense bytes.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    tile = tl.program_id(0)
    # Tiles of the same outputs run side by side, and share the weight in the L2 cache.
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
            N, M, False, GROUPS,
        )  # fmt: skip
        column = block * BLOCK_IN + tl.arange(0, BLOCK_IN)[:, None]
        inputs = tl.load(
            x + token * x_stride + column, mask=tokens_within & (column < d_in), other=0
        )
        total = dot(weight.to(inputs.dtype), inputs, total, PRECISION)

    if part == 0:
        if BIAS:
            total += tl.load(bias + row, mask=rows_within, other=0).to(tl.float32)
        if ADAPTER:
            update = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
            for first in range(0, rank, BLOCK_RANK):
                wide = first + tl.arange(0, BLOCK_RANK)[None, :]
                tall = first + tl.arange(0, BLOCK_RANK)[:, None]
                up = tl.load(
                    lora_b + row * lora_stride + wide, mask=rows_within & (wide < rank), other=0
                )
                low = tl.load(
                    down + token * down_stride + tall, mask=tokens_within & (tall < rank), other=0
                )
                update = dot(up.to(low.dtype), low, update, PRECISION)
            total += scale * update

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
    """``grad_X = grad_Y W^{R,C}``, from the weight as it lies: nothing is transposed.

    With several parts, ``dx`` is fp32 (parts, tokens, d_in), to be added up.

    Naive counterpart: ``reference.sparse_input_grad``.

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
