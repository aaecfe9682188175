"""The Triton kernel of products whose scales change along K, or whose rows each have one of several weights."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..activation.kernel import activated, clamped_gate
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
def _e2m1_times(codes, scale, GROUP: tl.constexpr):
    """The even and the odd codes of each byte [N, K] times their element of `scale` [N, K / GROUP], over 2**14.

    Two codes an instruction, 2.75 a code with the product: a byte goes to each half of a word, its code's magnitude to
    the first bits of a float16 and its sign before them, which is the code over 2**14. The scale comes as 2**7 times
    itself, so that products of two codes' lack 2**14; nothing is rounded, since what a code and a scale multiply to has
    six bits.
    """
    n: tl.constexpr = codes.shape[0]
    k: tl.constexpr = codes.shape[1]
    by = (_decoded(scale) * 128.0).to(tl.float16)
    by = tl.broadcast_to(by[:, :, None], [n, k // GROUP, GROUP])
    even, odd = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, m, s;
        prmt.b32 t, $4, 0, 0x4140;
        shl.b32 m, t, 9;
        and.b32 m, m, 0x0E000E00;
        shl.b32 s, t, 12;
        lop3.b32 m, s, 0x80008000, m, 0xEA;
        mul.rn.f16x2 $0, m, $5;
        shl.b32 m, t, 5;
        and.b32 m, m, 0x0E000E00;
        shl.b32 s, t, 8;
        lop3.b32 m, s, 0x80008000, m, 0xEA;
        mul.rn.f16x2 $2, m, $5;
        prmt.b32 t, $4, 0, 0x4342;
        shl.b32 m, t, 9;
        and.b32 m, m, 0x0E000E00;
        shl.b32 s, t, 12;
        lop3.b32 m, s, 0x80008000, m, 0xEA;
        mul.rn.f16x2 $1, m, $6;
        shl.b32 m, t, 5;
        and.b32 m, m, 0x0E000E00;
        shl.b32 s, t, 8;
        lop3.b32 m, s, 0x80008000, m, 0xEA;
        mul.rn.f16x2 $3, m, $6;
        }
        """,
        "=r,=r,=r,=r,r,r,r",
        [tl.reshape(codes, [n, k // GROUP, GROUP]), by],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )
    return tl.reshape(even, [n, k]), tl.reshape(odd, [n, k])


@triton.jit
def _values(codes, scale, GROUP: tl.constexpr, WIDE: tl.constexpr):
    """`codes` [N, K] in WIDE, each group of GROUP multiplied by its element of `scale` [N, K / GROUP]."""
    n: tl.constexpr = codes.shape[0]
    k: tl.constexpr = codes.shape[1]
    # By float32: before Triton 3.8, sm_89 has no other way from FP8 to bfloat16.
    grouped = tl.reshape(codes.to(tl.float32), [n, k // GROUP, GROUP])
    return tl.reshape((grouped * _decoded(scale)[:, :, None]).to(WIDE), [n, k])


@triton.jit
def _operand(codes, scale, GROUP: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr):
    """What `tl.dot` takes of `codes`: themselves; in WIDE, scaled; of packed ones two parts, the even codes first.

    The order along K is the same in both operands, so that nothing has to be put back in between.
    """
    if WIDE is None:
        first, second = codes, codes
    elif WORDS:
        first, second = _e2m1_times(codes, scale, GROUP)
    elif codes.dtype == tl.uint8:
        first, second = _values(_e2m1(codes), scale, GROUP, WIDE), _values(_e2m1(codes >> 4), scale, GROUP, WIDE)
    else:
        first = _values(codes, scale, GROUP, WIDE)
        second = first
    return first, second


@triton.jit
def _add_products(
    y,
    x,
    even,
    odd,
    xs,
    b,
    b_scale,
    first_row,
    columns,
    start,
    last,
    b_row,
    b_scale_row,
    b_scale_group,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    B_SWIZZLED: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
    WORDS: tl.constexpr,
    SUMMED: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`y` [COLUMNS, ROWS] and the products of rows of `b`, from `first_row` on, with those of `x`, from `start` on.

    `columns` of them are there.
    """
    packed: tl.constexpr = x.dtype == tl.uint8
    exact: tl.constexpr = x.dtype == tl.int8
    each = tl.arange(0, COLUMNS)
    row, inside = first_row + each, each < columns
    k = start + tl.arange(0, DEPTH)
    wanted = inside[:, None]
    if not EVEN:
        wanted &= (k < last)[None, :]
    if TRANSPOSED:
        w = tl.load(b + row.to(tl.int64)[:, None] + (k * b_row)[None, :], wanted, other=0.0)
    else:
        w = tl.load(b + row.to(tl.int64)[:, None] * b_row + k[None, :], wanted, other=0.0)
    if GROUP == 0:
        y = tl.dot(w, tl.trans(even), y, max_num_imprecise_acc=SUMMED)
    elif NATIVE or WIDE is not None:
        g = (start // GROUP + tl.arange(0, DEPTH // GROUP))[None, :]
        ws = _scale_at(b_scale, (row // SHARED)[:, None], g, b_scale_row, b_scale_group, B_SWIZZLED)
        ws = tl.load(ws, inside[:, None] & (g * GROUP < last), other=0.0)
        if NATIVE:
            form: tl.constexpr = "e2m1" if packed else "e4m3"
            y = tl.dot_scaled(w, ws, form, tl.trans(x), xs, form, y)
        else:
            w_even, w_odd = _operand(w, ws, GROUP, WIDE, WORDS)
            y = tl.dot(w_even, tl.trans(even), y)
            if packed:
                y = tl.dot(w_odd, tl.trans(odd), y)
    else:
        tl.static_assert(GROUP % DEPTH == 0)
        if SHARED % COLUMNS == 0:
            ws = _scale_at(b_scale, first_row // SHARED, start // GROUP, b_scale_row, b_scale_group, B_SWIZZLED)
            by = (xs * _decoded(tl.load(ws)))[None, :]
        else:
            ws = _scale_at(b_scale, row // SHARED, start // GROUP, b_scale_row, b_scale_group, B_SWIZZLED)
            by = _decoded(tl.load(ws, inside, other=0.0))[:, None] * xs[None, :]
        summed = tl.dot(w, tl.trans(even), out_dtype=tl.int32 if exact else tl.float32)
        y += summed.to(tl.float32) * by
    return y


@triton.jit
def _rounded(y, a_global, b_global, bias, row, column, rows, columns, ALONE: tl.constexpr, kind: tl.constexpr):
    """The sums `y`, scaled and with their bias, as float32 of `kind`. ALONE: rounded before the bias, too."""
    if ALONE:
        y = _finish(y, a_global, b_global, None, row, column, rows, columns, False, False).to(kind).to(tl.float32)
        if bias is not None:
            y += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)
    else:
        y = _finish(y, a_global, b_global, bias, row, column, rows, columns, False, False)
    return y.to(kind).to(tl.float32)


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
    order,
    experts,
    rows,
    columns,
    depths,
    a_row,
    b_row,
    b_expert,
    a_scale_row,
    a_scale_group,
    b_scale_row,
    b_scale_group,
    b_scale_expert,
    alpha,
    limit,
    TOP: tl.constexpr,
    ACT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    A_SWIZZLED: tl.constexpr,
    B_SWIZZLED: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
    WORDS: tl.constexpr,
    SUMMED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of `a` times COLUMNS rows of `b` a program, over a share of the `depths` where they are split.

    Sizes along K are in bytes where operands are codes: of e2m1 ones, which come as uint8, there are two in each. GROUP
    of them share a scale, in `b` with SHARED rows; 0: there are no scales but `a_global` and `b_global`, of all. EVEN:
    `depths` is a multiple of DEPTH. How codes are multiplied:

    - ROWS is 1: one by one, in float32.
    - NATIVE: with their scales, by the matrix units.
    - WIDE is a dtype in which `code * scale` is exact: in that, by the matrix units.
      WORDS: packed ones by PTX, two an instruction.
    - WIDE is None: as codes, and each group's sum is scaled. DEPTH is no more than GROUP then. Without scales Hopper's
      units may sum SUMMED products in the bits that they have.

    With `order`, `b` is one of several, `b_expert` apart: block i of rows has the weight `experts[i]` (-1: none), and
    its rows of `out` are `order[i * ROWS:]`, `rows` where there is none; each TOP of them in turn read one of `a`.

    TRANSPOSED: rows of `b` lie next to one another, and `b_row` is the step along K; where ROWS is above 1.

    ACT: `b` has twice as many rows, and `out` is `act(first half) * second half`, each rounded before as in eager mode;
    INTERLEAVED: of every two rows the first and the second. "clamped" is GPT-OSS's, with `alpha` and `limit`.

    GROUPED blocks of rows are next to one another, then those of the next columns, so that they share them in the
    cache. With SPLITS > 1 the sums go to `sums`, [SPLITS, rows, columns], for `split_kernel`.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(columns, COLUMNS)
    row_blocks = tl.num_programs(0) // column_blocks
    together = GROUPED * column_blocks
    first_block = program // together * GROUPED
    count = tl.minimum(row_blocks - first_block, GROUPED)
    row_block = first_block + program % together % count
    column_block = program % together // count
    share = tl.cdiv(depths, SPLITS * DEPTH) * DEPTH
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, depths)
    row = row_block * ROWS + tl.arange(0, ROWS)
    pdl_wait(PDL)
    if order is not None:
        expert = tl.load(experts + row_block)
        last = tl.where(expert < 0, first, last)
        expert = tl.maximum(expert, 0).to(tl.int64)
        b += expert * b_expert
        if GROUP > 0:
            b_scale += expert * b_scale_expert
        if b_global is not None:
            b_global += expert
        if bias is not None:
            bias += expert * (columns * 2 if ACT is not None else columns)
        row = tl.load(order + row)
    read = row < rows
    source = row // TOP
    a_rows = a + source.to(tl.int64) * a_row
    first_column = column_block * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < columns
    packed: tl.constexpr = b.dtype.element_ty == tl.uint8
    groups: tl.constexpr = DEPTH // GROUP if GROUP > 0 and DEPTH > GROUP else 1
    group = tl.arange(0, groups)
    if ROWS == 1:
        part: tl.constexpr = DEPTH // groups
        inner = tl.arange(0, DEPTH)
        b_rows = b + column.to(tl.int64) * b_row
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
            xs = _scale_at(a_scale, source[:, None], g, a_scale_row, a_scale_group, A_SWIZZLED)
            ws = tl.load(ws, inside[:, None] & asked, other=0.0)
            xs = tl.load(xs, asked, other=0.0)
            if WORDS:
                w_even, w_odd = _e2m1_times(w, ws, GROUP)
                x_even, x_odd = _e2m1_times(x, xs, GROUP)
                products += tl.reshape(w_even.to(tl.float32) * x_even.to(tl.float32), [COLUMNS, groups, part])
                products += tl.reshape(w_odd.to(tl.float32) * x_odd.to(tl.float32), [COLUMNS, groups, part])
            else:
                if packed:
                    y = _e2m1(w).to(tl.float32) * _e2m1(x).to(tl.float32)
                    y += _e2m1(w >> 4).to(tl.float32) * _e2m1(x >> 4).to(tl.float32)
                else:
                    y = w.to(tl.float32) * x.to(tl.float32)
                products += tl.reshape(y, [COLUMNS, groups, part]) * (_decoded(ws) * _decoded(xs))[:, :, None]
        y = tl.sum(tl.sum(products, 2), 1)[:, None]
    else:
        # Gate and up of one column come out of one product where they lie side by side.
        both: tl.constexpr = 2 * COLUMNS if INTERLEAVED else COLUMNS
        ahead: tl.constexpr = 2 if INTERLEAVED else 1
        y = tl.zeros([both, ROWS], tl.float32)
        y_2 = y
        depth = tl.arange(0, DEPTH)
        for start in range(first, last, DEPTH):
            asked = read[:, None]
            if not EVEN:
                asked &= (start + depth < last)[None, :]
            x = tl.load(a_rows[:, None] + (start + depth)[None, :], asked, other=0.0)
            if NATIVE or WIDE is not None:
                g = (start // GROUP + group)[None, :]
                xs = _scale_at(a_scale, source[:, None], g, a_scale_row, a_scale_group, A_SWIZZLED)
                xs = tl.load(xs, read[:, None] & (g * GROUP < last), other=0.0)
            elif GROUP > 0:
                xs = _scale_at(a_scale, source, start // GROUP, a_scale_row, a_scale_group, A_SWIZZLED)
                xs = _decoded(tl.load(xs, read, other=0.0))
            else:
                xs = 0.0
            if NATIVE:
                even, odd = x, x
            else:
                even, odd = _operand(x, xs, GROUP, WIDE, WORDS)
            y = _add_products(
                y, x, even, odd, xs, b, b_scale, ahead * first_column, ahead * (columns - first_column), start, last,
                b_row, b_scale_row, b_scale_group, GROUP, SHARED, TRANSPOSED, B_SWIZZLED, WIDE, NATIVE, WORDS, SUMMED,
                EVEN, both, DEPTH,
            )  # fmt: skip
            if ACT is not None and not INTERLEAVED:
                y_2 = _add_products(
                    y_2, x, even, odd, xs, b, b_scale, columns + first_column, columns - first_column, start, last,
                    b_row, b_scale_row, b_scale_group, GROUP, SHARED, TRANSPOSED, B_SWIZZLED, WIDE, NATIVE, WORDS,
                    SUMMED, EVEN, COLUMNS, DEPTH,
                )  # fmt: skip
    if WORDS:
        y *= 16384.0
        if ACT is not None:
            y_2 *= 16384.0
    row, column = row[None, :], column[:, None]
    stored = inside[:, None] & read[None, :]
    at = row.to(tl.int64) * columns + column
    if SPLITS == 1:
        kind: tl.constexpr = out.dtype.element_ty
        if INTERLEAVED:
            pair = 2 * first_column + tl.arange(0, 2 * COLUMNS)[:, None]
            y = _rounded(y, a_global, b_global, bias, row, pair, rows, 2 * columns, order is not None, kind)
            y, y_2 = tl.split(tl.permute(tl.reshape(y, [COLUMNS, 2, ROWS]), (0, 2, 1)))
        else:
            y = _rounded(y, a_global, b_global, bias, row, column, rows, columns, order is not None, kind)
            if ACT is not None:
                beside = bias + columns if bias is not None else bias
                y_2 = _rounded(y_2, a_global, b_global, beside, row, column, rows, columns, order is not None, kind)
        if ACT == "clamped":
            y_2 = tl.clamp(y_2, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
            y = clamped_gate(y, alpha, limit, out) * (y_2 + 1.0).to(kind).to(tl.float32)
        elif ACT is not None:
            y = activated(y, ACT).to(kind).to(tl.float32) * y_2
        pdl_launch(PDL)
        tl.store(out + at, y.to(kind), stored)
    else:
        pdl_launch(PDL)
        tl.store(sums + tl.program_id(1).to(tl.int64) * rows * columns + at, y, stored)
