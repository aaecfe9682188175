"""Where tensors lie in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> "Layout":
        """The layout of `tensor`."""
        return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """A tensor that lies so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def is_plain(value: Any) -> bool:
    """Whether a value is a strided tensor with memory of its own."""
    if type(value) not in (Tensor, Parameter) and (not isinstance(value, Tensor) or is_wrapper(value)):
        return False
    return value.layout is torch.strided


def is_wrapper(value: Tensor) -> bool:
    """Whether a tensor is made of others."""
    return bool(is_traceable_wrapper_subclass(value))


def parts(value: Tensor) -> tuple[int, ...]:
    """The addresses of the strided tensors that a tensor is made of; none of one that is not."""
    if is_plain(value):
        return (value.data_ptr(),)
    names = value.__tensor_flatten__()[0] if is_wrapper(value) else ()  # type: ignore[attr-defined]
    return tuple(pointer for name in names for pointer in parts(getattr(value, name)))


def address(value: Tensor) -> int:
    """Where the storage of a tensor begins; 0 if it has none."""
    return value.untyped_storage().data_ptr()


def laid(storage: torch.UntypedStorage, offset: int, like: Tensor) -> Tensor:
    """A tensor in `storage`, `offset` elements from its beginning, that lies as `like` does."""
    made = torch.empty(0, dtype=like.dtype, device=like.device)
    return made.set_(storage, offset, like.shape, like.stride())


def extent(value: Tensor) -> int:
    """Bytes from the first element of a tensor to behind the last."""
    if value.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.itemsize


def overlap(args: Sequence[Any], slots: Iterable[int], chosen: Iterable[int]) -> tuple[int, int] | None:
    """Two of `args[slots]`, one of them in `chosen`, between whose first and last elements there is memory of both."""
    chosen = set(chosen)
    tensors = [(slot, args[slot]) for slot in slots if is_plain(args[slot]) and args[slot].numel()]
    last, owner = 0, -1
    for start, end, slot in sorted((tensor.data_ptr(), tensor.data_ptr() + extent(tensor), s) for s, tensor in tensors):
        if start < last and not chosen.isdisjoint((slot, owner)):
            return owner, slot
        if end > last:
            last, owner = end, slot
    return None
