"""Find where the norm kernel's rule is beaten, and write those cells: `python -m bench.tune`."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from fusionpass.arch import Arch
from fusionpass.ops import add_rms_norm_quantize as op
from fusionpass.tuning import store

from .implementations import argument_sets, bytes_moved, inductor, launch_call, plan, variant
from .machine import ROOT, facts, require_gpu
from .timing import cold_sets, time_calls, warm_up

CUTS = [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (4, 4), (8, 4), (16, 4)]
"""Rows a program and warps a program."""
GAIN = 0.97
"""A cell is worth an exception where it takes this much of the rule's time, or less."""
FEW = 256
"""Up to so many tokens are timed warm, as a model's activations are then; more are timed cold."""


def main() -> None:
    """Time every cut of every size and write the cells that beat the rule, or where Inductor beats them all."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 8192])
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 576, 1024, 2048, 2880, 4096, 5120, 8192])
    parser.add_argument("--out", type=Path, default=ROOT / "fusionpass" / "tuning" / "configs" / "norm" / "h100.json")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    require_gpu()
    warm_up()
    console, cells = Console(), []
    store.DEVICES.clear()  # the rule alone is the baseline
    for hidden, tokens in track([(h, t) for h in options.hidden for t in options.tokens], console=console):
        found, text = tune(tokens, hidden)
        console.print(text)
        cells += found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(cell) for cell in cells)
    head = json.dumps(facts(options.commit))[1:-1]
    options.out.write_text(f'{{{head}, "cells": [\n{rows}\n]}}\n')


def tune(tokens: int, hidden: int) -> tuple[list[dict[str, Any]], str]:
    """The exceptional cell of one size, if it is one, and a line about it."""
    arch = Arch.of(torch.device("cuda"))
    count = 1
    if tokens > FEW:
        one = argument_sets(op, tokens, hidden, torch.bfloat16, 1)[0]
        count = cold_sets(bytes_moved(op, one), torch.cuda.get_device_properties(0).L2_cache_size) or 1
    sets = argument_sets(op, tokens, hidden, torch.bfloat16, count)
    launches = [launch for arguments in sets if (launch := plan(op, arguments, arch)) is not None]
    rule = (launches[0].args["ROWS"], launches[0].num_warps)

    def timed(cut: tuple[int, int]) -> float:
        call = launch_call([variant(launch, *cut) for launch in launches])
        return statistics.median(time_calls(call, count))

    block = launches[0].args["BLOCK"]
    fitting = [cut for cut in CUTS if 2 <= cut[0] * block / (cut[1] * 32) <= 128] + [rule]
    times = {cut: timed(cut) for cut in dict.fromkeys(fitting)}
    best = min(times, key=lambda cut: times[cut])
    # Once more, so that the lucky one among many has to be lucky twice.
    rule_us, best_us = min(times[rule], timed(rule)), timed(best)
    inductor_us = statistics.median(time_calls(inductor(op, sets, arch, pdl=True), count))
    torch.cuda.empty_cache()
    text = (
        f"{tokens} × {hidden}: rule {rule} {rule_us:.2f}, best {best} {best_us:.2f}, inductor+pdl {inductor_us:.2f} µs"
    )
    if best_us > GAIN * rule_us:
        best, best_us = rule, rule_us
    cell = {"tokens": tokens, "width": hidden, "rows": best[0], "warps": best[1], "us": round(best_us, 3)}
    if inductor_us < GAIN * best_us:
        cell["inductor_us"] = round(inductor_us, 3)
    return ([cell] if best != rule or "inductor_us" in cell else []), text


if __name__ == "__main__":
    main()
