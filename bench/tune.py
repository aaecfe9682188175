"""Find where another cut, or Inductor, beats a kernel's rule, and write those cells: `python -m bench.tune`."""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.launch import Launch
from fusionpass.op import OPS, Op
from fusionpass.ops.quant.scheme import SCHEMES
from fusionpass.tuning import store
from fusionpass.tuning.store import Cut

from .implementations import argument_sets, bytes_moved, compile_apart, in_processes, inductor, launch_call, with_cut
from .kernels import USUALLY_WARM
from .machine import ROOT, facts, require_gpu
from .timing import cold_sets, time_calls, warm_up

BY_NAME = {op.name: op for op in OPS.values()}
TUNED = [
    "rms_norm", "add_rms_norm", "silu_mul", "rms_norm_quantize", "add_rms_norm_quantize", "silu_mul_quantize",
    "quantize",
]  # fmt: skip
GAIN = 0.97
"""A cell is worth an exception where it takes this much of the rule's time, or less."""
Kind = tuple[str, str | None, int]
"""An op, a scheme and a width."""


def main() -> None:
    """Time every cut of every size and write the cells that beat the rule, or where Inductor beats them all."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=TUNED, default=TUNED)
    parser.add_argument("--scheme", nargs="+", default=[name for name in SCHEMES if name != "fp8_block128"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 1024, 8192])
    parser.add_argument("--hidden", nargs="+", type=int, default=[2880, 4096, 5120, 8192])
    parser.add_argument("--out", type=Path, default=ROOT / "fusionpass" / "tuning" / "configs" / "h100.json")
    parser.add_argument("--inductor", action="store_true", help="time Inductor's own code beside them")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    require_gpu()
    store.DEVICES.clear()  # the rule alone is the baseline
    kinds = list(_kinds(options))
    # Sizes that Triton does not tell apart share a kernel: one, and a multiple of sixteen.
    once = {(*kind, 1 if tokens == 1 else 64): None for kind in kinds for tokens in options.tokens}
    compile_apart(launch_of, [(*size, cut) for size in once for cut in cuts(*size)])
    if options.inductor:
        in_processes(compile_inductor, [(*kind, tokens) for kind in kinds for tokens in options.tokens])
    warm_up()
    console, cells = Console(), []
    for kind in track(kinds, console=console):
        for tokens in options.tokens:
            cell = tune(*kind, tokens, options.inductor)
            console.print(line(cell))
            cells += [cell] if "rows" in cell or cell.get("inductor_us", math.inf) < GAIN * cell["us"] else []
        _save(options, cells)


def _kinds(options: argparse.Namespace) -> Iterator[Kind]:
    for name, width in itertools.product(options.op, options.hidden):
        for scheme in options.scheme if "scheme" in BY_NAME[name].signature.parameters else [None]:
            try:
                argument_sets(BY_NAME[name], 1, width, torch.bfloat16, 1, scheme)
                launch_of(name, scheme, width, 1, None)
            except (ArgumentError, AssertionError):
                continue
            yield name, scheme, width


def launch_of(name: str, scheme: str | None, width: int, tokens: int, cut: Cut | None) -> Launch:
    return with_cut(BY_NAME[name], _sets(name, scheme, width, tokens, 1)[0], CHOOSE, cut)


CHOOSE = "fusionpass.tuning.store.choose"


def compile_inductor(name: str, scheme: str | None, width: int, tokens: int) -> None:
    _inductor(BY_NAME[name], _sets(name, scheme, width, tokens, 1))(0)


def _inductor(op: Op, sets: list[dict[str, Any]]) -> Any:
    return inductor(op, sets, Arch.of(torch.device("cuda")), pdl=True)


def _sets(name: str, scheme: str | None, width: int, tokens: int, count: int) -> list[Any]:
    return argument_sets(BY_NAME[name], tokens, width, torch.bfloat16, count, scheme)


def rule(name: str, scheme: str | None, width: int, tokens: int) -> Cut:
    """The cut that the plan takes by itself."""
    launch = launch_of(name, scheme, width, tokens, None)
    return Cut(launch.args.get("ROWS", 1), launch.args["BLOCK"], launch.num_warps)


def cuts(name: str, scheme: str | None, width: int, tokens: int) -> list[Cut]:
    """Those worth trying: whole rows where something is computed of them, else parts; 8 to 64 elements a thread."""
    own = rule(name, scheme, width, tokens)
    whole = "norm" in name or str(scheme).endswith("_token")
    columns = [own.columns] if whole else [256, 512, 1024, 2048, 4096]
    rows = [1] if "mul" in name else [1, 2, 4]
    found = [Cut(*parts) for parts in itertools.product(rows, columns, (1, 2, 4, 8, 16))]
    most = 64 if whole else 16
    fitting = [cut for cut in found if 8 <= cut.rows * cut.columns / (cut.warps * 32) <= most]
    group = 1 if scheme is None else SCHEMES[scheme].group or 1
    fitting = [cut for cut in fitting if cut.columns >= group and (whole or cut.rows * cut.columns <= 4096)]
    return list(dict.fromkeys([own, *fitting]))


def tune(name: str, scheme: str | None, width: int, tokens: int, beside: bool) -> dict[str, Any]:
    """What was found of one size: the rule's time and, where it is enough faster, another cut; Inductor's, if asked."""
    op, count = BY_NAME[name], 1
    if tokens > USUALLY_WARM:
        one = _sets(name, scheme, width, tokens, 1)[0]
        count = cold_sets(bytes_moved(op, one), torch.cuda.get_device_properties(0).L2_cache_size) or 1
    sets = _sets(name, scheme, width, tokens, count)

    def timed(cut: Cut) -> float:
        call = launch_call([with_cut(op, arguments, CHOOSE, cut) for arguments in sets])
        return statistics.median(time_calls(call, count, replays=9))

    own = rule(name, scheme, width, tokens)
    times = {cut: timed(cut) for cut in cuts(name, scheme, width, tokens)}
    # Once more, so that the lucky one among many has to be lucky twice.
    again = {cut: max(times[cut], timed(cut)) for cut in sorted(times, key=lambda cut: times[cut])[:2]}
    best = min(again, key=lambda cut: again[cut])
    rule_us = min(times[own], timed(own))
    cell = {"op": name, "scheme": scheme, "tokens": tokens, "width": width, "us": rule_us}
    if again[best] <= GAIN * rule_us:
        cell |= {"us": again[best], "rule_us": rule_us, **vars(best)}
    if beside:
        cell["inductor_us"] = statistics.median(time_calls(_inductor(op, sets), count))
    torch.cuda.empty_cache()
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in cell.items()}


def line(cell: dict[str, Any]) -> str:
    """One cell, to be read while others are measured."""
    what = " ".join(str(cell[part]) for part in ("op", "scheme") if cell[part])
    found = (
        f", rule {cell['rule_us']:.2f}: {cell['rows']} × {cell['columns']}, {cell['warps']} warps"
        if "rows" in cell
        else ""
    )
    other = f", inductor+pdl {cell['inductor_us']:.2f}" if "inductor_us" in cell else ""
    return f"{what} {cell['tokens']} × {cell['width']}: {cell['us']:.2f} µs{found}{other}"


def _save(options: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(cell) for cell in cells)
    measured = {**facts(options.commit), "tokens": options.tokens, "widths": options.hidden}
    options.out.write_text(f'{json.dumps(measured)[:-1]}, "cells": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
