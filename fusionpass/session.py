"""The state of one `compile` call: its options, its report, its compiled pieces and their CUDA graphs."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from . import inductor, pipeline
from .config import Config
from .errors import MissError, RecompileWarning
from .op import OPS
from .passes.whole import whole
from .report.assembly import assembly
from .report.dump import active_dump, of_rank, wants_ptx, write_graph, write_index, write_pieces
from .report.trace import GraphTrace, ModelGraph, Report
from .runtime.build import Builder, Request
from .runtime.cache import Cache, CacheWarning, Entry
from .runtime.cuda_graphs import Graphs
from .runtime.keys import digest, environment, source_digest
from .runtime.program import Program
from .runtime.traces import Made, Traces

log = logging.getLogger("fusionpass")
inductor.register_logs()

STORM = 8
"""Compilations of one function, above which Dynamo's default gives up on it."""


@dataclass(frozen=True)
class _Code:
    """A compiled piece and where its records are."""

    compiled: inductor.Compiled
    graph: int


class Session:
    """The state of one `compile` call. Nothing is shared between two of them."""

    def __init__(self, config: Config, title: str = "") -> None:
        self.config = config
        self.report = Report(title)
        self.graphs = Graphs(config.cuda_graphs, config.capture_sizes, config.graph_limit, config.graph_memory)
        self.report.graph_memory = lambda: self.graphs.memory
        self._codes: dict[str, list[_Code]] = {}
        self._dumped: dict[Path, dict[int, str]] = {}
        self._cache = _cache(config)
        traces = inductor.keeps_traces() if config.traces is None else config.traces
        self.traces = Traces(self, self._cache) if self._cache is not None and traces else None
        if self.traces is None:
            inductor.warm_up()
        alone = config.cuda_graphs == "piecewise"
        self._builder = Builder(self._piece, config.boundaries, alone)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """The Dynamo backend."""
        record = self.report.new_model_graph(inductor.graph_break(gm), inductor.recompile_reason())
        self._warn_of_storm()
        known = len(self.report.graphs)
        trains = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        record.rewrites = whole(gm, self.config.disable)
        program = self._builder.build(gm, inputs, record, whole=trains)
        for folder in self._folders():
            names = self._dumped.setdefault(folder, {})
            names |= {trace.index: write_graph(folder, trace).name for trace in self.report.graphs[known:]}
            folder.mkdir(parents=True, exist_ok=True)
            write_pieces(folder, self.report.title, record, names)
            write_index(folder)
        self._judge(self.report.graphs[known:])
        self.tell(record, self.report.graphs[known:])
        assumed = inductor.guards([value for value in inputs if isinstance(value, torch.SymInt)])
        if self.traces is not None:
            self.traces.made.append(Made(record, program, assumed, trains))
        return program.run if trains else self.run(record, program, assumed)

    def run(self, record: ModelGraph, program: Program, assumed: str | None) -> Callable[..., Any]:
        """What Dynamo calls for a program, under CUDA graphs.

        Args:
            record: told of how it is replayed.
            program: any that serves inference.
            assumed: of the sizes among its inputs.
        """
        program = replace(program, holds=inductor.size_check(assumed))
        run = self.graphs.wrap(program, f"graph {record.index}")
        record.replay = self.graphs.notes[-1]
        return run

    def release(self) -> None:
        """Let go of all CUDA graphs and their memory."""
        self.graphs.release()

    def tell(self, record: ModelGraph, traces: Sequence[GraphTrace]) -> None:
        """One line of log for a graph, and a line for each record where TORCH_LOGS has "+fusionpass"."""
        kinds = ("fused", "refused", "missed")
        found = {kind: [one for trace in traces for one in getattr(trace, kind)] for kind in kinds}
        counts = Counter(one.op for one in found["fused"])
        log.info(
            "%s, graph %d: %d pieces, %d compiled now (%d from the cache): %s; %d refused, %d missed, %d kernels",
            self.report.title or "fusionpass",
            record.index,
            len(record.pieces),
            len(traces),
            sum(trace.cached for trace in traces),
            ", ".join(f"{count} x {op}" for op, count in counts.items()) or "nothing fused",
            len(found["refused"]),
            len(found["missed"]),
            sum(trace.kernels for trace in traces),
        )
        for kind in kinds:
            for one in found[kind]:
                log.debug("%s: %s", kind, one)
        inductor.artifacts(self.report, traces)

    def _folders(self) -> list[Path]:
        given = self.config.dump_dir
        return [folder for folder in (given and of_rank(given), active_dump()) if folder is not None]

    def _piece(self, request: Request, note: Callable[[int], None]) -> inductor.Compiled:
        """The code of a piece: of an alike one, from the cache, or compiled."""
        name = request.fingerprint.digest()
        for code in self._codes.get(name, ()):
            if inductor.holds(code.compiled.guards, request.inputs):
                note(code.graph)
                return code.compiled
        trace = self.report.new_trace()
        note(trace.index)
        if self.traces is not None:
            self.traces.called.update(function.__module__ for function in request.fingerprint.functions)
        key = self._key(request)
        compiled = self._load(key, request, trace) or self._compile(key, request, trace)
        self._codes.setdefault(name, []).append(_Code(compiled, trace.index))
        return compiled

    def _compile(self, key: str | None, request: Request, trace: GraphTrace) -> inductor.Compiled:
        config, keep = self.config, bool(self._folders())

        def early(graph: Graph) -> None:
            if inductor.is_training(graph):
                trace.skipped = "it has a backward; fused ops serve inference (use torch.no_grad or inference_mode)"
                return
            pipeline.run(pipeline.early(config, trace), graph, config, trace, keep=keep)

        def late(graph: Graph, parameters: frozenset[Node]) -> None:
            if not trace.skipped:
                pipeline.run(pipeline.late(config, trace, parameters), graph, config, trace, keep=keep)
                if wants_ptx():
                    trace.assembly |= assembly(graph, config.target)

        compiled = inductor.compile_graph(
            request.module,
            request.inputs,
            config,
            trace,
            early,
            late,
            request.weights,
            request.outputs,
            save=key is not None,
            origins=keep,
        )
        kept = None
        if key is not None and compiled.payload is not None and self._cache is not None:
            meta = {"trace": trace.to_dict(), "fingerprint": request.fingerprint.digest(), **compiled.facts()}
            if reason := self._cache.save(key, Entry(compiled.payload, meta)):
                log.warning("not cached: %s", reason)
            else:
                kept = key
        return replace(compiled, payload=None, key=kept)

    def restored(self, keys: Sequence[str]) -> dict[str, tuple[inductor.Compiled, int]] | str:
        """Pieces from the cache, each with the index of its `GraphTrace`; or why not, and then nothing changed."""
        known = {code.compiled.key: code for codes in self._codes.values() for code in codes}
        found = {}
        for key in dict.fromkeys(keys):
            if key not in known:
                entry = self._cache.load(key) if self._cache is not None else None
                compiled = None if entry is None else self._restored(key, entry)
                if entry is None or compiled is None:
                    return "a piece is no longer in the cache"
                found[key] = compiled, entry.meta
        misses = any(meta["trace"]["refused"] or meta["trace"]["missed"] for _, meta in found.values())
        if misses and self.config.on_miss == "error":
            return "sites did not fuse"
        first = len(self.report.graphs)
        for key, (compiled, meta) in found.items():
            trace = self.report.new_trace()
            trace.update(meta["trace"])
            known[key] = _Code(compiled, trace.index)
            self._codes.setdefault(meta["fingerprint"], []).append(known[key])
        self._judge(self.report.graphs[first:])
        return {key: (known[key].compiled, known[key].graph) for key in keys}

    def _key(self, request: Request) -> str | None:
        """What the piece is kept under on disk; None where it is not kept."""
        if request.fingerprint.unsaveable:
            return None
        common = self.common_key(request.fingerprint.functions, request.inputs)
        return None if common is None else digest(*common, request.fingerprint.text)

    def common_key(self, functions: Sequence[Callable[..., Any]], inputs: Sequence[Any]) -> tuple[str, ...] | None:
        """What all keys of this session contain; None where nothing is kept.

        Args:
            functions: of the user's, whose sources count too.
            inputs: tensors on the devices that code is for.
        """
        if self._cache is None or self._folders() or self.config.verify:
            return None
        config, own = self.config, [op for op in OPS.values() if op.namespace != "fusionpass"]
        kernels = [backend.plan for op in own for backend in op.backends]
        references = [op.reference for op in own]
        sources = source_digest([*functions, *pipeline.own_functions(config), *references, *kernels])
        options = inductor.options_digest()
        if sources is None or options is None:
            return None
        gemm = sorted(config.gemm.items())
        choices = (sorted(config.disable), gemm, config.numerics, str(config.target), inductor.hardware(inputs))
        return (*environment(), repr(choices), options, sources)

    def _load(self, key: str | None, request: Request, trace: GraphTrace) -> inductor.Compiled | None:
        entry = self._cache.load(key) if key is not None and self._cache is not None else None
        if key is None or entry is None or not inductor.holds(entry.meta["guards"], request.inputs):
            return None
        compiled = self._restored(key, entry)
        if compiled is not None:
            trace.update(entry.meta["trace"])
        return compiled

    def _restored(self, key: str, entry: Entry) -> inductor.Compiled | None:
        try:
            call = inductor.restore(entry.payload)
        except Exception as error:  # whatever torch raises: a cache may not stop a model
            warnings.warn(
                f"a cached piece could not be loaded: {error!r}; it is compiled anew", CacheWarning, stacklevel=2
            )
            return None
        return replace(inductor.Compiled.of(call, entry.meta), key=key)

    def _warn_of_storm(self) -> None:
        reasons = self.report.recompiles
        if len(reasons) == STORM:
            warnings.warn(
                f"fusionpass: {self.report.title or 'the model'} was compiled {STORM + 1} times, and Dynamo may soon "
                f"run it uncompiled; the last time because {reasons[-1]}",
                RecompileWarning,
                stacklevel=2,
            )

    def _judge(self, traces: Sequence[GraphTrace]) -> None:
        misses = [miss for trace in traces for miss in (*trace.refused, *trace.missed)]
        if not misses or self.config.on_miss == "ignore":
            return
        text = "\n".join(str(record) for record in misses)
        if self.config.on_miss == "error":
            raise MissError(f"{len(misses)} sites did not fuse:\n{text}", next_step="See fusionpass.report")
        warnings.warn(f"fusionpass: {len(misses)} sites did not fuse:\n{text}", stacklevel=2)


def _cache(config: Config) -> Cache | None:
    if not config.cache:
        return None
    cache = Cache(config.cache_dir or Cache.default_folder())
    if reason := cache.refuse():
        log.warning("nothing is cached: %s", reason)
        return None
    return cache
