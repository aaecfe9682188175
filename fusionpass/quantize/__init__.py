"""Quantising a model's linears in place, so that the passes have quantisations to fuse."""

from .linear import QuantizedLinear
from .model import quantize_
from .report import QuantizedRecord, QuantizeReport, SkippedRecord
from .scheme import SCHEMES, LinearScheme

__all__ = [
    "SCHEMES", "LinearScheme", "QuantizeReport", "QuantizedLinear", "QuantizedRecord", "SkippedRecord", "quantize_",
]  # fmt: skip
