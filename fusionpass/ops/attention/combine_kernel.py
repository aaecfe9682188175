"""Triton kernel that puts together the parts that `decode_kernel` left, and quantises them where the op does so."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait
from ..quant.epilogue import store_codes
from .decode_kernel import power_of


@triton.jit
def combine_kernel(
    like,
    sums,
    peaks,
    totals,
    code_scale,
    arrived,
    out,
    codes,
    code_scales,
    result_rows,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
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
):
    """One row of the result a program: its parts, each weighed by the exponential of its peak. `like` is not read.

    HEADS: 0, or a token's heads share a scale: the last of their programs quantises the whole token, of which each
    writes its head to `out`, and counts itself in `arrived`.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_BLOCK)
    columns = tl.arange(0, V_BLOCK)
    part = row * SPLITS + split
    kind: tl.constexpr = like.dtype.element_ty
    given = None
    pdl_wait(PDL)
    if code_scale is not None:
        given = tl.load(code_scale).to(tl.float32)
    total = tl.load(totals + part, split < SPLITS, other=0.0)
    peak = tl.load(peaks + part, split < SPLITS, other=float("-inf"))
    # Those of parts that have seen nothing, too: to wait for their totals would cost more than to read their zeros.
    summed = tl.load(
        sums + part[:, None] * V_DIM + columns[None, :],
        (split < SPLITS)[:, None] & (columns < V_DIM)[None, :],
        other=0.0,
    )
    if HEADS == 0:
        pdl_launch(PDL)
    weight = power_of(peak, tl.max(peak, 0))
    whole = tl.sum(weight * total, 0)
    result = tl.sum(summed * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    made = result.to(kind)
    if out is not None:
        tl.store(out + row * V_DIM + columns, made, columns < V_DIM)
    if HEADS == 0:
        if codes is not None:
            store_codes(
                made.to(tl.float32)[None, :], given, codes, code_scales, row + tl.zeros([1, 1], tl.int64),
                columns[None, :], (columns < V_DIM)[None, :], result_rows, V_DIM, GROUP_COLUMNS, LIMIT, LOW, INVERSE,
                INPUT, EPS, ZERO_IS_ONE, POWER, LAYOUT, DIVIDE, False,
            )  # fmt: skip
    else:
        token = row // HEADS
        # The count is released by one thread: what the others have stored must be there before.
        tl.debug_barrier()
        if tl.atomic_add(arrived + token, 1, sem="acq_rel") == HEADS - 1:
            width: tl.constexpr = HEADS * V_DIM
            across = tl.arange(0, triton.next_power_of_2(width))[None, :]
            # Not from this multiprocessor's own cache, where other heads' may be old.
            y = tl.load(out + token * width + across, across < width, other=0.0, cache_modifier=".cg")
            pdl_launch(PDL)
            store_codes(
                y.to(tl.float32), given, codes, code_scales, token + tl.zeros([1, 1], tl.int64), across,
                across < width, result_rows // HEADS, width, GROUP_COLUMNS, LIMIT, LOW, INVERSE, INPUT, EPS,
                ZERO_IS_ONE, POWER, LAYOUT, DIVIDE, False,
            )  # fmt: skip
