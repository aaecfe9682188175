"""Rotary position embedding of queries and keys: with a norm, for both at once, and with the write to a cache."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ArgumentError
from ...op import EXACT, op
from ..derive import derived, parameter
from ..norm import BEFORE, NORM, rms_norm
from ..rows import triton_backend

HALF, INTERLEAVED, DEINTERLEAVED = "half", "interleaved", "deinterleaved"
STYLES = (HALF, INTERLEAVED, DEINTERLEAVED)
EACH, LAST = "each_step", "last"
EACH_HEAD = -1
"""In the place of the heads' dimension: each is normalised by itself."""

ROTATED = EXACT
"""Every step is rounded as the reference has it."""
NORMED = dataclasses.replace(NORM, fp32_ulp=64, cancels=2)
"""The normalised value may move by a step, of which the rotation makes two terms."""

_TENSOR, _OPTIONAL = torch.Tensor, torch.Tensor | None


def heads(count: int, tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> torch.Tensor:
    """Random [1, count, tokens, width], with the tokens' rows in memory as a projection leaves them."""
    made = torch.randn(1, tokens, count, width, generator=generator, device=device)
    return made.to(dtype).transpose(1, 2)


def table(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, torch.Tensor]:
    """Random "cos" and "sin", [1, 1, tokens, width]."""
    angle = torch.rand(1, 1, tokens, width, generator=generator, device=device).mul(6.3)
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def head_dim(width: int) -> int:
    """How wide the heads are of a sample whose queries have `width` columns."""
    return next((dim for dim in (128, 64) if width % dim == 0 and width > dim), max(1, width))


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    dim = head_dim(width)
    return {
        "x": heads(width // dim, tokens, dim, dtype, device, generator),
        **table(tokens, dim, dtype, device, generator),
    }


@op(outputs=("rotated",), sample=_sample, tolerance={"rotated": ROTATED})
def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str = HALF,
    paired: bool = False,
    rounding: str = EACH,
) -> torch.Tensor:
    """Rotary position embedding: pairs of columns turned by an angle, `(a, b) → (a cos - b sin, b cos + a sin)`.

    Args:
        x: [..., head_dim], floating point; columns from `rotary_dim` on pass through.
        cos: [..., rotary_dim], or [..., rotary_dim / 2] if `paired`; broadcasts to `x` in all other dimensions.
        sin: as `cos`.
        style: which columns are a pair. "half": j and j + rotary_dim / 2, as Llama has it. "interleaved": 2j and
            2j + 1, as GLM and Cohere. "deinterleaved": 2j and 2j + 1 of `x`, written as in "half", as DeepSeek.
        paired: `cos` and `sin` have one column for each pair, not one for each column.
        rounding: "each_step": both products and their sum are rounded; "last": computed in float32 and rounded once, to
            the dtype of `x`.

    Returns:
        The shape of `x`; its dtype, or what it promotes to with that of `cos` for "each_step".

    Raises:
        ArgumentError: the shapes do not fit, or a style or a rounding that does not exist.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    if style not in STYLES:
        raise ArgumentError(f"style={style!r} does not exist", "rope", f"Pass one of {', '.join(STYLES)}")
    if rounding not in (EACH, LAST):
        raise ArgumentError(f"rounding={rounding!r} does not exist", "rope", f"Pass {EACH!r} or {LAST!r}")
    if not all(v.is_floating_point() and v.dim() for v in (x, cos, sin)):
        raise ArgumentError("x, cos and sin must be floating point, with dimensions", "rope", "Pass [..., head_dim]")
    width = cos.shape[-1] * (2 if paired else 1)
    if cos.shape[-1] != sin.shape[-1] or width > x.shape[-1] or width % 2:
        raise ArgumentError(
            f"cos has {cos.shape[-1]} columns, sin {sin.shape[-1]}, x {x.shape[-1]}",
            "rope",
            "The rotated columns must be even in number, and no more than x has",
        )
    if cos.dtype != sin.dtype:
        raise ArgumentError(f"cos is {cos.dtype}, sin is {sin.dtype}", "rope", "They must be alike")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() > x.dim() or any(t.shape[i] not in (1, x.shape[i]) for i in range(-t.dim(), -1)):
            raise ArgumentError(f"{name} is {tuple(t.shape)}, x is {tuple(x.shape)}", "rope", "It must broadcast to x")
    if width < x.shape[-1]:
        turned = rope.reference(x[..., :width], cos, sin, style, paired, rounding)
        return torch.cat([turned, x[..., width:]], -1)
    dtype = x.dtype
    if rounding == LAST:
        x, cos, sin = x.float(), cos.float(), sin.float()
    if style == DEINTERLEAVED:
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).contiguous()
    half = width // 2
    a, b = (x[..., ::2], x[..., 1::2]) if style == INTERLEAVED else (x[..., :half], x[..., half:])
    if paired:
        y = _joined(a * cos - b * sin, b * cos + a * sin, style)
    else:
        y = x * cos + _joined(-b, a, style) * sin
    return y.to(dtype) if rounding == LAST else y


def _joined(a: torch.Tensor, b: torch.Tensor, style: str) -> torch.Tensor:
    return torch.stack([a, b], -1).flatten(-2) if style == INTERLEAVED else torch.cat([a, b], -1)


_TURN = (
    parameter("cos", _TENSOR),
    parameter("sin", _TENSOR),
)
_STYLE = (
    parameter("style", str, HALF),
    parameter("paired", bool, False),
    parameter("rounding", str, EACH),
)
_NORM = (
    parameter("weight_offset", float, 0.0),
    parameter("norm_rounding", str, BEFORE),
    parameter("norm_first", bool, True),
    parameter("heads_dim", int, EACH_HEAD),
)


def _norm_rope(arguments: Mapping[str, Any]) -> torch.Tensor:
    x, cos, sin, weight, eps, offset, norm_rounding, first, heads_dim, *turn = arguments.values()
    norm = (weight, eps, offset, norm_rounding, heads_dim)
    made: torch.Tensor = (
        rope.reference(_normed(x, *norm), cos, sin, *turn)
        if first
        else _normed(rope.reference(x, cos, sin, *turn), *norm)
    )
    return made


def _normed(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, rounding: str, heads_dim: int
) -> torch.Tensor:
    if heads_dim == EACH_HEAD:
        return rms_norm.reference(x, weight, eps, offset, rounding)  # type: ignore[no-any-return]
    return norm_heads.reference(x, heads_dim, weight, eps, offset, rounding)  # type: ignore[no-any-return]


def _sample_norm(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    weight = torch.rand(head_dim(width), generator=generator, device=device).add(0.5).to(dtype)
    return {**_sample(tokens, width, dtype, device, generator), "weight": weight, "eps": 1e-6}


def _sample_heads(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    dim = head_dim(width)
    weight = torch.rand(width // dim * dim, generator=generator, device=device).add(0.5).to(dtype)
    return {"x": heads(width // dim, tokens, dim, dtype, device, generator), "heads_dim": 1, "weight": weight}


@op(outputs=("norm",), sample=_sample_heads, tolerance={"norm": NORM})
def norm_heads(
    x: torch.Tensor,
    heads_dim: int,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str = BEFORE,
) -> torch.Tensor:
    """`rms_norm` of all heads of a token together, given by the head.

    Args:
        x: [..., heads, tokens, head_dim] or [..., tokens, heads, head_dim], floating point.
        heads_dim: which dimension, from the first, the heads are.
        weight: [heads * head_dim], or None.
        eps, weight_offset, rounding: as `rms_norm`.

    Returns:
        The shape of `x`, with a token's heads in one row of memory.

    Raises:
        ArgumentError: the heads are neither the last dimension but one nor that before it; or as `rms_norm`.
    """
    return _by_rows(rms_norm.reference, x, heads_dim, weight, eps, weight_offset, rounding)


def _by_rows(norm: Any, x: torch.Tensor, heads_dim: int, *rest: Any) -> torch.Tensor:
    if heads_dim not in (x.dim() - 3, x.dim() - 2) or heads_dim < 0:
        raise ArgumentError(f"heads_dim={heads_dim} for x of {tuple(x.shape)}", "norm_heads", "Pass that of the heads")
    rows = x.movedim(heads_dim, -2)
    made: torch.Tensor = norm(rows.flatten(-2), *rest)
    apart: torch.Tensor = made.unflatten(-1, rows.shape[-2:])
    return apart.movedim(-2, heads_dim)


def _norm_of_rows(**arguments: Any) -> torch.Tensor:
    return _by_rows(rms_norm.overload, *(arguments[name] for name in ("x", "heads_dim")), *list(arguments.values())[2:])


norm_heads.parts = _norm_of_rows
norm_rope = derived(
    "norm_rope",
    [
        parameter("x", _TENSOR),
        *_TURN,
        parameter("weight", _OPTIONAL, None),
        parameter("eps", float, 1e-6),
        *_NORM,
        *_STYLE,
    ],
    _norm_rope,
    """`rope(rms_norm(x, weight, eps), cos, sin)`, each head normalised by itself.

    Args:
        x: as `rope`.
        cos, sin, style, paired, rounding: as `rope`.
        weight: [head_dim], or None.
        eps, weight_offset: as `rms_norm`; `norm_rounding` is its `rounding`.
        norm_first: False: the norm comes behind the rotation, as HunYuan has it.
        heads_dim: -1, or the dimension of the heads, all of which are normalised together, as OLMo2 has it; then
            `weight` is [heads * head_dim].

    Returns:
        As `rope`.

    Raises:
        ArgumentError: as `rope` and `rms_norm`.
    """,
    torch.Tensor,
    outputs=("rotated",),
    sample=_sample_norm,
    tolerance={"rotated": NORMED},
)

for _op in (rope, norm_rope):
    _op.backends.append(triton_backend(f"{__name__}.triton", "plan_one"))
