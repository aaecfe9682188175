"""Triton kernels of products with few rows, which are bound by reading the weights."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait


@triton.jit
def _finish(y, a_scale, b_scale, bias, row, column, rows, columns, A_SCALES: tl.constexpr, B_SCALES: tl.constexpr):
    """The sums `y` of codes, scaled, as float32. `row` and `column` broadcast to its shape."""
    y = y.to(tl.float32)
    if a_scale is not None:
        y *= tl.load(a_scale + row, row < rows, other=0.0) if A_SCALES else tl.load(a_scale)
    if b_scale is not None:
        y *= tl.load(b_scale + column, column < columns, other=0.0) if B_SCALES else tl.load(b_scale)
    if bias is not None:
        y += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)
    return y


@triton.jit
def stream_kernel(
    a,
    a_scale,
    b,
    b_scale,
    bias,
    out,
    b_2,
    b_scale_2,
    bias_2,
    out_2,
    b_3,
    b_scale_3,
    bias_3,
    out_3,
    sums,
    rows,
    columns,
    columns_2,
    columns_3,
    a_row,
    b_column,
    b_column_2,
    b_column_3,
    depths,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    A_SCALES: tl.constexpr,
    B_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLUMNS columns of one `b` against all rows of `a` a program, over a share of the `depths` where they are split.

    The share is read in PARTS at once, which lie side by side in the tile: the matrix units then have PARTS * COLUMNS
    columns, and as many times the rows, of which each part's products with its own count. So narrow weights occupy more
    multiprocessors without sums that another kernel would add.

    The programs of `b_2` and `b_3`, which may be None, come behind those of `b`.
    EVEN: they are a multiple of DEPTH, and of all the parts where there are several. ROWS is 1 (products one by one) or
    a size that `tl.dot` takes. With SPLITS > 1 the sums go to `sums`, [SPLITS, rows, columns of all], for
    `split_kernel`, else to `out`, [rows, columns].
    SUMMED: how many FP8 products Hopper's matrix units may sum in the bits that they have, before float32 is added to.
    """
    block = tl.program_id(0)
    whole = columns
    before = 0
    if b_2 is not None:
        blocks = tl.cdiv(columns, COLUMNS)
        whole += columns_2
        if b_3 is not None:
            behind = blocks + tl.cdiv(columns_2, COLUMNS)
            whole += columns_3
            if block >= behind:
                block -= behind
                before = columns + columns_2
                b, b_scale, columns, b_column = b_3, b_scale_3, columns_3, b_column_3
                if SPLITS == 1:
                    out = out_3
                if bias is not None:
                    bias = bias_3
                blocks = tl.num_programs(0)
        if block >= blocks:
            block -= blocks
            before = columns
            b, b_scale, columns, b_column = b_2, b_scale_2, columns_2, b_column_2
            if SPLITS == 1:
                out = out_2
            if bias is not None:
                bias = bias_2
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.cdiv(depths, SPLITS * DEPTH) * DEPTH
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, depths)
    depth = tl.arange(0, DEPTH)
    # The columns are rows of a weight: wider than 2**31 elements, all of them.
    b_columns = b + column.to(tl.int64) * b_column
    exact: tl.constexpr = b.dtype.element_ty == tl.int8
    number: tl.constexpr = tl.int32 if exact else tl.float32
    pdl_wait(PDL)
    inside = column < columns
    if ROWS == 1:
        products = tl.zeros([COLUMNS, DEPTH], number)
        for start in range(first, last, DEPTH):
            k = start + depth
            wanted = inside[:, None]
            if not EVEN:
                wanted &= (k < last)[None, :]
            w = tl.load(b_columns[:, None] + k[None, :], wanted, other=0.0)
            x = tl.load(a + k) if EVEN else tl.load(a + k, k < last, other=0.0)
            products += w.to(number) * x.to(number)[None, :]
        y = tl.sum(products, 1)
        row, column_of, stored = 0, column, inside
    elif PARTS == 1:
        row = tl.arange(0, ROWS)
        y = tl.zeros([COLUMNS, ROWS], number)
        a_rows = a + row.to(tl.int64) * a_row
        for start in range(first, last, DEPTH):
            k = start + depth
            wanted, read = inside[:, None], (row < rows)[None, :]
            if not EVEN:
                wanted &= (k < last)[None, :]
                read &= (k < last)[:, None]
            w = tl.load(b_columns[:, None] + k[None, :], wanted, other=0.0)
            x = tl.load(a_rows[None, :] + k[:, None], read, other=0.0)
            y = tl.dot(w, x, y, max_num_imprecise_acc=SUMMED, out_dtype=number)
        row, column_of = row[None, :], column[:, None]
        stored = inside[:, None] & (row < rows)
    else:
        piece = tl.cdiv(depths, SPLITS * PARTS * DEPTH) * DEPTH
        of_split = tl.program_id(1) * PARTS * piece
        tile, beside = tl.arange(0, PARTS * COLUMNS), tl.arange(0, PARTS * ROWS)
        from_w, from_x = of_split + tile // COLUMNS * piece, of_split + beside // ROWS * piece
        tile_column, row = block * COLUMNS + tile % COLUMNS, beside % ROWS
        w_at = b + tile_column.to(tl.int64) * b_column + from_w
        x_at = a + row.to(tl.int64) * a_row + from_x
        y = tl.zeros([PARTS * COLUMNS, PARTS * ROWS], number)
        for start in range(0, piece, DEPTH):
            k = start + depth
            wanted, read = (tile_column < columns)[:, None], (row < rows)[None, :]
            if not EVEN:
                wanted &= from_w[:, None] + k[None, :] < depths
                read &= from_x[None, :] + k[:, None] < depths
            w = tl.load(w_at[:, None] + k[None, :], wanted, other=0.0)
            x = tl.load(x_at[None, :] + k[:, None], read, other=0.0)
            y = tl.dot(w, x, y, max_num_imprecise_acc=SUMMED, out_dtype=number)
        part = tl.arange(0, PARTS)
        own = part[:, None, None, None] == part[None, None, :, None]
        y = tl.where(own, tl.reshape(y, [PARTS, COLUMNS, PARTS, ROWS]), tl.zeros([1], number))
        y = tl.sum(tl.sum(y, 2), 0)
        row, column_of = tl.arange(0, ROWS)[None, :], column[:, None]
        stored = inside[:, None] & (row < rows)
    if SPLITS == 1:
        y = _finish(y, a_scale, b_scale, bias, row, column_of, rows, columns, A_SCALES, B_SCALES)
        pdl_launch(PDL)
        tl.store(out + row * columns + column_of, y.to(out.dtype.element_ty), stored)
    else:
        pdl_launch(PDL)
        tl.store(sums + (tl.program_id(1) * rows + row) * whole + before + column_of, y, stored)


@triton.jit
def split_kernel(
    sums,
    a_scale,
    b_scale,
    bias,
    out,
    b_scale_2,
    bias_2,
    out_2,
    b_scale_3,
    bias_3,
    out_3,
    rows,
    columns,
    columns_2,
    columns_3,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    A_SCALES: tl.constexpr,
    B_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sums of all splits, added in order: COLUMNS columns of one row a program."""
    row = tl.program_id(1)
    block = tl.program_id(0)
    whole = columns
    before = 0
    if out_2 is not None:
        blocks = tl.cdiv(columns, COLUMNS)
        whole += columns_2
        if out_3 is not None:
            behind = blocks + tl.cdiv(columns_2, COLUMNS)
            whole += columns_3
            if block >= behind:
                block -= behind
                before = columns + columns_2
                b_scale, out, columns = b_scale_3, out_3, columns_3
                if bias is not None:
                    bias = bias_3
                blocks = tl.num_programs(0)
        if block >= blocks:
            block -= blocks
            before = columns
            b_scale, out, columns = b_scale_2, out_2, columns_2
            if bias is not None:
                bias = bias_2
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    pdl_wait(PDL)
    y = tl.zeros([COLUMNS], sums.dtype.element_ty)
    for split in tl.static_range(SPLITS):
        y += tl.load(sums + (split * rows + row) * whole + before + column, inside, other=0.0)
    y = _finish(y, a_scale, b_scale, bias, row, column, rows, columns, A_SCALES, B_SCALES)
    pdl_launch(PDL)
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), inside)
