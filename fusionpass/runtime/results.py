"""What a caller gets of values that lie in memory which the next replay writes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import address, extent, laid

Owner = tuple[int, int] | bool
"""Whose memory a value lies in: an input's, by its slot and its address when it was captured; or whether it is the
pool's, which the next replay writes."""


def hand_out(values: Sequence[Any], owners: Sequence[Owner], args: Sequence[Any], first: Sequence[bool]) -> list[Any]:
    """Values that are safe to keep.

    What lies in the pool is copied, strides and shared memory kept; a view of an input becomes that view of the input
    which the caller gave.

    Args:
        values: results.
        owners: of each value's memory.
        args: the inputs.
        first: which values are the first rows of larger ones, whose strides mean nothing.
    """
    results = list(values)
    shared: dict[int, list[int]] = {}
    for index, (value, owner) in enumerate(zip(values, owners, strict=True)):
        if isinstance(owner, tuple):
            results[index] = _view(value, args[owner[0]], owner[1])
        elif owner:
            shared.setdefault(address(value), []).append(index)
    for indices in shared.values():
        copies = _copies([values[i] for i in indices], first[indices[0]])
        for index, copied in zip(indices, copies, strict=True):
            results[index] = copied
    return results


def _view(value: Tensor, current: Tensor, captured: int) -> Tensor:
    """What `value` is of an input at the address `captured`, of the same input elsewhere."""
    distance = value.data_ptr() - captured
    layout = value.shape, value.stride()
    if distance == 0 and value.dtype == current.dtype and layout == (current.shape, current.stride()):
        return current
    offset = (int(current.storage_offset()) * current.itemsize + distance) // value.itemsize
    if value.dtype == current.dtype:
        return current.as_strided(*layout, offset)
    return laid(current.untyped_storage(), offset, value)


def _copies(values: Sequence[Tensor], narrowed: bool) -> Sequence[Tensor]:
    """Copies of tensors in one storage, which share one again."""
    if len(values) == 1 or values[0].untyped_storage().nbytes() == 0:
        copies = [value.clone() for value in values]
        if narrowed or all(a.stride() == b.stride() for a, b in zip(copies, values, strict=True)):
            return copies
    starts = [int(value.storage_offset()) * value.itemsize for value in values]
    low = min(starts) // 16 * 16  # a multiple of every element's size
    high = max(start + extent(value) for start, value in zip(starts, values, strict=True))
    region = torch.empty(0, dtype=torch.uint8, device=values[0].device)
    region.set_(values[0].untyped_storage(), low, (high - low,), (1,))
    storage = region.clone().untyped_storage()
    return [laid(storage, (start - low) // v.itemsize, v) for start, v in zip(starts, values, strict=True)]
