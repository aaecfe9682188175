"""What Dynamo makes of a frame, kept for another process: its bytecode, its guards, the names that both use.

The guards are not what is loaded. They are made again of the call at hand, by Dynamo's own code, and the text of all
that they check is compared with the text that they had: equal text means that Dynamo read the same.
"""

import dataclasses
import functools
import hashlib
import importlib
import io
import pickle
import re
import sys
import traceback
import types
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._dynamo import bytecode_transformation, output_graph, pgo
from torch._dynamo.guards import CheckFunctionManager, convert_int_to_concrete_values
from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState, get_builtins_dict
from torch._dynamo.package import SerializedCode
from torch._dynamo.utils import CleanupHook, CleanupManager
from torch.utils import _pytree as pytree
from torch.utils._ordered_set import OrderedSet
from torch.utils.weak import TensorWeakRef

from ..runtime.identity import Identities, UnknownError

_ADDRESS = re.compile(r"(?<![\w.])\d{9,}(?![\w.])")
_PLACE = re.compile(r"(___check_obj_id\(.*, type=<.*) at 0x[0-9a-f]+")
"""Where an object lies that the line names otherwise, too."""
_COMPILED = "__compiled_fn"


class UnsaveableError(Exception):
    """Why what Dynamo made of a frame is not kept."""


@dataclass
class Recorded:
    """The guards of a frame, as they were built.

    Attributes:
        guards: all that Dynamo made, before a filter left any out.
        graph: Dynamo's.
        manager: the `CheckFunctionManager`.
        text: what `guards` check, with addresses in it.
        values: what these addresses are of.
    """

    guards: list[Any] = field(default_factory=list)
    graph: Any = None
    manager: Any = None
    text: str = ""
    values: dict[int, Any] = field(default_factory=dict)


@contextmanager
def recording() -> Iterator[Recorded]:
    """Note the guards that Dynamo builds meanwhile; under its lock, so that they are those of one frame."""
    found = Recorded()
    build = CheckFunctionManager.build_guards

    def recorded(self: Any, guards: list[Any], different: Any, code: Any, graph: Any, save: bool, **more: Any) -> Any:
        shapes = [guard for guard in guards if guard.create_fn_name() == "SHAPE_ENV"]
        if self.shape_code_parts is None and shapes:
            # Built in advance, to be saved: torch then writes its expressions down, and takes those from there.
            build(self, shapes, OrderedSet(), code, graph, True)
        builder, manager = build(self, guards, different, code, graph, save, **more)
        if found.manager is not self:
            found.guards, found.graph, found.manager = list(guards), graph, self
            found.text, found.values = str(manager), _values(builder, guards)
        return builder, manager

    with mock.patch.object(CheckFunctionManager, "build_guards", recorded):
        yield found


def _values(builder: Any, guards: Sequence[Any]) -> dict[int, Any]:
    """By address, what guards may name by it."""
    values: dict[int, Any] = {}
    for guard in guards:
        if not guard.name:
            continue
        try:
            value = builder.get(guard)
        except Exception:  # the guard is that there is no such value; torch evaluates whatever source it has
            continue
        for one in (value, type(value), getattr(value, "__code__", None)):
            values[id(one)] = one
    return values


def told(recorded: Recorded) -> str:
    """The text of all guards, without addresses.

    Raises:
        UnknownError: one is about something that has no name in another process.
    """
    identities = Identities()

    def named(match: re.Match[str]) -> str:
        value = recorded.values.get(int(match[0]), _ADDRESS)
        return match[0] if value is _ADDRESS else f"<{identities.describe(value)}>"

    return _PLACE.sub(r"\1", _ADDRESS.sub(named, recorded.text))


@dataclass(frozen=True)
class Trace:
    """What Dynamo made of a frame.

    Attributes:
        backend: the global under which the bytecode finds the compiled graph.
        payload: the rest, for `rebuild`. It holds pickles: the caller vouches for where it comes from.
        traced: the functions that Dynamo went through, by module and name, with what they consist of.
        guards: a hash of what its guards check.
        inputs: shapes (None: any size) of the tensors that it was given, by source, to turn calls down quickly.
    """

    backend: str
    payload: bytes
    traced: list[tuple[str, str, str]]
    guards: str
    inputs: dict[str, list[int | None]]


def save(recorded: Recorded, original: types.CodeType, made: types.CodeType, scope: dict[str, Any]) -> Trace:
    """What `rebuild` takes in another process.

    Args:
        recorded: while Dynamo made it.
        original: the frame's code.
        made: Dynamo's.
        scope: the frame's globals.

    Raises:
        UnsaveableError: it holds something that another process has no name for.
    """
    graph = recorded.graph
    if graph.functorch_layers or graph.torch_function_mode_stack:
        raise UnsaveableError("it was traced inside a mode of torch.func or of __torch_function__")
    try:
        text = told(recorded)
        traced = _traced(graph.traced_code)
    except UnknownError as error:
        raise UnsaveableError(f"a guard cannot be kept: {error}") from error
    names = _names(made)
    backends = [name for name in names if name.startswith(_COMPILED)]
    if len(backends) != 1:
        raise UnsaveableError(f"it calls {len(backends)} graphs")
    aliases = _aliases(graph, names, text, scope)
    for name in names & graph.installed_globals - {backends[0], *aliases}:
        raise UnsaveableError(f"its bytecode needs {name.rstrip('_0123456789') or name}, made while it was traced")
    stacks: dict[Any, Any] = {}
    state = {
        "bytecode": SerializedCode.from_code_object(made),
        "text": zlib.compress(text.encode(errors="surrogatepass"), 1),
        "aliases": aliases,
        "numbers": _numbers(graph, aliases),
        "guards": [_portable(guard, stacks) for guard in recorded.guards],
        "shapes": recorded.manager.shape_code_parts,
        "order": graph.guard_on_key_order,
        "sizes": pytree.tree_map(convert_int_to_concrete_values, graph.input_source_to_sizes_strides),
        "level": graph.dual_level,
        "device": graph.current_device,
        "aot": list(graph.aotautograd_guards),
        "builtins": graph.name_of_builtins_dict_key_in_fglobals,
        "dynamic": dict(pgo.get_code_state()[pgo.CodeId.make(original)].automatic_dynamic),
    }
    try:
        payload = _pickled(state)
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UnsaveableError(f"a guard or its bytecode cannot be kept: {error}") from error
    guards = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return Trace(backends[0], payload, traced, guards, _inputs(recorded))


class _Pickler(pickle.Pickler):
    """Tensors and modules are the model's: what holds one is not kept."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor | torch.nn.Module | torch.SymInt | types.FrameType):
            raise pickle.PicklingError(f"it holds a {type(value).__name__}")
        return NotImplemented


def _pickled(state: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(state)
    return buffer.getvalue()


def _portable(guard: Any, stacks: dict[Any, Any]) -> Any:
    """A guard without what belongs to this process; of its stacks the line that torch's messages name."""
    create = guard.create_fn
    if isinstance(create, functools.partial):
        args = [_held(value) for value in create.args]
        create = functools.partial(create.func, *args, **{k: _held(v) for k, v in create.keywords.items()})
    users = [line for line in guard.user_stack or () if line.filename not in _uninteresting()]
    torchs = guard.stack.summary() if guard.stack and not guard.user_stack else ()
    kept = {
        "user_stack": _line(users[-1], stacks) if users else None,
        "stack": Stack(_line(torchs[-1], stacks)) if torchs else None,
    }
    empty = {"guard_types": None, "code_list": None, "obj_weakref": None, "guarded_class_weakref": None}
    return dataclasses.replace(guard, create_fn=create, **kept, **empty)


def _line(frame: Any, stacks: dict[Any, Any]) -> Any:
    key = (frame.filename, frame.lineno, frame.name)
    return stacks.setdefault(key, traceback.StackSummary.from_list([(*key, frame.line)]))


@dataclass(frozen=True)
class Stack:
    """What a guard asks of a `CapturedTraceback`."""

    lines: traceback.StackSummary

    def summary(self) -> traceback.StackSummary:
        """Its lines."""
        return self.lines


@functools.cache
def _uninteresting() -> frozenset[str]:
    from torch._dynamo.guards import uninteresting_files

    return frozenset(uninteresting_files())


def _held(value: Any) -> Any:
    """An argument of a guard: of a tensor nothing, as it is looked up again."""
    value = value() if isinstance(value, weakref.ref | TensorWeakRef) else value
    return None if isinstance(value, torch.Tensor) else value


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


def _renamed(code: types.CodeType, old: str, new: str) -> types.CodeType:
    inner = [_renamed(c, old, new) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    names = [new if name == old else name for name in code.co_names]
    return code.replace(co_consts=tuple(inner), co_names=tuple(names))


def _aliases(graph: Any, names: set[str], text: str, scope: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The globals that Dynamo made for itself, and what each is: (kind, name)."""
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(graph.installed_globals | set(graph.import_sources) | {n for n in scope if "__import_" in n}):
        if name.startswith(_COMPILED) or name not in scope or not (name in names or f"G['{name}']" in text):
            continue
        value = scope[name]
        if isinstance(value, types.ModuleType):
            found[name] = "module", value.__name__
        elif value is get_builtins_dict(scope):
            found[name] = "builtins", ""
        elif isinstance(value, type | types.FunctionType) and _found(value.__module__, value.__qualname__) is value:
            found[name] = value.__module__, value.__qualname__
        else:
            raise UnsaveableError(f"it needs a {type(value).__name__} that was made while it was traced")
    return found


def _found(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _numbers(graph: Any, aliases: dict[str, Any]) -> tuple[int, int]:
    """The numbers in names that torch gave out: of graphs and of globals."""
    ends = [int(name.rpartition("_")[2]) for name in aliases if name.rpartition("_")[2].isdigit()]
    return int(graph.compile_id), max(ends, default=0)


def _traced(codes: Sequence[types.CodeType]) -> list[tuple[str, str, str]]:
    """The functions at the top of a module or class that bytecode belongs to, and what they consist of."""
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    identities, found = Identities(), {}
    for code in dict.fromkeys(codes):
        module = modules.get(code.co_filename)
        name = getattr(code, "co_qualname", code.co_name).partition(".<locals>")[0]
        if module is None:
            if code.co_filename.startswith("<"):
                continue  # a dataclass's: its text comes from the class, which is in a file
            raise UnsaveableError(f"{name} belongs to no module")
        found[module, name] = function_text(module, name, identities)
    return [(module, name, text) for (module, name), text in found.items()]


def function_text(module: str, name: str, identities: Identities) -> str:
    """What the function of a name consists of now; that there is none is text too."""
    return identities.held(_found(module, name))


def _inputs(recorded: Recorded) -> dict[str, list[int | None]]:
    found: dict[str, list[int | None]] = {}
    sizes = recorded.graph.input_source_to_sizes_strides
    for guard in recorded.guards:
        source = guard.originating_source
        if guard.create_fn_name() != "TENSOR_MATCH" or source not in sizes or "._modules[" in guard.name:
            continue
        shape = [convert_int_to_concrete_values(size) for size in sizes[source]["size"]]
        found[guard.name] = shape
    return found


def fits(inputs: Mapping[str, Sequence[int | None]], local: dict[str, Any], scope: dict[str, Any]) -> bool:
    """Whether a call may be one that was traced, by its tensors' shapes alone."""
    for source, shape in inputs.items():
        try:
            value = eval(source, {"L": local, "G": scope})
        except Exception:  # not there: whatever the source does
            return False
        if not isinstance(value, torch.Tensor) or value.dim() != len(shape):
            return False
        if any(want is not None and have != want for have, want in zip(value.shape, shape, strict=True)):
            return False
    return True


@dataclass(frozen=True)
class Rebuilt:
    """A trace in this process.

    Attributes:
        code: the bytecode to run in the frame's place.
        guards: what is checked at each call.
    """

    code: types.CodeType
    guards: Any


def rebuild(
    trace: Trace,
    original: types.CodeType,
    local: dict[str, Any],
    scope: dict[str, Any],
    graph: Callable[[], Callable[..., Any] | str],
    filter_guards: Any = None,
) -> Rebuilt | str:
    """The trace for a frame like the one that it was made of, or what is different.

    Args:
        trace: of `save`.
        original: the frame's code.
        local: its variables.
        scope: its globals; what the bytecode needs is added for as long as it lives.
        graph: makes the compiled graph, once all else fits; or says why there is none.
        filter_guards: as torch.compile's option `guard_filter_fn`.
    """
    state = pickle.loads(trace.payload)
    identities = Identities()
    for module, name, text in trace.traced:
        if function_text(module, name, identities) != text:
            return f"{module}.{name} is another function"
    hooks: list[Any] = []
    try:
        if reason := _install(state, scope, hooks):
            return reason
        manager, recorded = _manager(state, original, local, scope, filter_guards)
        if isinstance(manager, str):
            return manager
        was = zlib.decompress(state["text"]).decode(errors="surrogatepass")
        try:
            now = told(recorded)
        except UnknownError as error:
            return str(error)
        if now != was:
            return _difference(was, now)
        if not manager.guard_manager.check(local):
            return "a guard does not hold"
        code = SerializedCode.to_code_object(state["bytecode"])
        run = graph()
        if isinstance(run, str):
            return run
        name = bytecode_transformation.unique_id(_COMPILED, with_uuid=True)  # the kept one may be in use here
        code = _renamed(code, trace.backend, name)
        hooks.append(CleanupHook.create(scope, name, torch._dynamo.disable(run)))
        CleanupManager.instance[code] = list(hooks)
        hooks.clear()
    finally:
        for hook in hooks:
            hook()
    known = pgo.get_code_state()[pgo.CodeId.make(original)].automatic_dynamic
    for name, entry in state["dynamic"].items():
        known[name] |= entry
    from torch._dynamo.convert_frame import output_codes
    from torch._dynamo.utils import orig_code_map

    output_codes.add(code)
    orig_code_map[code] = original
    return Rebuilt(code, manager.guard_manager)


def _install(state: dict[str, Any], scope: dict[str, Any], hooks: list[Any]) -> str:
    graphs, names = state["numbers"]
    _advance(output_graph._compile_id_counter, graphs)
    _advance(bytecode_transformation._unique_id_counter, names)
    for name, (kind, target) in state["aliases"].items():
        if kind == "module":
            value: Any = importlib.import_module(target)
        else:
            value = get_builtins_dict(scope) if kind == "builtins" else _found(kind, target)
        if name in scope:
            if scope[name] is not value:
                return f"the global {name} is something else"
        elif name.startswith("__import_"):
            scope[name] = value  # as Dynamo does: all its graphs have these in common
        else:
            hooks.append(CleanupHook.create(scope, name, value))
    return ""


def _advance(counter: Iterator[int], number: int) -> None:
    """Let a counter of torch's give out no number up to `number` again."""
    while next(counter) < number:
        pass


def _manager(
    state: dict[str, Any], original: types.CodeType, local: dict[str, Any], scope: dict[str, Any], filter_guards: Any
) -> tuple[Any, Recorded]:
    from torch._C._dynamo.guards import GlobalStateGuard
    from torch._guards import GuardsSet

    known = {f.name for f in dataclasses.fields(OutputGraphGuardsState)}
    fields = {
        "local_scope": local,
        "global_scope": scope,
        "torch_function_mode_stack": [],
        "guard_on_key_order": state["order"],
        "input_source_to_sizes_strides": state["sizes"],
        "dual_level": state["level"],
        "functorch_layers": [],
        "current_device": state["device"],
        "global_state_guard": GlobalStateGuard(),
        "_guards": GuardsSet(OrderedSet(state["guards"])),
        "_aotautograd_guards": state["aot"],
        "skip_guards_check": True,
        "name_of_builtins_dict_key_in_fglobals": state["builtins"],
    }
    graph = OutputGraphCommon(OutputGraphGuardsState(**{k: v for k, v in fields.items() if k in known}))
    with recording() as recorded:
        try:
            manager = CheckFunctionManager(
                original,
                graph,
                guard_filter_fn=filter_guards,
                shape_code_parts=state["shapes"],
                runtime_global_scope=scope,
            )
        except Exception as error:  # a source that leads nowhere here: torch raises whatever that does
            return f"a guard cannot be made: {type(error).__name__}: {error}", recorded
    return manager, recorded


def _difference(was: str, now: str) -> str:
    for before, after in zip(was.splitlines(), now.splitlines(), strict=False):
        if before != after:
            return f"guarded otherwise: {after.strip()[:300]}, not {before.strip()[:300]}"
    return "there are more or fewer guards"
