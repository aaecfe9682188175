"""One Triton kernel for the RMSNorm family: a residual added in front or not, codes, norm and sum written or not."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait
from ..quant.epilogue import store_codes, store_static
from ..rounding import rounded, widened


@triton.jit
def normalised(h, eps, inside, WIDTH: tl.constexpr, CENTRE: tl.constexpr):
    """float32 rows `h` (zero outside) over their root mean square; with CENTRE deviations over the standard one."""
    if CENTRE:
        h = tl.where(inside, h - tl.sum(h, 1, keep_dims=True) / WIDTH, 0.0)
    variance = tl.sum(h * h, 1, keep_dims=True) / WIDTH
    return h * tl.rsqrt(variance + eps)


@triton.jit
def weighted(
    y,
    w,
    b,
    offset,
    like,
    wide,
    CENTRE: tl.constexpr,
    AFTER: tl.constexpr,
    LAST: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Normalised float32 rows times `w` and plus `b`, None where there is none, rounded where the reference rounds.

    `like` and `wide` are pointers of the dtypes of x and of the weight. AFTER rounds once, behind weight and bias; LAST
    leaves even that to a modulation.
    """
    kind: tl.constexpr = like.dtype.element_ty
    if w is None:
        if b is not None:
            y += widened(b, PAIRS and y.shape[0] == 1)
        if not LAST:
            y = rounded(y, kind, PAIRS)
    elif AFTER:
        scaling = widened(w, PAIRS and y.shape[0] == 1)
        if offset is not None:
            scaling += offset
            if CENTRE:
                scaling = scaling.to(wide.dtype.element_ty).to(tl.float32)
        y = y * scaling
        if b is not None:
            y += widened(b, PAIRS and y.shape[0] == 1)
        if not LAST:
            y = rounded(y, kind, PAIRS)
    else:
        y = y.to(kind).to(tl.float32) * w.to(tl.float32)
        # The product has the promoted dtype: that of both, or float32.
        if kind == wide.dtype.element_ty:
            y = widened(y.to(kind), PAIRS)
    return y


@triton.jit
def rounded_as(y, a, b):
    """float32 `y` rounded to the dtype to which those of the pointers `a` and `b` promote, if it has 16 bits."""
    if a.dtype.element_ty == b.dtype.element_ty:
        y = y.to(a.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def norm_kernel(
    x,
    residual,
    second,
    inner,
    weight,
    bias,
    mod_scale,
    mod_shift,
    scale,
    scale_2,
    scale_3,
    scale_4,
    scale_5,
    q,
    scales,
    q_2,
    q_3,
    q_4,
    q_5,
    norm,
    total,
    rows,
    x_row,
    residual_row,
    second_row,
    scale_row,
    shift_row,
    per_modulation,
    unit,
    eps,
    offset,
    alpha,
    NORM: tl.constexpr,
    AFTER: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUP: tl.constexpr,
    LIMIT: tl.constexpr,
    LOW: tl.constexpr,
    INVERSE: tl.constexpr,
    INPUT: tl.constexpr,
    EPS: tl.constexpr,
    ZERO_IS_ONE: tl.constexpr,
    POWER: tl.constexpr,
    LAYOUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS rows a program, each held in registers; pointers and numbers are None where the op has no such thing.

    float32 arithmetic, rounded where the reference rounds. NORM is "rms", "layer", or "" for a sum alone. EARLY reads
    weights, bias and given scales before the wait: the preceding kernel must not have written them. LATE reads those
    weights and biases when the row is normalised, so that they take no registers before.
    """
    # Left to itself, the one-byte output would set the layout of all: 32-byte strides in the loads, a shuffle through
    # shared memory before the wider stores.
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]
    inside = columns < WIDTH
    w = None
    b = None
    v = None
    step = None
    late: tl.constexpr = EARLY and LATE
    if EARLY and not late:
        if weight is not None:
            w = tl.load(weight + columns, inside, other=0.0, eviction_policy="evict_last")
        if bias is not None:
            b = tl.load(bias + columns, inside, other=0.0, eviction_policy="evict_last")
    if EARLY:
        if inner is not None:
            v = tl.load(inner + columns, inside, other=0.0, eviction_policy="evict_last")
        if scale is not None:
            step = tl.load(scale).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = inside
    if ROWS > 1 or LAYOUT == "swizzled":
        mask = inside & (row < rows)
    pdl_wait(PDL)
    # A sum is one 16-bit instruction for two, which the compiler finds by itself.
    h = widened(tl.load(x + row * x_row + columns, mask, other=0.0), PAIRS and residual is None)
    if residual is not None:
        r = tl.load(residual + row * residual_row + columns, mask, other=0.0).to(tl.float32)
    if second is not None:
        r += tl.load(second + row * second_row + columns, mask, other=0.0).to(tl.float32)
        r = r.to(x.dtype.element_ty).to(tl.float32)
    if not EARLY:
        # Before any store: loads stay in program order with them, and the first store waits for x.
        if weight is not None:
            w = tl.load(weight + columns, inside, other=0.0, eviction_policy="evict_last")
        if bias is not None:
            b = tl.load(bias + columns, inside, other=0.0, eviction_policy="evict_last")
        if inner is not None:
            v = tl.load(inner + columns, inside, other=0.0, eviction_policy="evict_last")
        if scale is not None:
            step = tl.load(scale).to(tl.float32)
    if mod_scale is not None:
        group = row // per_modulation
        m = tl.load(mod_scale + group * scale_row + columns, mask, other=0.0)
        shift = tl.load(mod_shift + group * shift_row + columns, mask, other=0.0)
    pdl_launch(PDL)
    if inner is not None:
        h = weighted(normalised(h, eps, inside, WIDTH, False), v, None, offset, x, inner, False, AFTER, False, PAIRS)
    if alpha is not None:
        # Chosen by what the compiler does not know, or float32 would be scaled and added at once.
        h = tl.where(unit > 0.0, h * alpha, 0.0).to(x.dtype.element_ty).to(tl.float32)
    if residual is not None:
        # LLVM turns arithmetic on widened 16-bit numbers into 16-bit arithmetic, and then a product and its sum into a
        # fused multiply-add, which skips the rounding in between: `unit` is 1, and hides that `r` was one.
        added = (h + (r if inner is None else r * unit)).to(x.dtype.element_ty)
        if total is not None:
            tl.store(total + row * WIDTH + columns, added, mask)
        h = widened(added, PAIRS)
    y = h
    if NORM != "":
        y = normalised(h, eps, inside, WIDTH, NORM == "layer")
        if late:
            if weight is not None:
                w = tl.load(weight + columns, inside, other=0.0, eviction_policy="evict_last")
            if bias is not None:
                b = tl.load(bias + columns, inside, other=0.0, eviction_policy="evict_last")
        like = x if weight is None else weight
        y = weighted(y, w, b, offset, x, like, NORM == "layer", AFTER, LAST, PAIRS and q is not None)
    if mod_scale is not None:
        # Each step rounded to the dtype that promotion gives it. LLVM would make 16-bit arithmetic of it, and then a
        # fused multiply-add, as above.
        one = (unit + m.to(tl.float32)).to(m.dtype).to(tl.float32)
        if LAST:
            y = (y * one + shift.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
        elif WIDE:
            y = y * one + shift.to(tl.float32)
        else:
            y = rounded_as(y * one, x, mod_scale)
            y = rounded_as(y + shift.to(tl.float32) * unit, x, mod_shift)
    if norm is not None:
        tl.store(norm + row * WIDTH + columns, y.to(norm.dtype.element_ty), mask)
    if q is not None:
        store_codes(
            y,
            step,
            q,
            scales,
            row,
            columns,
            mask,
            rows,
            WIDTH,
            GROUP,
            LIMIT,
            LOW,
            INVERSE,
            INPUT,
            EPS,
            ZERO_IS_ONE,
            POWER,
            LAYOUT,
            DIVIDE,
            PAIRS,
        )
    if q_2 is not None:
        store_static(y, scale_2, q_2, row, columns, mask, WIDTH, LIMIT, DIVIDE, PAIRS)
    if q_3 is not None:
        store_static(y, scale_3, q_3, row, columns, mask, WIDTH, LIMIT, DIVIDE, PAIRS)
    if q_4 is not None:
        store_static(y, scale_4, q_4, row, columns, mask, WIDTH, LIMIT, DIVIDE, PAIRS)
    if q_5 is not None:
        store_static(y, scale_5, q_5, row, columns, mask, WIDTH, LIMIT, DIVIDE, PAIRS)
