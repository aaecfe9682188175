"""Spellings of quantisation."""

from typing import Any

import torch

from ..ops.quant import quantize, quantized
from ..ops.quant.scheme import Scheme
from ..rule import Spelling

SCHEMES = {
    "quant.fp8_static": "fp8_static",
    "quant.fp8_static_divide": "fp8_static,rounding=divide",
    "quant.fp8_token": "fp8_token",
    "quant.fp8_group128": "fp8_group128",
    "quant.fp8_group128_ue8m0": "fp8_group128,scale_rounding=ceil",
    "quant.fp8_group128_e8m0": "fp8_group128,scale_dtype=float8_e8m0fnu",
    "quant.mxfp8": "mxfp8",
    "quant.mxfp8_log2": "mxfp8,scale_rounding=log2_ceil",
    "quant.mxfp8_floor": "mxfp8,scale_rounding=floor",
    "quant.nvfp4": "nvfp4",
    "quant.int8_token": "int8_token",
}
"""Schemes as this package computes them, by the name of the spelling."""


def as_defined(name: str, scheme: str) -> Spelling:
    """The arithmetic of a scheme, as its own reference has it."""
    kind = Scheme.parse(scheme)

    def computed(x: torch.Tensor) -> Any:
        return quantized(x, None, kind)

    def given(x: torch.Tensor, scale: torch.Tensor) -> Any:
        return quantized(x, scale, kind)

    return Spelling(name, quantize, given if kind.takes_scale else computed, {"scheme": scheme})


SPELLINGS = tuple(as_defined(name, scheme) for name, scheme in SCHEMES.items())
