"""Measured cells by op family and device: `configs/<family>/<device>.json`, written by `python -m bench.tune`."""

import functools
import json
import math
from importlib.resources import files
from typing import Any

from ..arch import Arch

DEVICES = {"sm_90": "h100"}
"""The device whose measurements stand for a target."""


def look_up(family: str, arch: Arch, tokens: int | None, width: int) -> dict[str, Any] | None:
    """The measured cell of this width nearest to `tokens`, where one is within a factor of two.

    The files hold exceptions only: the cells where the kernel's own rule, or the kernel, was found to be beaten.

    Args:
        family: a folder of `configs`, such as "norm".
        arch: the target.
        tokens: None where the count is symbolic: no single cell is right then.
        width: columns; only cells of exactly this width count.

    Returns:
        {"tokens", "width"} and what was found there: the kernel's configuration, "us", "inductor_us"; or None.
    """
    if not tokens:
        return None

    def distance(cell: dict[str, Any]) -> float:
        return abs(math.log2(cell["tokens"] / tokens))

    near = [cell for cell in _cells(family, arch.name) if cell["width"] == width and distance(cell) <= 1]
    return min(near, key=distance, default=None)


def refuse(family: str, arch: Arch, tokens: int | None, width: int) -> str | None:
    """Why Inductor's own code is the better choice for this size, by measurement, or None."""
    cell = look_up(family, arch, tokens, width)
    if cell is None or cell.get("inductor_us", math.inf) >= cell["us"]:
        return None
    figures = f"{cell['inductor_us']:.2f} against {cell['us']:.2f} µs at {cell['tokens']} × {cell['width']}"
    return f"inductor: measured faster ({figures} on {DEVICES[arch.name]})"


@functools.cache
def _cells(family: str, arch: str) -> tuple[dict[str, Any], ...]:
    device = DEVICES.get(arch)
    if device is None:
        return ()
    path = files(__package__) / "configs" / family / f"{device}.json"
    return tuple(json.loads(path.read_text())["cells"]) if path.is_file() else ()
