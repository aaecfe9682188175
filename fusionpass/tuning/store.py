"""Measured cuts of the kernels that work by the row, by device: `configs/<device>.json`, of `python -m bench.tune`."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..arch import Arch

DEVICES = {"sm_90": "h100"}
"""The device whose measurements stand for a target."""


@dataclass(frozen=True)
class Cut:
    """What one program of a kernel takes.

    Args:
        rows: how many.
        columns: of each; a power of two.
        warps: that share them.
    """

    rows: int
    columns: int
    warps: int


def choose(rule: Cut, op: str, scheme: str | None, arch: Arch, tokens: int | None, width: int, itemsize: int) -> Cut:
    """The cut that was measured to beat the kernel's own `rule` at this size, or the rule.

    Args:
        rule: the kernel's own choice.
        op: its name.
        scheme: the string of a scheme, or None; overrides do not count.
        arch: the target.
        tokens: rows; None where the count is symbolic: no single cell is right then.
        width: columns of a row.
        itemsize: bytes of an element of the input; two were measured.
    """
    cell = look_up(op, scheme, arch, tokens, width) if itemsize == 2 else None
    return rule if cell is None or "rows" not in cell else Cut(cell["rows"], cell["columns"], cell["warps"])


def look_up(op: str, scheme: str | None, arch: Arch, tokens: int | None, width: int) -> dict[str, Any] | None:
    """The exception that was found for this size, if one was: files hold the cells where a rule is beaten, no others.

    Counts of tokens stand for those within a factor of two, the nearest first. A width that was not measured takes the
    nearest that was of those with the same power of two above, which are cut alike.

    Returns:
        {"op", "scheme", "tokens", "width", "us"} and "rows", "columns", "warps", or "inductor_us"; or None.
    """
    table = _table(arch.name)
    if not tokens or not table:
        return None

    def far(count: int) -> float:
        return abs(math.log2(count / tokens))

    alike = [w for w in table["widths"] if (w - 1).bit_length() == (width - 1).bit_length()]
    nearest = min(alike, key=lambda w: abs(w - width), default=None)
    count = min(table["tokens"], key=far)
    found: dict[str, Any] | None = None
    if nearest is not None and far(count) <= 1:
        found = table["cells"].get((op, scheme and scheme.partition(",")[0], count, nearest))
    return found


def refuse(op: str, scheme: str | None, arch: Arch, tokens: int | None, width: int) -> str | None:
    """Why Inductor's own code is the better choice for this size, by measurement, or None."""
    cell = look_up(op, scheme, arch, tokens, width)
    if cell is None or cell.get("inductor_us", math.inf) >= cell["us"]:
        return None
    figures = f"{cell['inductor_us']:.2f} against {cell['us']:.2f} µs at {cell['tokens']} × {cell['width']}"
    return f"inductor: measured faster ({figures} on {DEVICES[arch.name]})"


@functools.cache
def _table(arch: str) -> Mapping[str, Any]:
    device = DEVICES.get(arch)
    path = files(__package__) / "configs" / f"{device}.json"
    return indexed(json.loads(path.read_text())) if device is not None and path.is_file() else {}


def indexed(record: dict[str, Any]) -> dict[str, Any]:
    """A file's record with its cells by (op, scheme, tokens, width)."""
    return {**record, "cells": {(c["op"], c["scheme"], c["tokens"], c["width"]): c for c in record["cells"]}}
