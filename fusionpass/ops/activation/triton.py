"""Triton kernel of the gated activations."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...arch import Arch
from ...launch import Empty, Launch
from ..quant.scheme import Scheme
from ..quant.triton import encode, refuse_scheme
from ..rows import FLOATS, alike, row_count, row_stride, static


@triton.jit
def activate(x, ACT: tl.constexpr):
    """SiLU, or GELU by the error function or by tanh, of float32 `x`."""
    if ACT == "silu":
        y = tl.div_rn(x, 1.0 + tl.exp(-x))
    elif ACT == "gelu":
        y = (x * 0.5) * (tl.erf(x * 0.7071067811865476) + 1.0)
    else:
        inner = (x + x * x * x * 0.044715) * 0.7978845608028654
        # tanh by the exponential of a negative number, which cannot overflow.
        power = tl.exp(-2.0 * tl.abs(inner))
        tanh = tl.div_rn(1.0 - power, 1.0 + power)
        y = (x * 0.5) * (tl.where(inner < 0, -tanh, tanh) + 1.0)
    return y


@triton.jit
def activation_kernel(
    gate,
    up,
    scale,
    q,
    product,
    gate_row,
    up_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    DIVIDE: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One block of a row a program: `product = act(gate) * up`, and its codes `q` where there are any.

    EARLY reads the scale before the wait: the preceding kernel must not have written it.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks
    columns = (pid % blocks) * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    inside = columns < WIDTH
    if EARLY:
        step = tl.load(scale).to(tl.float32)
    if PDL:
        gdc_wait()
    if scale is not None and not EARLY:
        step = tl.load(scale).to(tl.float32)
    x = tl.load(gate + row * gate_row + columns, inside, other=0.0)
    y = tl.load(up + row * up_row + columns, inside, other=0.0).to(tl.float32)
    if PDL:
        # Here as in the norm's kernel, and for its reasons.
        gdc_launch_dependents()
    activated = activate(x.to(tl.float32), ACT).to(gate.dtype.element_ty).to(tl.float32)
    rounded = (activated * y).to(gate.dtype.element_ty)
    if product is not None:
        tl.store(product + row * WIDTH + columns, rounded, inside)
    if q is not None:
        codes = encode(rounded.to(tl.float32), step, LIMIT, DIVIDE).to(q.dtype.element_ty)
        tl.store(q + row * WIDTH + columns, codes, inside)


def plan_silu_mul(arch: Arch, gate: torch.Tensor, up: torch.Tensor) -> Launch | str:
    """The launch that runs `silu_mul` on `arch`, or why it cannot."""
    return _plan(arch, gate, up, "silu")


def plan_gelu_mul(arch: Arch, gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> Launch | str:
    """The launch that runs `gelu_mul` on `arch`, or why it cannot."""
    return _plan(arch, gate, up, "gelu" if approximate == "none" else "gelu_tanh")


def plan_silu_mul_quantize(
    arch: Arch,
    gate: torch.Tensor,
    up: torch.Tensor,
    scale: torch.Tensor | None = None,
    scheme: str = "fp8_static",
    product_out: bool = False,
) -> Launch | str:
    """The launch that runs `silu_mul_quantize` on `arch`, or why it cannot."""
    return _plan(arch, gate, up, "silu", scale, scheme, product_out)


def plan_gelu_mul_quantize(
    arch: Arch,
    gate: torch.Tensor,
    up: torch.Tensor,
    scale: torch.Tensor | None = None,
    approximate: str = "none",
    scheme: str = "fp8_static",
    product_out: bool = False,
) -> Launch | str:
    """The launch that runs `gelu_mul_quantize` on `arch`, or why it cannot."""
    return _plan(arch, gate, up, "gelu" if approximate == "none" else "gelu_tanh", scale, scheme, product_out)


def block_of(rows: int | None, width: int) -> int:
    """Elements a program takes; `rows` is None where the count is symbolic, and then as for many.

    Measured on an H100: few elements are spread over more programs, many want wider ones (docs/kernels.md).
    """
    elements = rows * width if rows is not None else 2**31
    most = 512 if elements <= 2**17 else 1024 if elements <= 2**20 else 2048
    return min(most, int(triton.next_power_of_2(width)))


def _plan(
    arch: Arch,
    gate: torch.Tensor,
    up: torch.Tensor,
    act: str,
    scale: torch.Tensor | None = None,
    scheme: str | None = None,
    product_out: bool = True,
) -> Launch | str:
    if scheme is not None and (reason := refuse_scheme(arch, scale, scheme, gate.device)):
        return reason
    if gate.dtype not in FLOATS or not alike(gate, up):
        return f"gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}"
    strides = [row_stride(gate, "gate"), row_stride(up, "up")]
    for stride in strides:
        if isinstance(stride, str):
            return stride
    width: Any = gate.shape[-1]
    if not isinstance(width, int):
        return "the width is symbolic"
    if width == 0:
        return "the rows are empty"
    kind = None if scheme is None else Scheme.parse(scheme)
    shape, block = tuple(gate.shape), block_of(static(row_count(gate)), width)
    outputs = {
        "q": Empty(shape, kind.dtype) if kind else None,
        "product": Empty(shape, gate.dtype) if product_out else None,
    }
    return Launch(
        activation_kernel,
        (row_count(gate) * triton.cdiv(width, block),),
        {
            "gate": gate,
            "up": up,
            "scale": scale,
            **outputs,
            "gate_row": strides[0],
            "up_row": strides[1],
            "WIDTH": width,
            "BLOCK": block,
            "VECTOR": 16 // gate.element_size(),
            "ACT": act,
            "LIMIT": kind.max if kind else 0.0,
            "DIVIDE": kind is not None and kind.rounding == "divide",
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=tuple(name for name, output in outputs.items() if output is not None),
        num_warps=max(1, min(256, block // 8) // arch.warp_size),
        pdl=arch.has_pdl,
        early=("scale",) if kind else (),
    )
