"""How the scales of groups, and the codes that they belong to, lie in memory.

| layout | scales of [rows, groups] | who reads it |
|---|---|---|
| linear | [rows, groups] | everything of ours; checkpoints |
| column_major | the same, each group's column by itself | cuBLAS and DeepGEMM, on Hopper |
| swizzled | blocks of 128 × 4, padded with zeros | cuBLAS, FlashInfer's CUTLASS and CuTe kernels |
| trtllm | the same, of rows shuffled within 32, as those of the codes are | FlashInfer's TensorRT-LLM kernels |
| deepgemm | four exponents an int32, each four groups' column by itself | DeepGEMM, on Blackwell |

`laid_out` goes from the first to any, `linear` back. Nothing is lost, so that both are each other's inverse.
"""

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


SHUFFLED = 32
"""Rows within which TensorRT-LLM's kernels want a weight's order changed."""


def shuffled(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, ...] with row 4i + j of every 32 at 8j + i. Five times is the identity; twice is not.

    Source: FlashInfer's `shuffle_matrix_a` for tiles of 128 rows.
    """
    blocks: torch.Tensor = matrix.unflatten(0, (-1, 8, 4))
    return blocks.transpose(1, 2).flatten(0, 2)


def unshuffled(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of `shuffled`."""
    blocks: torch.Tensor = matrix.unflatten(0, (-1, 4, 8))
    return blocks.transpose(1, 2).flatten(0, 2)


def exponents_packed(scales: torch.Tensor) -> torch.Tensor:
    """Exponent bytes [..., groups] as [..., ⌈groups/4⌉] int32, the first in the lowest byte, column-major.

    Source: DeepGEMM's `get_mn_major_tma_aligned_packed_ue8m0_tensor`.
    """
    return column_major(F.pad(scales, (0, -scales.shape[-1] % 4)).contiguous().view(torch.int32))


def exponents_unpacked(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The exponent bytes of `shape` that `exponents_packed` stored."""
    # One column is contiguous whatever its stride, which a view as bytes minds.
    return packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)[..., : shape[-1]].contiguous()


def stored_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Of scales [..., groups] once they lie so."""
    if layout in ("swizzled", "trtllm"):
        return swizzled_shape(math.prod(shape[:-1]), shape[-1])
    return (*shape[:-1], -(-shape[-1] // 4)) if layout == "deepgemm" else shape


def laid_out(codes: torch.Tensor, scales: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., K] and their linear scales [..., groups] in a layout; `refuse_layout` says which ones fit."""
    if layout == "column_major":
        return codes, column_major(scales)
    if layout == "swizzled":
        return codes, swizzled(scales)
    if layout == "trtllm":
        return shuffled(codes), swizzled(shuffled(scales))
    return (codes, exponents_packed(scales)) if layout == "deepgemm" else (codes, scales)


def linear(
    codes: torch.Tensor, scales: torch.Tensor, layout: str, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and the linear scales, of `shape`, that `laid_out` was given."""
    if layout == "column_major":
        return codes, scales.contiguous()
    if layout == "swizzled":
        return codes, unswizzled(scales, shape)
    if layout == "trtllm":
        return unshuffled(codes), unshuffled(unswizzled(scales, shape))
    return (codes, exponents_unpacked(scales, shape)) if layout == "deepgemm" else (codes, scales)


def refuse_layout(rows: int, layout: str) -> str | None:
    """Why a matrix of so many rows cannot lie so."""
    if layout == "trtllm" and rows % 128:
        return f"it has {rows} rows, and TensorRT-LLM's kernels take blocks of 128"
    return None
