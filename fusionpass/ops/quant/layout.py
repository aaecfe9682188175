"""How the scales of groups lie in memory."""

import math

import torch
import torch.nn.functional as F


def padded_rows(rows: int, itemsize: int) -> int:
    """Rows of a column of column-major scales: as many as fill whole 16-byte units, which TMA wants. At least one."""
    unit = 16 // itemsize
    return 1 if isinstance(rows, int) and rows == 0 else (rows + unit - 1) // unit * unit


def column_major(scales: torch.Tensor) -> torch.Tensor:
    """[..., groups] with each group's column contiguous over all rows, and columns 16-byte aligned. Same shape."""
    rows, groups = math.prod(scales.shape[:-1]), scales.shape[-1]
    pad = padded_rows(rows, scales.element_size()) - rows
    # A pad by nothing would keep the strides.
    columns = F.pad(scales.reshape(rows, groups).t().contiguous(), (0, pad))
    return columns[:, :rows].t().view(scales.shape)


def column_major_stride(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of `column_major` for scales of this shape."""
    strides = [padded_rows(math.prod(shape[:-1]), itemsize)]
    step = 1
    for size in reversed(shape[:-1]):
        strides.insert(0, step)
        step *= size
    return tuple(strides)


def swizzled_shape(rows: int, groups: int) -> tuple[int, int]:
    """Of the blocked layout that holds rows × groups scales."""
    return (rows + 127) // 128 * 128, (groups + 3) // 4 * 4


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """[..., groups] in blocks of 128 × 4, each stored as 32 × 16: rows 32 apart lie side by side. Padding is zero.

    Returns:
        [⌈rows/128⌉·128, ⌈groups/4⌉·4], contiguous; its shape says how large it is, not where a scale lies.

    Source: https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
    """
    rows, groups = math.prod(scales.shape[:-1]), scales.shape[-1]
    down, across = swizzled_shape(rows, groups)
    padded = F.pad(scales.reshape(rows, groups), (0, across - groups, 0, down - rows))
    blocks = padded.view(down // 128, 4, 32, across // 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(down, across)


def unswizzled(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The scales of `shape` that `swizzled` stored."""
    down, across = scales.shape
    blocks = scales.view(down // 128, across // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(down, across)[: math.prod(shape[:-1]), : shape[-1]].reshape(shape)
