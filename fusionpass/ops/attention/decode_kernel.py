"""Triton kernel of attention of a few tokens over a cache, by parts of the positions.

A cache of FP8 codes is widened as it is read, and the result is quantised before it is written, where the op does so.
"""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait
from ..quant.epilogue import store_codes

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def power_of(score, peak):
    """exp(score - peak), 0 where a score is hidden (-inf), also where all are."""
    # Subtracted before it is scaled: a mask of the least finite number must not become infinite.
    return tl.exp2((score - tl.where(peak == float("-inf"), 0.0, peak)) * LOG2E)


@triton.jit
def _widened(codes, step, like):
    """FP8 codes times their scale, None for 1, in the dtype of `like`; what is in that dtype as it is."""
    kind: tl.constexpr = like.dtype
    if codes.dtype == kind:
        return codes
    wide = codes.to(tl.float32)
    if step is not None:
        wide = wide * step
    return wide.to(kind)


@triton.jit
def _attend(
    queries,
    k_rows,
    v_rows,
    k_step,
    v_step,
    k_position,
    v_position,
    position,
    seen,
    bias,
    scale,
    peak,
    total,
    summed,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    """`peak`, `total` and `summed` of the softmax with a block of positions more, of which those in `seen` are read."""
    read = tl.max(seen.to(tl.int32), 0) > 0
    columns = tl.arange(0, DIM_BLOCK)
    v_columns = tl.arange(0, V_BLOCK)
    # Both are to be on their way before one is waited for. What a product reads is put into shared memory right behind
    # its load, so the values are loaded first, and are kept from that by the choice that leaves out what was not read.
    wanted = read[:, None] & (v_columns < V_DIM)[None, :]
    values = tl.load(v_rows + position[:, None] * v_position + v_columns[None, :], wanted)
    keys = tl.load(
        k_rows + position[:, None] * k_position + columns[None, :],
        read[:, None] & (columns < DIM)[None, :],
        other=0.0,
    )
    keys = _widened(keys, k_step, queries)
    score = tl.dot(queries, tl.trans(keys)) * scale
    if bias is not None:
        score += bias
    score = tl.where(seen, score, float("-inf"))
    highest = tl.maximum(peak, tl.max(score, 1))
    weight = power_of(score, highest[:, None])
    values = tl.where(wanted, _widened(values, v_step, queries), 0.0)
    kept = power_of(peak, highest)
    total = total * kept + tl.sum(weight, 1)
    summed = summed * kept[:, None] + tl.dot(weight.to(values.dtype), values)
    return highest, total, summed


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    mask,
    k_scale,
    v_scale,
    code_scale,
    out,
    codes,
    code_scales,
    sums,
    peaks,
    totals,
    arrived,
    result_rows,
    kv_heads,
    positions,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_position,
    v_batch,
    v_head,
    v_position,
    mask_batch,
    mask_head,
    mask_token,
    mask_position,
    scale,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    ADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SCAN: tl.constexpr,
    SCANS: tl.constexpr,
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
    """One KV head and one split of the positions a program, for all query heads and tokens that read that head.

    Split s takes blocks s, s + SPLITS, …: wherever the visible positions are, they are shared evenly. Rows are tokens ×
    GROUP query heads. MASK_ROWS is 1 where all rows have one mask; it is looked through first if it has SCANS times
    SCAN positions at most. ADDED: it is added. With one split the result goes to `out`, `codes` and `code_scales`, as
    far as there are such, of `result_rows` rows; else the parts go to `sums`, `peaks` and `totals`, and `arrived`, of
    each token, is made zero.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = pid // kv_heads
    head = pid % kv_heads
    row = tl.arange(0, ROWS).to(tl.int64)
    token = row // GROUP
    q_heads = head * GROUP + row % GROUP
    inside = row < TOKENS * GROUP
    columns = tl.arange(0, DIM_BLOCK)
    mask_row = tl.arange(0, MASK_ROWS).to(tl.int64)
    mask_inside = mask_row < TOKENS * GROUP
    k_rows = k + batch * k_batch + head * k_head
    v_rows = v + batch * v_batch + head * v_head
    pdl_wait(PDL)
    k_step = None
    v_step = None
    given = None
    if k_scale is not None:
        k_step = tl.load(k_scale).to(tl.float32)
    if v_scale is not None:
        v_step = tl.load(v_scale).to(tl.float32)
    if code_scale is not None:
        given = tl.load(code_scale).to(tl.float32)
    q_rows = q + batch * q_batch + q_heads * q_head + token * q_token
    queries = tl.load(q_rows[:, None] + columns[None, :], inside[:, None] & (columns < DIM)[None, :], other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, V_BLOCK], tl.float32)
    places = tl.arange(0, BLOCK).to(tl.int64)
    end = tl.full([], positions, tl.int32)
    if CAUSAL:
        end = tl.minimum(positions, TOKENS)
    first = split * BLOCK
    if mask is not None:
        heads_of_mask = (head * GROUP + mask_row % GROUP) * mask_head
        mask_rows = mask + batch * mask_batch + heads_of_mask + (mask_row // GROUP) * mask_token
        hidden: tl.constexpr = float("-inf") if ADDED else 0
        if MASK_ROWS == 1:  # noqa: SIM102 (the one is known when this is compiled)
            # A static cache is hidden from where the text ends: what lies there is not gone through block by block.
            if end <= SCANS * SCAN:
                lowest = end
                highest = end * 0
                for start in range(0, end, SCAN):
                    at = start + tl.arange(0, SCAN)
                    marks = tl.load(mask_rows + at.to(tl.int64) * mask_position, at < end, other=hidden)
                    lowest = tl.minimum(lowest, tl.min(tl.where(marks != hidden, at, end), 0))
                    highest = tl.maximum(highest, tl.max(tl.where(marks != hidden, at + 1, 0), 0))
                end = highest
                first += lowest // (SPLITS * BLOCK) * (SPLITS * BLOCK)
        place = first + places
        marks = tl.load(
            mask_rows[:, None] + place[None, :] * mask_position,
            mask_inside[:, None] & (place < end)[None, :],
            other=hidden,
        )
    for start in range(first, end, SPLITS * BLOCK):
        position = start + places
        if mask is None:
            seen = inside[:, None] & (position < end)[None, :]
            if CAUSAL:
                seen &= position[None, :] <= token[:, None]
            peak, total, summed = _attend(
                queries, k_rows, v_rows, k_step, v_step, k_position, v_position, position, seen, None, scale, peak,
                total, summed, DIM, DIM_BLOCK, V_DIM, V_BLOCK,
            )  # fmt: skip
        else:
            bias = None
            if ADDED:
                bias = marks.to(tl.float32)
                seen = bias != float("-inf")
            else:
                seen = marks != 0
            # The next block's mask is on its way while this one is worked on: all else waits for it.
            place = position + SPLITS * BLOCK
            marks = tl.load(
                mask_rows[:, None] + place[None, :] * mask_position,
                mask_inside[:, None] & (place < end)[None, :],
                other=hidden,
            )
            if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
                peak, total, summed = _attend(
                    queries, k_rows, v_rows, k_step, v_step, k_position, v_position, position, seen, bias, scale, peak,
                    total, summed, DIM, DIM_BLOCK, V_DIM, V_BLOCK,
                )  # fmt: skip
    pdl_launch(PDL)
    v_columns = tl.arange(0, V_BLOCK)
    # As the outputs lie: batch, tokens, heads.
    made = (batch * TOKENS + token) * (kv_heads * GROUP) + q_heads
    if SPLITS == 1:
        # A row that has seen nothing has nothing to divide, and is zero.
        result = (summed / tl.where(total == 0.0, 1.0, total)[:, None]).to(q.dtype.element_ty)
        mask_of_result = inside[:, None] & (v_columns < V_DIM)[None, :]
        if out is not None:
            tl.store(out + made[:, None] * V_DIM + v_columns[None, :], result, mask_of_result)
        if codes is not None:
            store_codes(
                result.to(tl.float32), given, codes, code_scales, tl.where(inside, made, result_rows)[:, None],
                v_columns[None, :], mask_of_result, result_rows, V_DIM, GROUP_COLUMNS, LIMIT, LOW, INVERSE, INPUT, EPS,
                ZERO_IS_ONE, POWER, LAYOUT, DIVIDE, False,
            )  # fmt: skip
    else:
        if arrived is not None:
            first_of_token = (head == 0) & (split == 0) & (row % GROUP == 0) & inside
            tl.store(arrived + batch * TOKENS + token, tl.zeros([ROWS], tl.int32), first_of_token)
        part = made * SPLITS + split
        tl.store(peaks + part, peak, inside)
        tl.store(totals + part, total, inside)
        tl.store(
            sums + part[:, None] * V_DIM + v_columns[None, :],
            summed,
            inside[:, None] & (v_columns < V_DIM)[None, :],
        )
