"""Triton kernels around the products of experts: what is multiplied by which, and what becomes of the results."""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait


@triton.jit
def _expert_of(ids, at, there, EXPERTS: tl.constexpr):
    """The experts of pairs of a token and one of its choices; EXPERTS where there is none."""
    expert = tl.load(ids + at, there, other=EXPERTS).to(tl.int32)
    return tl.where((expert < 0) | (expert > EXPERTS), EXPERTS, expert)


@triton.jit
def align_kernel(
    ids,
    order,
    experts,
    places,
    pairs,
    blocks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Pairs in the order of their experts, those of each from a multiple of ROWS on; one program.

    Writes `order` [blocks * ROWS], pairs, and the number of them where there is none; and `experts` [blocks], whose the
    block is, or -1. `places` [EXPERTS] is where the next pair of an expert goes. BINS is a power of two above EXPERTS.
    Pairs of one expert come in any order, which nothing depends on.
    """
    each, bins = tl.arange(0, BLOCK), tl.arange(0, BINS)
    pdl_wait(PDL)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, BLOCK):
        counts += tl.histogram(_expert_of(ids, start + each, start + each < pairs, EXPERTS), BINS)
    padded = tl.where(bins < EXPERTS, (counts + (ROWS - 1)) // ROWS, 0)
    ends = tl.cumsum(padded, 0)
    tl.store(places + bins, (ends - padded) * ROWS, bins < EXPERTS)
    for start in range(0, blocks * ROWS, BLOCK):
        tl.store(order + start + each, pairs + tl.zeros_like(each), start + each < blocks * ROWS)
    some = tl.arange(0, 16)
    for start in range(0, blocks, 16):
        before = (ends[None, :] <= (start + some)[:, None]) & (bins < EXPERTS)[None, :]
        expert = tl.sum(before.to(tl.int32), 1)
        tl.store(experts + start + some, tl.where(expert < EXPERTS, expert, -1), start + some < blocks)
    tl.debug_barrier()
    pdl_launch(PDL)
    for start in range(0, pairs, BLOCK):
        expert = _expert_of(ids, start + each, start + each < pairs, EXPERTS)
        place = tl.atomic_add(places + expert, 1, expert < EXPERTS, sem="relaxed")
        tl.store(order + place, start + each, expert < EXPERTS)


@triton.jit
def combine_kernel(
    y, ids, weights, out, width, EXPERTS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """`out[t] = sum_k weights[t, k] * y[t * TOP + k]`, BLOCK columns of a token a program.

    A weighted row is rounded as eager mode rounds it, to the wider dtype of the two; the sum is float32.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kind: tl.constexpr = tl.float32 if weights.dtype.element_ty == tl.float32 else y.dtype.element_ty
    pdl_wait(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP):
        pair = token * TOP + k
        there = _expert_of(ids, pair, True, EXPERTS) < EXPERTS
        weight = tl.load(weights + pair).to(tl.float32)
        row = tl.load(y + pair * width + column, inside & there, other=0.0).to(tl.float32)
        total += tl.where(there, (row * weight).to(kind).to(tl.float32), 0.0)
    pdl_launch(PDL)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), inside)
