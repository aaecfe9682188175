"""The Triton kernel of products whose scales change along K."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait
from .kernel import _finish


@triton.jit
def _scale_at(scales, row, group, step_row, step_group, SWIZZLED: tl.constexpr):
    """Where the scale of a row's group is. SWIZZLED: `step_row` is how many blocks of 4 groups lie side by side."""
    row = row.to(tl.int64)
    if SWIZZLED:
        block = row // 128 * step_row + group // 4
        at = block * 512 + row % 32 * 16 + row // 32 % 4 * 4 + group % 4
    else:
        at = row * step_row + group * step_group
    return scales + at


@triton.jit
def _decoded(scale):
    """A scale as stored, in float32. A byte is an exponent: 0 is 2**-127, 255 NaN."""
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32) << 23
        bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, bits))
        return bits.to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def _e2m1(nibble):
    """What the low four bits stand for, in float16: they are its own first bits, but for its other bias."""
    bits = ((nibble & 7).to(tl.int16) << 9) | ((nibble & 8).to(tl.int16) << 12)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def _values(codes, scale, GROUP: tl.constexpr, WIDE: tl.constexpr):
    """`codes` [N, K] in WIDE, each group of GROUP multiplied by its element of `scale` [N, K / GROUP]."""
    n: tl.constexpr = codes.shape[0]
    k: tl.constexpr = codes.shape[1]
    # By float32: before Triton 3.8, sm_89 has no other way from FP8 to bfloat16.
    grouped = tl.reshape(codes.to(tl.float32), [n, k // GROUP, GROUP])
    return tl.reshape((grouped * _decoded(scale)[:, :, None]).to(WIDE), [n, k])


@triton.jit
def block_kernel(
    a,
    b,
    a_scale,
    b_scale,
    a_global,
    b_global,
    bias,
    out,
    sums,
    rows,
    columns,
    depths,
    a_row,
    b_row,
    a_scale_row,
    a_scale_group,
    b_scale_row,
    b_scale_group,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    A_SWIZZLED: tl.constexpr,
    B_SWIZZLED: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of `a` times COLUMNS rows of `b` a program, over a share of the `depths` where they are split.

    Sizes along K are in bytes: of e2m1 codes, which come as uint8, there are two in each. GROUP of them share a scale,
    in `b` with SHARED rows. EVEN: `depths` is a multiple of DEPTH. How codes are multiplied:

    - ROWS is 1: one by one, in float32.
    - NATIVE: with their scales, by the matrix units.
    - WIDE is a dtype in which `code * scale` is exact: in that, by the matrix units.
    - WIDE is None: as codes, and each group's sum is scaled. DEPTH is no more than GROUP then.

    GROUPED blocks of rows are next to one another, then those of the next columns, so that they share them in the
    cache. With SPLITS > 1 the sums go to `sums`, [SPLITS, rows, columns], for `split_kernel`.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(columns, COLUMNS)
    if ROWS == 1:
        row_block = program // column_blocks
        column_block = program % column_blocks
    else:
        together = GROUPED * column_blocks
        first_block = program // together * GROUPED
        count = tl.minimum(tl.cdiv(rows, ROWS) - first_block, GROUPED)
        row_block = first_block + program % together % count
        column_block = program % together // count
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    read, inside = row < rows, column < columns
    packed: tl.constexpr = b.dtype.element_ty == tl.uint8
    exact: tl.constexpr = b.dtype.element_ty == tl.int8
    share = tl.cdiv(depths, SPLITS * DEPTH) * DEPTH
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, depths)
    a_rows = a + row.to(tl.int64) * a_row
    b_rows = b + column.to(tl.int64) * b_row
    groups: tl.constexpr = DEPTH // GROUP if DEPTH > GROUP else 1
    group = tl.arange(0, groups)
    pdl_wait(PDL)
    if ROWS == 1:
        part: tl.constexpr = DEPTH // groups
        inner = tl.arange(0, DEPTH)
        products = tl.zeros([COLUMNS, groups, part], tl.float32)
        for start in range(first, last, DEPTH):
            k = (start + inner)[None, :]
            g = (start // GROUP + group)[None, :]
            wanted, asked = inside[:, None], g * GROUP < last
            if not EVEN:
                wanted &= k < last
            w = tl.load(b_rows[:, None] + k, wanted, other=0.0)
            x = tl.load(a_rows[:, None] + k) if EVEN else tl.load(a_rows[:, None] + k, k < last, other=0.0)
            ws = _scale_at(b_scale, (column // SHARED)[:, None], g, b_scale_row, b_scale_group, B_SWIZZLED)
            xs = _scale_at(a_scale, row[:, None], g, a_scale_row, a_scale_group, A_SWIZZLED)
            ws = _decoded(tl.load(ws, inside[:, None] & asked, other=0.0))
            xs = _decoded(tl.load(xs, asked, other=0.0))
            if packed:
                y = _e2m1(w).to(tl.float32) * _e2m1(x).to(tl.float32)
                y += _e2m1(w >> 4).to(tl.float32) * _e2m1(x >> 4).to(tl.float32)
            else:
                y = w.to(tl.float32) * x.to(tl.float32)
            products += tl.reshape(y, [COLUMNS, groups, part]) * (ws * xs)[:, :, None]
        y = tl.sum(tl.sum(products, 2), 1)[:, None]
    else:
        y = tl.zeros([COLUMNS, ROWS], tl.float32)
        depth = tl.arange(0, DEPTH)
        for start in range(first, last, DEPTH):
            k = start + depth
            wanted, asked = inside[:, None], read[:, None]
            if not EVEN:
                wanted &= (k < last)[None, :]
                asked &= (k < last)[None, :]
            w = tl.load(b_rows[:, None] + k[None, :], wanted, other=0.0)
            x = tl.load(a_rows[:, None] + k[None, :], asked, other=0.0)
            if NATIVE or WIDE is not None:
                g = (start // GROUP + group)[None, :]
                there = g * GROUP < last
                ws = _scale_at(b_scale, (column // SHARED)[:, None], g, b_scale_row, b_scale_group, B_SWIZZLED)
                xs = _scale_at(a_scale, row[:, None], g, a_scale_row, a_scale_group, A_SWIZZLED)
                ws = tl.load(ws, inside[:, None] & there, other=0.0)
                xs = tl.load(xs, read[:, None] & there, other=0.0)
                if NATIVE:
                    form: tl.constexpr = "e2m1" if packed else "e4m3"
                    y = tl.dot_scaled(w, ws, form, tl.trans(x), xs, form, y)
                elif packed:
                    # Even codes by even ones, odd by odd: the order along K is the same in both.
                    even = _values(_e2m1(x), xs, GROUP, WIDE)
                    odd = _values(_e2m1(x >> 4), xs, GROUP, WIDE)
                    y = tl.dot(_values(_e2m1(w), ws, GROUP, WIDE), tl.trans(even), y)
                    y = tl.dot(_values(_e2m1(w >> 4), ws, GROUP, WIDE), tl.trans(odd), y)
                else:
                    y = tl.dot(_values(w, ws, GROUP, WIDE), tl.trans(_values(x, xs, GROUP, WIDE)), y)
            else:
                tl.static_assert(GROUP % DEPTH == 0)
                g = start // GROUP
                xs = _scale_at(a_scale, row, g, a_scale_row, a_scale_group, A_SWIZZLED)
                xs = _decoded(tl.load(xs, read, other=0.0))
                if SHARED % COLUMNS == 0:
                    ws = _scale_at(b_scale, column_block * COLUMNS // SHARED, g, b_scale_row, b_scale_group, B_SWIZZLED)
                    by = (xs * _decoded(tl.load(ws)))[None, :]
                else:
                    ws = _scale_at(b_scale, column // SHARED, g, b_scale_row, b_scale_group, B_SWIZZLED)
                    by = _decoded(tl.load(ws, inside, other=0.0))[:, None] * xs[None, :]
                summed = tl.dot(w, tl.trans(x), out_dtype=tl.int32 if exact else tl.float32)
                y += summed.to(tl.float32) * by
    row, column = row[None, :], column[:, None]
    stored = inside[:, None] & read[None, :]
    at = row.to(tl.int64) * columns + column
    if SPLITS == 1:
        y = _finish(y, a_global, b_global, bias, row, column, rows, columns, False, False)
        pdl_launch(PDL)
        tl.store(out + at, y.to(out.dtype.element_ty), stored)
    else:
        pdl_launch(PDL)
        tl.store(sums + tl.program_id(1).to(tl.int64) * rows * columns + at, y, stored)
