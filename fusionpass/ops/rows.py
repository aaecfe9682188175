"""What the kernels' plans ask of their inputs: tensors seen as rows, without guarding on a symbolic size."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..arch import Arch
from ..launch import Launch
from ..op import Backend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def triton_backend(module: str, function: str) -> Backend:
    """The backend "triton" with the plan `module.function`, imported on first use: some systems have no Triton."""

    def plan(arch: Arch, **arguments: Any) -> Launch | str:
        if arch.is_cpu:
            return "the cpu has no Triton kernels"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed here"
        if arch.is_cuda and arch.capability < 80:
            return f"Triton's kernels need sm_80 or newer, not {arch.name}"
        found: Callable[..., Launch | str] = getattr(import_module(module), function)
        return found(arch, **arguments)

    return Backend("triton", plan)


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds for every value of the symbols in it. Adds no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def static(size: Any) -> int | None:
    """The size, or None where it is symbolic: then the choice must be good for any."""
    return size if isinstance(size, int) else None


def row_count(tensor: torch.Tensor) -> Any:
    """How many rows of the last dimension there are."""
    return math.prod(tensor.shape[:-1])


def row_stride(tensor: torch.Tensor, name: str) -> Any | str:
    """The one stride, in elements, from each row of the last dimension to the next, or why there is none (a str)."""
    if tensor.dim() == 0:
        return f"{name} has no dimensions"
    width = tensor.shape[-1]
    if any(known(size == 0) for size in tensor.shape):
        return width
    if not known(tensor.stride(-1) == 1) and not known(width == 1):
        return f"{name} has stride {tensor.stride(-1)} in its last dimension, not 1"
    wider = [
        (size, step) for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if not known(size == 1)
    ]
    for (_, outer), (size, inner) in itertools.pairwise(wider):
        if not known(outer == size * inner):
            return f"{name} has strides {tuple(tensor.stride())}: its rows are not evenly spaced"
    return wider[-1][1] if wider else width


def alike_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the shape is the same."""
    return a.dim() == b.dim() and all(known(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and device are the same."""
    return alike_shape(a, b) and a.dtype == b.dtype and a.device == b.device
