"""explain: what would fuse in a model, what not, why, and what to change; from a trace alone."""

import argparse
import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from ..report.advice import advise
from ..report.layers import layer_of, layers
from ..report.records import Time
from ..report.sites import KINDS, Site, fold, sites
from ..report.trace import Report
from . import gemm
from .options import Commands, add_model, here, program

_STYLES = {"missed": "red", "refused": "yellow", "fused": "green"}


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("explain", help="what would fuse in a model, what not, why, and what to change")
    add_model(parser, optional=True)
    gemm.add(parser)
    parser.add_argument("--measure", action="store_true", help="also time each fused op, and what it replaced, here")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the report as a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--all", action="store_true", help="a table for each layer, also for those that are alike")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trace the model and print the tables; or those of the products."""
    if args.gemm:
        return gemm.run(args)
    if args.model is None:
        raise ConfigError("there is no model", "explain", "Name one, or ask for the products with --gemm")
    if args.measure and args.target not in (None, here().name):
        raise ConfigError(
            f"times are measured on this machine, {here().name}", "--measure", "Leave out --target, or --measure"
        )
    found, config = program(args)
    report = found.explain(config)
    if args.measure:
        report.measure()
    # Into a file or a pipe, lines need not be as short as those of an old terminal.
    console = Console() if Console().is_terminal else Console(width=160)
    console.print(f"[bold]{escape(found.name)}[/] {escape(', '.join(found.notes))}", soft_wrap=True)
    show(report, console, every=args.all)
    if args.html:
        console.print(f"The page: {report.write_html(args.html)}", soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1))
    return 0


def show(report: Report, console: Console, every: bool = False) -> None:
    """Print a table for each distinct layer, or for `every` layer; what did not fuse comes first."""
    for title, found in _by_layer(report, every):
        table = Table(title=escape(title), title_justify="left", title_style="bold", expand=False)
        for heading in ("", "op", "run by", "module"):
            table.add_column(heading, no_wrap=True)
        table.add_column("why, and what to do", overflow="fold")
        for site in sorted(found, key=lambda site: (KINDS.index(site.kind), site.record.backend == "triton")):
            table.add_row(*_cells(site, report.times.get((site.record.graphs[0], site.record.node))))
        console.print(table)
    counts = Counter(kind for kind in KINDS for _ in getattr(report, kind))
    console.print(", ".join(f"{counts[kind]} {kind}" for kind in reversed(KINDS)), style="bold")
    for line in (*(f"graph break: {reason}" for reason in report.graph_breaks), *_rewrites(report)):
        console.print(line, markup=False)


def _rewrites(report: Report) -> list[str]:
    return list(dict.fromkeys(line for graph in report.model_graphs for line in graph.rewrites))


def _by_layer(report: Report, every: bool) -> list[tuple[str, list[Site]]]:
    distinct = layers(report)
    found = sites(report, distinct)
    if every:
        names = dict.fromkeys(layer_of(site.record.where) for site in reversed(found))
        by_name = {name: [site for site in found if layer_of(site.record.where) == name] for name in names}
        return sorted(((name or "outside of layers", inside) for name, inside in by_name.items()), key=_in_order)
    groups: dict[int | None, list[Site]] = {i: [] for i in range(len(distinct))}
    for site in fold(found, report, key=lambda site: site.layer):
        groups.setdefault(site.layer, []).append(site)
    titles: dict[int | None, str] = {
        i: (layer.members[0] or "outside of layers")
        + (f" and {len(layer.members) - 1} alike" if len(layer.members) > 1 and layer.title else "")
        for i, layer in enumerate(distinct)
    }
    return [(titles.get(i, "elsewhere"), inside) for i, inside in groups.items() if inside]


def _in_order(group: tuple[str, list[Site]]) -> tuple[bool, str, int]:
    name = group[0]
    head, _, number = name.rpartition(".")
    return (not number.isdecimal(), head, int(number) if number.isdecimal() else 0)


def _cells(site: Site, measured: Time | None) -> list[str]:
    record, style = site.record, _STYLES[site.kind]
    own = layer_of(record.where)
    where = record.where.removeprefix(own).strip(".") or record.where or "(no module)"
    told = [escape(record.reason)] if record.reason else []
    advice = advise(site.kind, record)
    # A kernel runs it: the note on what a larger op would have taken is enough.
    if advice and record.backend != "triton":
        told.append(f"[bold]→[/] {escape(advice)}")
    if measured is not None:
        told.append(escape(str(measured)))
    if site.kind != "fused" and record.source:
        told.append(f"[dim]{escape(record.source)}[/]")
    op = "\n".join(filter(None, (record.op, record.scheme)))
    return [f"[{style}]{site.kind}[/]", escape(op), escape(record.backend), escape(where), "\n".join(told)]
