"""What linears of one storage have in common."""

import copy
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn


class Pack:
    """The linear of a whole storage, and those of which each has some of its rows.

    Args:
        layer: the whole.
        shards: in the order of their rows.
        names: of the parameters that are cut by rows, where they have rows.
    """

    def __init__(self, layer: nn.Module, shards: Sequence["Shard"], names: Sequence[str]) -> None:
        self.layer, self.shards, self.names = layer, list(shards), tuple(names)

    def bind(self) -> None:
        """Make the shards' parameters views of the whole, and tell the shards."""
        self.tie()
        start = 0
        for shard in self.shards:
            shard.part = (start, start + shard.out_features)
            shard.pack = self
            start += shard.out_features

    def tie(self) -> None:
        """Make the shards' parameters views of the whole."""
        for shard, name, parameter, view in self._views(self.layer):
            if torch._has_compatible_shallow_copy_type(parameter, view):
                parameter.data = view
            else:
                shard._parameters[name] = nn.Parameter(view, parameter.requires_grad)

    def _views(self, layer: nn.Module) -> Iterator[tuple["Shard", str, nn.Parameter, torch.Tensor]]:
        """Each shard, the name of a parameter of it, the parameter and its rows of that of `layer`."""
        for name in self.names:
            whole: Any = getattr(layer, name, None)
            if whole is None or whole.dim() == 0:
                continue
            start = 0
            for shard in self.shards:
                parameter = shard._parameters.get(name)
                # A bias has a row for each output also where the shard itself has none.
                rows = shard.out_features if parameter is None else parameter.shape[0]
                if parameter is not None:
                    yield shard, name, parameter, whole.detach()[start : start + rows]
                start += rows

    def dissolve(self) -> None:
        """Leave the shards with what they have, each by itself."""
        for shard in self.shards:
            shard.pack = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pack":
        made = Pack(copy.deepcopy(self.layer, memo), [], self.names)
        memo[id(self)] = made
        # The copy of a Parameter would have a storage of its own.
        for _, _, parameter, view in self._views(made.layer):
            memo[id(parameter)] = nn.Parameter(view, parameter.requires_grad)
        made.shards = [copy.deepcopy(shard, memo) for shard in self.shards]
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # Files do not tell what shares a storage: a pickled linear is by itself.
        return NoneType, ()


class Shard(nn.Module):
    """A linear that may have some of the rows of a `Pack`."""

    out_features: int
    pack: Pack | None = None
    part: tuple[int, int] = (0, 0)

    def packed(self, input: torch.Tensor) -> torch.Tensor | None:
        """The linear's columns of the product with the whole, where that is what a graph should hold."""
        pack = self.pack
        # The whole has no gradient, and in eager mode nothing would merge the products of several shards.
        if pack is None or not torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        whole: torch.Tensor = pack.layer(input)
        return whole[..., self.part[0] : self.part[1]]

    def moved(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move the whole, too, behind `_apply(fn)`."""
        if self.pack is not None:
            self.pack.layer._apply(fn)
            self.pack.tie()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shard":
        # The pack comes first, since it has the storage.
        pack = copy.deepcopy(self.pack, memo)
        if id(self) not in memo:
            made = memo[id(self)] = type(self).__new__(type(self))
            own = {name: value for name, value in self.__dict__.items() if name != "pack"}
            made.__dict__.update(copy.deepcopy(own, memo) | {"pack": pack})
        found: Shard = memo[id(self)]
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        pack = self.pack
        if pack is not None and name in self._parameters and value is not self._parameters[name]:
            pack.dissolve()
        super().__setattr__(name, value)
