"""Triton kernel of the gated activations."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ...arch import Arch
from ...launch import Empty, Launch
from ...tuning.rows import Cut, choose_rows
from ..derive import MORE
from ..pdl import pdl_launch, pdl_wait
from ..quant.epilogue import (
    code_outputs,
    covered_rows,
    fewest_columns,
    refuse_scheme,
    scheme_constants,
    store_codes,
    store_static,
)
from ..quant.scheme import Scheme
from ..rows import FLOATS, alike, known, row_count, row_stride, static


@triton.jit
def sigmoid(x):
    """Of float32 `x`."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, ACT: tl.constexpr):
    """SiLU, GELU by the error function or by tanh, or squared ReLU, of float32 `x`."""
    if ACT == "silu":
        # Not correctly rounded: that division has a slow path, which zeros take, and those are all that a mask leaves.
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        y = (x * 0.5) * (tl.erf(x * 0.7071067811865476) + 1.0)
    elif ACT == "gelu_tanh":
        inner = (x + x * x * x * 0.044715) * 0.7978845608028654
        # tanh by the exponential of a negative number, which cannot overflow.
        power = tl.exp(-2.0 * tl.abs(inner))
        tanh = (1.0 - power) / (1.0 + power)
        y = (x * 0.5) * (tl.where(inner < 0, -tanh, tanh) + 1.0)
    else:
        # Not a maximum, which would lose a NaN.
        positive = tl.where(x < 0, 0.0, x)
        y = positive * positive
    return y


@triton.jit
def clamped_gate(x, alpha, limit, like):
    """GPT-OSS's gate of float32 `x`, each step rounded to the dtype of the pointer `like`."""
    kind: tl.constexpr = like.dtype.element_ty
    x = tl.where(x > limit, limit, x)
    slope = sigmoid((x * alpha).to(kind).to(tl.float32)).to(kind).to(tl.float32)
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
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One block of a row a program: `product = act(gate) * up`, or without `up`, and its codes where there are any.

    EARLY reads the scale before the wait: the preceding kernel must not have written it.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // blocks) + tl.zeros([1, 1], tl.int64)
    start = (pid % blocks).to(tl.int32) * BLOCK
    columns = start + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]
    inside = columns < WIDTH
    if LAYOUT == "swizzled":
        inside = inside & (row < rows)
    step = None
    if scale is not None and EARLY:
        step = tl.load(scale).to(tl.float32)
    pdl_wait(PDL)
    if scale is not None and not EARLY:
        step = tl.load(scale).to(tl.float32)
    x = tl.load(gate + row * gate_row + columns * step_of_columns, inside, other=0.0)
    if up is not None:
        u = tl.load(up + row * up_row + columns * step_of_columns, inside, other=0.0).to(tl.float32)
    pdl_launch(PDL)
    if ACT == "clamped":
        y = clamped_gate(x.to(tl.float32), alpha, limit, gate)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        u = (u + 1.0).to(gate.dtype.element_ty).to(tl.float32)
    else:
        y = activated(x.to(tl.float32), ACT).to(gate.dtype.element_ty).to(tl.float32)
    if up is not None:
        y = (y * u).to(gate.dtype.element_ty).to(tl.float32)
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
            start,
        )
    if q_2 is not None:
        store_static(y, scale_2, q_2, row, columns, inside, WIDTH, LIMIT, DIVIDE)
    if q_3 is not None:
        store_static(y, scale_3, q_3, row, columns, inside, WIDTH, LIMIT, DIVIDE)
    if q_4 is not None:
        store_static(y, scale_4, q_4, row, columns, inside, WIDTH, LIMIT, DIVIDE)
    if q_5 is not None:
        store_static(y, scale_5, q_5, row, columns, inside, WIDTH, LIMIT, DIVIDE)


def plan_silu_mul(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `silu_mul` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "silu", **arguments)


def plan_gelu_mul(arch: Arch, approximate: str = "none", **arguments: Any) -> Launch | str:
    """The launch that runs `gelu_mul` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "gelu" if approximate == "none" else "gelu_tanh", **arguments)


def plan_clamped_swiglu(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `clamped_swiglu` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "clamped", **arguments)


def plan_silu(arch: Arch, x: torch.Tensor, **arguments: Any) -> Launch | str:
    """The launch that runs `silu` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "silu", x, **arguments)


def plan_gelu(arch: Arch, x: torch.Tensor, approximate: str = "none", **arguments: Any) -> Launch | str:
    """The launch that runs `gelu` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "gelu" if approximate == "none" else "gelu_tanh", x, **arguments)


def plan_relu_squared(arch: Arch, x: torch.Tensor, **arguments: Any) -> Launch | str:
    """The launch that runs `relu_squared` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "relu_squared", x, **arguments)


def configure(arch: Arch, kind: Scheme | None, rows: int | None, width: int) -> Cut:
    """The rule for `rows` rows (None: any number) of `width` columns: a whole row where it has one scale, else a part.

    Measured on an H100: few elements are spread over more programs, many want wider ones, but no wider than 1024 where
    groups are scaled: their arithmetic is what a row that does not fill its last block wastes (docs/kernels.md).
    """
    block = int(triton.next_power_of_2(width))
    if kind is not None and kind.granularity == "token":
        threads = min(512, max(32, block // 16))
    else:
        elements = rows * width if rows is not None else 2**31
        most = 512 if elements <= 2**17 else 1024 if elements <= 2**20 else 2048
        most = 1024 if kind is not None and kind.group else most
        block = max(min(most, block), fewest_columns(kind))
        threads = min(256, block // 8)
    return Cut(1, block, max(1, threads // arch.warp_size))


def _column_stride(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[Any, Any, Any] | str:
    """The strides between rows of both and between columns: 1, or 2 where gate and up are interleaved in one row."""
    tensors = {"gate": gate} if up is None else {"gate": gate, "up": up}
    steps = [t.stride(-1) for t in tensors.values()]
    if all(known(step == 2) for step in steps) and all(known(t.shape[-1] > 1) for t in tensors.values()):
        halves = [t.as_strided(t.shape, (*(s // 2 for s in t.stride()[:-1]), 1)) for t in tensors.values()]
        odd = any(not known(s % 2 == 0) for t in tensors.values() for s in t.stride()[:-1])
        rows = ["odd row strides" if odd else row_stride(t, name) for name, t in zip(tensors, halves, strict=True)]
        scale = 2
    else:
        rows, scale = [row_stride(t, name) for name, t in tensors.items()], 1
    for found in rows:
        if isinstance(found, str):
            return found
    return rows[0] * scale, rows[-1] * scale, scale


def _plan(
    arch: Arch,
    act: str,
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    alpha: float | None = None,
    limit: float | None = None,
    scale: torch.Tensor | None = None,
    scheme: str | None = None,
    product_out: bool | None = None,
    activation_out: bool | None = None,
    **more: torch.Tensor | None,
) -> Launch | str:
    extra = {name: s for name, s in more.items() if s is not None}
    for given in (scale, *extra.values()):
        if scheme is not None and (reason := refuse_scheme(arch, given, scheme, gate)):
            return reason
    if gate.dtype not in FLOATS or (up is not None and not alike(gate, up)):
        given_up = f", up is {up.dtype} {tuple(up.shape)}" if up is not None else ""
        return f"gate is {gate.dtype} {tuple(gate.shape)}{given_up}"
    width: Any = gate.shape[-1] if gate.dim() else 0
    if not isinstance(width, int):
        return "the width is symbolic"
    if width == 0:
        return "the rows are empty"
    strides = _column_stride(gate, up)
    if isinstance(strides, str):
        return strides
    codes = None if scheme is None else Scheme.parse(scheme)
    rows, shape = row_count(gate), tuple(gate.shape)
    name = {"gelu_tanh": "gelu", "clamped": "clamped_swiglu"}.get(act, act) + "_mul" * (
        up is not None and act != "clamped"
    )
    name += "_quantize" * (codes is not None)
    size = (arch, static(rows), width)
    rule, whole = configure(arch, codes, *size[1:]), codes is not None and codes.granularity == "token"
    fewest = fewest_columns(codes)
    cut = choose_rows(rule, name, scheme, *size, gate.element_size(), whole=whole, fewest=fewest, most_rows=1)
    if isinstance(cut, str):
        return cut
    made = code_outputs(codes, shape)
    outputs = {
        "q": made["q"],
        "scales": made["scales"],
        **{f"q_{i}": made["q"] if f"scale_{i}" in extra else None for i in range(2, 6)},
        "product": Empty(shape, gate.dtype) if codes is None or product_out or activation_out else None,
    }
    return Launch(
        activation_kernel,
        (covered_rows(codes, rows) * triton.cdiv(width, cut.columns),),
        {
            "gate": gate,
            "up": up,
            "scale": scale,
            **{name: more.get(name) for name in MORE},
            **outputs,
            "rows": rows,
            "gate_row": strides[0],
            "up_row": strides[1],
            "step_of_columns": strides[2],
            "alpha": alpha,
            "limit": limit,
            "WIDTH": width,
            "BLOCK": cut.columns,
            "VECTOR": 16 // gate.element_size(),
            "ACT": act,
            **scheme_constants(codes, gate.dtype),
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=tuple(name for name, output in outputs.items() if output is not None),
        num_warps=cut.warps,
        pdl=arch.has_pdl,
        early=("scale",) if scale is not None else (),
    )
