"""The adapter's up-projection, added where its input comes out of the down-projection."""

import triton
import triton.language as tl

from slope_fx.kernels.triton.tiles import dot


@triton.jit
def low_rank_update(
    y, down, lora_b, result,
    tokens, d_out, rank, y_stride, down_stride, lora_stride, scale,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """``result = Y + scale * down B^T``, where ``down = X A^T`` (tokens, rank).

    Naive counterpart: ``reference.low_rank_update``.

    Traffic per output of s bytes: reads s, writes s; ``down`` and ``B`` come once a tile, from
    the L2 cache.
    """
    out_tiles = tl.cdiv(d_out, BLOCK_OUT)
    tile = tl.program_id(0)
    token = ((tile // out_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    out = ((tile % out_tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[None, :]
    tokens_within = token < tokens
    outs_within = out < d_out
    update = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        wide = first + tl.arange(0, BLOCK_RANK)[None, :]
        tall = first + tl.arange(0, BLOCK_RANK)[:, None]
        low = tl.load(
            down + token * down_stride + wide, mask=tokens_within & (wide < rank), other=0
        )
        up = tl.load(
            lora_b + out.to(tl.int64) * lora_stride + tall,
            mask=outs_within & (tall < rank), other=0,
        )  # fmt: skip
        update = dot(low, up.to(low.dtype), update, PRECISION)
    within = tokens_within & outs_within
    base = tl.load(y + token * y_stride + out, mask=within, other=0).to(tl.float32)
    total = base + scale * update
    tl.store(result + token * d_out + out, total.to(result.dtype.element_ty), mask=within)
