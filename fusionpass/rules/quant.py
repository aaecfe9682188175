"""Spellings of quantisation."""

import torch

from ..ops.quant import quantize
from ..ops.quant.scheme import SCHEMES
from ..rule import Spelling

_STATIC = SCHEMES["fp8_static"]


def _reciprocal(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale.reciprocal()).clamp(-_STATIC.max, _STATIC.max).to(_STATIC.dtype)


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-_STATIC.max, _STATIC.max).to(_STATIC.dtype)


SPELLINGS = (
    Spelling("quant.fp8_static", quantize, _reciprocal, {"scheme": "fp8_static"}),
    Spelling("quant.fp8_static_divide", quantize, _divide, {"scheme": "fp8_static,rounding=divide"}),
)
