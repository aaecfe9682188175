"""Spellings of activations, and what folds into them."""

import torch

from ..ops.activation import PAIRS, clamped_swiglu, gelu, gelu_mul, relu_squared, silu, silu_mul
from ..ops.quant import quantize
from ..rule import Fold, Spelling
from .norm import again


def _gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = gelu_mul.reference(gate, up)
    return product


def _gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = gelu_mul.reference(gate, up, "tanh")
    return product


def _gelu(x: torch.Tensor) -> torch.Tensor:
    activation: torch.Tensor = gelu.reference(x)
    return activation


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    activation: torch.Tensor = gelu.reference(x, "tanh")
    return activation


# Gated before ungated: the activation alone is the beginning of the product.
SPELLINGS = (
    Spelling("activation.silu_mul", silu_mul, silu_mul.reference),
    Spelling("activation.gelu_mul", gelu_mul, _gelu_mul),
    Spelling("activation.gelu_tanh_mul", gelu_mul, _gelu_tanh_mul, {"approximate": "tanh"}),
    Spelling("activation.clamped_swiglu", clamped_swiglu, clamped_swiglu.reference),
    Spelling("activation.relu_squared", relu_squared, relu_squared.reference),
    Spelling("activation.silu", silu, silu.reference),
    Spelling("activation.gelu", gelu, _gelu),
    Spelling("activation.gelu_tanh", gelu, _gelu_tanh, {"approximate": "tanh"}),
)

FOLDS = tuple(
    fold
    for plain, fused in PAIRS
    for output in fused.options
    for fold in (
        Fold(f"activation.{fused.name}", plain, quantize, fused, output),
        again(f"activation.again_{fused.name}", fused, output),
    )
)
