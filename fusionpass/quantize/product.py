"""Matrix products of quantised operands."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..ops.quant import dequantize

if TYPE_CHECKING:
    from .linear import QuantizedLinear

_INT8_ROWS = 17
"""What torch._int_mm wants at least on a GPU."""


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
        return _one_scale(layer, codes, dtype)
    if kind.granularity == "token":
        rows = _int8_rows if kind.dtype == torch.int8 else _fp8_rows
        return rows(layer, codes, scales[0], dtype)
    x = dequantize(codes, scales[0], kind, layer.input_scale)
    weight = dequantize(layer.weight, layer.weight_scale, layer.kind.weight, layer.weight_global_scale)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias)


def _one_scale(layer: "QuantizedLinear", codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # cuBLAS has no epilogue with a bias for fp32 outputs.
    inside = None if layer.bias is None or dtype == torch.float32 else layer.bias.to(dtype)
    assert layer.input_scale is not None
    y = torch._scaled_mm(codes, layer.weight.t(), layer.input_scale, layer.weight_scale, bias=inside, out_dtype=dtype)
    return y if layer.bias is None or inside is not None else y + layer.bias


def _fp8_rows(layer: "QuantizedLinear", codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight, weight_scale = layer.weight.t(), layer.weight_scale.t()
    if codes.is_cuda and dtype == torch.bfloat16:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return torch._scaled_mm(codes, weight, scale, weight_scale, bias=bias, out_dtype=dtype)
    # CUDA scales rows for bfloat16 alone, and the CPU not before torch 2.12.
    one = scale.new_ones(())
    return _scaled(layer, torch._scaled_mm(codes, weight, one, one, out_dtype=torch.float32), scale, dtype)


def _int8_rows(layer: "QuantizedLinear", codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows = codes.shape[0]
    if codes.is_cuda and rows < _INT8_ROWS:
        codes = F.pad(codes, (0, 0, 0, _INT8_ROWS - rows))
    return _scaled(layer, torch._int_mm(codes, layer.weight.t())[:rows].float(), scale, dtype)


def _scaled(layer: "QuantizedLinear", y: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 product of codes `y` with its scales and the bias."""
    y = y * scale * layer.weight_scale.t()
    return (y if layer.bias is None else y + layer.bias).to(dtype)
