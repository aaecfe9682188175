"""Spellings of gated activations, and what folds into them."""

import torch

from ..ops.activation import gelu_mul, gelu_mul_quantize, silu_mul, silu_mul_quantize
from ..ops.quant import quantize
from ..rule import Fold, Spelling


def _gelu_tanh(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = gelu_mul.reference(gate, up, "tanh")
    return product


SPELLINGS = (
    Spelling("activation.silu_mul", silu_mul, silu_mul.reference),
    Spelling("activation.gelu_mul", gelu_mul, gelu_mul.reference),
    Spelling("activation.gelu_tanh_mul", gelu_mul, _gelu_tanh, {"approximate": "tanh"}),
)

FOLDS = (
    Fold("activation.silu_mul_quantize", silu_mul, quantize, silu_mul_quantize, "product"),
    Fold("activation.gelu_mul_quantize", gelu_mul, quantize, gelu_mul_quantize, "product"),
)
