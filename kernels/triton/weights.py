"""Between kept values and dense weights, and the compressed transpose."""

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
    planes,
    store_codes,
    store_planes,
    tile_of,
    told_of_bad_codes,
)


@triton.jit
def expand(
    values, forward, backward, dense,
    d_out, d_in,
    N: tl.constexpr, M: tl.constexpr, TWICE: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The dense ``W^R``, or with ``TWICE`` the dense ``W^{R,C}``.

    Naive counterpart: ``reference.expand``.

    Traffic per weight of s bytes: reads s * N / M and 1/8, and N / M / 8 with ``TWICE``;
    writes s.
    """
    row = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    first = tl.program_id(0) * GROUPS
    rows_within = row < d_out
    tile = load_tile(values, forward, backward, row, first, rows_within, d_in, N, M, TWICE, GROUPS)
    column = first * M + tl.arange(0, GROUPS * M)[None, :]
    tl.store(dense + row * d_in + column, tile, mask=rows_within & (column < d_in))


@triton.jit
def compress(
    dense, forward, values,
    d_out, d_in, row_stride, column_stride,
    N: tl.constexpr, M: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The kept values of a dense weight.

    Naive counterpart: ``reference.compress``.

    Traffic per weight of s bytes: reads s and 1/8, writes s * N / M.
    """
    row = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    first = tl.program_id(0) * GROUPS
    rows_within = row < d_out
    group = first + tl.arange(0, GROUPS)[None, :]
    within = rows_within & (group < d_in // M)
    columns = load_planes(
        dense, row * row_stride, first * M, rows_within, d_in, column_stride, M, GROUPS
    )
    code = load_codes(forward, row, first, rows_within, d_in // M, M, GROUPS)
    kept = told_of_bad_codes(compress_planes(columns, code, N, M), code, within, N, M)
    d_kept = d_in // M * N
    store_planes(values, row * d_kept, first * N, kept, rows_within, d_kept)


@triton.jit
def transpose(
    values, forward, backward, transposed, bits,
    d_out, d_in,
    N: tl.constexpr, M: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The compressed transpose of ``W^{R,C}``: its values and its packed mask.

    A group of M outputs with fewer than N kept is filled up with zeros at its lowest free
    places, so that every group has N.

    Naive counterpart: ``reference.transpose``.

    Traffic per weight of s bytes: reads s * N / M, 1/8 and N / M / 8; writes s * N / M and 1/8.
    """
    row = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    first = tl.program_id(0) * GROUPS
    rows_within = row < d_out
    kept, code, twice, within = load_groups(
        values, forward, backward, row, first, rows_within, d_in, N, M, True, GROUPS
    )
    flags = ()
    for i in tl.static_range(N):
        flags = flags + (((twice >> i) & 1).to(tl.int8),)
    columns = told_of_bad_codes(expand_planes(kept, code, N, M), code, within, N, M)
    weight = tl.trans(tile_of(columns))
    kept_columns = expand_planes(flags, code, N, M)
    bad = (is_not(code, N, M) & within).to(tl.int8)  # its NaN must not be dropped
    marked = (kept_columns[0] | bad,)
    for j in tl.static_range(1, M):
        marked = marked + (kept_columns[j],)
    is_kept = tl.trans(tile_of(marked))

    outputs = planes(weight, M)
    marks = planes(is_kept, M)
    count = tl.zeros(marks[0].shape, tl.int32)
    for j in tl.static_range(M):
        count += marks[j].to(tl.int32)
    to_fill = N - count
    full = tl.zeros(marks[0].shape, tl.int32)
    for j in tl.static_range(M):
        mark = marks[j].to(tl.int32)
        fill = (mark == 0) & (to_fill > 0)
        to_fill -= fill.to(tl.int32)
        full = full | ((mark | fill.to(tl.int32)) << j)

    column = (first * M).to(tl.int64) + tl.arange(0, GROUPS * M)[:, None]
    columns_within = column < d_in
    out_group = tl.program_id(1) * (BLOCK_OUT // M)
    exists = out_group + tl.arange(0, BLOCK_OUT // M)[None, :] < d_out // M
    full = tl.where(exists, full, 0)
    d_kept_out = d_out // M * N
    results = compress_planes(outputs, full, N, M)
    results = told_of_bad_codes(results, full, exists & columns_within, N, M)
    store_planes(
        transposed, column * d_kept_out, out_group * N, results, columns_within, d_kept_out
    )
    store_codes(bits, column, out_group, full, columns_within, d_out // M, M)
