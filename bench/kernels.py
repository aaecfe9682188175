"""Time ops' kernels beside a copy, eager mode, Inductor and other libraries: `python -m bench.kernels --help`."""

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.op import OPS
from fusionpass.tuning.timing import cold_sets, summary, warm_up

from . import peers, verdicts
from .cells import PRESETS, USUAL, Cell, product
from .check import checker
from .implementations import (
    COMPILED,
    IMPLEMENTATIONS,
    YARDSTICKS,
    Arguments,
    Call,
    argument_sets,
    bytes_moved,
    compile_here,
    compile_one,
    in_processes,
    left_to_inductor,
    named,
    workers,
)
from .machine import facts, require_gpu, results_folder
from .replays import calls_for, capture

WAYS = (*IMPLEMENTATIONS, *peers.PEERS)
KEY = ("op", "scheme", "dtype", "tokens", "hidden", "regime")
REPLAYS = 7
"""Of each way in each round."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, and in `cells` what they choose."""
    timed = {op.name: op for op in OPS.values() if op.backends}
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="the cells of the docs' table; other options choose of them")
    parser.add_argument("--op", nargs="+", choices=[*timed, "all"], metavar="OP")
    parser.add_argument("--tokens", nargs="+", type=int, help="default 1 64 1024 8192")
    parser.add_argument("--hidden", nargs="+", type=int, help="default 576 2048 4096 8192")
    parser.add_argument("--scheme", nargs="+", help="for the ops that quantise; default fp8_static")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--regime", choices=["warm", "cold", "both", "usual"], default="both", help=USUAL)
    parser.add_argument("--beside", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--rounds", type=int, default=2, help="that each cell is timed in")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="after which no further cell is begun")
    parser.add_argument("--resume", action="store_true", help="leave out cells that the file has of this commit")
    parser.add_argument("--anchors", type=Path, metavar="CSV", help="other systems' figures to be judged against")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/<device>")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args(arguments)
    chosen = [*timed] if options.op and "all" in options.op else options.op
    if options.preset:
        wanted = {"op": chosen, "tokens": options.tokens, "hidden": options.hidden, "scheme": options.scheme}
        options.cells = [
            cell
            for cell in PRESETS[options.preset]()
            if all(v is None or getattr(cell, k) in (None, *v) for k, v in wanted.items())
        ]
        return options
    sizes = (options.tokens or (1, 64, 1024, 8192), options.hidden or (576, 2048, 4096, 8192), options.regime)
    options.cells = []
    for name in chosen or ["add_rms_norm_quantize"]:
        quantises = "scheme" in timed[name].signature.parameters
        options.cells += product([name], (options.scheme or ["fp8_static"]) if quantises else [None], *sizes)
    return options


def main() -> None:
    """Compile and time family by family, write the JSON and print the table of each, then judge the run."""
    options = parse()
    require_gpu()
    compile_here()
    console, file, began = Console(soft_wrap=True), results_folder(options.out) / "kernels.json", time.monotonic()
    measured = facts(options.commit)
    gone = {name: why for name, why in peers.missing().items() if name in options.beside}
    console.print("\n".join(f"{name}: {why}" for name, why in gone.items()), markup=False)
    todo = left_over(options.cells, file, measured, options)
    console.print(f"{len(todo)} sizes of {len(options.cells)}")
    judged = record(file, [], measured, options, gone)
    counted = 0

    def left() -> float:
        return math.inf if options.budget is None else options.budget - (time.monotonic() - began)

    warm_up()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with workers() as pool, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sizes", total=len(todo))
        for _, family in itertools.groupby(todo, lambda cell: cell.family):
            cells = list(family)
            compile_all(cells, options, pool, left())
            compiled = time.monotonic() - began
            for title, group in itertools.groupby(cells, lambda cell: cell.title):
                bar.update(task, description=title)
                found: list[dict[str, Any]] = []
                for cell in itertools.takewhile(lambda _: left() > 0, group):
                    try:
                        found += measure(cell, options)
                    except (ArgumentError, torch.OutOfMemoryError) as error:
                        console.print(f"{title} {cell.tokens} × {cell.hidden}: {error}", markup=False)
                    counted += 1
                    bar.advance(task)
                judged = record(file, found, measured, options, gone)
                console.print(table(found, title))
            after = time.monotonic() - began
            console.print(
                f"{counted} of {len(todo)} sizes after {after:.0f} s; these timed in {after - compiled:.0f} s"
            )
            if left() <= 0:
                break
    console.print(verdicts.text(judged), markup=False, highlight=False)
    if counted < len(todo):
        rest = sorted({f"{cell.title} {cell.hidden}" for cell in todo[counted:]})
        console.print(f"left out for time, {len(todo) - counted} sizes (--resume takes them up): {'; '.join(rest)}")


def compile_all(cells: Sequence[Cell], options: argparse.Namespace, pool: ProcessPoolExecutor, seconds: float) -> None:
    """Leave what the cells' ways compile to in the caches on disk."""
    kind = getattr(torch, options.dtype)
    each = [
        (way, cell.op, cell.tokens, cell.hidden, kind, cell.scheme)
        for cell in cells
        for way in COMPILED
        if way in options.beside and (cell.ways is None or way in cell.ways)
    ]
    in_processes(compile_one, each, pool, None if math.isinf(seconds) else max(0.0, seconds))


def left_over(cells: Sequence[Cell], file: Path, measured: dict[str, str], options: argparse.Namespace) -> list[Cell]:
    """The cells; with --resume without those that the file has of this commit, device, torch and Triton."""
    old = json.loads(file.read_text())["cells"] if options.resume and file.exists() else []
    same = [cell for cell in old if {**cell, **measured, "dtype": options.dtype} == cell]
    done = {verdicts.where(cell) for cell in same}
    return [c for c in cells if not {(c.op, c.scheme, c.tokens, c.hidden, regime) for regime in c.regimes} <= done]


def record(
    file: Path,
    cells: list[dict[str, Any]],
    measured: dict[str, str],
    options: argparse.Namespace,
    gone: dict[str, str],
) -> dict[str, Any]:
    """Put the cells into the file, in the place of older ones of the same key, and what this commit's cells show."""
    found = json.loads(file.read_text())["cells"] if file.exists() else []
    cells = [{**cell, "dtype": options.dtype, **measured} for cell in cells]
    fresh = {tuple(cell[k] for k in KEY): cell for cell in cells}
    kept = {tuple(cell[k] for k in KEY): cell for cell in found} | fresh
    ours = [cell for cell in kept.values() if {**cell, **measured} == cell]
    judged = {**measured, **verdicts.summary(ours, options.anchors), "peers": gone}
    rows = ",\n".join("  " + json.dumps(cell) for _, cell in sorted(kept.items(), key=str))
    # Not half a file, should the process be killed.
    whole = file.with_suffix(".new")
    whole.write_text(f'{{"summary": {json.dumps(judged)},\n"cells": [\n{rows}\n]}}\n')
    whole.replace(file)
    return judged


def measure(cell: Cell, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One size: warm on one set of buffers, cold on sets rotated past three times the L2."""
    kind, (op, also) = getattr(torch, options.dtype), named(cell.op)
    moved = bytes_moved(op, argument_sets(op, cell.tokens, cell.hidden, kind, 1, cell.scheme, also, "meta")[0])
    chosen = regimes(cell, cold_sets(moved, torch.cuda.get_device_properties(0).L2_cache_size))
    if not chosen:
        return []
    sets = argument_sets(op, cell.tokens, cell.hidden, kind, max(chosen.values()), cell.scheme, also)
    arch = Arch.of(torch.device("cuda"))
    calls, errors, wrong = checked(cell, sets, options.beside, arch)
    left = left_to_inductor(op, sets[0], arch)
    said = {**({"wrong": wrong} if wrong else {}), **({"left": left} if left else {})}
    size = {"op": cell.op, "scheme": cell.scheme, "tokens": cell.tokens, "hidden": cell.hidden, "bytes": moved}
    cells = []
    for regime, count in chosen.items():
        samples = timed(calls, count, calls_for(moved, count), options.rounds)
        results = {k: {**summary(v), **({"error": errors[k]} if k in errors else {})} for k, v in samples.items()}
        cells.append({**size, "regime": regime, "sets": count, **said, "results": results})
    del calls, sets
    torch.cuda.empty_cache()
    return cells


def checked(
    cell: Cell, sets: list[Arguments], beside: Sequence[str], arch: Arch
) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """The calls of each way that there is, their errors, and why others count for nothing."""
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    wrong: dict[str, str] = {}
    op, _ = named(cell.op)
    check = checker(op, sets[0])
    torch._dynamo.reset()
    for way in beside:
        theirs = way in peers.PEERS
        if not theirs and cell.ways is not None and way not in cell.ways:
            continue
        try:
            call = peers.peer(way, cell.op, cell.scheme, sets) if theirs else IMPLEMENTATIONS[way](op, sets, arch)
            if call is not None and way not in YARDSTICKS:
                errors[way] = check(call(0))
        except Exception as error:
            # Another library may fail in any way, on this device or at this size.
            if not theirs and not isinstance(error, AssertionError):
                raise
            wrong[way] = f"{type(error).__name__}: {error}"[:200]
        else:
            calls |= {} if call is None else {way: call}
    return calls, errors, wrong


def timed(calls: dict[str, Call], sets: int, each: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each way, in turns; `each` calls a graph, on so many sets of buffers."""
    graphs = {way: capture(call, sets, each) for way, call in calls.items()}
    # Here, not only at the start: while kernels are loaded, the clocks go down again.
    warm_up(0.03)
    samples: dict[str, list[float]] = {way: [] for way in graphs}
    for _ in range(rounds):
        for way, graph in graphs.items():
            graph.us()
            samples[way] += [graph.us() for _ in range(REPLAYS)]
    return samples


def regimes(cell: Cell, cold: int | None) -> dict[str, int]:
    """How many sets of buffers each of the cell's regimes takes."""
    return {k: v for k, v in {"warm": 1, "cold": cold}.items() if v is not None and k in cell.regimes}


def table(cells: list[dict[str, Any]], title: str) -> Table:
    made = Table(title=f"{title}: µs (% of the copy's speed)")
    ways = [way for way in WAYS if any(way in cell["results"] for cell in cells)]
    for column in ("tokens × hidden", "regime", *ways):
        made.add_column(column, justify="right")
    for cell in cells:
        texts = []
        for way in ways:
            share = verdicts.percent(cell, way)
            us = cell["results"].get(way, {}).get("us")
            texts.append("–" if us is None else f"{us:.2f}" + ("" if share is None else f" ({share:.0f})"))
        made.add_row(f"{cell['tokens']} × {cell['hidden']}", cell["regime"], *texts)
    return made


if __name__ == "__main__":
    main()
