"""Triton kernel of the quantisations."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ...arch import Arch
from ...launch import Launch
from ...tuning.rows import Cut, choose_rows, tile
from ..pdl import pdl_launch, pdl_wait
from ..rounding import in_pairs, widened
from ..rows import FLOATS, known, row_count, row_stride, static
from .epilogue import (
    code_outputs,
    covered_rows,
    encode,
    fewest_columns,
    refuse_scheme,
    scheme_constants,
    store_codes,
)
from .scheme import Scheme

__all__ = [
    "code_outputs", "covered_rows", "encode", "fewest_columns", "plan_quantize", "refuse_scheme", "scheme_constants",
    "store_codes",
]  # fmt: skip

FLAT_ROW = 2048
"""Elements of a program where rows do not matter."""


@triton.jit
def quantize_kernel(
    x,
    scale,
    q,
    scales,
    rows,
    elements,
    x_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    FLAT: tl.constexpr,
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
    """A tile of ROWS rows and BLOCK columns a program. FLAT: `x` is contiguous and a row is any WIDTH elements of it.

    EARLY reads the scale before the wait: the preceding kernel must not have written it.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    start = (pid % blocks).to(tl.int32) * BLOCK
    columns = start + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]
    if FLAT:
        mask = row * WIDTH + columns < elements
    else:
        mask = (row < rows) & (columns < WIDTH)
    given = None
    if EARLY:
        given = tl.load(scale).to(tl.float32)
    pdl_wait(PDL)
    if scale is not None and not EARLY:
        given = tl.load(scale).to(tl.float32)
    y = widened(tl.load(x + row * x_row + columns, mask, other=0.0), PAIRS)
    pdl_launch(PDL)
    store_codes(
        y, given, q, scales, row, columns, mask, rows, WIDTH, GROUP, LIMIT, LOW, INVERSE, INPUT, EPS, ZERO_IS_ONE,
        POWER, LAYOUT, DIVIDE, PAIRS, start,
    )  # fmt: skip


def plan_quantize(
    arch: Arch, x: torch.Tensor, scale: torch.Tensor | None = None, scheme: str = "fp8_static"
) -> Launch | str:
    """The launch that runs `quantize` on `arch`, or why it cannot."""
    if reason := refuse_scheme(arch, scale, scheme, x):
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
    rows = row_count(x)
    elements = rows * width
    flat = kind.static and known(stride == width)
    if flat:
        width = stride = FLAT_ROW
        rows = (elements + FLAT_ROW - 1) // FLAT_ROW
    rule = configure(arch, kind, static(rows), width, x.element_size())
    size = (arch, static(row_count(x)), x.shape[-1], x.element_size())
    whole, fewest = not kind.static and kind.group is None, fewest_columns(kind)
    cut = choose_rows(rule, "quantize", scheme, *size, whole=whole, fewest=fewest)
    if isinstance(cut, str):
        return cut
    return Launch(
        quantize_kernel,
        ((covered_rows(kind, rows) + cut.rows - 1) // cut.rows * triton.cdiv(width, cut.columns),),
        {
            "x": x,
            "scale": scale,
            **code_outputs(kind, x.shape),
            "rows": rows,
            "elements": elements,
            "x_row": stride,
            "WIDTH": width,
            "BLOCK": cut.columns,
            "ROWS": cut.rows,
            "VECTOR": 16 // x.element_size(),
            "FLAT": flat,
            **scheme_constants(kind, x.dtype),
            "PAIRS": in_pairs(arch, cut.rows * cut.columns, cut.warps),
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=("q", "scales") if kind.returns_scale else ("q",),
        num_warps=cut.warps,
        pdl=arch.has_pdl,
        early=("scale",) if kind.takes_scale else (),
    )


def configure(arch: Arch, kind: Scheme, rows: int | None, width: int, itemsize: int) -> Cut:
    """The rule for `rows` rows (None: any number) of `width` columns."""
    if kind.static:
        columns = min(4096, triton.next_power_of_2(width))
        return Cut(1, columns, max(1, min(256, columns // 8) // arch.warp_size))
    if kind.group is None:
        # The whole row, by the norm kernel's rule.
        columns = triton.next_power_of_2(width)
        loads = max(1, columns * itemsize // 16)
        threads = loads if 128 <= loads <= 256 else max(128, columns // 64)
        return Cut(max(1, min(16, 64 // loads)), columns, threads // arch.warp_size)
    elements = rows * width if rows is not None else 2**31
    return tile(elements, width, fewest_columns(kind), arch.warp_size, grouped=True)
