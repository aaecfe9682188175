"""Operators that wait for the device: refused before they invalidate a capture."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoWaits(TorchDispatchMode):
    """Raise where an operator would wait for a GPU.

    A capture in which one waits is invalid, and torch 2.11 does not recover from that: its allocators and its random
    generator stay in the capture. An exception before the wait lets the capture end in order.

    Raises:
        RuntimeError: an operator's result depends on what a GPU tensor holds, or it copies between a GPU and memory of
            the host that is not pinned.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at each operator's tags and tensors, then run it."""
        given = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        if _shaped_by_values(func, args, given) and any(t.is_cuda for t in tensors):
            raise RuntimeError(f"{func} waits for the device to know its result")
        if func is torch.ops.aten.copy_.default:
            _refuse_copy(func, tensors[1], tensors[0].device, tensors[0])
        elif func is torch.ops.aten._to_copy.default and given.get("device") is not None:
            _refuse_copy(func, tensors[0], given["device"], None)
        return func(*args, **given)


_SHAPED_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _shaped_by_values(func: Any, args: Any, given: dict[str, Any]) -> bool:
    if not _SHAPED_BY_VALUES.intersection(getattr(func, "tags", ())):
        return False
    if func is torch.ops.aten.index.Tensor:  # indices that are numbers give their own shape
        indices = tree_leaves(args[1] if len(args) > 1 else given["indices"])
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return given.get("output_size") is None
    return True


def _refuse_copy(func: Any, source: Tensor, device: torch.device, target: Tensor | None) -> None:
    if source.is_cuda == (device.type == "cuda"):
        return
    host = source if source.device.type == "cpu" else target
    if host is None or not host.is_pinned():
        raise RuntimeError(f"{func} copies from {source.device} to {device}, memory that is not pinned, and waits")
