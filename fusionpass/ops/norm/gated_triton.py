"""Triton kernel of the gated RMSNorm, and its plan."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from ...arch import Arch
from ...launch import Empty, Launch
from ...tuning.rows import choose_rows
from ..activation.kernel import activated, sigmoid
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
from ..rounding import in_pairs
from ..rows import FLOATS, alike_shape, row_count, row_stride, static
from . import AFTER, BEFORE
from .kernel import rounded_as
from .triton import configure, refuse_inputs


@triton.jit
def gated_norm_kernel(
    x,
    gate,
    weight,
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
    rows,
    x_row,
    gate_row,
    eps,
    ACT: tl.constexpr,
    GATED_FIRST: tl.constexpr,
    AFTER: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
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
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS rows a program, each held in registers; pointers are None where the op has no such thing.

    float32 arithmetic, rounded where the reference rounds. The mean square is of SPAN columns: a power of two that
    divides WIDTH, or BLOCK for whole rows. EARLY reads weight and given scale before the wait: the preceding kernel
    must not have written them.
    """
    kind: tl.constexpr = x.dtype.element_ty
    # As in the norm's kernel: left to itself, the one-byte output would set the layout of all.
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]
    inside = columns < WIDTH
    # A weight of one row would get a layout of its own, and rows that share a program a shuffle through shared memory.
    of_weight = tl.broadcast_to(columns, [ROWS, BLOCK])
    w = None
    step = None
    if EARLY:
        if weight is not None:
            w = tl.load(weight + of_weight, inside, other=0.0, eviction_policy="evict_last")
        if scale is not None:
            step = tl.load(scale).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = inside
    if ROWS > 1 or LAYOUT == "swizzled":
        mask = inside & (row < rows)
    pdl_wait(PDL)
    h = tl.load(x + row * x_row + columns, mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + columns, mask, other=0.0).to(tl.float32)
    if not EARLY:
        if weight is not None:
            w = tl.load(weight + of_weight, inside, other=0.0, eviction_policy="evict_last")
        if scale is not None:
            step = tl.load(scale).to(tl.float32)
    pdl_launch(PDL)
    if ACT == "silu":
        g = activated(g, ACT, PAIRS)
    else:
        g = sigmoid(g, PAIRS)
    if GATED_FIRST:
        h = h * g
    spans = tl.reshape(h, [ROWS * BLOCK // SPAN, SPAN])
    mean = tl.sum(spans * spans, 1, keep_dims=True) / (WIDTH if SPAN == BLOCK else SPAN)
    y = tl.reshape(spans * tl.rsqrt(mean + eps), [ROWS, BLOCK])
    if AFTER:
        if w is not None:
            y = y * w.to(tl.float32)
    else:
        y = y.to(kind).to(tl.float32)
        if w is not None:
            y = rounded_as(y * w.to(tl.float32), x, weight)
    if not GATED_FIRST:
        y = y * g
    if AFTER or not GATED_FIRST:
        y = y.to(kind).to(tl.float32)
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


def plan_gated_rms_norm(
    arch: Arch,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    gating: str = "before",
    group_size: int | None = None,
    rounding: str = BEFORE,
    activation: str = "silu",
    scale: torch.Tensor | None = None,
    scheme: str | None = None,
    norm_out: bool = True,
    **more: torch.Tensor | None,
) -> Launch | str:
    """The launch that runs `gated_rms_norm` or its quantising form on `arch`, or why there is none."""
    extra = {name: s for name, s in more.items() if s is not None}
    for given in (scale, *extra.values()):
        if scheme is not None and (reason := refuse_scheme(arch, given, scheme, x)):
            return reason
    if reason := refuse_inputs(x, {}, {"weight": weight}):
        return reason
    if gate.dtype not in FLOATS or gate.device != x.device or not alike_shape(x, gate):
        return f"the gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}"
    x_row, gate_row = row_stride(x, "x"), row_stride(gate, "the gate")
    for found in (x_row, gate_row):
        if isinstance(found, str):
            return found
    rows, width, shape = row_count(x), x.shape[-1], tuple(x.shape)
    codes = None if scheme is None else Scheme.parse(scheme)
    block = max(fewest_columns(codes), triton.next_power_of_2(width))
    span = block if group_size in (None, width) else group_size
    if span & (span - 1):
        return f"groups of {span} columns: rows in registers divide by powers of two"
    size = (arch, static(rows), width)
    name = "gated_rms_norm" if scheme is None else "gated_rms_norm_quantize"
    cut = choose_rows(configure(*size, x.element_size()), name, scheme, *size, x.element_size(), whole=True)
    if isinstance(cut, str):
        return cut
    widening = weight if (gating, rounding) == ("before", BEFORE) else None
    dtype = x.dtype if widening is None else torch.promote_types(x.dtype, widening.dtype)
    made = code_outputs(codes, shape)
    outputs = {
        "q": made["q"],
        "scales": made["scales"],
        **{f"q_{i}": made["q"] if f"scale_{i}" in extra else None for i in range(2, 6)},
        "norm": Empty(shape, dtype) if norm_out else None,
    }
    read_early = {"weight": weight, "scale": scale}
    return Launch(
        gated_norm_kernel,
        ((covered_rows(codes, rows) + cut.rows - 1) // cut.rows,),
        {
            "x": x,
            "gate": gate,
            **read_early,
            **{name: more.get(name) for name in MORE},
            **outputs,
            "rows": rows,
            "x_row": x_row,
            "gate_row": gate_row,
            "eps": eps,
            "ACT": activation,
            "GATED_FIRST": gating == "before",
            "AFTER": rounding == AFTER,
            "WIDTH": width,
            "SPAN": span,
            "BLOCK": block,
            "ROWS": cut.rows,
            "VECTOR": 16 // x.element_size(),
            **scheme_constants(codes, dtype),
            "PAIRS": in_pairs(arch, cut.rows * block, cut.warps),
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=tuple(name for name, output in outputs.items() if output is not None),
        num_warps=cut.warps,
        pdl=arch.has_pdl,
        early=tuple(name for name, tensor in read_early.items() if tensor is not None),
    )
