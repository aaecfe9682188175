"""RMSNorm and LayerNorm, with the residual add in front and the quantisation behind."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ArgumentError
from ...op import Tolerance, op
from ..derive import SUM, adding, derived, parameter, quantizing, residual_sum
from ..rows import triton_backend

NORM = Tolerance(ulp=2, fraction=2e-3, fp32_ulp=8)
"""The order of the sum can move the normalised value by one step, and a step of it is up to two of its product.

With a modulation there is a sum behind it, which cancels: `cancels` and the wider bound of float32 are for that.
"""
CENTRED = Tolerance(ulp=2, fraction=2e-3, fp32_ulp=64, floor=2**-20, cancels=2)
"""LayerNorm cancels: close to the mean, to minus the bias, to minus the shift, there are few correct digits."""

BEFORE, AFTER, LAST = "before_weight", "after_weight", "after_modulation"


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    x = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    weight = torch.rand(width, generator=generator, device=device).add(0.5).to(dtype)
    return {"x": x, "weight": weight, "eps": 1e-6}


def _sample_with_bias(
    tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, object]:
    made = _sample(tokens, width, dtype, device, generator)
    bias, scale, shift = (torch.randn(width, generator=generator, device=device).to(dtype) for _ in range(3))
    return {**made, "bias": bias, "mod_scale": scale, "mod_shift": shift}


@op(outputs=("norm",), sample=_sample, tolerance={"norm": dataclasses.replace(NORM, fp32_ulp=64, cancels=2)})
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str = BEFORE,
    mod_scale: torch.Tensor | None = None,
    mod_shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm: `x32 * rsqrt(mean(x32²) + eps)`, times a weight. The reduction and the scaling are in float32.

    Args:
        x: [..., width], floating point.
        weight: [width], floating point, or None.
        eps: added to the mean square.
        weight_offset: added to the weight in float32 (1.0 in Gemma, whose weights are near zero); wants "after_weight".
        rounding: where the result is rounded. "before_weight", as Llama has it: the normalised value is rounded to
            `x.dtype` and then multiplied, which rounds again. "after_weight", as `nn.RMSNorm`, OLMo2 and Gemma have it:
            multiplied in float32 and rounded once, to `x.dtype`. "after_modulation": that too is in float32.
        mod_scale: the result is `norm * (1 + mod_scale) + mod_shift`; see `layer_norm`. With `mod_shift`.
        mod_shift: as `mod_scale`.

    Returns:
        [..., width], `x.dtype`; "before_weight" and a weight of a wider dtype give what the two promote to.

    Raises:
        ArgumentError: the weight is not [width], `x` is not floating point, a rounding that does not exist, or one of
            `mod_scale` and `mod_shift` is missing or does not broadcast.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    check_inputs("rms_norm", x, weight)
    if rounding not in (BEFORE, AFTER, LAST):
        raise ArgumentError(f"rounding={rounding!r} does not exist", "rms_norm", f"Pass {BEFORE!r} or {AFTER!r}")
    if weight_offset and rounding == BEFORE:
        raise ArgumentError("weight_offset is added in float32", "rms_norm", f"Pass rounding={AFTER!r}")
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == BEFORE:
        h = h.to(x.dtype) if weight is None else weight * h.to(x.dtype)
    elif weight is not None:
        w = weight.float()
        h = h * (w + weight_offset if weight_offset else w)
    return _modulated(h.to(x.dtype) if rounding == AFTER else h, x.dtype, mod_scale, mod_shift, rounding == LAST)


@op(outputs=("norm",), sample=_sample_with_bias, tolerance={"norm": CENTRED})
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    moments: str = "var_mean",
    mod_scale: torch.Tensor | None = None,
    mod_shift: torch.Tensor | None = None,
    rounding: str = AFTER,
) -> torch.Tensor:
    """LayerNorm: `(x32 - mean) * rsqrt(variance + eps) * weight + bias`, rounded to `x.dtype`, and its modulation.

    Args:
        x: [..., width], floating point.
        weight: [width], floating point, or None.
        eps: added to the variance, which is the biased one.
        bias: [width], floating point, or None.
        weight_offset: added to the weight in the weight's own dtype (1.0 in Nemotron).
        moments: "var_mean", as `torch.nn.functional.layer_norm`; "by_hand", as Cohere: the mean is subtracted first,
            and the squares of the differences are averaged.
        mod_scale: as diffusion transformers have it, the result is `norm * (1 + mod_scale) + mod_shift`, each step
            rounded; broadcasts against `x`: [width], or [batch, 1, width] for [batch, tokens, width]. With `mod_shift`.
        mod_shift: as `mod_scale`.
        rounding: "after_weight", before any modulation; "after_modulation": all in float32, and rounded once, to the
            dtype of `x`.

    Returns:
        [..., width], `x.dtype` (wider where `mod_scale` or `mod_shift` is).

    Raises:
        ArgumentError: weight or bias is not [width], `x` is not floating point, or one of `mod_scale` and `mod_shift`
            is missing or does not broadcast.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Peebles and Xie, "Scalable Diffusion Models with
    Transformers", 2023, for the modulation.
    """
    check_inputs("layer_norm", x, weight, bias)
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    if moments == "var_mean":
        w, b = (None if v is None else v.float() for v in (weight, bias))
        norm = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), w, b, eps)
    elif moments == "by_hand":
        norm = _by_hand(x, weight, bias, eps)
    else:
        raise ArgumentError(f"moments={moments!r} does not exist", "layer_norm", 'Pass "var_mean" or "by_hand"')
    if rounding not in (AFTER, LAST):
        raise ArgumentError(f"rounding={rounding!r} does not exist", "layer_norm", f"Pass {AFTER!r} or {LAST!r}")
    return _modulated(norm if rounding == LAST else norm.to(x.dtype), x.dtype, mod_scale, mod_shift, rounding == LAST)


def _modulated(
    norm: torch.Tensor,
    dtype: torch.dtype,
    mod_scale: torch.Tensor | None,
    mod_shift: torch.Tensor | None,
    last: bool,
) -> torch.Tensor:
    """`norm * (1 + mod_scale) + mod_shift`, or `norm` where there is neither; with `last` rounded to `dtype` then."""
    if mod_scale is None and mod_shift is None:
        return norm.to(dtype) if last else norm
    if mod_scale is None or mod_shift is None:
        raise ArgumentError("only one of mod_scale and mod_shift is there", "norm", "Pass both or neither")
    for modulation in (mod_scale, mod_shift):
        ahead = modulation.shape[:-1]
        fits = len(ahead) <= norm.dim() - 1 and modulation.shape[-1:] == norm.shape[-1:]
        if not fits or any(m not in (1, n) for m, n in zip(ahead[::-1], norm.shape[-2::-1], strict=False)):
            raise ArgumentError(
                f"the modulation has shape {tuple(modulation.shape)}, x has {tuple(norm.shape)}",
                "norm",
                "It must broadcast to x",
            )
    modulated = norm * (1 + mod_scale) + mod_shift
    return modulated.to(dtype) if last else modulated


def _by_hand(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    h = x.float()
    centred = h - h.mean(-1, keepdim=True)
    h = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    h = h if weight is None else weight.float() * h
    return h if bias is None else h + bias.float()


def check_inputs(name: str, x: torch.Tensor, *vectors: torch.Tensor | None) -> None:
    """Raise ArgumentError for the op `name` unless all are floating point, and `vectors` [width] for x [..., width]."""
    given = [v for v in vectors if v is not None]
    if not all(v.is_floating_point() for v in (x, *given)):
        dtypes = " and ".join(str(v.dtype) for v in (x, *given))
        raise ArgumentError(f"x and weight have dtypes {dtypes}", name, "All must be floating point")
    if x.dim() == 0:
        raise ArgumentError("x has no dimensions", name, "Pass [..., width]")
    for vector in given:
        if vector.dim() != 1 or vector.shape[0] != x.shape[-1]:
            raise ArgumentError(
                f"weight has shape {tuple(vector.shape)}, x has width {x.shape[-1]}",
                name,
                "Pass one weight per column",
            )


def _add(arguments: Mapping[str, Any]) -> torch.Tensor:
    x, residual, alpha, second, inner, eps, offset, rounding = arguments.values()
    if inner is not None:
        x = rms_norm.reference(x, inner, eps, offset, rounding)
    return residual_sum(x, residual, alpha, second, "add")


def _sample_add(
    tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, object]:
    x, residual = (torch.randn(tokens, width, generator=generator, device=device).to(dtype) for _ in range(2))
    return {"x": x, "residual": residual}


add = derived(
    "add",
    [
        parameter("x", torch.Tensor),
        parameter("residual", torch.Tensor),
        parameter("alpha", float, 1.0),
        parameter("second", torch.Tensor | None, None),
        parameter("inner_weight", torch.Tensor | None, None),
        parameter("eps", float, 1e-6),
        parameter("weight_offset", float, 0.0),
        parameter("rounding", str, BEFORE),
    ],
    _add,
    """A residual sum: `residual + second + alpha * x`, rounded after each step; `x` may be normalised first.

    Args:
        x: [..., width], floating point.
        residual: the shape and dtype of `x`.
        alpha: `x` is multiplied by it first, and rounded to its dtype; 1.0: not at all.
        second: like `x`, or None; added to `residual` before `x` is, and rounded.
        inner_weight: [width], or None; `x` is first normalised, as `rms_norm` with this weight.
        eps, weight_offset, rounding: of that norm.

    Returns:
        [..., width], the dtype of `x`.

    Raises:
        ArgumentError: the shapes or dtypes differ, or as `rms_norm`.
    """,
    torch.Tensor,
    outputs=("residual",),
    sample=_sample_add,
    tolerance={"residual": SUM},
)

add_rms_norm = adding(rms_norm, "add_rms_norm", "norm", inner=True)
add_layer_norm = adding(layer_norm, "add_layer_norm", "norm")
add_quantize = quantizing(add, "residual")
rms_norm_quantize = quantizing(rms_norm, "norm")
layer_norm_quantize = quantizing(layer_norm, "norm")
add_rms_norm_quantize = quantizing(add_rms_norm, "norm")
add_layer_norm_quantize = quantizing(add_layer_norm, "norm")

for _op, _plan in (
    (rms_norm, "plan_rms_norm"),
    (layer_norm, "plan_layer_norm"),
    (add_rms_norm, "plan_rms_norm"),
    (add_layer_norm, "plan_layer_norm"),
    (add_quantize, "plan_add"),
    (rms_norm_quantize, "plan_rms_norm"),
    (layer_norm_quantize, "plan_layer_norm"),
    (add_rms_norm_quantize, "plan_rms_norm"),
    (add_layer_norm_quantize, "plan_layer_norm"),
):
    _op.backends.append(triton_backend(f"{__name__}.triton", _plan))
