"""Time an op's kernel beside a copy, eager mode and Inductor: `python -m bench.kernels --help`."""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.op import OPS, Op
from fusionpass.ops.quant import Scheme, dequantize
from fusionpass.testing import exact, relative_error
from fusionpass.tuning.timing import cold_sets, summary, time_calls, warm_up

from .implementations import IMPLEMENTATIONS, Arguments, Call, argument_sets, bytes_moved, in_processes
from .machine import facts, require_gpu, results_folder


def main() -> None:
    """Parse the options, time every cell, write the JSON and print the table."""
    timed = {op.name: op for op in OPS.values() if op.backends}
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=[*timed, "all"], default=["add_rms_norm_quantize"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 1024, 8192])
    parser.add_argument("--hidden", nargs="+", type=int, default=[576, 2048, 4096, 8192])
    parser.add_argument("--scheme", nargs="+", default=["fp8_static"], help="for the ops that quantise")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--regime", choices=["warm", "cold", "both", "usual"], default="both", help=USUAL)
    parser.add_argument("--beside", nargs="+", choices=[*IMPLEMENTATIONS], default=[*IMPLEMENTATIONS], metavar="WAY")
    parser.add_argument("--rounds", type=int, default=2, help="that each cell is timed in")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/<device>")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    require_gpu()
    chosen = list(timed) if "all" in options.op else options.op
    quantising = {name for name in chosen if "scheme" in timed[name].signature.parameters}
    names = [(name, s) for name in chosen for s in (options.scheme if name in quantising else [None])]
    sizes = [(tokens, hidden) for hidden in options.hidden for tokens in options.tokens]
    each = [(op, *size, options.dtype, scheme, way) for op, scheme in names for size in sizes for way in options.beside]
    console, file = Console(), results_folder(options.out) / "kernels.json"
    console.print(f"compiling {len(each)} kernels")
    in_processes(compile_one, [parts for parts in each if parts[-1] in COMPILED])
    warm_up()
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(names) * len(sizes))
        for name, scheme in names:
            title = " ".join(part for part in (name, scheme) if part)
            cells: list[dict[str, Any]] = []
            for tokens, hidden in sizes:
                progress.update(bar, description=f"{title} {tokens} × {hidden}")
                try:
                    cells += measure(timed[name], tokens, hidden, getattr(torch, options.dtype), scheme, options)
                except ArgumentError as error:
                    console.print(error)
                progress.advance(bar)
            cells = [{"op": name, "scheme": scheme, "dtype": options.dtype, **cell} for cell in cells]
            record(file, cells, facts(options.commit))
            console.print(table(cells, title))
            console.print(verdict(cells))


USUALLY_WARM = 256
USUAL = (
    f"usual: warm up to {USUALLY_WARM} tokens, as a model's activations are, cold beyond; cold only where big enough"
)
COMPILED = ("fusionpass", "inductor+pdl", "inductor")
YARDSTICKS = ("one element", "copy")
KEY = ("op", "scheme", "dtype", "tokens", "hidden", "regime")


def compile_one(name: str, tokens: int, hidden: int, dtype: str, scheme: str | None, way: str) -> None:
    """Leave what one implementation of one cell compiles to in the caches on disk."""
    op = next(op for op in OPS.values() if op.name == name)
    sets = argument_sets(op, tokens, hidden, getattr(torch, dtype), 1, scheme)
    call = IMPLEMENTATIONS[way](op, sets, Arch.of(torch.device("cuda")))
    if call is not None:
        call(0)


def record(file: Path, cells: list[dict[str, Any]], measured: dict[str, str]) -> None:
    """Put the cells into the file, in the place of older ones of the same key."""
    found = json.loads(file.read_text())["cells"] if file.exists() else []
    fresh = {tuple(cell[k] for k in KEY): {**cell, **measured} for cell in cells}
    kept = {tuple(cell[k] for k in KEY): cell for cell in found} | fresh
    rows = ",\n".join("  " + json.dumps(cell) for _, cell in sorted(kept.items(), key=str))
    file.write_text(f'{{"cells": [\n{rows}\n]}}\n')


def regimes(tokens: int, cold: int | None, wanted: str) -> dict[str, int]:
    """How many sets of buffers each of the wanted regimes takes."""
    usual = "warm" if tokens <= USUALLY_WARM else "cold"
    chosen = ("warm", "cold") if wanted == "both" else (usual if wanted == "usual" else wanted,)
    return {k: v for k, v in {"warm": 1, "cold": cold}.items() if v is not None and k in chosen}


def measure(
    op: Op, tokens: int, hidden: int, dtype: torch.dtype, scheme: str | None, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The cells of one size: warm on one set of buffers, cold on sets rotated past three times the L2.

    Raises:
        AssertionError: an implementation's output is further from float64 than twice what the reference's is.
    """
    arch = Arch.of(torch.device("cuda"))
    moved = bytes_moved(op, argument_sets(op, tokens, hidden, dtype, 1, scheme)[0])
    cold = cold_sets(moved, torch.cuda.get_device_properties(0).L2_cache_size)
    chosen = regimes(tokens, cold, options.regime)
    if not chosen:
        return []
    sets = argument_sets(op, tokens, hidden, dtype, max(chosen.values()), scheme)
    made = {name: IMPLEMENTATIONS[name](op, sets, arch) for name in options.beside}
    calls = {name: call for name, call in made.items() if call is not None}
    errors = {name: _checked(op, sets[0], name, call) for name, call in calls.items() if name not in YARDSTICKS}
    cells = []
    for name, count in chosen.items():
        # Here, not only at the start: while kernels are loaded, the clocks go down again.
        warm_up(0.1)
        samples: dict[str, list[float]] = {implementation: [] for implementation in calls}
        for _ in range(options.rounds):
            for implementation, call in calls.items():
                samples[implementation] += time_calls(call, count)
        results = {k: {**summary(v), **({"error": errors[k]} if k in errors else {})} for k, v in samples.items()}
        cells.append(
            {"tokens": tokens, "hidden": hidden, "regime": name, "sets": count, "bytes": moved, "results": results}
        )
    torch.cuda.empty_cache()
    return cells


def _checked(op: Op, arguments: Arguments, name: str, call: Call) -> float:
    reference = op.reference(**arguments)
    outputs, wanted, oracle = call(0), [reference] if op.single else reference, exact(op, arguments)
    kind = Scheme.parse(arguments["scheme"]) if "scheme" in arguments else None
    if kind is not None and kind.returns_scale:
        # A code means nothing without its scale: both against what was to be quantised.
        given, count = arguments.get("scale"), len(wanted) - 2
        truth = exact(op, {**arguments, "scheme": "fp8_static", "scale": torch.ones((), device="cuda")})[0]
        outputs, wanted = ([dequantize(*results[:2], kind, given), *results[2:]] for results in (outputs, wanted))
        oracle = [truth, *oracle[-count:]] if count else [truth]
    worst = 0.0
    for output, want, truth in zip(outputs, wanted, oracle, strict=True):
        error, allowed = relative_error(output, truth), 2 * relative_error(want, truth) + 1e-6
        assert error <= allowed, f"{name} of {op.name}: {error:.2e} from float64, more than {allowed:.2e}"
        worst = max(worst, error)
    return worst


def table(cells: list[dict[str, Any]], title: str) -> Table:
    made = Table(title=f"{title}: µs (ratio to ours)")
    ways = [way for way in IMPLEMENTATIONS if any(way in cell["results"] for cell in cells)]
    for column in ("tokens × hidden", "regime", *ways):
        made.add_column(column, justify="right")
    for cell in cells:
        results = cell["results"]
        ours = results.get("fusionpass", {"us": math.nan})["us"]
        texts = [f"{results[k]['us']:.2f} ({results[k]['us'] / ours:.2f})" if k in results else "–" for k in ways]
        made.add_row(f"{cell['tokens']} × {cell['hidden']}", cell["regime"], *texts)
    return made


def verdict(cells: list[dict[str, Any]]) -> str:
    """Geometric mean and worst cell, against Inductor with PDL and against the copy."""
    lines = []
    for regime in ("warm", "cold"):
        for other in ("inductor+pdl", "copy"):
            ratios = {
                f"{c['tokens']} × {c['hidden']}": c["results"][other]["us"] / c["results"]["fusionpass"]["us"]
                for c in cells
                if c["regime"] == regime and {"fusionpass", other} <= c["results"].keys()
            }
            if ratios:
                mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
                worst = min(ratios, key=lambda k: ratios[k])
                lines.append(f"{regime}: {mean:.3f} × the speed of {other}; least {ratios[worst]:.3f} at {worst}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
