"""fusionpass: explainable kernel fusion for torch.compile, for any transformer."""

from . import ops
from .arch import Arch
from .compile import assert_fused, compile, dynamo_backend, release, report
from .config import Config
from .errors import FusionpassError
from .op import EXACT, Backend, Op, Refusal, Tolerance, op
from .quantize import load_quantized_, lower_linears_, pack_linears_, quantize_, repack_linears_, save_quantized
from .report.dump import dump
from .report.explain import explain
from .report.trace import Record, Report
from .rule import Beside, Fold, Spelling

__version__ = "0.1.0.dev0"

__all__ = [
    "EXACT", "Arch", "Backend", "Beside", "Config", "Fold", "FusionpassError", "Op", "Record", "Refusal", "Report",
    "Spelling", "Tolerance",
    "assert_fused", "compile", "dump", "dynamo_backend", "explain", "load_quantized_", "lower_linears_", "op", "ops",
    "pack_linears_", "quantize_", "release", "repack_linears_", "report", "save_quantized",
]  # fmt: skip
