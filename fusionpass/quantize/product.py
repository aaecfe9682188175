"""Matrix products of quantised operands."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..ops.gemm.arithmetic import int8_scales, row_scales, single_scales
from ..ops.quant import dequantize

if TYPE_CHECKING:
    from .linear import QuantizedLinear


def product(
    layer: "QuantizedLinear", codes: torch.Tensor, scales: list[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """[M, N] in `dtype`: the codes [M, K] of an input times the layer's weight, plus its bias.

    Args:
        layer: says how both are quantised.
        codes: contiguous.
        scales: those computed for `codes`, with a row for each of its rows; none where the layer holds the input's.
        dtype: of the result.
    """
    kind = layer.kind.input
    if kind.granularity == "tensor":
        assert layer.input_scale is not None
        return single_scales(codes, layer.weight.t(), layer.input_scale, layer.weight_scale, layer.bias, dtype)
    if kind.granularity == "token":
        scaled = int8_scales if kind.dtype == torch.int8 else row_scales
        return scaled(codes, layer.weight.t(), scales[0], layer.weight_scale.t(), layer.bias, dtype)
    x = dequantize(codes, scales[0], kind, layer.input_scale)
    weight = dequantize(layer.weight, layer.weight_scale, layer.kind.weight, layer.weight_global_scale)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias)
