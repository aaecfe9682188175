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
    "quant.int8_group128": "int8_group128",
    # What `lower_linears_` makes of other libraries' linears.
    "quant.fp8_token_divide": "fp8_token,rounding=divide",
    "quant.fp8_token_one": "fp8_token,eps=0.0,rounding=divide,zero=one",
    "quant.fp8_token_narrow": "fp8_token,amax_dtype=input,rounding=divide",
    "quant.fp8_token_narrow_nan": "fp8_token,amax_dtype=input,eps=0.0,rounding=divide",
    "quant.fp8_group128_divide": "fp8_group128,rounding=divide",
    "quant.fp8_group128_narrow": "fp8_group128,amax_dtype=input,rounding=divide",
    "quant.fp8_group128_narrow_nan": "fp8_group128,amax_dtype=input,eps=0.0,rounding=divide",
    "quant.nvfp4_divide": "nvfp4,rounding=divide",
    "quant.int8_token_narrow": "int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5",
    "quant.int8_token_narrow_divide": "int8_token,amax_dtype=input,rounding=divide,divisor=127.5",
    "quant.int8_group128_narrow_divide": "int8_group128,amax_dtype=input,rounding=divide,divisor=127.5",
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
