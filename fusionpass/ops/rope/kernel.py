"""One Triton kernel for queries, keys and values by the head: norm, rotation, codes, and the write to a cache."""
# mypy: disable-error-code="no-untyped-def, union-attr"

import triton
import triton.language as tl

from ..pdl import pdl_launch, pdl_wait
from ..quant.epilogue import encode


@triton.jit
def _scaled(y, w, offset, kind: tl.constexpr, AFTER: tl.constexpr):
    """A normalised float32 part times its weight, rounded where the reference rounds."""
    if not AFTER:
        y = y.to(kind).to(tl.float32)
    if w is not None:
        w = w.to(tl.float32)
        if AFTER and offset is not None:
            w += offset
        y = y * w
    return y.to(kind).to(tl.float32)


@triton.jit
def _normed(a, b, c, wa, wb, wc, eps, offset, columns, kind: tl.constexpr, AFTER: tl.constexpr, WHOLE: tl.constexpr):
    """RMSNorm of rows of `columns` that come in three parts; the parts of what is not there are zero.

    WHOLE: all rows are one.

    Without `c` the last result is `a`: Triton 3.6 returns no None among tensors.
    """
    square = tl.sum(a * a + b * b, 1, keep_dims=True)
    if c is not None:
        square += tl.sum(c * c, 1, keep_dims=True)
    if WHOLE:
        square = tl.sum(square, 0, keep_dims=True)
    r = tl.rsqrt(square / columns + eps)
    a = _scaled(a * r, wa, offset, kind, AFTER)
    b = _scaled(b * r, wb, offset, kind, AFTER)
    if c is not None:
        rest = _scaled(c * r, wc, offset, kind, AFTER)
    else:
        rest = a
    return a, b, rest


@triton.jit
def _turned(a, b, cos_a, sin_a, cos_b, sin_b, kind: tl.constexpr, LAST: tl.constexpr):
    """`(a cos - b sin, b cos + a sin)`, rounded to `kind` after each step or, with LAST, not at all."""
    a_cos, b_sin = a * cos_a, b * sin_a
    b_cos, a_sin = b * cos_b, a * sin_b
    if LAST:
        return a_cos - b_sin, b_cos + a_sin
    p = a_cos.to(kind).to(tl.float32) - b_sin.to(kind).to(tl.float32)
    q = b_cos.to(kind).to(tl.float32) + a_sin.to(kind).to(tl.float32)
    return p.to(kind).to(tl.float32), q.to(kind).to(tl.float32)


@triton.jit
def _stored(y, step, to, LIMIT: tl.constexpr, DIVIDE: tl.constexpr):
    """float32 `y` as what `to` points to: codes of the scale `step`, or numbers if it is None."""
    if step is not None:
        y = encode(y, step, to, LIMIT, DIVIDE, False)
    return y.to(to.dtype.element_ty)


@triton.jit
def _one_kind(
    x,
    out,
    cache,
    weight,
    cos,
    sin,
    out_scale,
    cache_scale,
    outside,
    head,
    inside,
    group,
    place,
    at,
    cached,
    x_group,
    x_head,
    x_token,
    out_group,
    out_head,
    out_token,
    cache_group,
    cache_head,
    cache_token,
    cos_group,
    cos_token,
    sin_group,
    sin_token,
    eps,
    offset,
    normed,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    READ_PAIRS: tl.constexpr,
    WRITE_PAIRS: tl.constexpr,
    PAIRED: tl.constexpr,
    NORM: tl.constexpr,
    AFTER: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    LIMIT: tl.constexpr,
    DIVIDE: tl.constexpr,
    TURN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Heads of the queries, of the keys or of the values: `place` is a token's row in `x` and `out`, `at` in `cache`.

    `outside` is a pointer of the dtype that each step is rounded to, `cached` where there is a row in the cache. WHOLE:
    the tile is all heads of one token, which are normalised together, `normed` columns.
    """
    kind: tl.constexpr = x.dtype.element_ty
    step: tl.constexpr = outside.dtype.element_ty
    j = tl.arange(0, BLOCK)[None, :]
    mask = inside & (j < HALF)
    first = 2 * j if READ_PAIRS else j
    second = 2 * j + 1 if READ_PAIRS else j + HALF
    first_out = 2 * j if WRITE_PAIRS else j
    second_out = 2 * j + 1 if WRITE_PAIRS else j + HALF
    rows = x + group * x_group + head * x_head + place * x_token
    a = tl.load(rows + first, mask, other=0.0).to(tl.float32)
    b = tl.load(rows + second, mask, other=0.0).to(tl.float32)
    c = None
    rest = j
    rest_mask = mask
    if REST > 0:
        rest = tl.arange(0, triton.next_power_of_2(REST))[None, :]
        rest_mask = inside & (rest < REST)
        rest += 2 * HALF
        c = tl.load(rows + rest, rest_mask, other=0.0).to(tl.float32)
    wa = None
    wb = None
    wc = None
    if weight is not None:
        # As wide as the rows: a row of weights would have another layout, and be exchanged through shared memory.
        none = head * (DIM if WHOLE else 0)
        if NORM == "before":
            wa = tl.load(weight + none + first, mask, other=0.0, eviction_policy="evict_last")
            wb = tl.load(weight + none + second, mask, other=0.0, eviction_policy="evict_last")
        else:
            wa = tl.load(weight + none + first_out, mask, other=0.0, eviction_policy="evict_last")
            wb = tl.load(weight + none + second_out, mask, other=0.0, eviction_policy="evict_last")
        if REST > 0:
            wc = tl.load(weight + none + rest, rest_mask, other=0.0, eviction_policy="evict_last")
    if TURN:
        of_cos = cos + group * cos_group + place * cos_token
        of_sin = sin + group * sin_group + place * sin_token
        one = j if PAIRED else first_out
        other = j if PAIRED else second_out
        cos_a = tl.load(of_cos + one, mask, other=0.0).to(tl.float32)
        sin_a = tl.load(of_sin + one, mask, other=0.0).to(tl.float32)
        cos_b = tl.load(of_cos + other, mask, other=0.0).to(tl.float32)
        sin_b = tl.load(of_sin + other, mask, other=0.0).to(tl.float32)
    out_step = None
    cache_step = None
    if out_scale is not None:
        out_step = tl.load(out_scale).to(tl.float32)
    if cache_scale is not None:
        cache_step = tl.load(cache_scale).to(tl.float32)
    pdl_launch(PDL)
    if NORM == "before":
        a, b, c = _normed(a, b, c, wa, wb, wc, eps, offset, normed, kind, AFTER, WHOLE)
    if TURN:
        a, b = _turned(a, b, cos_a, sin_a, cos_b, sin_b, step, LAST)
        if LAST:
            a = a.to(kind).to(tl.float32)
            b = b.to(kind).to(tl.float32)
    if NORM == "after":
        a, b, c = _normed(a, b, c, wa, wb, wc, eps, offset, normed, kind, AFTER, WHOLE)
    if out is not None:
        to = out + group * out_group + head * out_head + place * out_token
        tl.store(to + first_out, _stored(a, out_step, out, LIMIT, DIVIDE), mask)
        tl.store(to + second_out, _stored(b, out_step, out, LIMIT, DIVIDE), mask)
        if REST > 0:
            tl.store(to + rest, _stored(c, out_step, out, LIMIT, DIVIDE), rest_mask)
    if cache is not None:
        row = cache + group * cache_group + head * cache_head + at * cache_token
        tl.store(row + first_out, _stored(a, cache_step, cache, LIMIT, DIVIDE), mask & cached)
        tl.store(row + second_out, _stored(b, cache_step, cache, LIMIT, DIVIDE), mask & cached)
        if REST > 0:
            tl.store(row + rest, _stored(c, cache_step, cache, LIMIT, DIVIDE), rest_mask & cached)


@triton.jit
def heads_kernel(
    q,
    k,
    v,
    cos,
    sin,
    q_weight,
    k_weight,
    q_scale,
    k_scale,
    v_scale,
    positions,
    q_out,
    k_out,
    k_cache,
    v_cache,
    tokens,
    per_group,
    q_heads,
    k_heads,
    q_group,
    q_head,
    q_token,
    k_group,
    k_head,
    k_token,
    v_group,
    v_head,
    v_token,
    cos_group,
    cos_token,
    sin_group,
    sin_token,
    q_out_group,
    q_out_head,
    q_out_token,
    k_out_group,
    k_out_head,
    k_out_token,
    k_cache_group,
    k_cache_head,
    k_cache_token,
    v_cache_group,
    v_cache_head,
    v_cache_token,
    positions_step,
    slots,
    q_eps,
    k_eps,
    offset,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    READ_PAIRS: tl.constexpr,
    WRITE_PAIRS: tl.constexpr,
    PAIRED: tl.constexpr,
    NORM: tl.constexpr,
    AFTER: tl.constexpr,
    LAST: tl.constexpr,
    LIMIT: tl.constexpr,
    DIVIDE: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS heads of TOKENS tokens a program, all of the queries, of the keys or of the values.

    Tokens are numbered over `group`s (the batch) of `per_group`. Pointers are None where the op has no such thing.
    WIDE: steps are rounded to the dtype of `cos`, not to that of x. A position outside of the cache is not written.
    """
    number = tl.arange(0, TOKENS * HEADS)[:, None]
    token = tl.program_id(0).to(tl.int64) * TOKENS + number // HEADS
    group = token // per_group
    place = token - group * per_group
    block = tl.program_id(1)
    q_blocks = (q_heads + HEADS - 1) // HEADS
    k_blocks = (k_heads + HEADS - 1) // HEADS
    outside = cos if WIDE else q
    q_normed = DIM
    k_normed = DIM
    if WHOLE:
        q_normed = q_heads * DIM
        k_normed = k_heads * DIM
    pdl_wait(PDL)
    at = place
    cached = token < tokens
    if positions is not None:
        at = tl.load(positions + place * positions_step, cached, other=0)
        at = tl.where(at < 0, at + slots, at)
        cached &= (at >= 0) & (at < slots)
    if block < q_blocks:
        head = block * HEADS + number % HEADS
        inside = (token < tokens) & (head < q_heads)
        _one_kind(
            q, q_out, None, q_weight, cos, sin, q_scale, None, outside, head, inside, group, place, at, cached,
            q_group, q_head, q_token, q_out_group, q_out_head, q_out_token, 0, 0, 0,
            cos_group, cos_token, sin_group, sin_token, q_eps, offset, q_normed,
            DIM, HALF, BLOCK, REST, READ_PAIRS, WRITE_PAIRS, PAIRED, NORM, AFTER, LAST, WHOLE, LIMIT, DIVIDE,
            cos is not None, PDL,
        )  # fmt: skip
    elif block < q_blocks + k_blocks:
        if k is not None:
            head = (block - q_blocks) * HEADS + number % HEADS
            inside = (token < tokens) & (head < k_heads)
            _one_kind(
                k, k_out, k_cache, k_weight, cos, sin, None, k_scale, outside, head, inside, group, place, at, cached,
                k_group, k_head, k_token, k_out_group, k_out_head, k_out_token,
                k_cache_group, k_cache_head, k_cache_token,
                cos_group, cos_token, sin_group, sin_token, k_eps, offset, k_normed,
                DIM, HALF, BLOCK, REST, READ_PAIRS, WRITE_PAIRS, PAIRED, NORM, AFTER, LAST, WHOLE, LIMIT, DIVIDE,
            cos is not None, PDL,
            )  # fmt: skip
    else:
        if v is not None:
            head = (block - q_blocks - k_blocks) * HEADS + number % HEADS
            inside = (token < tokens) & (head < k_heads)
            _one_kind(
                v, None, v_cache, None, cos, sin, None, v_scale, outside, head, inside, group, place, at, cached,
                v_group, v_head, v_token, 0, 0, 0, v_cache_group, v_cache_head, v_cache_token,
                cos_group, cos_token, sin_group, sin_token, k_eps, offset, k_normed,
                DIM, HALF, BLOCK, REST, False, False, PAIRED, "", AFTER, LAST, False, LIMIT, DIVIDE, False,
                PDL,
            )  # fmt: skip
