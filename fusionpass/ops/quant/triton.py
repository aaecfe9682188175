"""Triton kernels of the quantisations, and what other kernels need to quantise what they computed."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...arch import Arch
from ...launch import Empty, Launch
from ..rows import FLOATS, row_count, row_stride
from .scheme import Scheme


@triton.jit
def encode(y, scale, LIMIT: tl.constexpr, DIVIDE: tl.constexpr):
    """float32 `y` over the float32 scalar `scale`, clamped to what the codes can hold; NaN stays NaN."""
    # The reciprocal as the reference takes it: correctly rounded, whatever the target's fast division does.
    y = tl.div_rn(y, scale) if DIVIDE else y * tl.div_rn(1.0, scale)
    return tl.clamp(y, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_kernel(
    x,
    scale,
    q,
    elements,
    x_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    DIVIDE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`q[i] = encode(x[i])`, one block a program: of all elements where `x` is contiguous, else of one row.

    EARLY reads the scale before the wait: the preceding kernel must not have written it.
    """
    pid = tl.program_id(0).to(tl.int64)
    if CONTIGUOUS:
        start = pid * BLOCK
        source = x + start
        target = q + start
        left = elements - start
    else:
        blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        row = pid // blocks
        first = (pid % blocks) * BLOCK
        source = x + row * x_row + first
        target = q + row * WIDTH + first
        left = WIDTH - first
    columns = tl.arange(0, BLOCK)
    if EARLY:
        step = tl.load(scale).to(tl.float32)
    if PDL:
        gdc_wait()
    if not EARLY:
        step = tl.load(scale).to(tl.float32)
    y = tl.load(source + columns, columns < left, other=0.0).to(tl.float32)
    if PDL:
        # Here as in the norm's kernel, and for its reasons.
        gdc_launch_dependents()
    y = encode(y, step, LIMIT, DIVIDE)
    tl.store(target + columns, y.to(q.dtype.element_ty), columns < left)


def refuse_scheme(arch: Arch, scale: torch.Tensor | None, scheme: str, device: torch.device) -> str | None:
    """Why `encode` cannot quantise so on `arch`, or None."""
    kind = Scheme.parse(scheme)
    if not kind.static or kind.granularity != "tensor":
        return f"the kernels know static per-tensor scales, not {scheme!r}"
    if kind.dtype == torch.float8_e4m3fn and not arch.has_fp8_e4m3fn:
        return f"Triton cannot convert to float8_e4m3fn on {arch.name}"
    if kind.dtype == torch.float8_e4m3fnuz and arch.name != "gfx942":
        return f"{arch.name} does not convert to float8_e4m3fnuz"
    if scale is None or scale.numel() != 1:
        return "the scale is not one element"
    if scale.device != device or not scale.is_floating_point():
        return f"the scale is {scale.dtype} on {scale.device}, not a float on {device}"
    return None


def plan_quantize(
    arch: Arch, x: torch.Tensor, scale: torch.Tensor | None = None, scheme: str = "fp8_static"
) -> Launch | str:
    """The launch that runs `quantize` on `arch`, or why it cannot."""
    if reason := refuse_scheme(arch, scale, scheme, x.device):
        return reason
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    stride = row_stride(x, "x")
    if isinstance(stride, str):
        return stride
    width: Any = x.shape[-1]
    if not isinstance(width, int):
        return "the width is symbolic"
    if width == 0:
        return "the rows are empty"
    kind = Scheme.parse(scheme)
    elements = row_count(x) * width
    contiguous = isinstance(stride, int) and stride == width
    block = 2048 if contiguous else min(4096, triton.next_power_of_2(width))
    blocks = (elements + block - 1) // block if contiguous else row_count(x) * triton.cdiv(width, block)
    return Launch(
        quantize_kernel,
        (blocks,),
        {
            "x": x,
            "scale": scale,
            "q": Empty(tuple(x.shape), kind.dtype),
            "elements": elements,
            "x_row": stride,
            "WIDTH": width,
            "BLOCK": block,
            "LIMIT": kind.max,
            "DIVIDE": kind.rounding == "divide",
            "CONTIGUOUS": contiguous,
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=("q",),
        num_warps=max(1, min(256, block // 8) // arch.warp_size),
        pdl=arch.has_pdl,
        early=("scale",),
    )
