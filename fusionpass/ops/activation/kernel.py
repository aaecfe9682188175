"""Triton kernel of the gated activations."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait
from ..quant.epilogue import store_codes, store_static
from ..rounding import rounded, widened


@triton.jit
def quotient(a, b, PAIRS: tl.constexpr):
    """Float32 `a / b` for `b` from 0.25 to infinity; off by two units at most.

    A correctly rounded division has a slow path, which zeros take, and those are all that a mask leaves; Triton's own
    takes apart what a reciprocal would lose below 2**-126.
    """
    if PAIRS:
        y = a * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [b], tl.float32, is_pure=True, pack=1)
    else:
        y = a / b
    return y


@triton.jit
def sigmoid(x, PAIRS: tl.constexpr = False):
    """Of float32 `x`."""
    return quotient(0.25, 0.25 + 0.25 * tl.exp2(x * -1.4426950408889634), PAIRS)


@triton.jit
def with_sign_of(y, x):
    """Float32 `y` >= 0, negative where the sign of `x` is."""
    bits = y.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def erf_of_root_half(x):
    """erf(x / sqrt(2)) of float32 `x`, to 9e-8.

    As 1 - 2**(-a * R(a)) for a = |x|: where that loses digits, near 0, a GELU adds 1. R is the polynomial whose largest
    error, 1.6e-8 of erf, is the smallest for |x| up to 6.3; beyond, the power is less than half a unit of 1.
    """
    a = tl.abs(x)
    r = a * 2.83490973e-06 - 3.93776560e-05
    r = r * a + 1.86180083e-04
    r = r * a + 1.36936725e-04
    r = r * a - 7.06342055e-03
    r = r * a + 5.24961786e-02
    r = r * a + 4.59208197e-01
    r = r * a + 1.15110521
    return with_sign_of(1.0 - tl.exp2(-(r * a)), x)


@triton.jit
def activated(x, ACT: tl.constexpr, PAIRS: tl.constexpr = False):
    """SiLU, GELU by the error function or by tanh, or squared ReLU, of float32 `x`."""
    if ACT == "silu":
        # Both by a quarter, so that the reciprocal is no subnormal number.
        y = quotient(x * 0.25, 0.25 + 0.25 * tl.exp2(x * -1.4426950408889634), PAIRS)
    elif ACT == "gelu":
        y = (x * 0.5) * (erf_of_root_half(x) + 1.0)
    elif ACT == "gelu_tanh":
        # tanh by the power of a negative number, which cannot overflow: 2 * log2(e) * sqrt(2 / pi) is in the factor.
        inner = (x + x * x * x * 0.044715) * 2.302208198144325
        power = tl.exp2(-tl.abs(inner))
        y = (x * 0.5) * (with_sign_of(1.0 - quotient(2.0 * power, 1.0 + power, PAIRS), x) + 1.0)
    else:
        # Not a maximum, which would lose a NaN.
        positive = tl.where(x < 0, 0.0, x)
        y = positive * positive
    return y


@triton.jit
def clamped_gate(x, alpha, limit, like, PAIRS: tl.constexpr = False):
    """GPT-OSS's gate of float32 `x`, each step rounded to the dtype of the pointer `like`."""
    kind: tl.constexpr = like.dtype.element_ty
    x = tl.where(x > limit, limit, x)
    slope = sigmoid((x * alpha).to(kind).to(tl.float32), PAIRS).to(kind).to(tl.float32)
    return (x * slope).to(kind).to(tl.float32)


@triton.jit
def activation_kernel(
    gate,
    up,
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
    product,
    rows,
    gate_row,
    up_row,
    step_of_columns,
    alpha,
    limit,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    ACT: tl.constexpr,
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
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A tile of ROWS rows and BLOCK columns a program: `product = act(gate) * up`, or without `up`, and its codes.

    Pointers are None where the op has no such thing. EARLY reads the scale before the wait: the preceding kernel must
    not have written it.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    start = (pid % blocks).to(tl.int32) * BLOCK
    columns = start + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]
    inside = columns < WIDTH
    if ROWS > 1 or LAYOUT == "swizzled":
        inside = inside & (row < rows)
    step = None
    if scale is not None and EARLY:
        step = tl.load(scale).to(tl.float32)
    pdl_wait(PDL)
    if scale is not None and not EARLY:
        step = tl.load(scale).to(tl.float32)
    x = widened(tl.load(gate + row * gate_row + columns * step_of_columns, inside, other=0.0), PAIRS)
    if up is not None:
        u = tl.load(up + row * up_row + columns * step_of_columns, inside, other=0.0)
    pdl_launch(PDL)
    kind: tl.constexpr = gate.dtype.element_ty
    NARROW: tl.constexpr = PAIRS and q is not None
    if ACT == "clamped":
        y = clamped_gate(x, alpha, limit, gate, PAIRS)
        u = tl.clamp(u.to(tl.float32), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        y = widened((y * (u + 1.0).to(kind).to(tl.float32)).to(kind), NARROW)
    elif up is not None:
        # A product of two 16-bit numbers is one 16-bit instruction for two, which the compiler finds by itself.
        y = widened((activated(x, ACT, PAIRS).to(kind).to(tl.float32) * u.to(tl.float32)).to(kind), NARROW)
    else:
        y = rounded(activated(x, ACT, PAIRS), kind, NARROW)
    if product is not None:
        tl.store(product + row * WIDTH + columns, y.to(gate.dtype.element_ty), inside)
    if q is not None:
        store_codes(
            y,
            step,
            q,
            scales,
            row,
            columns,
            inside,
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
            start,
        )
    if q_2 is not None:
        store_static(y, scale_2, q_2, row, columns, inside, WIDTH, LIMIT, DIVIDE, PAIRS)
    if q_3 is not None:
        store_static(y, scale_3, q_3, row, columns, inside, WIDTH, LIMIT, DIVIDE, PAIRS)
    if q_4 is not None:
        store_static(y, scale_4, q_4, row, columns, inside, WIDTH, LIMIT, DIVIDE, PAIRS)
    if q_5 is not None:
        store_static(y, scale_5, q_5, row, columns, inside, WIDTH, LIMIT, DIVIDE, PAIRS)
