"""What the quantised linears of a model read, found by running it: no graph, rule or report has a say."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fusionpass.quantize import QuantizedLinear

KINDS = ("norm", "sum", "activation", "attention", "other")

_TORCH = os.path.dirname(torch.__file__) + os.sep
_MOVES = {
    "view", "_unsafe_view", "reshape", "transpose", "permute", "t", "expand", "slice", "select", "split",
    "split_with_sizes", "unsqueeze", "squeeze", "clone", "contiguous", "alias", "detach", "_to_copy", "unbind",
    "narrow", "lift_fresh", "native_dropout",
}  # fmt: skip
_ACTIVATIONS = {"silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "hardswish", "mish", "leaky_relu", "elu"}
_SUMS = {"add", "add_", "sub", "sub_"}


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a tensor was computed; views, copies and casts of it have the same. Compared by identity.

    Args:
        kind: one of `KINDS`, or "softmax".
        where: path of the norm, or of the module that called the operator.
        op: the operator, or the class of the norm or activation.
        norms: of a norm: it, and those whose output, perhaps in a sum, it reads; of a sum: those that went into it.
        places: (module path, "file:line") of the last operator of the computation and of the views and casts behind it.
    """

    kind: str
    where: str
    op: str
    norms: frozenset[str] = frozenset()
    places: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True)
class Site:
    """A tensor that quantised linears read: `Origin`'s fields, and the paths of the linears."""

    kind: str
    where: str
    op: str
    norms: frozenset[str]
    linears: tuple[str, ...]
    places: frozenset[tuple[str, str]] = frozenset()


def sites(model: nn.Module, inputs: dict[str, Any]) -> list[Site]:
    """What the `QuantizedLinear`s of `model` read when it is called with `inputs`, in the order of reading.

    "norm" is the output of a module with "Norm" in its class name, and "activation" and "attention" what such an
    operator gives, also multiplied by something; "sum" is arithmetic on the output of a norm: a residual added behind
    it, or a modulation. "other" is the rest.
    """
    origins = _Origins()
    with torch.no_grad(), _hooked(model, origins), origins:
        model(**inputs)
    return [
        Site(origin.kind, origin.where, origin.op, origin.norms, tuple(readers), frozenset(origin.places))
        for origin, readers in origins.read.items()
    ]


class _Origins(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of = WeakTensorKeyDictionary()
        self.stack = [""]
        self.behind: list[frozenset[str]] = []
        # The same activation of the same tensor, in several modules, is one site: it need run only once.
        self.activated = WeakTensorKeyDictionary()
        self.read: dict[Origin, dict[str, None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        name = func.overloadpacket.__name__
        origin = self._origin(name, torch.Tag.pointwise in func.tags, read, written)
        if origin is not None:
            origin.places.add((self.stack[-1], _line()))
        for t in written:
            self.of[t] = origin
        return out

    def _origin(
        self, name: str, pointwise: bool, read: list[torch.Tensor], written: list[torch.Tensor]
    ) -> Origin | None:
        known = [self.of.get(t) for t in read]
        by_kind = {origin.kind: origin for origin in reversed(known) if origin is not None}
        where = self.stack[-1]
        if name in _MOVES:
            return known[0] if known else None
        if "scaled_dot_product" in name:
            return Origin("attention", where, name)
        if name == "_softmax" or name == "_safe_softmax":
            return Origin("softmax", where, name)
        if "softmax" in by_kind and name in ("bmm", "mm", "baddbmm"):
            return Origin("attention", where, name)
        if name in _ACTIVATIONS:
            return Origin("activation", where, name)
        if pointwise:
            full = sum(t.numel() == written[0].numel() for t in read)
            joins = name in _SUMS and full > 1
            for kind in ("attention", "activation"):
                if kind in by_kind and not joins:
                    return Origin(kind, where, name)
            # A residual stream has seen many norms; the one just added makes it what it is.
            kinds = ("norm",) if joins else ("norm", "sum")
            norms = frozenset().union(*(o.norms for o in known if o is not None and o.kind in kinds))
            if norms:
                return Origin("sum", where, name, norms)
        return Origin("other", where, name)


@contextlib.contextmanager
def _hooked(model: nn.Module, origins: _Origins) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            origins.stack.append(path)
            x = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
            read = None if x is None else origins.of.get(x)
            origins.behind.append(frozenset() if read is None else read.norms)
            if isinstance(module, QuantizedLinear):
                origin = origins.of.setdefault(x, Origin("other", "", "input"))
                origins.read.setdefault(origin, {})[path] = None

        def leave(module: nn.Module, args: Any, out: Any, path: str = path) -> None:
            origins.stack.pop()
            behind = origins.behind.pop()
            kind = _kind(module)
            if kind is not None and isinstance(out, torch.Tensor):
                norms = frozenset([path, *behind] if kind == "norm" else ())
                inside = origins.of.get(out)
                places = {(path, "")} if inside is None else set(inside.places)
                origin = Origin(kind, path, type(module).__name__, norms, places)
                if kind == "activation" and args and not any(True for _ in module.parameters()):
                    origin = origins.activated.setdefault(args[0], {}).setdefault(repr(module), origin)
                origins.of[out] = origin

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _line() -> str:
    """ "file:line" of the innermost frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _kind(module: nn.Module) -> str | None:
    """What the output of a module is; None where the operators in it say."""
    if isinstance(module, nn.Linear | QuantizedLinear):
        return "other"
    if any(True for _ in module.children()):
        return None
    if "Norm" in type(module).__name__:
        return "norm"
    return "activation" if type(module).__module__.rpartition(".")[2] in ("activation", "activations") else None
