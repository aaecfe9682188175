"""Around attention."""

import torch

from ...arch import Arch
from ...errors import ArgumentError
from .decode import attention, attention_quantize

__all__ = ["attention", "attention_quantize", "view_heads"]


def view_heads(x: torch.Tensor, head_dim: int, arch: Arch | None = None, copy: bool | None = None) -> torch.Tensor:
    """Split the last dimension into heads, as a QK-norm wants its input.

    On CUDA and the CPU the result is a view that keeps the strides of `x`, so a slice of a packed QKV row is not
    copied: [..., heads * head_dim] → [..., heads, head_dim]. On ROCm it is `reshape(-1, head_dim)`, and a copy of a
    strided slice, since kernels there assume contiguous rows: → [rows * heads, head_dim].

    Args:
        x: [..., heads * head_dim], any dtype; its last stride must be 1 for a view.
        head_dim: elements per head.
        arch: the target; None: that of `x`'s device.
        copy: whether rows are made contiguous; None: on ROCm. The kernels of this package follow strides on every
            target (`qk_norm`, `qk_norm_rope`), and need no copy.

    Returns:
        A view of `x`, or [rows * heads, head_dim], contiguous.

    Raises:
        ArgumentError: the last dimension is not a multiple of `head_dim`.

    Source: SGLang's pull request 23227, where the view without its gate faulted on AMD GPUs.
    """
    if x.dim() == 0 or head_dim < 1 or x.shape[-1] % head_dim:
        raise ArgumentError(
            f"x has shape {tuple(x.shape)}, whose last dimension is not a multiple of head_dim {head_dim}",
            "view_heads",
            "Pass [..., heads * head_dim]",
        )
    if copy is None:
        copy = (arch or Arch.of(x.device)).copies_strided_heads
    if copy:
        # A slice of one head reshapes without a copy, and is strided still.
        return x.reshape(-1, head_dim).contiguous()
    heads: torch.Tensor = x.unflatten(-1, (-1, head_dim))
    return heads
