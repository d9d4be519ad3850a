"""The functions that the kernels share: tiles of a weight, groups as planes, masks as codes.

A *tile* is two-dimensional, (rows, columns). The groups of M consecutive columns of a tile are its
M *planes*, each (rows, groups): plane j has element j of each group. An operation within groups is
then a few instructions on whole planes, in registers, for any N:M. A *code* has the mask bits of a
group as an integer, with the lowest column in the lowest bit.

A code with another number of bits than N comes from a corrupted mask. A kernel cannot raise an
error. It stores NaN where such a group is used.
"""

import triton
import triton.language as tl

from slope_fx.kernels.triton import interpreted

# A constant for the compiler, a number for the interpreter.
_INTERPRETED: tl.constexpr = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b``, summed in fp32."""
    if _INTERPRETED:  # it has no bf16 products; fp32 products of the same numbers are equal
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def planes(tile, M: tl.constexpr):
    """The M planes (rows, groups) of a tile (rows, groups * M); M a power of two."""
    if M == 1:
        return (tile,)
    else:
        even, odd = tl.split(tl.reshape(tile, tile.shape[0], tile.shape[1] // 2, 2))
        return _alternate(planes(even, M // 2), planes(odd, M // 2))


@triton.jit
def _alternate(even, odd):
    merged = ()
    for i in tl.static_range(len(even)):
        merged = merged + (even[i], odd[i])
    return merged


@triton.jit
def tile_of(parts):
    """The tile (rows, groups * M) of M planes (rows, groups); M a power of two."""
    M: tl.constexpr = len(parts)
    if M == 1:
        return parts[0]
    else:
        even = ()
        odd = ()
        for i in tl.static_range(M // 2):
            even = even + (parts[2 * i],)
            odd = odd + (parts[2 * i + 1],)
        pairs = tl.join(tile_of(even), tile_of(odd))
        return tl.reshape(pairs, pairs.shape[0], pairs.shape[1] * 2)


# --- codes ---------------------------------------------------------------------------------


@triton.jit
def load_codes(
    bits, bits_stride, row, first_group, rows_within, groups, W: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The codes (rows, G) of W bits from packed rows; 0 for groups that do not exist.

    Args:
        bits: pointer to uint8.
        bits_stride: bytes of a row. It is an argument of the kernel, so that Triton knows its
            divisors, and loads several bytes at once before their use.
        row: (rows, 1): number of each row.
        first_group: number of the tile's first group, a multiple of G.
        rows_within: (rows, 1): which rows exist.
        groups: number of groups of a row.
        W: bits of a code, at most 16.
        G: groups in a row of the tile.
    """
    start = bits + row * bits_stride
    group = first_group + tl.arange(0, G)[None, :]
    if (W & (W - 1)) == 0 and (
        G * W
    ) % 8 == 0:  # load whole bytes, then separate the codes in registers
        column = first_group * W // 8 + tl.arange(0, G * W // 8)[None, :]
        byte = tl.load(start + column, mask=rows_within & (column < bits_stride), other=0)
        return _codes_of(byte.to(tl.int32), W)
    else:
        first = group * W
        byte = start + (first >> 3)
        within = rows_within & (group < groups)
        code = tl.load(byte, mask=within, other=0).to(tl.int32)
        last = (first + W - 1) >> 3
        for k in tl.static_range(1, (W + 6) // 8 + 1):
            more = within & ((first >> 3) + k <= last)
            code = code | (tl.load(byte + k, mask=more, other=0).to(tl.int32) << (8 * k))
        return (code >> (first & 7)) & ((1 << W) - 1)


@triton.jit
def _codes_of(byte, W: tl.constexpr):
    if W == 16:
        low, high = planes(byte, 2)
        return low | (high << 8)
    else:
        codes = ()
        for k in tl.static_range(8 // W):
            codes = codes + ((byte >> (k * W)) & ((1 << W) - 1),)
        return tile_of(codes)


@triton.jit
def store_codes(bits, bits_stride, row, first_group, codes, rows_within, W: tl.constexpr):
    """Store codes (rows, G) of W bits each as packed bits; G a multiple of 8.

    Args:
        bits: pointer to uint8.
        bits_stride: bytes of a row.
        row: (rows, 1): number of each row.
        first_group: number of the tile's first group, a multiple of 8.
        codes: int32 or narrower, 0 for groups that do not exist.
        rows_within: (rows, 1): which rows exist.
        W: bits of a code, at most 16.
    """
    of_8 = planes(codes, 8)
    R: tl.constexpr = codes.shape[0]
    B: tl.constexpr = codes.shape[1] // 8
    parts = ()
    for k in tl.static_range(W):  # eight groups are W bytes
        byte = tl.zeros((R, B), tl.int32)
        for p in tl.static_range(8):
            if p * W < 8 * k + 8 and p * W + W > 8 * k:
                if p * W >= 8 * k:
                    byte = byte | (of_8[p].to(tl.int32) << (p * W - 8 * k))
                else:
                    byte = byte | (of_8[p].to(tl.int32) >> (8 * k - p * W))
        parts = parts + ((byte & 255).to(tl.uint8),)
    store_planes(bits, row * bits_stride, (first_group // 8) * W, parts, rows_within, bits_stride)


@triton.jit
def slots(code, M: tl.constexpr):
    """For each of the M columns of a group: the number of its value, or -1."""
    result = ()
    before = code * 0
    for j in tl.static_range(M):
        bit = (code >> j) & 1
        result = result + (tl.where(bit == 1, before, -1),)
        before += bit
    return result


@triton.jit
def is_not(code, N: tl.constexpr, M: tl.constexpr):
    """Whether a code has another number of bits than N."""
    if N == 2 and M == 4:
        return ((0b0001011001101000 >> code) & 1) == 0  # the six codes with two bits
    else:
        count = code * 0
        for j in tl.static_range(M):
            count += (code >> j) & 1
        return count != N


@triton.jit
def nan_where_bad(parts, code, within, N: tl.constexpr, M: tl.constexpr):
    """The planes, with NaN in the first plane where an existing code is not N:M."""
    nan = tl.full(code.shape, float("nan"), tl.float32).to(parts[0].dtype)
    result = (tl.where(is_not(code, N, M) & within, nan, parts[0]),)
    for i in tl.static_range(1, len(parts)):
        result = result + (parts[i],)
    return result


# --- between values and groups -------------------------------------------------------------


@triton.jit
def expand_planes(values, code, N: tl.constexpr, M: tl.constexpr, PRUNED: tl.constexpr = 0):
    """The M planes of columns from the N planes of values; PRUNED where a column has no value."""
    if PRUNED == 0:
        pruned = tl.zeros(code.shape, values[0].dtype)
    else:
        pruned = tl.full(code.shape, PRUNED, values[0].dtype)
    if N == 2 and M == 4:  # the bits of the first two columns determine theirs, as do the last two
        a, b, c, d = _bits_of_4(code)
        return (
            tl.where(a, values[0], pruned),
            tl.where(b, tl.where(a, values[1], values[0]), pruned),
            tl.where(c, tl.where(d, values[0], values[1]), pruned),
            tl.where(d, values[1], pruned),
        )
    else:
        slot = slots(code, M)
        result = ()
        for j in tl.static_range(M):
            column = pruned
            for i in tl.static_range(N):
                if i <= j and i >= N - (M - j):
                    column = tl.where(slot[j] == i, values[i], column)
            result = result + (column,)
        return result


@triton.jit
def compress_planes(columns, code, N: tl.constexpr, M: tl.constexpr):
    """The N planes of values from the M planes of columns."""
    if N == 2 and M == 4:
        a, b, c, d = _bits_of_4(code)
        first = tl.where(a, columns[0], tl.where(b, columns[1], columns[2]))
        return first, tl.where(d, columns[3], tl.where(c, columns[2], columns[1]))
    else:
        slot = slots(code, M)
        result = ()
        for i in tl.static_range(N):
            value = tl.zeros(code.shape, columns[0].dtype)
            for j in tl.static_range(M):
                if i <= j and i >= N - (M - j):
                    value = tl.where(slot[j] == i, columns[j], value)
            result = result + (value,)
        return result


@triton.jit
def _bits_of_4(code):
    return (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0


@triton.jit
def keep_top(scores, N: tl.constexpr):
    """The code of the N largest scores of each group; ties go to the lower column.

    The rank of an element is the number of elements with a higher score. This takes M (M - 1) / 2
    comparisons, because the compiler finds that each occurs twice. At 2:4, an element is kept if
    it is higher in two of its three comparisons, which needs no additions.
    """
    M: tl.constexpr = len(scores)
    code = tl.zeros(scores[0].shape, tl.int32)
    if N == 2 and M == 4:
        ab, ac, ad = scores[0] >= scores[1], scores[0] >= scores[2], scores[0] >= scores[3]
        bc, bd, cd = scores[1] >= scores[2], scores[1] >= scores[3], scores[2] >= scores[3]
        code = tl.where(_two_of(ab, ac, ad), 1, 0)
        code = code | tl.where(_two_of(~ab, bc, bd), 2, 0)
        code = code | tl.where(_two_of(~ac, ~bc, cd), 4, 0)
        code = code | tl.where(_two_of(~ad, ~bd, ~cd), 8, 0)
    else:
        for i in tl.static_range(M):
            rank = tl.zeros(scores[0].shape, tl.int32)
            for j in tl.static_range(M):
                if j < i:
                    rank += (scores[j] >= scores[i]).to(tl.int32)
                if j > i:
                    rank += 1 - (scores[i] >= scores[j]).to(tl.int32)
            code = code | ((rank < N).to(tl.int32) << i)
    return code


@triton.jit
def _two_of(a, b, c):
    return (a & b) | (c & (a | b))


@triton.jit
def magnitude(x):
    """An integer >= 0 as wide as ``x`` with the order of abs(x); NaN has the place of infinity."""
    if x.dtype == tl.float32:
        return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    elif x.dtype == tl.bfloat16:
        return tl.minimum(x.to(tl.int16, bitcast=True) & 0x7FFF, 0x7F80).to(tl.int16)
    else:
        return tl.minimum(x.to(tl.int16, bitcast=True) & 0x7FFF, 0x7C00).to(tl.int16)


@triton.jit
def load_groups(
    values, forward, backward, forward_stride, backward_stride, row, first, rows_within, d_in,
    N: tl.constexpr, M: tl.constexpr, TWICE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The values, forward codes and existence of the groups of some rows.

    Args:
        values, forward, backward: pointers to a compressed weight.
        forward_stride, backward_stride: bytes of a row of its masks.
        row: (rows, 1): number of each row.
        first: number of the first group, a multiple of GROUPS.
        rows_within: (rows, 1): which rows exist.
        d_in: columns of the dense weight.
        TWICE: whether to read the backward mask and to set the values that it drops to zero.
    """
    groups = d_in // M
    group = first + tl.arange(0, GROUPS)[None, :]
    within = rows_within & (group < groups)
    kept = load_planes(values, row * (groups * N), first * N, rows_within, groups * N, 1, N, GROUPS)
    code = load_codes(forward, forward_stride, row, first, rows_within, groups, M, GROUPS)
    if TWICE:
        twice = load_codes(backward, backward_stride, row, first, rows_within, groups, N, GROUPS)
        kept = _masked(kept, twice)
    return kept, code, within


@triton.jit
def _masked(parts, code):
    result = ()
    for i in tl.static_range(len(parts)):
        zero = tl.zeros(code.shape, parts[i].dtype)
        result = result + (tl.where(((code >> i) & 1) == 1, parts[i], zero),)
    return result


@triton.jit
def load_tile(
    values, forward, backward, forward_stride, backward_stride, row, first, rows_within, d_in,
    N: tl.constexpr, M: tl.constexpr, TWICE: tl.constexpr, GROUPS: tl.constexpr,
    scales=None, BITS: tl.constexpr = 0, GROUP: tl.constexpr = 0, DTYPE: tl.constexpr = None,
):  # fmt: skip
    """The dense tile (rows, GROUPS * M) of a compressed weight, expanded in registers.

    Args, besides those of :func:`load_groups`:
        scales: pointer to the scales of quantised values.
        BITS, GROUP: of quantised values, whose codes are in ``values``; BITS is 0 without codes.
        DTYPE: dtype of the tile of quantised values.
    """
    if BITS == 0:
        kept, code, within = load_groups(
            values, forward, backward, forward_stride, backward_stride, row, first, rows_within,
            d_in, N, M, TWICE, GROUPS,
        )  # fmt: skip
    else:
        groups = d_in // M
        within = rows_within & (first + tl.arange(0, GROUPS)[None, :] < groups)
        code = load_codes(forward, forward_stride, row, first, rows_within, groups, M, GROUPS)
        kept = load_quantised(
            values, scales, row, first, rows_within, groups * N, N, BITS, GROUP, GROUPS, DTYPE
        )
    columns = expand_planes(kept, code, N, M)
    return tile_of(nan_where_bad(columns, code, within, N, M))


@triton.jit
def load_quantised(
    codes, scales, row, first, rows_within, kept,
    N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The N planes (rows, G) of quantised values, in a dtype (``kernels/quantised.py``).

    Args:
        codes, scales: pointers to a quantised weight.
        row: (rows, 1): number of each row.
        first: number of the first group, a multiple of G.
        rows_within: (rows, 1): which rows exist.
        kept: values of a row.
        N, G: values of a group, and groups in a row of the tile.
        BITS, GROUP: bits of a code, and codes that share a scale.
        DTYPE: of the result.
    """
    if BITS == 8:
        parts = load_planes(codes, row * kept, first * N, rows_within, kept, 1, N, G)
    else:
        parts = _halves(codes, row, first, rows_within, kept, N, G)
    result = ()
    if (N & (N - 1)) == 0:
        scale = _scales(scales, row, first, rows_within, kept, N, GROUP, G)
        for i in tl.static_range(N):
            result = result + ((parts[i].to(tl.float32) * scale).to(DTYPE),)
    else:  # a group of a row may have values with two scales
        each = tl.cdiv(kept, GROUP)
        for i in tl.static_range(N):
            column = first * N + tl.arange(0, G)[None, :] * N + i
            within = rows_within & (column < kept)
            scale = tl.load(scales + row * each + column // GROUP, mask=within, other=0)
            result = result + ((parts[i].to(tl.float32) * scale.to(tl.float32)).to(DTYPE),)
    return result


@triton.jit
def _halves(codes, row, first, rows_within, kept, N: tl.constexpr, G: tl.constexpr):
    """The N planes of 4-bit codes. A byte holds two codes."""
    length = (kept + 1) // 2
    result = ()
    if N > 1 and (N & (N - 1)) == 0:
        of_bytes = load_planes(
            codes, row * length, first * (N // 2), rows_within, length, 1, N // 2, G
        )
        for i in tl.static_range(N // 2):
            byte = of_bytes[i].to(tl.int32)
            result = result + (((byte & 15) ^ 8) - 8, ((byte >> 4) ^ 8) - 8)
    elif N == 1:
        byte = load_planes(codes, row * length, first // 2, rows_within, length, 1, 1, G // 2)[0]
        byte = byte.to(tl.int32)
        result = (tile_of((((byte & 15) ^ 8) - 8, ((byte >> 4) ^ 8) - 8)),)
    else:
        for i in tl.static_range(N):
            column = first * N + tl.arange(0, G)[None, :] * N + i
            within = rows_within & (column < kept)
            byte = tl.load(codes + row * length + column // 2, mask=within, other=0).to(tl.int32)
            result = result + ((((byte >> (4 * (column & 1))) & 15) ^ 8) - 8,)
    return result


@triton.jit
def _scales(
    scales, row, first, rows_within, kept, N: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The scales of the G groups of each row, fp32 (rows, G) or (rows, 1); N a power of two."""
    CODES: tl.constexpr = G * N
    each = tl.cdiv(kept, GROUP)
    if CODES > GROUP:
        column = first * N // GROUP + tl.arange(0, CODES // GROUP)[None, :]
        few = tl.load(scales + row * each + column, mask=rows_within & (column < each), other=0)
        wide = tl.broadcast_to(few[:, :, None], (row.shape[0], CODES // GROUP, GROUP // N))
        return tl.reshape(wide, (row.shape[0], G)).to(tl.float32)
    else:
        one = tl.load(scales + row * each + first * N // GROUP, mask=rows_within, other=0)
        return one.to(tl.float32)


@triton.jit
def place(groups, GROUPS: tl.constexpr):
    """The number of the block of rows, and of the first group, of the tile of this program.

    Programs of the same rows run side by side. One grid dimension is enough for any weight.
    """
    blocks = tl.cdiv(groups, GROUPS)
    program = tl.program_id(0)
    return program // blocks, (program % blocks) * GROUPS


# --- memory --------------------------------------------------------------------------------


@triton.jit
def load_planes(pointer, row, first, rows_within, length, stride, N: tl.constexpr, G: tl.constexpr):
    """The N planes of G groups of N elements, from ``first`` on; zeros after ``length``.

    Args:
        pointer: to the elements.
        row: (rows, 1): offset of each row.
        first: number of the first element in its row.
        rows_within: (rows, 1): which rows exist.
        length: number of elements of a row.
        stride: between the elements.
        N, G: elements of a group, and groups in a row of the tile.
    """
    if (N & (N - 1)) == 0:  # load one run of memory, then separate the planes in registers
        column = first + tl.arange(0, G * N)[None, :]
        within = rows_within & (column < length)
        tile = tl.load(pointer + row + column * stride, mask=within, other=0)
        return planes(tile, N)
    else:
        result = ()
        for i in tl.static_range(N):
            column = first + tl.arange(0, G)[None, :] * N + i
            within = rows_within & (column < length)
            part = tl.load(pointer + row + column * stride, mask=within, other=0)
            result = result + (part,)
        return result


@triton.jit
def store_planes(pointer, row, first, parts, rows_within, length):
    """Store planes in the layout of :func:`load_planes`, with a stride of 1."""
    N: tl.constexpr = len(parts)
    G: tl.constexpr = parts[0].shape[1]
    if (N & (N - 1)) == 0:
        column = first + tl.arange(0, G * N)[None, :]
        tl.store(pointer + row + column, tile_of(parts), mask=rows_within & (column < length))
    else:
        for i in tl.static_range(N):
            column = first + tl.arange(0, G)[None, :] * N + i
            tl.store(pointer + row + column, parts[i], mask=rows_within & (column < length))
