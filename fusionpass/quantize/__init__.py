"""Quantising a model's linears in place, so that the passes have quantisations to fuse."""

from .linear import QuantizedLinear
from .model import SCHEMES, quantize_
from .report import QuantizedRecord, QuantizeReport, SkippedRecord

__all__ = ["SCHEMES", "QuantizeReport", "QuantizedLinear", "QuantizedRecord", "SkippedRecord", "quantize_"]
