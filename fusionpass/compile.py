"""fusionpass.compile, the Dynamo backend, and what it remembers of each call."""

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from . import inductor, pipeline
from .config import Config
from .errors import ConfigError, MissError, NotCompiledError, nearest
from .op import OPS
from .report.dump import active_dump, write_graph
from .report.trace import Report

log = logging.getLogger("fusionpass")

F = TypeVar("F", bound=Callable[..., Any])


class Session:
    """The state of one `compile` call: its options and its report. Nothing is shared between two of them."""

    def __init__(self, config: Config, title: str = "") -> None:
        self.config = config
        self.report = Report(title)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """The Dynamo backend."""
        config, trace = self.config, self.report.new_graph()
        trace.graph_break = inductor.graph_break(gm)
        folders = [folder for folder in (config.dump_dir, active_dump()) if folder is not None]

        def early(graph: Graph) -> None:
            if inductor.is_training(graph):
                trace.skipped = "it has a backward; fused ops serve inference (use torch.no_grad or inference_mode)"
                return
            pipeline.run(pipeline.early(config, trace), graph, config, trace, keep=bool(folders))

        def late(graph: Graph, parameters: frozenset[Node]) -> None:
            if not trace.skipped:
                pipeline.run(pipeline.late(config, trace, parameters), graph, config, trace, keep=bool(folders))
                self._judge(trace.index)

        compiled = inductor.compile_graph(gm, inputs, config, trace, early, late)
        for folder in folders:
            write_graph(folder, trace)
        log.info("%s", self.report)
        return compiled

    def _judge(self, index: int) -> None:
        trace = self.report.graphs[index]
        misses = [*trace.refused, *trace.missed]
        if not misses or self.config.on_miss == "ignore":
            return
        text = "\n".join(str(record) for record in misses)
        if self.config.on_miss == "error":
            raise MissError(f"{len(misses)} sites did not fuse:\n{text}", next_step="See fusionpass.report")
        warnings.warn(f"fusionpass: {len(misses)} sites did not fuse:\n{text}", stacklevel=2)


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
        model.compile(backend=session, **inductor.ISOLATED)
        _SESSIONS[model] = session
        return model
    if not callable(model):
        raise ConfigError(f"{type(model).__name__} is neither a module nor a function", "compile")
    session = Session(made, getattr(model, "__name__", type(model).__name__))
    compiled = torch.compile(model, backend=session, **inductor.ISOLATED)
    _SESSIONS[compiled] = session
    return compiled  # type: ignore[return-value]


def report(model: Any) -> Report:
    """What fused in a compiled model or function, what did not and why, over everything that has run so far.

    Raises:
        NotCompiledError: `fusionpass.compile` was not called on it.
    """
    session = _SESSIONS.get(model)
    if session is None:
        raise NotCompiledError(
            f"{type(model).__name__} was not compiled", "report", "Call fusionpass.compile(model) first"
        )
    return session.report


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
        ConfigError: an option or value that does not exist.
    """
    return Session(Config.make(None, options))(gm, inputs)
