"""Matrix products of quantised operands."""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from ..ops.gemm import NAMES
from ..ops.gemm.arithmetic import int8_scales, row_scales, single_scales
from ..ops.gemm.blocks import block_scaled_mm, group_of
from ..ops.quant import dequantize

if TYPE_CHECKING:
    from .linear import QuantizedLinear


def product(
    layer: "QuantizedLinear",
    codes: torch.Tensor,
    scales: list[torch.Tensor],
    given: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[M, N] in `dtype`: the codes [M, K] of an input times the layer's weight, plus its bias.

    Args:
        layer: says how both are quantised.
        codes: contiguous.
        scales: those computed for `codes`, with a row for each of its rows; none where the one is given.
        given: the scale that the input's scheme takes, or None.
        dtype: of the result.
    """
    kind, weight_scale = layer.kind, layer.weight_scale
    if {kind.input.granularity, kind.weight.granularity} <= {"tensor", "token"}:
        a_scale = scales[0] if scales else given
        assert a_scale is not None
        operands = codes, layer.weight.t()
        if kind.input.dtype == torch.int8:
            return int8_scales(*operands, a_scale, weight_scale.t(), layer.bias, dtype)
        if kind.input.static and kind.weight.static:
            return single_scales(*operands, a_scale, weight_scale, layer.bias, dtype)
        # One scale for each row and column, or one for the whole of both: there is no product of one and many.
        rows, columns = a_scale.expand(codes.shape[0], 1), weight_scale.t().expand(1, layer.out_features)
        return row_scales(*operands, rows.contiguous(), columns.contiguous(), layer.bias, dtype)
    if group_of(kind.input) == group_of(kind.weight) and kind.input.scale_dtype == kind.weight.scale_dtype:
        scaled, relative = (scales[0], weight_scale), (given, layer.weight_global_scale)
        names = layer.operand_schemes
        y: torch.Tensor = block_scaled_mm(codes, layer.weight, *scaled, *names, *relative, layer.bias, NAMES[dtype])
        return y
    x = dequantize(codes, scales[0] if scales else cast(torch.Tensor, given), kind.input, given)
    weight = dequantize(layer.weight, weight_scale, kind.weight, layer.weight_global_scale)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias)
