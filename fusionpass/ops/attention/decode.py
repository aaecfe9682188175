"""Attention of a few tokens over a cache."""

from typing import Any

import torch

from ...errors import ArgumentError, ScaleError
from ...op import Tolerance, op
from ..derive import MORE, quantizing
from ..quant import quantize
from ..rope import head_dim, heads
from ..rows import triton_backend

WIDEST = 256
"""Columns of a head that the kernel takes."""

CODE_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
"""Of a cache that holds codes."""

WEIGHTS_ROUNDED = Tolerance(ulp=1, fraction=1.0, cancels=2)
"""Kernel and reference round the softmax's weights to the dtype of the values, and the result to its own.

Each rounding is off by up to half a step: of the result, and of each weighted value, whose errors are independent, as
the values are, so that their sum shrinks as the result does. Twice half a step, in both: two steps of the tensor's
largest magnitude.
"""


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    """The last few of `tokens` positions ask; their queries have `width` columns, in heads as those of `qk_rope`."""
    dim, queries = head_dim(width), min(tokens, 8)
    count = width // dim
    shared = count // 4 if count % 4 == 0 else 1
    seen = torch.ones(1, 1, queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    return {
        "q": heads(count, queries, dim, dtype, device, generator),
        "k": heads(shared, tokens, dim, dtype, device, generator),
        "v": heads(shared, tokens, dim, dtype, device, generator),
        "mask": seen,
    }


@op(outputs=("attended",), sample=_sample, tolerance={"attended": WEIGHTS_ROUNDED})
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    joined: bool = False,
) -> torch.Tensor:
    """Attention, `softmax(q @ kᵀ * scale + mask) @ v`; query head h reads KV head h // (heads // kv_heads).

    A row whose positions are all hidden gives zeros. The kernel does not read hidden positions: NaN in them, which
    PyTorch's own kernels may let through, does not reach the result.

    Args:
        q: [batch, heads, tokens, head_dim], floating point.
        k: [batch, kv_heads, positions, head_dim], `q.dtype` or FP8 codes; `heads` is a multiple of `kv_heads`.
        v: [batch, kv_heads, positions, v_head_dim], as `k`.
        mask: two to four dimensions, broadcasts to [batch, heads, tokens, positions]. Bool, True where a position may
            be seen; or `q.dtype` or float32 and added, -inf where it may not. None: all may be seen.
        causal: token t sees the positions up to t, the first being 0. Not with a mask.
        scale: None: 1 / sqrt(head_dim).
        enable_gqa: where no kernel fits, PyTorch is asked to share the heads itself; else they are repeated where there
            is a mask, with which most of PyTorch's kernels share none.
        k_scale, v_scale: one float each of any shape: what a code of 1.0 in `k` or `v` stands for; None: 1. Codes are
            multiplied by it in float32, and rounded to `q.dtype`.
        joined: whether a token's heads are joined to a row, as the linear behind reads them.

    Returns:
        [batch, heads, tokens, v_head_dim], `q.dtype`; in memory [batch, tokens, heads, v_head_dim]. If `joined`,
        [batch, tokens, heads * v_head_dim].

    Raises:
        ArgumentError: shapes or dtypes do not fit, or there are both `mask` and `causal`.

    Source: Vaswani et al., "Attention Is All You Need", 2017; Ainslie et al., "GQA", 2023, for heads that share keys.
    """
    _check(q, k, v, mask, causal)
    for name, t, step in (("k", k, k_scale), ("v", v, v_scale)):
        _check_scale(name, t, step)
    k, v = widened(k, k_scale, q.dtype), widened(v, v_scale, q.dtype)
    groups = q.shape[1] // k.shape[1]
    enable_gqa |= mask is None
    if groups > 1 and not enable_gqa:
        k, v = (_repeated(t, groups) for t in (k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=enable_gqa
    )
    # Which layout SDPA returns depends on what runs it; this one's heads join into rows without a copy.
    rows = attended.transpose(1, 2).contiguous()
    return rows.flatten(2) if joined else rows.transpose(1, 2)


def _repeated(t: torch.Tensor, groups: int) -> torch.Tensor:
    batch, kv_heads, positions, width = t.shape
    return (
        t[:, :, None]
        .expand(batch, kv_heads, groups, positions, width)
        .reshape(batch, kv_heads * groups, positions, width)
    )


def widened(t: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Codes times their scale, None for 1, in `dtype`; what is no code as it is."""
    if t.dtype not in CODE_DTYPES:
        return t
    return t.to(dtype) if scale is None else (t.float() * scale.float().reshape(())).to(dtype)


def _check_scale(name: str, t: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is None:
        return
    if t.dtype not in CODE_DTYPES:
        raise ArgumentError(f"{name} is {t.dtype}, and has a scale", "attention", "Only FP8 codes have one")
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ScaleError(f"the scale of {name} is {tuple(scale.shape)} {scale.dtype}", "attention", "Pass one float")


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> None:
    shapes = f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)):
        raise ArgumentError(shapes, "attention", "Pass [batch, heads, tokens, head_dim]")
    if not q.is_floating_point() or q.dtype in CODE_DTYPES or {k.dtype, v.dtype} - {q.dtype, *CODE_DTYPES}:
        dtypes = f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise ArgumentError(dtypes, "attention", "They must be of one floating point dtype, or k and v FP8 codes")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ArgumentError(shapes, "attention", "k and v must have one batch, one width and as many positions")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(shapes, "attention", "The heads of q must be a multiple of those of k")
    if mask is None:
        return
    if causal:
        raise ArgumentError("there is a mask and causal=True", "attention", "Pass one of them")
    if mask.dtype not in (torch.bool, q.dtype, torch.float32):
        raise ArgumentError(f"the mask is {mask.dtype}", "attention", f"Pass bool, {q.dtype} or float32")
    whole = (*q.shape[:3], k.shape[2])
    if not 2 <= mask.dim() <= 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], whole[::-1], strict=False)):
        raise ArgumentError(f"the mask is {tuple(mask.shape)}", "attention", f"Pass two dimensions or more of {whole}")


attention.backends.append(triton_backend(f"{__package__}.decode_triton", "plan_attention"))

attention_quantize = quantizing(attention, "attended", {"scale": "softmax_scale"}, {"joined": True})
attention_quantize.backends.append(triton_backend(f"{__package__}.decode_triton", "plan_attention_quantize"))


def _parts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    scale: torch.Tensor | None,
    scheme: str,
    attended_out: bool,
    **rest: Any,
) -> list[torch.Tensor]:
    """`attention_quantize` as ops of its own for each step, each of which may have its kernel."""
    own = {name: rest[name] for name in ("mask", "causal", "enable_gqa", "k_scale", "v_scale")}
    attended = attention.overload(q, k, v, scale=softmax_scale, joined=True, **own)
    codes: list[torch.Tensor] = []
    for one in (scale, *(rest[name] for name in MORE if rest[name] is not None)):
        codes += quantize.overload(attended, one, scheme)
    return [*codes, *([attended] if attended_out else [])]


attention_quantize.parts = _parts
