"""Configurations of kernels as files have them: the field's names on one side, a kernel's own on the other."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import TableError, TableWarning

C = TypeVar("C")
"""A frozen dataclass whose fields are ints: how a kernel is cut."""

FIELDS = {
    "rows": "BLOCK_SIZE_M",
    "columns": "BLOCK_SIZE_N",
    "depth": "BLOCK_SIZE_K",
    "grouped": "GROUP_SIZE_M",
    "splits": "SPLITS",
    "warps": "num_warps",
    "stages": "num_stages",
    "waves": "waves_per_eu",
}
"""By a kernel's name for it, what files call it. Any other is written in capitals."""

_told: set[str] = set()
"""What was warned of: once is enough, and plans are made often."""


def field(name: str) -> str:
    """What files call `name`."""
    return FIELDS.get(name, name.upper())


def to_file(cut: Any) -> dict[str, int]:
    """A configuration by the names of files."""
    return {field(part.name): getattr(cut, part.name) for part in dataclasses.fields(cut)}


def from_file(rule: C, entry: Mapping[str, Any], where: str) -> C:
    """The configuration of an entry; what it leaves out has the default of its class, or else is as in `rule`.

    What the kernel has no name for is left out, with a warning at the first time.

    Raises:
        TableError: a value is no whole number above zero.
    """
    parts = dataclasses.fields(rule)  # type: ignore[arg-type]
    known = {field(part.name): part.name for part in parts}
    if foreign := sorted(set(entry) - set(known)):
        warn_once(f"{where}: not known to this kernel, and left out: {', '.join(foreign)}")
    given = {known[name]: value for name, value in entry.items() if name in known}
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise TableError(f"{field(name)} is {value!r}", where, "Pass a whole number above zero")
    defaults = {part.name: part.default for part in parts if part.default is not dataclasses.MISSING}
    return dataclasses.replace(rule, **{**defaults, **given})  # type: ignore[type-var]


def no_power_of_two(cut: Any, *names: str) -> str | None:
    """Why Triton cannot take these fields of `cut` as sizes, or None."""
    for name in names:
        value = getattr(cut, name)
        if value < 1 or value & (value - 1):
            return f"{field(name)}: {value} is no power of two"
    return None


def warn_once(text: str) -> None:
    """Warn with a `TableWarning`, the first time in this process."""
    if text not in _told:
        _told.add(text)
        warnings.warn(text, TableWarning, stacklevel=2)
