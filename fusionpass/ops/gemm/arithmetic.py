"""The arithmetic of products of codes, in plain PyTorch, for each kind of codes and scales."""

import torch
import torch.nn.functional as F

_INT8_ROWS = 17
"""What torch._int_mm wants at least on a GPU."""


def single_scales(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool = False,
) -> torch.Tensor:
    """[M, N] in `dtype`: FP8 codes [M, K] times [K, N], one scale for each matrix."""
    # cuBLAS has no epilogue with a bias for fp32 outputs.
    inside = None if bias is None or dtype == torch.float32 else bias.to(dtype)
    y = torch._scaled_mm(a, b, a_scale, b_scale, bias=inside, out_dtype=dtype, use_fast_accum=fast_accum)
    return y if bias is None or inside is not None else y + bias


def row_scales(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool = False,
) -> torch.Tensor:
    """As `single_scales`, with scales [M, 1] and [1, N]."""
    if a.is_cuda and dtype == torch.bfloat16:
        inside = None if bias is None else bias.to(dtype)
        return torch._scaled_mm(a, b, a_scale, b_scale, bias=inside, out_dtype=dtype, use_fast_accum=fast_accum)
    # CUDA scales rows for bfloat16 alone, and the CPU not before torch 2.12.
    one = a_scale.new_ones(())
    y = torch._scaled_mm(a, b, one, one, out_dtype=torch.float32, use_fast_accum=fast_accum)
    return _scaled(y, a_scale, b_scale, bias, dtype)


def int8_scales(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `row_scales`, of INT8 codes; either scale may be single."""
    rows = a.shape[0]
    if a.is_cuda and rows < _INT8_ROWS:
        a = F.pad(a, (0, 0, 0, _INT8_ROWS - rows))
    return _scaled(torch._int_mm(a, b)[:rows].float(), a_scale, b_scale, bias, dtype)


def _scaled(
    y: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The float32 product of codes `y` with its scales and the bias."""
    y = y * a_scale * b_scale
    return (y if bias is None else y + bias).to(dtype)
