"""What makes two pieces the same: everything that the compiler sees of them, and nothing that it does not."""

import functools
import hashlib
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_iter

from .program import is_weight

_PLAIN = (
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_LARGEST_CONSTANT = 1 << 20
"""The bytes of a tensor constant up to which it is compared by its content."""


@dataclass
class Fingerprint:
    """What identifies a piece.

    Attributes:
        text: equal for pieces that may share compiled code. Weights are inputs, names do not count, sizes that are
            symbols are numbered by where they first occur.
        functions: the functions outside of torch that the piece calls, or holds; their sources count too.
        unsaveable: why it may not be compared with what another process wrote; empty if it may.
    """

    text: str = ""
    functions: list[Callable[..., Any]] = field(default_factory=list)
    unsaveable: str = ""

    def digest(self) -> str:
        """A short name."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def fingerprint(module: GraphModule) -> Fingerprint:
    """The fingerprint of one of Dynamo's graphs, or of a part of one, under the present modes of torch."""
    return _Reader().read(module)


class _Reader:
    def __init__(self) -> None:
        self.found = Fingerprint()
        self.symbols: dict[Any, str] = {}
        self.storages: dict[int, int] = {}

    def read(self, module: GraphModule) -> Fingerprint:
        lines = [_modes(), *self._lines(module)]
        self.found.text = "\n".join(lines)
        return self.found

    def _lines(self, module: GraphModule) -> list[str]:
        names: dict[Node, str] = {}
        lines = []
        for index, node in enumerate(module.graph.nodes):
            names[node] = f"%{index}"
            if node.op == "placeholder":
                weight = "weight " if is_weight(node) else ""
                lines.append(f"input {weight}{self._value(node.meta.get('example_value'))}")
            elif node.op == "get_attr":
                lines.append(f"constant {self._constant(functools.reduce(getattr, node.target.split('.'), module))}")
            else:
                parts = (node.args, node.kwargs)
                lines.append(f"{node.op} {self._target(node)} {self._literal(parts, names)}")
        return lines

    def _target(self, node: Node) -> str:
        target = node.target
        if isinstance(target, str):
            return target if node.op in ("call_method", "output") else self._unknown(target)
        if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
            return str(target)
        return self._function(target)

    def _function(self, function: Any) -> str:
        module = getattr(function, "__module__", None) or ""
        name = getattr(function, "__qualname__", getattr(function, "__name__", ""))
        if not name:
            return self._unknown(function)
        if module.split(".")[0] not in ("torch", "_operator", "operator", "math", "builtins"):
            if not isinstance(function, types.FunctionType):
                return self._unknown(function)
            self.found.functions.append(function)
            if "<locals>" in name:  # its values are its own
                self.found.unsaveable = f"it calls {name}, a local function"
                return f"{module}.{name} {id(function)}"
        return f"{module}.{name}"

    def _literal(self, value: Any, names: dict[Node, str]) -> str:
        if isinstance(value, Node):
            return names[value]
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._literal(v, names)}" for key, v in sorted(value.items())) + "}"
        if isinstance(value, tuple | list):
            return f"{type(value).__name__}({', '.join(self._literal(v, names) for v in value)})"
        if isinstance(value, slice):
            return f"slice{self._literal((value.start, value.stop, value.step), names)}"
        if isinstance(value, _PLAIN):
            return repr(value)
        if value is Ellipsis:
            return "..."
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        if isinstance(value, GraphModule):
            return "(" + "; ".join(self._lines(value)) + ")"
        if isinstance(value, torch.Tensor):
            text = self._value(value)
            if type(value) is not torch.Tensor or value.nbytes > _LARGEST_CONSTANT:
                return f"{text} {self._unknown(value)}"
            content = value.detach().cpu().contiguous().view(torch.uint8) if value.dim() else value.detach().cpu()
            return f"{text} {hashlib.sha256(str(content.tolist()).encode()).hexdigest()}"
        if callable(value):
            return self._function(value)
        return self._unknown(value)

    def _unknown(self, value: Any) -> str:
        """Something whose content cannot be compared: it is only like itself."""
        self.found.unsaveable = f"it holds a {type(value).__name__}"
        return f"{type(value).__name__} {id(value)}"

    def _value(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()._cdata if value.layout is torch.strided else id(value)
            alias = self.storages.setdefault(storage, len(self.storages))
            sizes = [*value.shape, "/", *value.stride(), "/", value.storage_offset()]
            return (
                f"{type(value).__name__} {value.dtype} {value.device} {' '.join(map(self._size, sizes))} "
                f"{value.requires_grad} {value.is_inference()} memory {alias}"
            )
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return f"{type(value).__name__} {self._size(value)}"
        if isinstance(value, tuple | list):
            return f"({', '.join(map(self._value, tree_iter(value)))})"
        if isinstance(value, _PLAIN):
            return repr(value)
        return self._unknown(value)

    def _size(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return str(size)
        expression, env = size.node.expr, size.node.shape_env
        renamed = {}
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self.symbols:
                known = env.var_to_range.get(symbol) if env is not None else None
                self.symbols[symbol] = f"n{len(self.symbols)}[{known}]"
            renamed[symbol] = type(symbol)(self.symbols[symbol])
        return str(expression.xreplace(renamed))


def _modes() -> str:
    """The modes of torch that change what is compiled."""
    autocast = [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    ]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (
        f"{torch.is_grad_enabled()} {torch.is_inference_mode_enabled()} {autocast} {deterministic} "
        f"{torch.backends.cuda.matmul.allow_tf32} {torch.get_float32_matmul_precision()}"
    )
