"""Records of what fused, what was refused and what was missed; one report over the graphs of a model."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runtime.notes import Memory
from .nodes import NodeRecord
from .records import Record, Site, Time

__all__ = ["GraphTrace", "ModelGraph", "PieceRecord", "Record", "Report", "Site"]


@dataclass
class GraphTrace:
    """What the passes did to one graph. Written by them, read by `Report`.

    Attributes:
        index: the number of the graph in its compile session.
        before: the nodes of the graph in front of `recognise`.
        after: the nodes in front of `lower`, where each op is still one node.
        snapshots: (name, text) before the first pass and after each that changed something.
        inlined: for the nodes that an op became again, the op's node.
        mains: what makes each of these a program, by name.
        sources: the code that Inductor generated.
        origins: for a kernel in that code, the nodes that it computes; only where graphs are dumped.
        assembly: PTX or AMD's assembly of our kernels, by names of files; only where it is asked for.
        kernels: how many kernels that code defines.
        skipped: why the passes left it alone; empty if they did not.
        seconds: of each pass.
        cached: whether its code, and these records with it, came from the cache on disk.
    """

    index: int
    fused: list[Record] = field(default_factory=list)
    refused: list[Record] = field(default_factory=list)
    missed: list[Record] = field(default_factory=list)
    before: list[NodeRecord] = field(default_factory=list)
    after: list[NodeRecord] = field(default_factory=list)
    snapshots: list[tuple[str, str]] = field(default_factory=list)
    inlined: dict[str, str] = field(default_factory=dict)
    mains: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    origins: dict[str, list[str]] = field(default_factory=dict)
    assembly: dict[str, str] = field(default_factory=dict)
    kernels: int = 0
    skipped: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values, for the cache."""
        nodes = {side: [dataclasses.astuple(node) for node in getattr(self, side)] for side in ("before", "after")}
        return {**dataclasses.asdict(dataclasses.replace(self, before=[], after=[])), **nodes}

    def update(self, saved: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave in another process."""
        for kind in ("fused", "refused", "missed"):
            setattr(self, kind, [Record.of(fields) for fields in saved[kind]])
        for side in ("before", "after"):
            setattr(self, side, [NodeRecord.of(values) for values in saved[side]])
        self.snapshots = [(name, text) for name, text in saved["snapshots"]]
        self.inlined, self.mains, self.origins = dict(saved["inlined"]), dict(saved["mains"]), dict(saved["origins"])
        self.sources, self.kernels, self.skipped = list(saved["sources"]), saved["kernels"], saved["skipped"]
        self.seconds, self.cached = dict(saved["seconds"]), True


@dataclass(frozen=True)
class PieceRecord:
    """A piece of one of Dynamo's graphs.

    Attributes:
        name: "piece_3"; the number counts within its graph.
        graph: the `GraphTrace` of its code, by index: alike pieces have it in common. None: its operators run eagerly.
        why: why the graph was cut in front of it; empty for the first.
        boundary: why it stays out of CUDA graphs by itself; empty if it does not.
        modules: the first and the last module that its operators come from.
        paths: for the modules of the piece that was compiled, what they are called here, where that is another name.
    """

    name: str
    graph: int | None
    why: str = ""
    boundary: str = ""
    modules: tuple[str, str] = ("", "")
    paths: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        span = " to ".join(dict.fromkeys(path for path in self.modules if path))
        code = "runs eagerly" if self.graph is None else f"graph {self.graph}"
        return f"{self.name}: {code}{f', {span}' if span else ''}{f'; cut: {self.why}' if self.why else ''}"


@dataclass
class ModelGraph:
    """One of Dynamo's graphs.

    Attributes:
        index: in order of compilation.
        graph_break: why Dynamo ended it early, if it did.
        recompiled: the guard that failed, where there is a graph of the same code already.
        pieces: in order.
        rewrites: what was done before it was cut (`passes.whole`), and what kept a mask where it is.
        replay: how it runs under CUDA graphs, a `runtime.notes.ProgramNote`; None where it does not.
        cached: whether Dynamo's trace, and all else with it, came from the cache on disk.
        trace: why it did not, where one was kept that might have been it; or why it is not kept.
    """

    index: int
    graph_break: str = ""
    recompiled: str = ""
    pieces: list[PieceRecord] = field(default_factory=list)
    rewrites: list[str] = field(default_factory=list)
    replay: Any = None
    cached: bool = False
    trace: str = ""


class Report:
    """What fused, what did not, and why, over every graph compiled so far.

    Attributes:
        model_graphs: a `ModelGraph` per graph of Dynamo's, in order; each consists of pieces.
        graphs: a `GraphTrace` per compiled graph, in order: pieces that are alike have one in common. The same site
            compiled again (another shape, prefill and decode) is one record in `fused`, `refused` and `missed`, with
            the graphs that have it.
        times: what `measure` found, by the index of the compiled graph and the name of the op's node.
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.times: dict[tuple[int, str], Time] = {}
        self.model_graphs: list[ModelGraph] = []
        self.graphs: list[GraphTrace] = []
        self.graph_memory: Callable[[], Memory] = lambda: Memory((), 0)
        self._lock = threading.Lock()

    def new_model_graph(self, graph_break: str = "", recompiled: str = "") -> ModelGraph:
        """A record for the next of Dynamo's graphs."""
        with self._lock:
            self.model_graphs.append(ModelGraph(len(self.model_graphs), graph_break, recompiled))
            return self.model_graphs[-1]

    def new_trace(self) -> GraphTrace:
        """A trace for the next graph to compile."""
        with self._lock:
            self.graphs.append(GraphTrace(len(self.graphs)))
            return self.graphs[-1]

    def new_graph(self, graph_break: str = "") -> GraphTrace:
        """A trace for the next of Dynamo's graphs, where that is one piece."""
        trace = self.new_trace()
        self.new_model_graph(graph_break).pieces.append(PieceRecord("piece_0", trace.index))
        return trace

    @property
    def fused(self) -> list[Record]:
        """The sites where an op runs."""
        return self._merged("fused")

    @property
    def refused(self) -> list[Record]:
        """The sites that a rule matched and a guard turned down."""
        return self._merged("refused")

    @property
    def missed(self) -> list[Record]:
        """The sites that came near a spelling and did not match."""
        return self._merged("missed")

    @property
    def kernels(self) -> int:
        """Kernels (Triton or C++ functions) that one run of every graph calls."""
        return sum(self.graphs[piece.graph].kernels for piece in self.pieces if piece.graph is not None)

    @property
    def pieces(self) -> list[PieceRecord]:
        """The pieces of all graphs, in order."""
        return [piece for graph in self.model_graphs for piece in graph.pieces]

    @property
    def distinct_pieces(self) -> int:
        """How many different pieces were compiled."""
        return len({piece.graph for piece in self.pieces if piece.graph is not None})

    @property
    def graph_breaks(self) -> list[str]:
        """Why Dynamo cut the model into several graphs; nothing fuses across."""
        return [graph.graph_break for graph in self.model_graphs if graph.graph_break]

    @property
    def recompiles(self) -> list[str]:
        """The guards that failed, one for each graph that was compiled again."""
        return [graph.recompiled for graph in self.model_graphs if graph.recompiled]

    @property
    def memory(self) -> Memory:
        """What the CUDA graphs cost: bytes in all, and for each captured size."""
        return self.graph_memory()

    def count(self, op: str, scheme: str | None = None, rule: str | None = None) -> int:
        """How many sites run `op`, optionally only those of one scheme or made by one rule."""
        return sum(r.op == op and scheme in (None, r.scheme) and (rule is None or rule in r.rules) for r in self.fused)

    def _merged(self, kind: str) -> list[Record]:
        sites: dict[tuple[Any, ...], list[Record]] = {}
        for model_graph in self.model_graphs:
            seen: collections.Counter[Any] = collections.Counter()
            for piece in model_graph.pieces:
                for record in [] if piece.graph is None else getattr(self.graphs[piece.graph], kind):
                    where = piece.paths.get(record.where, record.where)
                    # Another shape may be run by another backend, for another reason: it is the same site.
                    site = (record.op, record.rules or record.rule, where, record.source, record.scheme)
                    seen[site] += 1
                    here = dataclasses.replace(record, where=where, graphs=(piece.graph,))
                    sites.setdefault((site, seen[site]), []).append(here)
        return [_one(records) for records in sites.values()]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        kinds = {kind: [dataclasses.asdict(r) for r in getattr(self, kind)] for kind in ("fused", "refused", "missed")}
        graphs = [
            {"index": g.index, "kernels": g.kernels, "skipped": g.skipped, "cached": g.cached} for g in self.graphs
        ]
        models = [
            {
                "index": graph.index,
                "graph_break": graph.graph_break,
                "recompiled": graph.recompiled,
                "pieces": [dataclasses.asdict(piece) for piece in graph.pieces],
                "rewrites": graph.rewrites,
                "cached": graph.cached,
                "trace": graph.trace,
                "replay": None if graph.replay is None else dataclasses.asdict(graph.replay),
            }
            for graph in self.model_graphs
        ]
        times = [{"graph": graph, "node": node, **dataclasses.asdict(t)} for (graph, node), t in self.times.items()]
        told = {"title": self.title, "kernels": self.kernels, "graphs": graphs, "model_graphs": models, "times": times}
        return {**told, **kinds}

    def measure(self, device: torch.device | str | None = None, progress: bool | None = None) -> None:
        """Time each fused op of each distinct layer here, beside the operators that it replaced; see `times`.

        Both run on random inputs of the traced shapes, on one set of buffers; on a GPU as CUDA graphs of many calls, so
        that the host does not count. What is replaced is compiled by Inductor without our passes. Ops of symbolic sizes
        are left out, with the reason.

        Args:
            device: "cuda" or "cpu"; None: a GPU where there is one.
            progress: show a bar; None: where stderr is a terminal.
        """
        from .times import measure

        measure(self, device, progress)

    def write_html(self, path: str | Path) -> Path:
        """Write the report as one HTML page that needs nothing else; see `report/html.py`.

        Args:
            path: the file; its folder is made if missing.

        Returns:
            `path`.
        """
        from .html import write_html

        return write_html(self, path)

    def __str__(self) -> str:
        if not self.graphs:
            return (
                f"{self.title or 'fusionpass'}: nothing compiled yet. If the model has run, Dynamo gave up on it, most "
                "often at torch._dynamo.config.recompile_limit; TORCH_LOGS=recompiles says why"
            )
        fused, refused, missed = self.fused, self.refused, self.missed
        lines = [
            f"{self.title or 'fusionpass'}: {len(fused)} fused, {len(refused)} refused, {len(missed)} missed; "
            f"{len(self.model_graphs)} graphs, {self.kernels} kernels"
        ]
        if len(self.pieces) > len(self.model_graphs):
            cached = sum(graph.cached for graph in self.graphs)
            lines.append(
                f"  {len(self.pieces)} pieces, {self.distinct_pieces} distinct, {cached} of them from the cache"
            )
        if any(graph.cached for graph in self.model_graphs):
            traced = [str(graph.index) for graph in self.model_graphs if graph.cached]
            lines.append(f"  not traced, but from the cache: graph {', '.join(traced)}")
        lines += [f"  graph {g.index}: {g.trace}" for g in self.model_graphs if g.trace]
        counts = collections.Counter((r.op, r.scheme, r.backend) for r in fused)
        lines += [
            f"  {n:4} x {op}{f' {scheme}' if scheme else ''} ({backend})" for (op, scheme, backend), n in counts.items()
        ]
        lines += [f"  graph break: {reason}" for reason in self.graph_breaks]
        lines += [f"  recompiled: {reason}" for reason in self.recompiles]
        lines += [f"  {line}" for line in dict.fromkeys(line for g in self.model_graphs for line in g.rewrites)]
        replays = [g.replay for g in self.model_graphs if g.replay is not None and g.replay.mode != "off"]
        lines += [f"  {line}" for replay in replays for line in str(replay).splitlines()]
        lines += [f"  graph {g.index} left alone: {g.skipped}" for g in self.graphs if g.skipped]
        for title, records in (("refused", refused), ("missed", missed)):
            lines += [f"{title}:"] if records else []
            for record in records:
                lines += [f"  {record}", *([f"      at {record.source}"] if record.source else [])]
        return "\n".join(lines)


def _one(records: list[Record]) -> Record:
    """The records of one site in several graphs as one; where they differ, the reason says in which graph."""
    graphs = tuple(dict.fromkeys(index for record in records for index in record.graphs))
    backends = list(dict.fromkeys(record.backend for record in records))
    reasons = list(dict.fromkeys(record.reason for record in records))
    reason = reasons[0] if len(reasons) == 1 else "; ".join(f"graph {r.graphs[0]}: {r.reason}" for r in records)
    return dataclasses.replace(records[0], graphs=graphs, backend=", ".join(backends), reason=reason)
