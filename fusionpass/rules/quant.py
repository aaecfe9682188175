"""Spellings of quantisation."""

import torch

from ..ops.quant import quantize, static_codes
from ..ops.quant.scheme import Scheme
from ..rule import Spelling


def _static(name: str, scheme: str) -> Spelling:
    """The arithmetic of a static scheme, as its own reference has it."""
    kind = Scheme.parse(scheme)

    def spelled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return static_codes(x, scale, kind)

    return Spelling(name, quantize, spelled, {"scheme": scheme})


SPELLINGS = (
    _static("quant.fp8_static", "fp8_static"),
    _static("quant.fp8_static_divide", "fp8_static,rounding=divide"),
)
