"""Time products of matrices, every way there is to compute them: `python -m bench.gemm --help`.

Weights are rotated past the L2, as those of a model's layers are. What bounds few rows is memory, measured as a copy of
as many bytes in the same run; what bounds many, the matrix units' published rate. Each cell is written when it is done,
so that a run that is broken off can be taken up.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fusionpass.tuning.timing import warm_up

from .implementations import compile_apart
from .machine import facts, require_gpu, results_folder
from .products import BLOCKS, SCHEMES, SHAPES, grid_of, launch_of, measure, shapes_of

ROWS = (1, 8, 32, 64, 128, 512, 2048, 8192)
KEY = ("scheme", "rows", "columns", "k")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m bench.gemm", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 8, 32, 64], help=f"--all: {' '.join(map(str, ROWS))}"
    )
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=["fp8_token"])
    parser.add_argument("--all", action="store_true", help="every scheme, at 1 to 8192 rows")
    parser.add_argument("--search", action="store_true", help="try every cut, too")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="after which no further cell is begun")
    parser.add_argument("--resume", action="store_true", help="leave out cells that the file has of this commit")
    parser.add_argument("--file", default="gemm.json", help="in the folder (gemm.json)")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/<device>")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    if options.all:
        options.rows, options.scheme = [*ROWS], [*SCHEMES]
    return options


def cells_of(options: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """Those that are asked for, few rows first: a budget then leaves out what takes longest."""
    shapes = shapes_of(options.shapes)
    return [(scheme, rows, *shape) for rows, scheme, shape in itertools.product(options.rows, options.scheme, shapes)]


def kept(file: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of the file that were measured as these would be."""
    if not options.resume or not file.exists():
        return []
    old, said = json.loads(file.read_text()), facts(options.commit)
    return old["cells"] if all(old.get(name) == value for name, value in said.items()) else []


def main() -> None:
    """Parse the options, time every cell, write the JSON and print the table."""
    options = parse()
    require_gpu()
    began = time.monotonic()
    if options.search and set(options.scheme) & {*BLOCKS}:
        raise SystemExit("bench.gemm: --search is for scales of rows and of whole matrices")
    warm_up()
    if options.search:
        first = SHAPES[options.shapes[0]][0]
        each = itertools.product(options.rows, [first], options.scheme)
        compile_apart(
            launch_of, [(rows, *first, scheme, cut) for rows, _, scheme in each for cut in grid_of(rows, 4096)]
        )
    file = results_folder(options.out) / options.file
    cells = kept(file, options)
    done = {tuple(cell[name] for name in KEY) for cell in cells}
    todo = [cell for cell in cells_of(options) if cell not in done]
    budget, console, left = options.budget or math.inf, Console(), []
    for cell in todo:
        if time.monotonic() - began > budget:
            left.append(cell)
            continue
        scheme, rows, columns, k = cell
        cells.append(measure(rows, columns, k, scheme, grid_of(rows, columns) if options.search else []))
        torch.cuda.empty_cache()
        said = {**facts(options.commit), "cells": cells}
        file.write_text(json.dumps(said, indent=1) + "\n")
    console.print(table(cells))
    console.print(layers(cells, options.shapes))
    if left:
        console.print(f"left out for time: {len(left)} of {len(todo)} cells; --resume takes them up")


def best_other(cell: dict[str, Any]) -> float | None:
    """The least microseconds of another library."""
    return min((us for name, us in cell["times"].items() if name != "triton"), default=None)


def chosen(cell: dict[str, Any]) -> float | None:
    """Microseconds of what the dispatch chooses."""
    found: float | None = cell["times"].get(cell["auto"])
    return found


def table(cells: list[dict[str, Any]]) -> Table:
    """Microseconds of each way, and the share of the limit that the dispatch's choice reaches."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["times"]))
    made = Table(
        "scheme", "rows", "N × K", "copy", *names, "chosen", "% of limit", "bound by", "TFLOP/s", "best cut", "µs"
    )
    for cell in cells:
        us = chosen(cell)
        share = f"{100 * cell['limit'] / us:.0f}" if us and "limit" in cell else ""
        rate = f"{2e-6 * cell['rows'] * cell['columns'] * cell['k'] / us:.0f}" if us else ""
        times = [f"{cell['times'][name]:.2f}" if name in cell["times"] else "" for name in names]
        cut = " ".join(f"{value}" for value in cell.get("cut", {}).values())
        found = f"{cell['best']:.2f}" if "best" in cell else ""
        made.add_row(
            cell["scheme"], str(cell["rows"]), f"{cell['columns']} × {cell['k']}", f"{cell['copy']:.2f}", *times,
            cell["auto"], share, cell.get("bound", ""), rate, cut, found,
        )  # fmt: skip
    return made


def layers(cells: list[dict[str, Any]], shapes: list[str]) -> Table:
    """The products of a layer together: the dispatch's choice beside a copy of the weights and the best other."""
    made = Table(
        "scheme", "rows", "a layer of", "copy", "chosen", "% of copy", "best other", "times as fast", "best cuts %"
    )
    by_key = {tuple(cell[name] for name in KEY): cell for cell in cells}
    for scheme, rows in dict.fromkeys((cell["scheme"], cell["rows"]) for cell in cells):
        for name in shapes:
            found = [by_key.get((scheme, rows, *shape)) for shape in SHAPES[name]]
            whole = [cell for cell in found if cell is not None and chosen(cell) is not None]
            if len(whole) < len(found):
                continue
            copy, ours = sum(cell["copy"] for cell in whole), sum(chosen(cell) or 0.0 for cell in whole)
            others = [best_other(cell) for cell in whole]
            other = sum(us for us in others if us is not None) if None not in others else None
            best = sum(min(cell.get("best", math.inf), chosen(cell) or 0.0) for cell in whole)
            searched = f"{100 * copy / best:.1f}" if any("best" in cell for cell in whole) else ""
            beside = (f"{other:.1f}", f"{other / ours:.2f}") if other is not None else ("", "")
            made.add_row(
                scheme, str(rows), name, f"{copy:.1f}", f"{ours:.1f}", f"{100 * copy / ours:.1f}", *beside, searched
            )
    return made


if __name__ == "__main__":
    main()
