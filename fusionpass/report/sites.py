"""The records of a report with the place that each is drawn at, those of alike layers together."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .layers import Layer, layer_of
from .nodes import NodeRecord
from .trace import Record, Report

KINDS = ("missed", "refused", "fused")
"""What needs a look comes first."""

_NOWHERE = NodeRecord("")
_OURS = f"{Path(__file__).parents[2]}/"
_PACKAGES = re.compile(r"^\S*?/(?:site|dist)-packages/")


@dataclass
class Site:
    """One site, or the alike ones of alike layers.

    Attributes:
        kind: "missed", "refused" or "fused".
        record: of the first.
        layer: the index of its layer among the distinct ones; None where it is not drawn.
        row: the index of its row there; None where it is not drawn.
        places: the module path of each.
    """

    kind: str
    record: Record
    layer: int | None = None
    row: int | None = None
    places: list[str] = field(default_factory=list)


def shortened(source: str) -> str:
    """A line of the model with the path of its file from the package on, or from the working folder."""
    return _PACKAGES.sub("", source).removeprefix(f"{Path.cwd()}/").removeprefix(_OURS)


def sites(report: Report, layers: list[Layer]) -> list[Site]:
    """Every record of `report`, what did not fuse first.

    Args:
        report: any.
        layers: its distinct layers.
    """
    drawn = {
        (layer.graph, row.kind, row.record.node): (i, j)
        for i, layer in enumerate(layers)
        for j, row in enumerate(layer.rows)
        if row.record is not None
    }
    nodes = [{node.name: node for node in (*graph.before, *graph.after)} for graph in report.graphs]
    made = []
    for kind in KINDS:
        for record in getattr(report, kind):
            node = nodes[record.graphs[0]].get(record.node, _NOWHERE)
            where = record.where or node.where
            told = dataclasses.replace(record, where=where, source=shortened(record.source or node.source))
            place = drawn.get((record.graphs[0], kind, record.node))
            layer, row = place or (_like(kind, told, layers), None)
            made.append(Site(kind, told, layer, row, [where]))
    return made


def _like(kind: str, record: Record, layers: list[Layer]) -> int | None:
    """The folded layer that a record belongs to which is not that of the first member."""
    own = layer_of(record.where)
    near = [i for i, layer in enumerate(layers) if layer.graph == record.graphs[0] and own in layer.members]
    for i in near:
        for row in layers[i].rows:
            other = row.record
            if other is not None and (row.kind, other.op, other.rule) == (kind, record.op, record.rule):
                return i
    return near[0] if near else None


def fold(found: Iterable[Site], report: Report, key: Callable[[Site], object] = lambda site: None) -> list[Site]:
    """The sites that differ in the number of the layer alone as one, with all their places.

    Args:
        found: what `sites` returned.
        report: whose they are.
        key: what else keeps two sites apart.
    """
    names = [{node.name for node in (*graph.before, *graph.after)} for graph in report.graphs]

    def alike(site: Site) -> object:
        record = site.record
        own = names[record.graphs[0]]
        reason = re.sub(r"\w+", lambda word: "*" if word[0] in own else word[0], record.reason)
        where = f"*{record.where.removeprefix(layer_of(record.where))}"
        told = (record.op, record.rule, record.rules, record.scheme, record.backend, record.source)
        return site.kind, *told, reason, where, key(site)

    groups: dict[object, list[Site]] = {}
    for site in found:
        groups.setdefault(alike(site), []).append(site)
    folded = []
    for group in groups.values():
        first = next((site for site in group if site.row is not None), group[0])
        folded.append(dataclasses.replace(first, places=[place for site in group for place in site.places]))
    return folded
