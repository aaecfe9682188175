"""Dynamo's traces on disk: a second process neither traces nor compiles.

An entry is what Dynamo made of a frame, with the program that our pieces make up; the pieces are entries of their own.
It is used only where the guards that Dynamo would make of the call are, to the letter, those that it made then, and
where what it read is as it was.
"""

import dataclasses
import importlib
import logging
import pickle
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import inductor
from ..report.trace import ModelGraph, PieceRecord
from .build import Constant
from .cache import Cache, CacheWarning, Entry
from .identity import Identities, UnknownError, code_digest
from .keys import digest, sources_of
from .program import Input, Program, Step

if TYPE_CHECKING:
    from ..session import Session

log = logging.getLogger("fusionpass")

KEPT = 16
"""Traces of one frame, for one model: of other inputs, modes, values. In the order in which they were made, so that a
size that one was made for has it here too, and not a later one that takes any."""

TRIED = 4
"""Traces whose guards are built for a call before Dynamo traces it: each costs a fraction of that."""


@dataclass(frozen=True)
class Made:
    """What was made of one of Dynamo's graphs.

    Attributes:
        record: of the report.
        program: its program.
        assumed: of the sizes among its inputs.
        trains: whether it has a backward.
    """

    record: ModelGraph
    program: Program
    assumed: str | None
    trains: bool


class Traces:
    """The traces of one session: an `inductor.frames.Store`.

    Args:
        session: whose pieces they consist of.
        cache: where they are.

    Attributes:
        made: what became of the graphs of the frame that Dynamo is tracing.
        called: the modules of functions that these graphs call as they are.
    """

    def __init__(self, session: "Session", cache: Cache) -> None:
        self.made: list[Made] = []
        self.called: set[str] = set()
        self._session, self._cache = session, cache
        self._refused = self._unknown = ""

    def find(self, frame: Any, filter_guards: Any) -> inductor.Rebuilt | None:
        """See `Store`."""
        try:
            found = self._find(frame, filter_guards)
        except Exception as error:  # a cache may not stop a model
            warnings.warn(f"cached traces could not be read: {error!r}", CacheWarning, stacklevel=2)
            found = None
        if found is None:
            inductor.warm_up()
        return found

    def _find(self, frame: Any, filter_guards: Any) -> inductor.Rebuilt | None:
        self.made.clear()
        self.called.clear()
        self._refused = ""
        base = self._base(frame)
        index = self._cache.load(base) if base else None
        tried = 0
        for key in index.meta["entries"] if index is not None else ():
            entry = self._cache.load(key)
            if entry is None or not inductor.fits(entry.meta["inputs"], frame.f_locals, frame.f_globals):
                continue
            if (tried := tried + 1) > TRIED:
                break
            found = self._rebuilt(entry, frame, filter_guards)
            if isinstance(found, inductor.Rebuilt):
                return found
            self._refused = self._refused or f"traced anew, since {found}"
            log.info("%s: a kept trace is not used: %s", self._session.report.title, found)
        return None

    def keep(self, frame: Any, recorded: inductor.Recorded, code: types.CodeType) -> None:
        """See `Store`."""
        made, self.made = self.made, []
        if not made:
            return
        record = made[-1].record
        try:
            reason = self._keep(frame, recorded, code, made)
        except Exception as error:  # whatever torch raises: what is not kept may not stop a model
            reason = repr(error)
        record.trace = "; ".join(filter(None, (self._refused, reason and f"its trace is not kept: {reason}")))

    def _keep(self, frame: Any, recorded: inductor.Recorded, code: types.CodeType, made: Sequence[Made]) -> str:
        if len(made) != 1 or made[0].record.graph_break:
            return "Dynamo made several graphs of it"
        if made[0].trains:
            return "it has a backward"
        base = self._base(frame)
        if not base:
            return self._unknown
        program = _packed(made[0].program)
        if isinstance(program, str):
            return program
        known = {id(part) for module in _modules(frame) for part in module.modules()}
        for value in recorded.values.values():
            if isinstance(value, torch.nn.Module) and id(value) not in known:
                return f"it uses a {type(value).__qualname__} that is not among what it was called with"
        try:
            trace = inductor.save(recorded, frame.f_code, code, frame.f_globals)
        except inductor.UnsaveableError as error:
            return str(error)
        modules = {module for module, *_ in trace.traced} | self.called | {str(frame.f_globals.get("__name__"))}
        sources = sources_of(modules)
        if sources is None:
            return "what it was traced from cannot be known"
        meta = {
            "backend": trace.backend,
            "traced": trace.traced,
            "guards": trace.guards,
            "inputs": trace.inputs,
            "modules": sorted(modules),
            "sources": sources,
            "program": program,
            "assumed": made[0].assumed,
            "record": _record(made[0].record, program),
        }
        payload = pickle.dumps((trace.payload, _constants(made[0].program)))
        key = digest(base, trace.guards, sources)
        if reason := self._cache.save(key, Entry(payload, meta)):
            return reason
        index = self._cache.load(base)
        others = [other for other in (index.meta["entries"] if index is not None else ()) if other != key]
        return self._cache.save(base, Entry(b"", {"entries": [*others, key][-KEPT:]})) or ""

    def _base(self, frame: Any) -> str:
        """What traces of a frame are found under: its code, the modules that it works on, all that code depends on.

        Empty where none is kept.
        """
        self._unknown = ""
        modules = _modules(frame)
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        given = [value for value in frame.f_locals.values() if isinstance(value, torch.Tensor)]
        common = self._session.common_key((), [*tensors, *given])
        if common is None:
            return ""  # neither are pieces
        config, identities = self._session.config, Identities()
        try:
            structure = [line for module in modules for line in _structure(module, identities)]
        except UnknownError as error:
            self._unknown = str(error)
            return ""
        choices = (sorted(config.boundaries), config.cuda_graphs == "piecewise", config.guards)
        code = f"{frame.f_globals.get('__name__')} {code_digest(frame.f_code)}"
        return digest(*common, "trace", code, inductor.dynamo_digest(), repr(choices), *structure)

    def _rebuilt(self, entry: Entry, frame: Any, filter_guards: Any) -> inductor.Rebuilt | str:
        meta = entry.meta
        try:
            for module in meta["modules"]:
                importlib.import_module(module)
        except ImportError as error:
            return f"a module is missing: {error}"
        if sources_of(meta["modules"]) != meta["sources"]:
            return "its sources changed"
        try:
            payload, constants = pickle.loads(entry.payload)
            traced = [tuple(one) for one in meta["traced"]]
            trace = inductor.Trace(meta["backend"], payload, traced, meta["guards"], meta["inputs"])
            local, scope = dict(frame.f_locals), frame.f_globals

            def graph() -> Callable[..., Any] | str:
                return self._program(meta, constants)

            return inductor.rebuild(trace, frame.f_code, local, scope, graph, filter_guards)
        except Exception as error:  # whatever torch raises: a cache may not stop a model
            text = f"a cached trace could not be loaded: {error!r}; the model is traced anew"
            warnings.warn(text, CacheWarning, stacklevel=2)
            return "it could not be loaded"

    def _program(self, meta: Mapping[str, Any], constants: Sequence[Any]) -> Callable[..., Any] | str:
        """The program of a trace, with a record in the report; or why there is none."""
        packed, kept, first = meta["program"], meta["record"], len(self._session.report.graphs)
        pieces = self._session.restored([step["key"] for step in packed["steps"] if step["key"]])
        if isinstance(pieces, str):
            return pieces
        report = self._session.report
        record = report.new_model_graph("", kept["recompiled"] if report.model_graphs else "")
        record.rewrites, record.cached = list(kept["rewrites"]), True
        for piece in kept["pieces"]:
            fields = {**piece, "graph": pieces[piece["graph"]][1], "modules": tuple(piece["modules"])}
            record.pieces.append(PieceRecord(**fields))
        self._session.tell(record, report.graphs[first:])
        return self._session.run(record, _unpacked(packed, pieces, constants), meta["assumed"])


def _modules(frame: Any) -> list[torch.nn.Module]:
    """What a frame was called with; where a decorator takes any arguments, the module is among those."""
    found: list[Any] = []
    for value in frame.f_locals.values():
        found += value if type(value) is tuple else value.values() if type(value) is dict else [value]
    return [value for value in found if isinstance(value, torch.nn.Module)]


def _structure(module: torch.nn.Module, identities: Identities) -> Iterator[str]:
    """What modules a module consists of, and which weights they hold: Dynamo does not guard all of it.

    Raises:
        UnknownError: a module has hooks, or a class that is not found by its name.
    """
    for name, part in module.named_modules():
        yield f"{name} {identities.describe(type(part))}"
        if any(held for attribute, held in vars(part).items() if attribute.endswith("_hooks")):
            raise UnknownError(f"{name or 'the module'} has hooks")
    memories: dict[int, int] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if is_lazy(tensor):
            raise UnknownError(f"{name} has no shape yet")
        text = f"{name} {type(tensor).__qualname__} {tensor.dtype} {tensor.device} {tuple(tensor.shape)}"
        wraps: bool = is_traceable_wrapper_subclass(tensor)
        if wraps or tensor.layout is not torch.strided:
            yield f"{text} {tensor.layout}"
            continue
        memory = memories.setdefault(tensor.untyped_storage()._cdata, len(memories))
        yield f"{text} {tensor.stride()} {tensor.storage_offset()} of {memory}"


def _packed(program: Program) -> dict[str, Any] | str:
    """A program as plain JSON values, but for its constants; or why it cannot be kept."""
    steps = []
    for step in program.steps:
        if step.key is None and not step.constant:
            return f"{step.name} is not kept: {step.uncapturable or 'what it depends on cannot be known'}"
        if step.constant and not _plain(step.call()[0]):
            return f"{step.name} is no plain tensor"
        fields = ("name", "inputs", "outputs", "dead", "constant", "key")
        steps.append({name: getattr(step, name) for name in fields})
    inputs = [dataclasses.asdict(declared) for declared in program.inputs]
    return {"inputs": inputs, "steps": steps, "results": program.results, "slots": program.slots}


def _plain(value: Any) -> bool:
    small = type(value) is torch.Tensor and value.layout is torch.strided and value.nbytes <= 1 << 20
    return small and value.untyped_storage().nbytes() <= 1 << 20 and not value.requires_grad


def _constants(program: Program) -> list[Any]:
    return [step.call()[0] for step in program.steps if step.constant]


def _unpacked(
    packed: Mapping[str, Any], pieces: Mapping[str, tuple[inductor.Compiled, int]], constants: Sequence[Any]
) -> Program:
    inputs = tuple(Input(**{**declared, "shape": tuple(declared["shape"])}) for declared in packed["inputs"])
    steps, left = [], iter(constants)
    for step in packed["steps"]:
        given, outputs, dead = (tuple(step[name]) for name in ("inputs", "outputs", "dead"))
        if step["constant"]:
            steps.append(Step(step["name"], Constant(next(left)), given, outputs, dead, constant=True))
            continue
        code = pieces[step["key"]][0]
        steps.append(Step(step["name"], code.call, given, outputs, dead, code.uncapturable, code.rows, key=code.key))
    return Program(inputs, tuple(steps), tuple(packed["results"]), packed["slots"])


def _record(record: ModelGraph, program: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of a graph; its pieces by their keys."""
    keys = {step["name"]: step["key"] for step in program["steps"]}
    pieces = [{**dataclasses.asdict(piece), "graph": keys[piece.name]} for piece in record.pieces]
    return {"recompiled": record.recompiled, "rewrites": record.rewrites, "pieces": pieces}
