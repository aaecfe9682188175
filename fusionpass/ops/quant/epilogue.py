"""The Triton epilogue by which kernels quantise what they computed, and what their plans need to call it."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ...arch import Arch
from ...launch import Empty
from .layout import column_major_stride, swizzled_shape
from .scheme import Scheme

WIDEST = 32768
"""Columns of a row that one program holds in registers, for a scale per row."""


@triton.jit
def saturated(y, like, LOW: tl.constexpr, LIMIT: tl.constexpr, PAIRS: tl.constexpr):
    """float32 `y` clamped to what codes of the dtype of the pointer `like` can hold; NaN stays NaN."""
    # sm_90's conversion to e4m3 saturates by itself.
    if not (PAIRS and like.dtype.element_ty == tl.float8e4nv and LIMIT == 448):
        y = tl.clamp(y, LOW, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def encode(y, scale, like, LIMIT: tl.constexpr, DIVIDE: tl.constexpr, PAIRS: tl.constexpr):
    """float32 `y` over the float32 `scale`, clamped to what codes of the dtype of `like` can hold; NaN stays NaN."""
    # The reciprocal as the reference takes it: correctly rounded, whatever the target's fast division does.
    y = tl.div_rn(y, scale) if DIVIDE else y * tl.div_rn(1.0, scale)
    return saturated(y, like, -LIMIT, LIMIT, PAIRS)


@triton.jit
def larger(a, b):
    """The larger of two float32; NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def biased_exponent(step, POWER: tl.constexpr):
    """The e8m0 byte of float32 `step` >= 0 rounded to a power of two, as int32: 255 for NaN, 254 for infinity."""
    bits = step.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    if POWER == "ceil":
        # Adding all ones below the exponent carries into it unless they are all zero.
        exponent = tl.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23)
    elif POWER == "log2_ceil":
        # log2(2**k * (1 + n * 2**-23)) is k + n * 2**-23 / ln 2, and rounds to k where that is within half the spacing
        # of the floats above k: 2**(j - 24) for j = floor(log2(k)), where k < 0 floor(log2(-k - 1)).
        k = exponent - 127
        magnitude = tl.where(k < 0, -k - 1, k).to(tl.float32)
        power = (magnitude.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        above = (bits & 0x7FFFFF).to(tl.float32) > power * 0.34657359027997264
        # Subnormals have one power of two that matters, 2**-127, and eleven floats above it are as near.
        exponent = tl.where(bits <= 0x40000B, 0, tl.where(exponent == 0, 1, exponent + above.to(tl.int32)))
    return tl.where(step == step, tl.minimum(exponent, 254), 255)


@triton.jit
def store_scale(scales, value, row, group, rows, GROUPS: tl.constexpr, LAYOUT: tl.constexpr):
    """Scales of [ROWS, 1] rows and [1, n] groups, in their layout; rows and groups past the end pad it with zeros."""
    inside = (row < rows) & (group < GROUPS)
    if LAYOUT == "swizzled":
        across: tl.constexpr = (GROUPS + 3) // 4
        place = (row // 128 * across + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
        value = tl.where(inside, value, 0)
        inside = (row < (rows + 127) // 128 * 128) & (group < across * 4)
    elif LAYOUT == "column_major":
        unit: tl.constexpr = 128 // scales.dtype.element_ty.primitive_bitwidth
        # One row is a constant, not a tensor.
        place = row + group.to(tl.int64) * ((rows + unit - 1) // unit * unit)
    else:
        place = row * GROUPS + group
    tl.store(scales + place, value.to(scales.dtype.element_ty), inside)


@triton.jit
def pack(y, ROWS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """[ROWS, BLOCK] float32 as e2m1 codes, two a byte: [ROWS, BLOCK / 2]. Nearest even, saturating; NaN gives 6."""
    # A minimum of two numbers of which one is NaN is the other; the sign of a NaN differs between processors.
    y = tl.maximum(tl.minimum(y, 6.0), -6.0)
    a = tl.abs(y)
    # Codes in the binade of `power` (below 1: of 1) are as far apart as floats in that of 2**22 * power: the sum is
    # rounded to a code's value, and ends in the steps from `power`. Each binade from 1 on has two codes.
    power = tl.maximum(a, 1.0).to(tl.int32, bitcast=True) & 0x7F800000
    steps = (a + (power + 0x0B000002).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    code = steps + (power >> 22)
    even, odd = tl.split(tl.reshape(code, [ROWS, BLOCK // 2, 2]))
    signs = y.to(tl.int32, bitcast=True)
    plus, minus = tl.split(tl.reshape(signs, [ROWS, BLOCK // 2, 2]))
    if PAIRS:
        # Eight at once: the last byte of each code and the first of each number are gathered, then masked together.
        packed = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d, e;
            prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040; prmt.b32 a, a, b, 0x5410;
            prmt.b32 b, $5, $6, 0x0040; prmt.b32 c, $7, $8, 0x0040; prmt.b32 b, b, c, 0x5410;
            shl.b32 b, b, 4;
            prmt.b32 c, $9, $10, 0x0073; prmt.b32 d, $11, $12, 0x0073; prmt.b32 c, c, d, 0x5410;
            shr.u32 c, c, 4;
            prmt.b32 d, $13, $14, 0x0073; prmt.b32 e, $15, $16, 0x0073; prmt.b32 d, d, e, 0x5410;
            lop3.b32 a, a, b, 0x07070707, 0xe4;
            lop3.b32 c, c, d, 0x08080808, 0xe4;
            lop3.b32 $0, a, c, 0x77777777, 0xe4;
            }
            """,
            "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [even, odd, plus, minus],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        low = (even & 7) | (plus >> 28 & 8)
        packed = low | (((odd & 7) | (minus >> 28 & 8)) << 4)
    return packed


@triton.jit
def store_codes(
    y,
    given,
    q,
    scales,
    row,
    columns,
    mask,
    rows,
    WIDTH: tl.constexpr,
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
    start=0,
):
    """Quantise a tile: compute its scales, unless one is given alone, and write codes and scales.

    Args:
        y: float32 [ROWS, BLOCK], rounded as the reference's input was; anything where masked.
        given: a float32 scalar, or None.
        q: codes, [rows, WIDTH], or [rows, WIDTH / 2] uint8 for packed e2m1.
        scales: where they go, or None for a static scheme.
        row: int64 [ROWS, 1]. With swizzled scales the tiles must cover `covered_rows`.
        columns: [1, BLOCK], from a multiple of BLOCK; with a scale per row, the whole of it. `fewest_columns` is the
            least BLOCK.
        mask: which elements exist: broadcasts to [ROWS, BLOCK].
        rows: how many there are.
        WIDTH: of a row.
        GROUP: and the other constants: `scheme_constants`.
        start: the first column.
    """
    ROWS: tl.constexpr = y.shape[0]
    BLOCK: tl.constexpr = y.shape[1]
    if scales is None:
        step = given
    else:
        groups: tl.constexpr = WIDTH // GROUP if GROUP else 1
        if GROUP:
            y = tl.reshape(y, [ROWS, BLOCK // GROUP, GROUP])
            amax = tl.reduce(tl.abs(y), 2, larger)
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)[None, :]
            # A group past the end has 1, not 0, which a correctly rounded division would be slow with.
            amax = tl.where(group < groups, amax, 1.0)
        else:
            amax = tl.reduce(tl.where(mask, tl.abs(y), 0.0), 1, larger, keep_dims=True)
            group = tl.zeros([1, 1], tl.int32)
        if ZERO_IS_ONE:
            amax = tl.where(amax > 0, amax, 1.0)
        step = amax * INVERSE
        if INPUT == "bfloat16":
            step = step.to(tl.bfloat16).to(tl.float32)
        elif INPUT == "float16":
            step = step.to(tl.float16).to(tl.float32)
        if scales.dtype.element_ty == tl.float8e4nv:
            stored = tl.clamp(tl.div_rn(step, given), EPS, 448.0, propagate_nan=tl.PropagateNan.ALL)
            stored = stored.to(tl.float8e4nv)
            step = stored.to(tl.float32)
            factor = step * given if DIVIDE else tl.div_rn(tl.div_rn(1.0, given), step)
        else:
            step = tl.maximum(step, EPS, propagate_nan=tl.PropagateNan.ALL)
            if POWER != "none":
                exponent = biased_exponent(step, POWER)
            if scales.dtype.element_ty == tl.uint8:
                stored = exponent
                factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
                factor = tl.where(exponent == 254, 5.877471754111438e-39, factor)
                factor = tl.where(exponent == 0, 1.0, factor)
                factor = tl.where(exponent == 255, float("nan"), factor)
            else:
                if POWER != "none":
                    power = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
                    step = tl.where(step < float("inf"), power, step)
                stored = step
                factor = step if DIVIDE else tl.div_rn(1.0, step)
        store_scale(scales, stored, row, group, rows, groups, LAYOUT)
        if GROUP:
            factor = tl.expand_dims(factor, 2)
    if scales is None:
        y = encode(y, step, q, LIMIT, DIVIDE, PAIRS)
    else:
        y = tl.div_rn(y, factor) if DIVIDE and scales.dtype.element_ty != tl.uint8 else y * factor
        if q.dtype.element_ty != tl.uint8:
            y = saturated(y, q, LOW, LIMIT, PAIRS)
        if GROUP:
            y = tl.reshape(y, [ROWS, BLOCK])
    if q.dtype.element_ty == tl.uint8:
        codes = pack(y, ROWS, BLOCK, PAIRS)
        pairs = start // 2 + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(q + row * (WIDTH // 2) + pairs, codes.to(tl.uint8), (row < rows) & (pairs < WIDTH // 2))
    elif q.dtype.element_ty == tl.int8:
        # Nearest even: from 2**23 on, floats have no digits behind the point, and these end in those of the code. The
        # clamp keeps this from fusing into a multiply-add.
        codes = tl.where(y == y, (y + 12582912.0).to(tl.int32, bitcast=True), 0)
        tl.store(q + row * WIDTH + columns, codes.to(tl.int8), mask)
    else:
        tl.store(q + row * WIDTH + columns, y.to(q.dtype.element_ty), mask)


@triton.jit
def store_static(
    y,
    scale,
    q,
    row,
    columns,
    mask,
    WIDTH: tl.constexpr,
    LIMIT: tl.constexpr,
    DIVIDE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Codes of a tile by a further static scale, read here."""
    codes = encode(y, tl.load(scale).to(tl.float32), q, LIMIT, DIVIDE, PAIRS)
    tl.store(q + row * WIDTH + columns, codes.to(q.dtype.element_ty), mask)


def scheme_constants(kind: Scheme | None, x_dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs of `store_codes` by name, for values that were rounded to `x_dtype`; of no use for None."""
    kind = kind or Scheme.parse("fp8_static")
    return {
        "GROUP": kind.group or 0,
        "LIMIT": kind.max,
        "LOW": kind.min,
        # Not a division: torch's CUDA kernels multiply by the float32 reciprocal of a Python number.
        "INVERSE": torch.tensor(kind.denominator).reciprocal().item(),
        "INPUT": str(x_dtype).removeprefix("torch.") if kind.amax_dtype == "input" else "float32",
        "EPS": kind.eps,
        "ZERO_IS_ONE": kind.zero == "one",
        "POWER": kind.scale_rounding,
        "LAYOUT": kind.layout,
        "DIVIDE": kind.rounding == "divide",
    }


def code_outputs(kind: Scheme | None, shape: Sequence[Any]) -> dict[str, Empty | None]:
    """The buffers that `store_codes` writes for an input of `shape`, as its parameters `q` and `scales`."""
    if kind is None:
        return {"q": None, "scales": None}
    *lead, width = shape
    q = Empty((*lead, width // 2 if kind.packed else width), kind.code_dtype)
    if kind.static:
        return {"q": q, "scales": None}
    dtype, groups = kind.stored_scale_dtype, width // kind.group if kind.group else 1
    scales = Empty((*lead, groups), dtype)
    if kind.layout == "swizzled":
        scales = Empty(swizzled_shape(math.prod(lead), groups), dtype)
    elif kind.layout == "column_major":
        scales = Empty(scales.shape, dtype, column_major_stride(scales.shape, dtype.itemsize))
    return {"q": q, "scales": scales}


def covered_rows(kind: Scheme | None, rows: Any) -> Any:
    """How many rows the tiles must cover, so that the padding of swizzled scales is written too."""
    return swizzled_shape(rows, 1)[0] if kind is not None and kind.layout == "swizzled" else rows


def fewest_columns(kind: Scheme | None) -> int:
    """The least BLOCK: a whole group, four where they are swizzled."""
    if kind is None or kind.group is None:
        return 1
    return kind.group * 4 if kind.layout == "swizzled" else kind.group


def refuse_codes(arch: Arch, dtype: torch.dtype) -> str | None:
    """Why Triton does not convert between float32 and `dtype` on `arch`, or None."""
    if dtype == torch.float8_e4m3fn and not arch.has_fp8_e4m3fn:
        return f"Triton cannot convert to float8_e4m3fn on {arch.name}"
    if dtype == torch.float8_e4m3fnuz and arch.name != "gfx942":
        return f"{arch.name} does not convert to float8_e4m3fnuz"
    return None


def refuse_scheme(arch: Arch, scale: torch.Tensor | None, scheme: str, x: torch.Tensor | torch.device) -> str | None:
    """Why `store_codes` cannot quantise so on `arch`, or None.

    Args:
        arch: the target.
        scale: the scale that is given, or None.
        scheme: a scheme's string.
        x: what is quantised (fake, and of symbolic size, for all it matters), or its device alone.
    """
    kind = Scheme.parse(scheme)
    if kind.granularity == "block128":
        return "there is no kernel for scales of 128 x 128 blocks"
    if kind.layout in ("trtllm", "deepgemm"):
        return f"the layout {kind.layout!r} is for weights, which no kernel quantises"
    for dtype in (kind.dtype, kind.stored_scale_dtype):
        if reason := refuse_codes(arch, dtype):
            return reason
    device = x.device if isinstance(x, torch.Tensor) else x
    if kind.takes_scale:
        if scale is None or scale.numel() != 1:
            return "the scale is not one element"
        if scale.device != device or not scale.is_floating_point():
            return f"the scale is {scale.dtype} on {scale.device}, not a float on {device}"
    elif scale is not None:
        return f"{scheme!r} computes its scale"
    return _refuse_width(kind, x) if isinstance(x, torch.Tensor) and not kind.static else None


def _refuse_width(kind: Scheme, x: torch.Tensor) -> str | None:
    width: Any = x.shape[-1] if x.dim() else 0
    if not isinstance(width, int):
        return "the width is symbolic"
    if kind.group is None:
        fits = width <= WIDEST
        return None if fits else f"rows of {width} columns do not fit in registers (at most {WIDEST})"
    return f"the width {width} is not a multiple of {kind.group}" if width % kind.group else None
