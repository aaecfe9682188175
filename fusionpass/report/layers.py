"""The graphs of a report as rows, before beside after, cut into layers, with equal layers folded."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .nodes import NodeRecord
from .trace import GraphTrace, PieceRecord, Record, Report

_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.|$)")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Row:
    """What the passes made of some nodes.

    Attributes:
        before: the nodes, in order; empty for a node that a pass put in.
        after: the node that stands for them, with the values picked from it behind it; empty where they are gone.
        kind: "fused", "refused" or "missed"; empty for a node that nothing was tried on.
        record: what the report says of it, if there is a kind.
    """

    before: tuple[NodeRecord, ...]
    after: tuple[NodeRecord, ...]
    kind: str = ""
    record: Record | None = None

    @property
    def where(self) -> str:
        """Its module path: that of the record, else of the nodes."""
        paths = [self.record.where if self.record else "", *(n.where for n in (*self.after, *self.before))]
        return next(filter(None, paths), "")

    @property
    def name(self) -> str:
        """The name of the node that stands for it after the passes; empty where it is gone."""
        return self.after[0].name if self.after else ""

    def traffic(self, values: Mapping[str, NodeRecord]) -> tuple[int, int | None, int | None]:
        """For a fused row: operators that are replaced, and the bytes that they would move, and that the op moves.

        Each operator reads each of its inputs once and writes its results, as eager mode does; a view costs nothing.

        Args:
            values: the nodes of both graphs by name.
        """
        computing = [node for node in self.before if not node.moves]
        return len(computing), _moved(computing, values), _moved(self.after[:1], values)


def _moved(nodes: Iterable[NodeRecord], values: Mapping[str, NodeRecord]) -> int | None:
    parts = [size for n in nodes for size in (n.bytes, *(values[i].bytes for i in n.inputs if i in values))]
    return None if None in parts else sum(size for size in parts if size is not None)


@dataclass
class Layer:
    """A part of a graph that belongs to one module, and all that are like it.

    Attributes:
        graph: the index of the compiled graph.
        title: the path of the module; empty for what lies outside of numbered layers.
        members: the paths of all that look like this one, itself first.
        rows: in the order of the graph after the passes.
    """

    graph: int
    title: str
    members: list[str]
    rows: list[Row] = field(default_factory=list)


def layer_of(path: str) -> str:
    """The numbered module that a module path lies in: "model.layers.3" of "model.layers.3.mlp"; "" outside."""
    found = _LAYER.match(path)
    return found[0] if found else ""


def rows(trace: GraphTrace) -> list[Row]:
    """Before beside after: a fused op stands beside what it replaced, every other node beside itself."""
    before = {node.name: node for node in trace.before}
    claimed = {name for node in trace.after for name in node.replaces}
    records = {r.node: (kind, r) for kind in ("missed", "refused", "fused") for r in getattr(trace, kind) if r.node}
    heads: dict[str, list[NodeRecord]] = {}
    left: dict[str, list[NodeRecord]] = {}
    placed: dict[str, str] = {}
    for node in trace.after:
        if not node.text:
            continue
        source = node.inputs[0] if len(node.inputs) == 1 else ""
        if node.name not in before and node.text.startswith(f"{source}[") and source in heads:
            heads[source].append(node)
            continue
        names = node.replaces or ((node.name,) if node.name not in claimed else ())
        left[node.name] = [before[name] for name in before if name in names and name not in placed]
        placed |= dict.fromkeys(names, node.name)
        heads[node.name] = [node]
    behind: dict[str, list[NodeRecord]] = {}
    last = ""
    for node in trace.before:
        last = placed.get(node.name, last)
        if node.name not in placed and node.text:
            behind.setdefault(last, []).append(node)
    made: list[Row] = [_row((node,), (), records) for node in behind.get("", ())]
    for name, after in heads.items():
        made.append(_row(left[name], after, records))
        made += [_row((node,), (), records) for node in behind.get(name, ())]
    return made


def _row(before: Iterable[NodeRecord], after: Iterable[NodeRecord], records: Mapping[str, tuple[str, Record]]) -> Row:
    row = Row(tuple(before), tuple(after))
    names = [node.name for node in (*row.after, *row.before)]
    found = [records[name] for name in names if name in records]
    if not found:
        return row
    # A fused op comes first among the names; a rule that gave up in the middle of it is told in its reason.
    return Row(row.before, row.after, *found[0])


def layers(report: Report) -> list[Layer]:
    """The layers of every compiled graph, each with those that are like it."""
    found: list[Layer] = []
    for trace in report.graphs:
        pieces = [piece for piece in report.pieces if piece.graph == trace.index]
        known: dict[object, Layer] = {}
        for layer in _cut(trace):
            members = _members(layer, pieces)
            same = known.setdefault(_key(layer, trace), layer)
            same.members = members if same is layer else [*same.members, *members]
        for layer in known.values():
            layer.members = list(dict.fromkeys(layer.members))
        found += known.values()
    return found


def _cut(trace: GraphTrace) -> list[Layer]:
    """The rows of one graph by layer, in order of first appearance."""
    found: dict[str, Layer] = {}
    for row in rows(trace):
        title = layer_of(row.where)
        found.setdefault(title, Layer(trace.index, title, [title])).rows.append(row)
    return list(found.values())


def _members(layer: Layer, pieces: Iterable[PieceRecord]) -> list[str]:
    """What the layer is called in each of the pieces that have this code."""
    own = [row.where for row in layer.rows if row.where]
    found = []
    for piece in pieces:
        renamed = Counter(layer_of(piece.paths.get(path, path)) for path in own)
        found.append(renamed.most_common(1)[0][0] if renamed else layer.title)
    return found or [layer.title]


def _key(layer: Layer, trace: GraphTrace) -> object:
    """What two layers have in common that are alike but for the numbers in their names."""
    names = {node.name for node in (*trace.before, *trace.after)}
    own = {node.name: str(i) for i, row in enumerate(layer.rows) for node in (*row.before, *row.after)}

    def plain(text: str) -> str:
        return _WORD.sub(lambda m: own.get(m[0], "outside") if m[0] in names else m[0], text)

    def told(node: NodeRecord) -> tuple[object, ...]:
        where = f"*{node.where.removeprefix(layer.title)}" if layer_of(node.where) else node.where
        # A value of the layer before is read alike by all; its path has another number.
        where = _LAYER.sub("*", node.where) if where == f"*{node.where}" else where
        return plain(node.text), node.type, where, node.source, node.moves, len(node.replaces)

    def said(record: Record | None) -> tuple[object, ...]:
        if record is None:
            return ()
        return record.op, record.rules, record.scheme, record.backend, plain(record.reason)

    return tuple(
        (row.kind, said(row.record), tuple(map(told, row.before)), tuple(map(told, row.after))) for row in layer.rows
    )
