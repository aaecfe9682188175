"""Between float32 and 16 bits, in kernels.

PAIRS takes two numbers of a register at a time, on sm_90 and newer. Left to the compiler, widening two of bfloat16
takes three instructions instead of two, and what is rounded but used as float32 again is rounded one by one, by a unit
that does an eighth of what a multiprocessor multiplies.
"""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..arch import Arch


def in_pairs(arch: Arch, elements: int, warps: int) -> bool:
    """The PAIRS of these functions, and of those that want eight of a thread, for programs of so many elements."""
    return arch.capability >= 90 and elements >= 8 * arch.warp_size * warps


@triton.jit
def widened(x, PAIRS: tl.constexpr):
    """`x` as float32."""
    if PAIRS and x.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def rounded(y, kind: tl.constexpr, PAIRS: tl.constexpr):
    """float32 `y` rounded to the dtype `kind`, as float32."""
    if PAIRS and kind == tl.bfloat16:
        x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [y], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif PAIRS and kind == tl.float16:
        x = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [y], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        x = y.to(kind)
    return widened(x, PAIRS)
