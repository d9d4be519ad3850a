"""The kernels that expand, compress and transpose weights."""

import triton
import triton.language as tl

from slope_fx.kernels.triton.tiles import (
    compress_planes,
    expand_planes,
    is_not,
    load_codes,
    load_groups,
    load_planes,
    load_tile,
    nan_where_bad,
    place,
    planes,
    store_codes,
    store_planes,
    tile_of,
)


@triton.jit
def expand(
    values, forward, backward, dense,
    d_out, d_in, forward_stride, backward_stride,
    N: tl.constexpr, M: tl.constexpr, TWICE: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The dense ``W^R``, or with ``TWICE`` the dense ``W^{R,C}``.

    Oracle: ``reference.expand``.

    Traffic per weight of s bytes: reads s * N / M and 1/8, and N / M / 8 with ``TWICE``;
    writes s.
    """
    out_block, first = place(d_in // M, GROUPS)
    row = out_block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    rows_within = row < d_out
    tile = load_tile(
        values, forward, backward, forward_stride, backward_stride, row, first, rows_within, d_in,
        N, M, TWICE, GROUPS,
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


@triton.jit
def transpose(
    values, forward, backward, transposed, bits,
    d_out, d_in, forward_stride, backward_stride, bits_stride,
    N: tl.constexpr, M: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The compressed transpose of ``W^{R,C}``: its values and its packed mask.

    A group of M outputs with fewer than N kept values gets zeros at its lowest free places, so
    that every group has N values.

    Oracle: ``reference.transpose``.

    Traffic per weight of s bytes: reads s * N / M, 1/8 and N / M / 8; writes s * N / M and 1/8.
    """
    out_block, first = place(d_in // M, GROUPS)
    row = out_block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    rows_within = row < d_out
    kept, code, twice, within = load_groups(
        values, forward, backward, forward_stride, backward_stride, row, first, rows_within, d_in,
        N, M, True, GROUPS,
    )  # fmt: skip
    # Only the bits of the values go through shared memory. All ones mean "not kept"; no value
    # has these bits, because a NaN with them is replaced by another NaN.
    marked = ()
    for i in tl.static_range(N):
        marked = marked + (_marked(kept[i], ((twice >> i) & 1) == 1),)
    columns = expand_planes(marked, code, N, M, -1)
    bad = is_not(code, N, M) & within
    told = (tl.where(bad, _quiet_nan(values.dtype.element_ty), columns[0]).to(columns[0].dtype),)
    for j in tl.static_range(1, M):
        told = told + (columns[j],)
    tile = tl.trans(tile_of(told))

    outputs = planes(tile, M)
    code_of_kept = tl.zeros(outputs[0].shape, tl.int32)
    for j in tl.static_range(M):
        code_of_kept = code_of_kept | tl.where(outputs[j] != -1, 1 << j, 0)
    full = _filled(code_of_kept, N, M)

    column = (first * M).to(tl.int64) + tl.arange(0, GROUPS * M)[:, None]
    columns_within = column < d_in
    out_group = out_block * (BLOCK_OUT // M)
    exists = out_group + tl.arange(0, BLOCK_OUT // M)[None, :] < d_out // M
    full = tl.where(exists, full, 0)
    d_kept_out = d_out // M * N
    kept_bits = compress_planes(outputs, full, N, M)
    stored = ()
    for i in tl.static_range(N):
        value = tl.where(kept_bits[i] == -1, 0, kept_bits[i])
        stored = stored + (value.to(values.dtype.element_ty, bitcast=True),)
    stored = nan_where_bad(stored, full, exists & columns_within, N, M)
    store_planes(transposed, column * d_kept_out, out_group * N, stored, columns_within, d_kept_out)
    store_codes(bits, bits_stride, column, out_group, full, columns_within, M)


@triton.jit
def _marked(part, is_kept):
    """The bits of values as integers, and -1, all ones, for values that are not kept."""
    if part.dtype == tl.float32:
        bits = part.to(tl.int32, bitcast=True)
    else:
        bits = part.to(tl.int16, bitcast=True)
    bits = tl.where(bits == -1, _quiet_nan(part.dtype), bits).to(bits.dtype)
    return tl.where(is_kept, bits, tl.full(bits.shape, -1, bits.dtype))


@triton.jit
def _quiet_nan(dtype: tl.constexpr):
    """The bits of a NaN with a bit that is zero."""
    return 0x7FFFFFFF if dtype == tl.float32 else 0x7FFF


@triton.jit
def _filled(code, N: tl.constexpr, M: tl.constexpr):
    """Codes with up to N bits, with bits added at the lowest free places until they have N."""
    if N == 2 and M == 4:
        missing = tl.where(code <= 1, 3, 1)
        return tl.where((code & (code - 1)) == 0, code | missing, code)
    else:
        to_fill = tl.zeros(code.shape, tl.int32) + N
        for j in tl.static_range(M):
            to_fill -= (code >> j) & 1
        full = code
        for j in tl.static_range(M):
            fill = (((code >> j) & 1) == 0) & (to_fill > 0)
            to_fill -= fill.to(tl.int32)
            full = full | tl.where(fill, 1 << j, 0)
        return full
