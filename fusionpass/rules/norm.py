"""Spellings of norms, and what folds into them."""

from ..graphs import aten
from ..ops.norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize
from ..ops.quant import quantize
from ..rule import Fold, Spelling

SPELLINGS = (Spelling("norm.llama", rms_norm, rms_norm.reference),)

FOLDS = (
    Fold("norm.add", aten.add.Tensor, rms_norm, add_rms_norm, "residual", names=("x", "residual")),
    Fold("norm.add_quantize", add_rms_norm, quantize, add_rms_norm_quantize, "norm"),
    Fold("norm.quantize", rms_norm, quantize, rms_norm_quantize, "norm"),
)
