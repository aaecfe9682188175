"""Quantising a model's linears in place, so that the passes have quantisations to fuse."""

from .checkpoint import load_quantized_, save_quantized
from .experts import QuantizedExperts
from .linear import QuantizedLinear
from .lower import lower_linears_
from .model import quantize_
from .pack import pack_linears_
from .repack import repack_linears_
from .report import (
    LoweredRecord,
    LowerReport,
    PackedRecord,
    PackReport,
    QuantizedRecord,
    QuantizeReport,
    RepackedRecord,
    RepackReport,
    SkippedRecord,
)
from .scheme import SCHEMES, LinearScheme

__all__ = [
    "SCHEMES", "LinearScheme", "LowerReport", "LoweredRecord", "PackReport", "PackedRecord", "QuantizeReport",
    "QuantizedExperts", "QuantizedLinear", "QuantizedRecord", "RepackReport", "RepackedRecord", "SkippedRecord",
    "load_quantized_", "lower_linears_", "pack_linears_", "quantize_", "repack_linears_", "save_quantized",
]  # fmt: skip
