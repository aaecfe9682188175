"""Records of what fused, what was refused and what was missed; one report over the graphs of a model."""

import collections
import dataclasses
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Site:
    """Where an op in a graph came from.

    Args:
        rules: the rules that made it, in order; empty where the model called the op itself.
        where: module path.
        source: "file:line, code".
        note: why a rule that would have taken more was refused here.
    """

    rules: tuple[str, ...] = ()
    where: str = ""
    source: str = ""
    note: str = ""


@dataclass(frozen=True)
class Record:
    """One fusion site.

    Attributes:
        op: the op that runs there, or that the nearest rule would have made.
        rule: the last rule applied, or the nearest one; empty where the model called the op itself.
        reason: fused: why this backend, and why no larger op took it in; refused and missed: why not.
        where: module path, "model.layers.0.input_layernorm".
        source: "file:line, code" of the model.
        scheme: quantisation scheme, or "".
        backend: what runs it: "triton", or "inductor" (plain aten, C++ on a CPU). Fused only.
        rules: all rules applied, in order.
        graphs: the indices of the compiled graphs that have this site.
    """

    op: str
    rule: str
    reason: str
    where: str
    source: str = ""
    scheme: str = ""
    backend: str = ""
    rules: tuple[str, ...] = ()
    graphs: tuple[int, ...] = ()

    def __str__(self) -> str:
        head = f"{self.where or '<no module>'}: {self.op}"
        details = ", ".join(part for part in (self.scheme, self.rule, self.backend) if part)
        return f"{head} [{details}] {self.reason}".rstrip()


@dataclass
class GraphTrace:
    """What the passes did to one graph. Written by them, read by `Report`.

    Attributes:
        index: the number of the graph in its compile session.
        snapshots: (name, text) before the first pass and after each that changed something.
        sources: the code that Inductor generated.
        kernels: how many kernels that code defines.
        graph_break: why Dynamo ended the graph early, if it did.
    """

    index: int
    fused: list[Record] = field(default_factory=list)
    refused: list[Record] = field(default_factory=list)
    missed: list[Record] = field(default_factory=list)
    snapshots: list[tuple[str, str]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    kernels: int = 0
    graph_break: str = ""
    skipped: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class Report:
    """What fused, what did not, and why, over every graph compiled so far.

    Attributes:
        graphs: a `GraphTrace` per compiled graph, in order. The same site compiled again (another shape, prefill and
            decode) is one record in `fused`, `refused` and `missed`, with the graphs that have it.
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.graphs: list[GraphTrace] = []
        self._lock = threading.Lock()

    def new_graph(self) -> GraphTrace:
        """A trace for the next graph."""
        with self._lock:
            self.graphs.append(GraphTrace(len(self.graphs)))
            return self.graphs[-1]

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
        """Kernels (Triton or C++ functions) that Inductor's code defines, over all graphs."""
        return sum(graph.kernels for graph in self.graphs)

    @property
    def graph_breaks(self) -> list[str]:
        """Why Dynamo cut the model into several graphs; nothing fuses across."""
        return [graph.graph_break for graph in self.graphs if graph.graph_break]

    def count(self, op: str, scheme: str | None = None, rule: str | None = None) -> int:
        """How many sites run `op`, optionally only those of one scheme or made by one rule."""
        return sum(r.op == op and scheme in (None, r.scheme) and (rule is None or rule in r.rules) for r in self.fused)

    def _merged(self, kind: str) -> list[Record]:
        sites: dict[tuple[Any, ...], list[Record]] = {}
        for graph in self.graphs:
            seen: collections.Counter[Any] = collections.Counter()
            for record in getattr(graph, kind):
                # Another shape may be run by another backend, for another reason: it is the same site.
                site = (record.op, record.rules or record.rule, record.where, record.source, record.scheme)
                seen[site] += 1
                sites.setdefault((site, seen[site]), []).append(dataclasses.replace(record, graphs=(graph.index,)))
        return [_one(records) for records in sites.values()]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        kinds = {kind: [dataclasses.asdict(r) for r in getattr(self, kind)] for kind in ("fused", "refused", "missed")}
        graphs = [
            {"index": g.index, "kernels": g.kernels, "graph_break": g.graph_break, "skipped": g.skipped}
            for g in self.graphs
        ]
        return {"title": self.title, "kernels": self.kernels, "graphs": graphs, **kinds}

    def __str__(self) -> str:
        if not self.graphs:
            return (
                f"{self.title or 'fusionpass'}: nothing compiled yet. If the model has run, Dynamo gave up on it, most "
                "often at torch._dynamo.config.recompile_limit; TORCH_LOGS=recompiles says why"
            )
        fused, refused, missed = self.fused, self.refused, self.missed
        lines = [
            f"{self.title or 'fusionpass'}: {len(fused)} fused, {len(refused)} refused, {len(missed)} missed; "
            f"{len(self.graphs)} graphs, {self.kernels} kernels"
        ]
        counts = collections.Counter((r.op, r.scheme, r.backend) for r in fused)
        lines += [
            f"  {n:4} x {op}{f' {scheme}' if scheme else ''} ({backend})" for (op, scheme, backend), n in counts.items()
        ]
        lines += [f"  graph break: {reason}" for reason in self.graph_breaks]
        lines += [f"  graph {g.index} left alone: {g.skipped}" for g in self.graphs if g.skipped]
        for title, records in (("refused", refused), ("missed", missed)):
            lines += [f"{title}:"] if records else []
            for record in records:
                lines += [f"  {record}", *([f"      at {record.source}"] if record.source else [])]
        return "\n".join(lines)


def _one(records: list[Record]) -> Record:
    """The records of one site in several graphs as one; where they differ, the reason says in which graph."""
    graphs = tuple(index for record in records for index in record.graphs)
    backends = list(dict.fromkeys(record.backend for record in records))
    reasons = list(dict.fromkeys(record.reason for record in records))
    reason = reasons[0] if len(reasons) == 1 else "; ".join(f"graph {r.graphs[0]}: {r.reason}" for r in records)
    return dataclasses.replace(records[0], graphs=graphs, backend=", ".join(backends), reason=reason)
