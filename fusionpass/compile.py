"""fusionpass.compile, the Dynamo backend, and what is asked of a compiled model."""

import dataclasses
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from . import inductor
from .config import Config
from .errors import ConfigError, NotCompiledError, nearest
from .op import OPS
from .report.trace import Report
from .session import Session

F = TypeVar("F", bound=Callable[..., Any])


_SESSIONS: "weakref.WeakKeyDictionary[Any, Session]" = weakref.WeakKeyDictionary()


def compile(model: F, config: Config | None = None, **overrides: Any) -> F:
    """Compile a model with fused kernels.

    Args:
        model: an `nn.Module`, compiled in place, so that `isinstance`, `state_dict` and `generate` hold; or a function.
        config: options; default `Config()`, with FUSIONPASS_* from the environment.
        overrides: single fields of `Config`.

    Returns:
        The same module, or a compiled function. Compilation happens at the first call, for each new kind of input;
        see `report`. Compiling a module again replaces its options and starts a new report.

    Raises:
        ConfigError: an option or value that does not exist, or `model` cannot be called.
    """
    made = Config.make(config, overrides)
    if isinstance(model, torch.nn.Module):
        session = Session(made, type(model).__name__)
        with inductor.traces_of(session.traces):
            inductor.compile_module(model, session, made.guards)
        if hasattr(model, "get_compiled_call"):
            # transformers' generate would compile the model once more around this, for itself, and leave us out.
            vars(model)["get_compiled_call"] = types.MethodType(_compiled_call, model)
        _SESSIONS[model] = session
        return model
    if not callable(model):
        raise ConfigError(f"{type(model).__name__} is neither a module nor a function", "compile")
    session = Session(made, getattr(model, "__name__", type(model).__name__))
    with inductor.traces_of(session.traces):
        compiled = torch.compile(model, backend=session, **inductor.compile_options(made.guards))
    _SESSIONS[compiled] = session
    return compiled  # type: ignore[return-value]


def _compiled_call(model: torch.nn.Module, *_: Any, **__: Any) -> Callable[..., Any]:
    return model.__call__


def report(model: Any) -> Report:
    """What fused in a compiled model or function, what did not and why, over everything that has run so far.

    Raises:
        NotCompiledError: `fusionpass.compile` was not called on it.
    """
    return _session(model, "report").report


def release(model: Any) -> None:
    """Let go of the CUDA graphs of a compiled model or function, and of their memory.

    The model stays compiled: later calls capture anew.

    Raises:
        NotCompiledError: `fusionpass.compile` was not called on it.
    """
    _session(model, "release").release()


def _session(model: Any, caller: str) -> Session:
    session = _SESSIONS.get(model)
    if session is None:
        raise NotCompiledError(
            f"{type(model).__name__} was not compiled", caller, "Call fusionpass.compile(model) first"
        )
    return session


def assert_fused(
    fused: Any, op: str | None = None, count: int | None = None, *, scheme: str | None = None, where: str = "*"
) -> None:
    """Fail, with the report as the message, unless a model fused as expected: for tests.

    Args:
        fused: a compiled model or function that has run, or a `Report` (from `explain`).
        op: the op that must run; None: some op must run, and nothing may be refused or missed.
        count: at how many sites; None: at least at one.
        scheme: only sites with this quantisation scheme.
        where: only sites in modules whose path matches this glob: "model.layers.*.input_layernorm".

    Raises:
        AssertionError: something else fused, or did not.
        NotCompiledError: `fused` is neither compiled nor a report.
        ConfigError: there is no such op.
    """
    found = fused if isinstance(fused, Report) else report(fused)
    if op is not None and op not in (names := {known.name for known in OPS.values()}):
        raise ConfigError(f"there is no op {op!r}", "assert_fused", nearest(op, names))
    sites = [
        r for r in found.fused if op in (None, r.op) and scheme in (None, r.scheme) and fnmatchcase(r.where, where)
    ]
    misses = [r for r in (*found.refused, *found.missed) if fnmatchcase(r.where, where)] if op is None else []
    asked = " ".join(part for part in (op or "op", scheme or "", f"in {where}" if where != "*" else "") if part)
    if misses or len(sites) != (count if count is not None else max(1, len(sites))):
        wanted = "at least 1" if count is None else str(count)
        raise AssertionError(f"{len(sites)} sites run {asked}, not {wanted}; {len(misses)} misses\n{found}")


def dynamo_backend(
    gm: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The entry point behind `torch.compile(model, backend="fusionpass", options={...})`.

    Args:
        gm: Dynamo's graph.
        inputs: its example inputs.
        options: fields of `Config`.

    Raises:
        ConfigError: an option or value that does not exist; `guards`, which are torch.compile's own here.
    """
    # Frames are torch's own here: nobody would ask for their traces, nor start the workers that asking starts.
    made = dataclasses.replace(Config.make(None, options), traces=False)
    if made.guards != "all":
        raise ConfigError(f"guards={made.guards!r} comes too late", "options", "Pass guard_filter_fn to torch.compile")
    return Session(made)(gm, inputs)
