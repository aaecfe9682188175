"""Spellings of norms and residual sums, and what folds into them."""

from collections.abc import Mapping
from typing import Any

import torch

from ..graphs import CAST
from ..match import HALVES
from ..op import Op, Refusal
from ..ops.derive import MORE, residual_sum
from ..ops.norm import (
    AFTER,
    LAST,
    add_layer_norm,
    add_layer_norm_quantize,
    add_quantize,
    add_rms_norm,
    add_rms_norm_quantize,
    layer_norm,
    layer_norm_quantize,
    rms_norm,
    rms_norm_quantize,
)
from ..ops.norm.gated import gated_rms_norm, gated_rms_norm_quantize
from ..ops.quant import quantize
from ..rule import Fold, Spelling


def _after_weight(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return rms_norm.reference(x, weight, eps, rounding=AFTER)


def _offset(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> Any:
    return rms_norm.reference(x, weight, eps, weight_offset, AFTER)


def _llama(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return rms_norm.reference(x, weight, eps)


def _weightless(x: torch.Tensor, eps: float) -> Any:
    return rms_norm.reference(x, None, eps)


def _layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Any:
    return layer_norm.reference(x, weight, eps, bias)


def _layer_offset(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, weight_offset: float) -> Any:
    return layer_norm.reference(x, weight, eps, bias, weight_offset)


def _layer_unbiased(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return layer_norm.reference(x, weight, eps)


def _layer_plain(x: torch.Tensor, eps: float) -> Any:
    return layer_norm.reference(x, None, eps)


def _layer_modulated(x: torch.Tensor, eps: float, mod_scale: torch.Tensor, mod_shift: torch.Tensor) -> Any:
    return layer_norm.reference(x, None, eps, mod_scale=mod_scale, mod_shift=mod_shift)


def _layer_modulated_last(x: torch.Tensor, eps: float, mod_scale: torch.Tensor, mod_shift: torch.Tensor) -> Any:
    return layer_norm.reference(x, None, eps, mod_scale=mod_scale, mod_shift=mod_shift, rounding=LAST)


def _weightless_modulated(x: torch.Tensor, eps: float, mod_scale: torch.Tensor, mod_shift: torch.Tensor) -> Any:
    return rms_norm.reference(x, None, eps, mod_scale=mod_scale, mod_shift=mod_shift)


def _cohere(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return layer_norm.reference(x, weight, eps, moments="by_hand")


def _gated_before(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return gated_rms_norm.reference(x, gate, weight, eps)


def _gated_before_grouped(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> Any:
    return gated_rms_norm.reference(x, gate, weight, eps, "before", group_size)


def _falcon_before(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int) -> Any:
    return gated_rms_norm.reference(x, gate, weight, eps, "before", group_size, AFTER)


def _falcon_after(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int) -> Any:
    return gated_rms_norm.reference(x, gate, weight, eps, "after", group_size, AFTER)


def _gated_after(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return gated_rms_norm.reference(x, gate, weight, eps, "after")


def _sigmoid_after(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return gated_rms_norm.reference(x, gate, weight, eps, "after", None, AFTER, "sigmoid")


def _sum(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return residual_sum(x, residual)


def _sum_scaled(x: torch.Tensor, residual: torch.Tensor, alpha: float) -> torch.Tensor:
    return residual_sum(x, residual, alpha)


def _sum_of_three(x: torch.Tensor, residual: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return residual_sum(x, residual, second=second)


def _not_widened(arguments: Mapping[str, Any]) -> Refusal:
    x = arguments["x"]
    if x.target is CAST and x.args[0].meta["val"].dtype in HALVES:
        return f"a norm of {x.args[0].meta['val'].dtype} that is not rounded back: no rule knows what follows"
    return None


_AFTER_ONCE = {"gating": "after", "rounding": AFTER}

# The longest first: a weightless norm is the beginning of every other.
SPELLINGS = (
    Spelling("norm.llama", rms_norm, _llama),
    Spelling("norm.gemma", rms_norm, _offset, {"rounding": AFTER}),
    Spelling("norm.rms", rms_norm, _after_weight, {"rounding": AFTER}),
    Spelling("norm.weightless", rms_norm, _weightless, refuse=_not_widened),
    Spelling("norm.layer_modulated", layer_norm, _layer_modulated),
    Spelling("norm.layer_modulated_last", layer_norm, _layer_modulated_last, {"rounding": LAST}),
    Spelling("norm.weightless_modulated", rms_norm, _weightless_modulated),
    Spelling("norm.layer_offset", layer_norm, _layer_offset),
    Spelling("norm.layer", layer_norm, _layer),
    Spelling("norm.layer_unbiased", layer_norm, _layer_unbiased),
    Spelling("norm.layer_plain", layer_norm, _layer_plain, refuse=_not_widened),
    Spelling("norm.cohere", layer_norm, _cohere, {"moments": "by_hand"}),
    Spelling("norm.gated_before", gated_rms_norm, _gated_before),
    Spelling("norm.gated_before_grouped", gated_rms_norm, _gated_before_grouped),
    Spelling("norm.gated_before_falcon", gated_rms_norm, _falcon_before, {"rounding": AFTER}),
    Spelling("norm.gated_after", gated_rms_norm, _gated_after, {"gating": "after"}),
    Spelling("norm.gated_after_falcon", gated_rms_norm, _falcon_after, _AFTER_ONCE),
    Spelling("norm.gated_after_sigmoid", gated_rms_norm, _sigmoid_after, {**_AFTER_ONCE, "activation": "sigmoid"}),
)

_SUMS = (_sum_of_three, _sum_scaled, _sum)
_SAME_NORM = ("eps", "weight_offset", "rounding")


def _inner(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    """The norm of what is added, in the op that adds it."""
    if asked["inner_weight"] is not None:
        return "a norm is in there already"
    if given["weight"] is None:
        return "it has no weight"
    if asked["alpha"] != 1.0:
        return "what is added is scaled first"
    if "weight" in asked and any(given[name] != asked[name] for name in _SAME_NORM):
        return "the two norms differ in eps or rounding"
    return {**asked, **{name: given[name] for name in _SAME_NORM}, "x": given["x"], "inner_weight": given["weight"]}, {}


def _again(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    """One more static scale of what is quantised already."""
    if given["scheme"] != asked["scheme"]:
        return f"it is quantised as {given['scheme']} already"
    free = [name for name in MORE if given[name] is None]
    if not free:
        return f"it is quantised with {1 + len(MORE)} scales already"
    return {**given, free[0]: asked["scale"]}, {"q": f"q{free[0].removeprefix('scale')}"}


def again(name: str, fused: Op, output: str) -> Fold:
    """A further quantisation of what `fused` quantises already."""
    return Fold(name, fused, quantize, fused, output, join=_again)


FOLDS = (
    Fold("norm.add", _SUMS, rms_norm, add_rms_norm, "residual"),
    Fold("norm.add_layer", _SUMS, layer_norm, add_layer_norm, "residual"),
    Fold("norm.add_quantize", add_rms_norm, quantize, add_rms_norm_quantize, "norm"),
    Fold("norm.add_layer_quantize", add_layer_norm, quantize, add_layer_norm_quantize, "norm"),
    Fold("norm.quantize", rms_norm, quantize, rms_norm_quantize, "norm"),
    Fold("norm.layer_quantize", layer_norm, quantize, layer_norm_quantize, "norm"),
    Fold("norm.gated_quantize", gated_rms_norm, quantize, gated_rms_norm_quantize, "norm"),
    Fold("norm.sum_quantize", _SUMS, quantize, add_quantize, "residual"),
    *(
        Fold(f"norm.inner_{op.name}", rms_norm, op, op, "norm", reads=("x", "residual"), join=_inner)
        for op in (add_rms_norm, add_rms_norm_quantize, add_quantize)
    ),
    *(
        again(f"norm.again_{op.name}", op, output)
        for op, output in (
            (rms_norm_quantize, "norm"),
            (add_rms_norm_quantize, "norm"),
            (layer_norm_quantize, "norm"),
            (add_layer_norm_quantize, "norm"),
            (add_quantize, "residual"),
            (gated_rms_norm_quantize, "norm"),
        )
    ),
)
