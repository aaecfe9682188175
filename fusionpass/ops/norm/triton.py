"""One Triton kernel for the RMSNorm family: a residual added in front or not, codes, norm and sum written or not."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...arch import Arch
from ...launch import Empty, Launch
from ...tuning import store
from ..quant.scheme import Scheme
from ..quant.triton import encode, refuse_scheme
from ..rows import FLOATS, alike, row_count, row_stride, static

WIDEST = 16384
"""Columns that one program holds in registers."""
MANY = 4096
"""Rows from which on starting their programs takes longer than short rows do."""


@triton.jit
def norm_kernel(
    x,
    residual,
    weight,
    scale,
    q,
    norm,
    total,
    rows,
    x_row,
    residual_row,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    LIMIT: tl.constexpr,
    DIVIDE: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS rows a program, each held in registers. `residual`, `scale`, `q`, `norm`, `total` are None where not wanted.

    float32 arithmetic, rounded where the reference rounds: the sum, the normalised value, its product with the weight.
    EARLY reads weight and scale before the wait: the preceding kernel must not have written them.
    """
    # Left to itself, the one-byte output would set the layout of all: 32-byte strides in the loads, a shuffle through
    # shared memory before the wider stores.
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]
    inside = columns < WIDTH
    if EARLY:
        w = tl.load(weight + columns, inside, other=0.0, eviction_policy="evict_last")
        if scale is not None:
            step = tl.load(scale).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = inside
    if ROWS > 1:
        mask = inside & (row < rows)
    if PDL:
        gdc_wait()
    h = tl.load(x + row * x_row + columns, mask, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_row + columns, mask, other=0.0).to(tl.float32)
    if not EARLY:
        # Before any store: loads stay in program order with them, and the first store waits for x.
        w = tl.load(weight + columns, inside, other=0.0, eviction_policy="evict_last")
        if scale is not None:
            step = tl.load(scale).to(tl.float32)
    if PDL:
        # As late as Inductor's own kernels: the next one may count on everything older than this one to be finished,
        # and may write to memory that this one has read.
        gdc_launch_dependents()
    if residual is not None:
        rounded = h.to(x.dtype.element_ty)
        if total is not None:
            tl.store(total + row * WIDTH + columns, rounded, mask)
        h = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / WIDTH + eps)
    y = (h * rstd).to(x.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    # The product has the promoted dtype: that of both, or float32.
    if x.dtype.element_ty == weight.dtype.element_ty:
        y = y.to(x.dtype.element_ty).to(tl.float32)
    if norm is not None:
        tl.store(norm + row * WIDTH + columns, y.to(norm.dtype.element_ty), mask)
    if q is not None:
        y = encode(y, step, LIMIT, DIVIDE)
        tl.store(q + row * WIDTH + columns, y.to(q.dtype.element_ty), mask)


@dataclass(frozen=True)
class Config:
    """How the kernel is cut.

    Args:
        rows: per program.
        warps: per program.
    """

    rows: int
    warps: int


def configure(arch: Arch, rows: int | None, width: int, itemsize: int = 2) -> Config:
    """The configuration for `rows` rows (None: any number) of `width` columns: as measured, else by rule.

    The rule: a row of 128 to 256 threads' 16-byte loads takes one load a thread, a much narrower one shares its program
    with others, and a wider one takes 128 threads, or as many as leave none with more than 64 elements.
    """
    cell = store.look_up("norm", arch, rows, width) if itemsize == 2 else None
    if cell is not None:
        return Config(cell["rows"], cell["warps"])
    block = triton.next_power_of_2(width)
    loads = max(1, block * itemsize // 16)
    threads = loads if 128 <= loads <= 256 else max(128, block // 64)
    # Starting a program takes a GPU over a nanosecond: many short rows are bound by that, so two share a program.
    fewest = 2 if rows is not None and rows >= MANY and loads <= 128 else 1
    return Config(max(fewest, min(16, 64 // loads)), threads // arch.warp_size)


def plan_rms_norm(arch: Arch, x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> Launch | str:
    """The launch that runs `rms_norm` on `arch`, or why it cannot."""
    return _plan(arch, x, None, weight, eps, norm_out=True)


def plan_add_rms_norm(
    arch: Arch,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual_out: bool = True,
) -> Launch | str:
    """The launch that runs `add_rms_norm` on `arch`, or why it cannot."""
    return _plan(arch, x, residual, weight, eps, norm_out=True, residual_out=residual_out)


def plan_rms_norm_quantize(
    arch: Arch,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    scheme: str = "fp8_static",
    norm_out: bool = False,
) -> Launch | str:
    """The launch that runs `rms_norm_quantize` on `arch`, or why it cannot."""
    reason = refuse_scheme(arch, scale, scheme, x.device)
    return reason or _plan(arch, x, None, weight, eps, scale, scheme, norm_out)


def plan_add_rms_norm_quantize(
    arch: Arch,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    scheme: str = "fp8_static",
    norm_out: bool = False,
    residual_out: bool = True,
) -> Launch | str:
    """The launch that runs `add_rms_norm_quantize` on `arch`, or why it cannot."""
    reason = refuse_scheme(arch, scale, scheme, x.device)
    return reason or _plan(arch, x, residual, weight, eps, scale, scheme, norm_out, residual_out)


def _refuse(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> str | None:
    if x.dtype not in FLOATS or weight.dtype not in FLOATS:
        return f"x is {x.dtype} and the weight {weight.dtype}"
    if residual is not None and not alike(x, residual):
        return "x and the residual differ in shape, dtype or device"
    width: Any = x.shape[-1] if x.dim() else 0
    if not isinstance(width, int):
        return "the width is symbolic"
    if width == 0:
        return "the rows are empty"
    if width > WIDEST:
        return f"rows of {width} columns do not fit in registers (at most {WIDEST})"
    if weight.dim() != 1 or weight.shape[0] != width or weight.stride(0) != 1 or weight.device != x.device:
        return f"the weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}, not a dense vector of {width}"
    return None


def _plan(
    arch: Arch,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    scheme: str | None = None,
    norm_out: bool = False,
    residual_out: bool = False,
) -> Launch | str:
    if reason := _refuse(x, residual, weight):
        return reason
    x_row = row_stride(x, "x")
    residual_row = 0 if residual is None else row_stride(residual, "the residual")
    for stride in (x_row, residual_row):
        if isinstance(stride, str):
            return stride
    rows, width, shape = row_count(x), x.shape[-1], tuple(x.shape)
    config = configure(arch, static(rows), width, x.element_size())
    if reason := store.refuse("norm", arch, static(rows), width):
        return reason
    kind = None if scheme is None else Scheme.parse(scheme)
    outputs = {
        "q": Empty(shape, kind.dtype) if kind else None,
        "norm": Empty(shape, torch.promote_types(x.dtype, weight.dtype)) if norm_out else None,
        "total": Empty(shape, x.dtype) if residual_out else None,
    }
    return Launch(
        norm_kernel,
        ((rows + config.rows - 1) // config.rows,),
        {
            "x": x,
            "residual": residual,
            "weight": weight,
            "scale": scale,
            **outputs,
            "rows": rows,
            "x_row": x_row,
            "residual_row": residual_row,
            "eps": eps,
            "WIDTH": width,
            "BLOCK": triton.next_power_of_2(width),
            "ROWS": config.rows,
            "VECTOR": 16 // x.element_size(),
            "LIMIT": kind.max if kind else 0.0,
            "DIVIDE": kind is not None and kind.rounding == "divide",
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=tuple(name for name, output in outputs.items() if output is not None),
        num_warps=config.warps,
        pdl=arch.has_pdl,
        early=("weight",) if kind is None else ("weight", "scale"),
    )
