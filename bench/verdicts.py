"""What a run of the kernels' benchmark shows: `python -m bench.verdicts kernels.json --anchors h100_kernels.csv`."""

import argparse
import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from .cells import FEW

Record = Mapping[str, Any]
"""A cell as the file has it."""
Where = tuple[str, str | None, int, int, str]
"""Op, scheme, tokens, columns and regime."""

ENOUGH, SLACK, MARGIN, POINTS, FASTER = 95.0, {4096: 0.6, 8192: 1.0}, 1.03, 3.0, 1.25
"""Percent of the copy; microseconds above a kernel of one element up to a width; times Inductor with PDL; points of
percent behind the best anchor; how many times as fast as the anchors in the geometric mean."""
NAMED = 8
"""Of the worst cells, so many are named."""


class Anchor(NamedTuple):
    """The best that was measured elsewhere."""

    percent: float
    way: str


def where(cell: Record) -> Where:
    return cell["op"], cell["scheme"], cell["tokens"], cell["hidden"], cell["regime"]


def percent(cell: Record, way: str = "fusionpass") -> float | None:
    """The speed in percent of a copy of as many bytes; None where one of the two was not timed."""
    results = cell["results"]
    return 100 * results["copy"]["us"] / results[way]["us"] if {way, "copy"} <= results.keys() else None


def _names() -> dict[str, tuple[str, str | None]]:
    """Op and scheme by the names of the anchors' file."""
    schemes = {"fp8_static": "fp8_static", "fp8_token": "fp8_token", "int8_token": "int8_token"}
    schemes |= {"fp8_g128": "fp8_group128", "fp8_g128_ue8m0": "fp8_group128,scale_dtype=float8_e8m0fnu"}
    bases = {"add_rms": "add_rms_norm", "rms": "rms_norm", "silu_mul": "silu_mul"}
    names: dict[str, tuple[str, str | None]] = {
        "add_rms": ("add_rms_norm", None),
        "rms_norm": ("rms_norm", None),
        "silu_mul": ("silu_mul", None),
        "qk_norm_rope": ("qk_norm_rope", None),
        "qk_norm_rope_kv": ("qk_norm_rope_cache", None),
        "add_rms_fp8_g128+bf16": ("add_rms_norm_quantize+norm", "fp8_group128"),
    }
    names |= {short: ("quantize", scheme) for short, scheme in schemes.items()}
    return names | {f"{b}_{s}": (f"{bases[b]}_quantize", schemes[s]) for b in bases for s in schemes}


def anchors(path: Path) -> tuple[dict[Where, Anchor], list[str]]:
    """The best implementation of each cell of a file, and the ops of it that there is none of here.

    Its columns: op, tokens, size (columns, or heads of queries and of keys, of 128), regime, implementation,
    percent_of_copy.
    """
    names, best, unknown = _names(), dict[Where, Anchor](), set[str]()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] not in names:
                unknown.add(row["op"])
                continue
            heads, _, keys = row["size"].partition("/")
            hidden = int(heads) * (128 if keys else 1)
            key = (*names[row["op"]], int(row["tokens"]), hidden, row["regime"])
            found = Anchor(float(row["percent_of_copy"]), row["implementation"])
            best[key] = max(found, best.get(key, found))
    return best, sorted(unknown)


def _bar(text: str, values: Mapping[Where, float], fails: Callable[[Where], bool], least_first: bool) -> dict[str, Any]:
    """A bar over cells: how many fail it, and the worst."""
    order = sorted(values, key=lambda key: values[key], reverse=not least_first)
    failed = [key for key in order if fails(key)]
    worst = [{"cell": _text(key), "value": round(values[key], 3)} for key in (failed or order)[:NAMED]]
    met = not failed if values else None
    return {"bar": text, "met": met, "cells": len(values), "failed": len(failed), "worst": worst}


def _text(key: Where) -> str:
    op, scheme, tokens, hidden, regime = key
    return " ".join(part for part in (op, scheme, f"{tokens} × {hidden}", regime) if part)


def copy_bar(cells: Sequence[Record]) -> dict[str, Any]:
    big = [c for c in cells if c["regime"] == "cold" and c["tokens"] >= 1024]
    values = {where(c): v for c in big if (v := percent(c)) is not None}
    return _bar(
        f"cold, from 1024 tokens: ≥ {ENOUGH:g} % of a copy's speed",
        values,
        lambda k: values[k] < ENOUGH,
        least_first=True,
    )


def floor_bar(cells: Sequence[Record]) -> dict[str, Any]:
    few = [c for c in cells if c["regime"] == "warm" and c["tokens"] <= FEW and c["hidden"] <= max(SLACK)]
    timed = [c for c in few if {"fusionpass", "one element"} <= c["results"].keys()]
    values = {where(c): c["results"]["fusionpass"]["us"] - c["results"]["one element"]["us"] for c in timed}

    def allowed(key: Where) -> float:
        return next(slack for width, slack in sorted(SLACK.items()) if key[3] <= width)

    limits = ", ".join(f"{slack:g} up to {width} columns" for width, slack in sorted(SLACK.items()))
    made = _bar(
        f"warm, up to {FEW} tokens: µs above a kernel of one element, {limits}",
        {k: v - allowed(k) for k, v in values.items()},
        lambda k: round(values[k], 3) > allowed(k),
        least_first=False,
    )
    by_text = {_text(key): round(v, 3) for key, v in values.items()}
    return {**made, "worst": [{**w, "value": by_text[w["cell"]]} for w in made["worst"]]}


def inductor_bar(cells: Sequence[Record]) -> dict[str, Any]:
    both = [c for c in cells if {"fusionpass", "inductor+pdl"} <= c["results"].keys()]
    values = {where(c): c["results"]["fusionpass"]["us"] / c["results"]["inductor+pdl"]["us"] for c in both}
    left = {where(c) for c in both if "left" in c}
    made = _bar(
        f"times as long as Inductor with PDL: ≤ {MARGIN:g}, or left to Inductor",
        values,
        lambda k: values[k] > MARGIN and k not in left,
        least_first=False,
    )
    return {**made, "left": sorted(map(_text, left)), "geomean": _mean(1 / v for v in values.values())}


def anchor_bar(cells: Sequence[Record], best: Mapping[Where, Anchor], unknown: Sequence[str]) -> dict[str, Any]:
    ours = {where(c): v for c in cells if where(c) in best and (v := percent(c)) is not None}
    values = {key: v - best[key].percent for key, v in ours.items()}
    made = _bar(
        f"points of percent of the copy behind the best anchor: ≤ {POINTS:g}; geometric mean ≥ {FASTER:g} times",
        values,
        lambda k: values[k] < -POINTS,
        least_first=True,
    )
    mean = _mean(v / best[key].percent for key, v in ours.items())
    met = made["met"] and mean is not None and mean >= FASTER if values else None
    missing = [_text(key) for key in sorted(best.keys() - ours.keys(), key=str)]
    return {**made, "met": met, "geomean": mean, "not measured": missing, "no such op": list(unknown)}


def summary(cells: Sequence[Record], file: Path | None = None) -> dict[str, Any]:
    """The four bars over the cells of one run; without the anchors' file, three."""
    bars = [copy_bar(cells), floor_bar(cells), inductor_bar(cells)]
    if file is not None:
        bars.append(anchor_bar(cells, *anchors(file)))
    wrong = [f"{_text(where(c))}: {way}: {why}" for c in cells for way, why in c.get("wrong", {}).items()]
    return {"cells": len(cells), "bars": bars, "wrong": wrong}


def text(found: Mapping[str, Any]) -> str:
    lines = []
    for bar in found["bars"]:
        state = {True: "met", False: "NOT met", None: "nothing measured"}[bar["met"]]
        mean = f", geometric mean {bar['geomean']:.3f}" if bar.get("geomean") else ""
        lines.append(f"{state}: {bar['bar']} ({bar['failed']} of {bar['cells']} cells fail{mean})")
        lines += [f"  {worst['value']:9.3f}  {worst['cell']}" for worst in bar["worst"]]
        for name in ("left", "not measured", "no such op"):
            if bar.get(name):
                lines.append(f"  {name}: {len(bar[name])}: {'; '.join(bar[name][:NAMED])}")
    return "\n".join([*lines, *(f"wrong: {line}" for line in found["wrong"])])


def _mean(ratios: Iterable[float]) -> float | None:
    found = list(ratios)
    return round(math.exp(statistics.fmean(map(math.log, found))), 4) if found else None


def main() -> None:
    """Judge the cells of a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.verdicts", description=__doc__)
    parser.add_argument("file", type=Path, help="kernels.json")
    parser.add_argument("--anchors", type=Path, help="CSV of other systems' figures")
    parser.add_argument("--commit", help="only cells of it")
    options = parser.parse_args()
    cells = json.loads(options.file.read_text())["cells"]
    cells = [cell for cell in cells if options.commit in (None, cell["commit"])]
    Console(soft_wrap=True).print(text(summary(cells, options.anchors)), markup=False, highlight=False)


if __name__ == "__main__":
    main()
