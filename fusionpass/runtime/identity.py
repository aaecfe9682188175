"""What something is, as text that is the same in every process: for values that are known in one by where they lie."""

import functools
import hashlib
import sys
import types
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(Ellipsis))
_UNTOLD = frozenset(("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl"))
"""Attributes of a class that do not change what its methods do."""


class UnknownError(Exception):
    """Something has no name that another process knows."""


class Identities:
    """Describes values; what a function or a class consists of is read once.

    A function is its name, its bytecode, its defaults and what it closes over; a class is its name, its bases, its
    methods and its plain attributes: one that was patched is another one.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}

    def describe(self, value: Any) -> str:
        """The same text for the same value in every process.

        Raises:
            UnknownError: it is known by its address alone.
        """
        if type(value) in _PLAIN:
            return repr(value)
        if id(value) not in self._known:
            self._known[id(value)] = value, self._described(value)  # kept, so that no other takes its address
        return self._known[id(value)][1]

    def _described(self, value: Any) -> str:
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, type):
            return f"class {_named(value)} {self._class(value)}"
        if isinstance(value, types.FunctionType):
            return f"function {value.__module__}.{value.__qualname__} {self._function(value)}"
        if isinstance(value, types.MethodType):
            return f"method {self.describe(value.__func__)} of {_named(type(value.__self__))}"
        if isinstance(value, types.CodeType):
            return f"code {value.co_qualname if hasattr(value, 'co_qualname') else value.co_name} {code_digest(value)}"
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            return f"builtin {getattr(value, '__module__', None)}.{value.__qualname__}"
        if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
            return f"operator {value}"
        raise UnknownError(f"a {type(value).__qualname__} is known by its address alone")

    def _class(self, value: type) -> str:
        if value.__module__ == "builtins":
            return ""
        parts = [_named(base) for base in value.__mro__[1:]]
        for base in value.__mro__:
            if base.__module__ == "builtins":
                continue
            attributes = [(name, held) for name, held in vars(base).items() if name not in _UNTOLD]
            parts += [f"{name}={self.held(held)}" for name, held in attributes]
        return _hash(parts)

    def _function(self, value: types.FunctionType, within: tuple[int, ...] = ()) -> str:
        if id(value) in within:
            return "itself"  # a function may be in its own closure
        inner = (*within, id(value))
        cells = [_content(cell) for cell in value.__closure__ or ()]
        held = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items())
        return _hash([code_digest(value.__code__), *(self.held(one, inner) for one in held)])

    def held(self, value: Any, within: tuple[int, ...] = ()) -> str:
        """What a class, a closure or a default holds: of objects no more than their type, as they change."""
        if type(value) in _PLAIN:
            return repr(value)
        if isinstance(value, tuple):
            return f"({', '.join(self.held(one, within) for one in value)})"
        if isinstance(value, types.FunctionType):
            return self._function(value, within)
        if isinstance(value, classmethod | staticmethod | types.MethodType):
            return f"{type(value).__name__} {self.held(value.__func__, within)}"
        if isinstance(value, property):
            return f"property {[self.held(one, within) for one in (value.fget, value.fset, value.fdel)]}"
        if isinstance(value, functools.partial):
            return f"partial {self.held((value.func, *value.args, *value.keywords.items()), within)}"
        if isinstance(value, type):
            return f"class {value.__module__}.{value.__qualname__}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        return f"a {type(value).__module__}.{type(value).__qualname__}"


def code_digest(code: types.CodeType) -> str:
    """A hash of what bytecode does: not of its lines, nor of its file's folder."""
    constants = [
        code_digest(constant)
        if isinstance(constant, types.CodeType)
        else f"{type(constant).__name__} {_plain(constant)}"
        for constant in code.co_consts
    ]
    names = (code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
    table = getattr(code, "co_exceptiontable", b"")
    return _hash([repr(names), code.co_code.hex(), bytes(table).hex(), *constants])


def _plain(constant: Any) -> str:
    if isinstance(constant, types.CodeType):
        return code_digest(constant)
    return repr(sorted(constant, key=repr)) if isinstance(constant, frozenset) else repr(constant)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _named(value: type) -> str:
    """The name of a class.

    Raises:
        UnknownError: what has this name is another one, or nothing.
    """
    name = f"{value.__module__}.{value.__qualname__}"
    if value.__module__ == "builtins":
        return name
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise UnknownError(f"the class {name} is not found by its name")
    return name


def _hash(parts: list[str]) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(f"{len(part)} {part}".encode(errors="surrogatepass"))
    return made.hexdigest()[:32]
