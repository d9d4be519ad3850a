"""The sum of the partial results of a product."""

import triton
import triton.language as tl


@triton.jit
def add_up(partial, result, length, parts, BLOCK: tl.constexpr):
    """``result = partial.sum(0)`` for an fp32 (parts, length), added in the order of the parts.

    Traffic per element of s bytes: reads 4 * parts, writes s.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = place < length
    length_64 = tl.full((1,), length, tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + place + part * length_64, mask=within, other=0)
    tl.store(result + place, total.to(result.dtype.element_ty), mask=within)
