"""The report as one HTML file that needs no network: how the model's modules fused, layer by layer."""

import dataclasses
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .advice import advise
from .layers import Layer, Row, layers
from .nodes import NodeRecord
from .records import Time
from .sites import KINDS, Site, fold, shortened, sites
from .trace import Report


def write_html(report: Report, path: str | Path) -> Path:
    """Write `report` as one self-contained HTML page.

    Args:
        report: of `explain`, or of a compiled model that has run.
        path: the file; its folder is made if missing.

    Returns:
        `path`.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(report), encoding="utf-8")
    return file


def page(report: Report) -> str:
    """The text of that page."""
    folder = resources.files(__package__)
    # "</script>" in a string would end the element, and "<!--" would change how it is read.
    data = json.dumps(contents(report), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(report.title or "fusionpass"),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((folder / name).read_text(encoding="utf-8") for name in ("layers.js", "page.js")),
        "data": data,
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def contents(report: Report) -> dict[str, Any]:
    """What the page shows, as plain JSON values."""
    found = layers(report)
    values = [{node.name: node for node in (*g.before, *g.after)} for g in report.graphs]
    all_sites = sites(report, found)
    return {
        "title": report.title or "fusionpass",
        "summary": _summary(report),
        "tree": _tree(all_sites),
        "sites": [_site(site) for site in fold(all_sites, report)],
        "layers": [_layer(layer, values[layer.graph], report.times) for layer in found],
        "run": _run(report),
    }


def _summary(report: Report) -> list[list[Any]]:
    known = {kind: len(getattr(report, kind)) for kind in ("fused", "refused", "missed")}
    pieces = {"graphs": len(report.model_graphs), "pieces": len(report.pieces), "distinct": report.distinct_pieces}
    # A trace generates none.
    kernels = {"kernels": report.kernels} if any(graph.kernels for graph in report.graphs) else {}
    return [[name, count] for name, count in {**known, **pieces, **kernels}.items()]


def _site(site: Site) -> dict[str, Any]:
    fields = dataclasses.asdict(site.record)
    return {
        **{name: value for name, value in fields.items() if name not in _UNSEEN},
        "kind": site.kind,
        "layer": site.layer if site.row is not None else None,
        "row": site.row,
        "members": list(dict.fromkeys(site.places)),
        "count": len(site.places),
        "advice": advise(site.kind, site.record),
    }


def _tree(found: Iterable[Site]) -> list[dict[str, Any]]:
    """The modules that have sites, with how many of each kind they and what is inside them have."""
    root: dict[str, Any] = {"children": {}}
    for site in found:
        node, path = root, ""
        for name in (site.record.where or "(no module)").split("."):
            path = f"{path}.{name}" if path else name
            node = node["children"].setdefault(name, {"name": name, "path": path, "counts": Counter(), "children": {}})
            node["counts"][site.kind] += 1
    return _branches(root)


def _branches(node: dict[str, Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    shapes: list[object] = []
    for child in sorted(node["children"].values(), key=lambda one: _number(one["name"]) or 0):
        counts = {kind: child["counts"][kind] for kind in KINDS}
        branch = {"name": child["name"], "path": child["path"], "counts": counts, "children": _branches(child)}
        shape = None if _number(child["name"]) is None else _shape(branch)
        if shape is not None and shapes and shape == shapes[-1]:
            made[-1]["last"] = child["name"]
        else:
            made.append(branch)
            shapes.append(shape)
    return made


def _number(name: str) -> int | None:
    return int(name) if name.isdecimal() else None


def _shape(branch: dict[str, Any]) -> object:
    inside = tuple((child["name"], child.get("last"), _shape(child)) for child in branch["children"])
    return tuple(branch["counts"].items()), inside


def _layer(layer: Layer, values: Mapping[str, NodeRecord], times: Mapping[tuple[int, str], Time]) -> dict[str, Any]:
    own = {node.name for row in layer.rows for node in (*row.before, *row.after)}
    read = {name for row in layer.rows for node in (*row.before, *row.after) for name in node.inputs} - own
    return {
        "graph": layer.graph,
        "title": layer.title,
        "members": layer.members,
        "outside": {name: [values[name].type, values[name].where] for name in sorted(read) if name in values},
        "rows": [_drawn(row, values, times.get((layer.graph, row.name))) for row in layer.rows],
    }


def _drawn(row: Row, values: Mapping[str, NodeRecord], measured: Time | None) -> dict[str, Any]:
    made: dict[str, Any] = {"before": [_node(n) for n in row.before], "after": [_node(n) for n in row.after]}
    if row.record is not None:
        fields = {**dataclasses.asdict(row.record), "advice": advise(row.kind, row.record)}
        made |= {"kind": row.kind, "record": {k: v for k, v in fields.items() if v and k not in _UNSEEN}}
    if row.kind == "fused":
        made["operators"], made["bytes"], made["left"] = row.traffic(values)
    if measured is not None:
        made["time"] = dataclasses.asdict(measured)
    return made


def _node(node: NodeRecord) -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(node, source=shortened(node.source)))
    return {k: v for k, v in fields.items() if v and k not in _UNSEEN}


_UNSEEN = ("graphs", "node", "bytes", "replaces")


def _run(report: Report) -> dict[str, Any]:
    passes: Counter[str] = Counter()
    for graph in report.graphs:
        passes.update(graph.seconds)
    notes = [f"graph break: {reason}" for reason in report.graph_breaks]
    notes += [f"recompiled: {reason}" for reason in report.recompiles]
    notes += dict.fromkeys(line for graph in report.model_graphs for line in graph.rewrites)
    notes += [f"compiled graph {g.index} left alone: {g.skipped}" for g in report.graphs if g.skipped]
    return {
        "notes": notes,
        "pieces": [
            [graph.index, piece.name, piece.graph, " to ".join(dict.fromkeys(filter(None, piece.modules))), piece.why,
             piece.boundary]
            for graph in report.model_graphs
            for piece in graph.pieces
        ],
        "graphs": [
            [g.index, g.kernels, "yes" if g.cached else "no", len(g.before), len(g.after)] for g in report.graphs
        ],
        "replays": [str(graph.replay) for graph in report.model_graphs if graph.replay is not None],
        "memory": str(report.memory),
        "passes": [[name, round(seconds * 1000, 1)] for name, seconds in passes.items()],
    }  # fmt: skip
