"""Draw the figures: `python -m bench.plot --out docs/images` (percent of a copy's speed; time per layer)."""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cells import Cell
from .machine import ROOT, device_slug
from .verdicts import percent

RESULTS = ROOT / "bench" / "results"
STYLES = {"fusionpass": ("C3", 2.0), "inductor+pdl": ("C0", 1.2), "inductor": ("C9", 1.2), "eager": ("0.6", 1.2)}
"""Colours and widths of lines; other libraries take the next colours."""
OTHERS = ("C1", "C2", "C4", "C5", "C6", "C8")
SETTINGS = {
    # Text stays text, and what is drawn of the same figures is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "fusionpass",
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLUMNS = 3


def usual(cells: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Of cells in both regimes the one that models meet: warm where rows are few, cold beyond."""
    for cell in cells:
        if cell["regime"] in Cell(cell["op"], cell["scheme"], cell["tokens"], cell["hidden"], "usual").regimes:
            yield cell


def lines(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and percent of the copy's speed, by implementation."""
    found: dict[str, list[tuple[int, float]]] = {}
    for cell in sorted(usual(cells), key=lambda cell: cell["tokens"]):
        for way in cell["results"]:
            share = percent(cell, way)
            if share is not None and way not in ("copy", "one element"):
                found.setdefault(way, []).append((cell["tokens"], share))
    return found


def op_figure(op: str, hidden: int, cells: Sequence[Mapping[str, Any]]) -> Figure:
    """One op at one width: a panel for each scheme."""
    schemes = sorted({cell["scheme"] for cell in cells}, key=str)
    by_scheme = {scheme: lines([cell for cell in cells if cell["scheme"] == scheme]) for scheme in schemes}
    drawn = {way for found in by_scheme.values() for way in found}
    order = [*(way for way in STYLES if way in drawn), *sorted(drawn - STYLES.keys())]
    others = zip(order[len(drawn & STYLES.keys()) :], itertools.cycle(OTHERS), strict=False)
    styles = {**STYLES, **{way: (colour, 1.2) for way, colour in others}}
    columns = min(COLUMNS, len(schemes))
    rows = -(-len(schemes) // columns)
    size = (2.6 * columns + 1.2, 2.0 * rows + 0.3)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(schemes) :]:
        axes.set_visible(False)
    for axes, scheme in zip(grid.flat, schemes, strict=False):
        panel(axes, by_scheme[scheme], styles)
        axes.set_title((scheme or op).replace(",", "\n"), fontsize=8)
    grid.flat[0].set_ylim(bottom=0)
    handles = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([handles[way] for way in order], order, loc="center right", frameon=False)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("% of a copy's speed", fontsize=8)
    figure.suptitle(", ".join([op, f"{hidden} columns", *devices(cells)]), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 1.2 / size[0], 1))
    return figure


def panel(
    axes: Axes, found: Mapping[str, Sequence[tuple[int, float]]], styles: Mapping[str, tuple[str, float]]
) -> None:
    """A line for each implementation, and one at the copy's speed."""
    axes.axhline(100, color="0.8", linewidth=0.8)
    for way, points in found.items():
        colour, width = styles[way]
        axes.plot(*zip(*points, strict=True), label=way, color=colour, linewidth=width, marker="o", markersize=2.5)
    axes.set_xscale("log", base=2)
    ticks = sorted({tokens for points in found.values() for tokens, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
    axes.minorticks_off()


def devices(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured on, where the figures say it."""
    return sorted({one["device"] for one in found if "device" in one})


def layer_figure(work: Mapping[str, Mapping[str, Mapping[str, float]]], layers: int, device: str) -> Figure:
    """Microseconds a layer of a whole model, by what it does and how it was compiled."""
    figure, grid = plt.subplots(1, len(work), figsize=(2.6 * len(work), 2.4), squeeze=False)
    for axes, (title, ways) in zip(grid.flat, work.items(), strict=True):
        times = {way: found["us"] / layers for way, found in ways.items() if "us" in found}
        colours = ["C3" if way == "fusionpass" else "C0" for way in times]
        bars = axes.barh([*times], [*times.values()], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=2)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("µs a layer")
        axes.margins(x=0.2)
    figure.suptitle(device, fontsize=9)
    figure.tight_layout()
    return figure


def figures(folder: Path, hidden: Sequence[int]) -> Iterator[tuple[str, Figure]]:
    """The figures of a folder of results, by the names of their files."""
    kernels, whole = folder / "kernels.json", folder / "e2e.json"
    cells = json.loads(kernels.read_text())["cells"] if kernels.exists() else []
    for op, width in sorted({(cell["op"], cell["hidden"]) for cell in cells if cell["hidden"] in hidden}):
        chosen = [cell for cell in cells if (cell["op"], cell["hidden"]) == (op, width)]
        if any(lines(chosen).values()):
            yield f"kernels-{op.replace('+', '-and-')}-{width}.svg", op_figure(op, width, chosen)
    if whole.exists():
        found = json.loads(whole.read_text())
        yield "layer.svg", layer_figure(found["work"], found["layers"], ", ".join(devices([found])))


def measured() -> Path:
    """The folder of this machine's GPU; where there is none, that of the only device that there are results of.

    Raises:
        FileNotFoundError: which of several devices is meant cannot be known.
    """
    if torch.cuda.is_available():
        return RESULTS / device_slug()
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    if len(folders) != 1:
        raise FileNotFoundError(f"name one with --results: {', '.join(map(str, folders)) or 'there is none'}")
    return folders[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw every figure that there are results for."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--results", type=Path, help="folder of kernels.json and e2e.json; default: this GPU's")
    parser.add_argument("--hidden", nargs="+", type=int, default=[4096, 12288], help="widths that are drawn")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(SETTINGS):
        for name, figure in figures(options.results or measured(), options.hidden):
            figure.savefig(options.out / name, metadata={"Date": None, "Creator": None})
            plt.close(figure)
            print(options.out / name)


if __name__ == "__main__":
    main()
