"""Products of one matrix with weights side by side."""

from typing import Any

import torch

from ..graphs import value
from ..ops.gemm import is_single, scaled_mm
from ..ops.gemm.several import scaled_mms
from ..rule import Beside

Joined = tuple[dict[str, Any], dict[str, str], dict[str, str]] | str
_OWN, _COMMON = ("b", "b_scale", "bias"), ("out_dtype", "fast_accum")


def _differ(given: dict[str, Any], asked: dict[str, Any]) -> str:
    for arguments in (given, asked):
        if (algo := arguments.get("algo", "auto")) not in ("auto", "triton"):
            return f"{algo} was asked for, which multiplies by one weight"
    for name in _COMMON:
        if given[name] != asked[name]:
            return f"they differ in {name}"
    same = _kind(given) == _kind(asked)
    return "" if same else "their scales or biases are of different kinds"


def _kind(arguments: dict[str, Any]) -> tuple[bool, torch.dtype | None]:
    scale, bias = (arguments[name] and value(arguments[name]) for name in ("b_scale", "bias"))
    assert scale is not None
    return is_single(scale), None if bias is None else bias.dtype


def _beside(given: dict[str, Any], asked: dict[str, Any], which: str) -> dict[str, Any]:
    kept = {name: value for name, value in given.items() if name != "algo"}
    return {**kept, **{f"{name}{which}": asked[name] for name in _OWN}}


def _two(given: dict[str, Any], asked: dict[str, Any]) -> Joined:
    return _differ(given, asked) or (_beside(given, asked, "_2"), {}, {"product": "product_2"})


def _three(given: dict[str, Any], asked: dict[str, Any]) -> Joined:
    if given["b_3"] is not None:
        return "there are three already"
    return _differ(given, asked) or (_beside(given, asked, "_3"), {}, {"product": "product_3"})


FOLDS = (
    Beside("scaled_mms.two", scaled_mm, scaled_mm, scaled_mms, ("a", "a_scale"), _two),
    Beside("scaled_mms.three", scaled_mms, scaled_mm, scaled_mms, ("a", "a_scale"), _three),
)
