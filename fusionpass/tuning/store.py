"""The one place where kernels ask how they are best cut: tuned tables, of the user and of the package.

Files are read when a launch is planned, never at import and never while Dynamo traces: to Dynamo an op is one call.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from ..arch import Arch
from ..config import config_dir
from ..errors import TuningError
from .files import Entry, Name, measured, read
from .names import from_file, warn_once

C = TypeVar("C")

STAND_IN = {"sm_90": "NVIDIA_H100_80GB_HBM3"}
"""The device whose tables serve a target where its own device has none, or is not here; see `stand_in`."""


@dataclass(frozen=True)
class Found:
    """What a look-up found.

    Attributes:
        m: the number of rows that was measured.
        entry: read-only; see `files`.
        table: what the entry is of.
        path: where it is.
    """

    m: int
    entry: Entry
    table: Name
    path: Any


def choose(
    rule: C,
    op: str,
    key: Mapping[str, object],
    arch: Arch,
    m: int | None,
    *,
    near: str = "",
    reach: float = math.inf,
    refuse: Callable[[C], str | None] | None = None,
) -> C | str:
    """How a kernel is cut: as a table has it, or by `rule`.

    Args:
        rule: the kernel's own choice, a dataclass of ints.
        op: the name of the tables.
        key: what the table is for, beside the number of rows; None and False count as left out.
        arch: the target.
        m: the number of rows; None where it is symbolic: the rule has to be good for any.
        near: see `find`.
        reach: see `find`.
        refuse: why the kernel cannot be cut so; what a table says and the kernel cannot do is left, with a warning.

    Returns:
        The configuration; or why the kernel should not run at all, as something else was measured to be faster.

    Raises:
        TableError: a table for this key cannot be read.
    """
    imposed = _imposed.get()
    if imposed is not None:
        return imposed.answer(rule, Name.of(op, key, "").key, op, refuse)
    found = find(op, key, arch, m, near=near, reach=reach) if m else None
    if found is None or found.entry == {}:
        return rule
    if found.entry is None:
        # What else is faster was measured on that device; elsewhere nothing is known of it.
        return _slower(found) if device_here() in (None, found.table.device) else rule
    cut = from_file(rule, found.entry, str(found.path))
    if refuse is not None and (reason := refuse(cut)):
        warn_once(f"{found.path}: the entry of {found.m} is left out: {reason}")
        return rule
    return cut


def find(
    op: str,
    key: Mapping[str, object],
    arch: Arch,
    m: int,
    *,
    near: str = "",
    reach: float = math.inf,
    folder: Path | None = None,
) -> Found | None:
    """The entry for `m` rows, of the nearest number that was measured: of two as near the larger, whose tile holds `m`.

    A table of the user's stands in the place of one of the package's for the same key. Those of this device come first,
    then those of the device that stands in for the target.

    Args:
        op: the name of the tables.
        key: as in `choose`.
        arch: the target.
        m: the number of rows.
        near: a field, of numbers, in which a table may differ, if the next power of two above is the same: the nearest
            such table, of two the smaller.
        reach: an entry does not stand for numbers of rows that differ from its own by more than this factor.
        folder: the user's tables, where they are not those that the environment names.
    """
    for device in _devices(arch):
        name = Name.of(op, key, device)
        shipped, own = _index(_shipped()), _index(folder or config_dir())
        tables = {**shipped.get((op, device), {}), **own.get((op, device), {})}
        chosen = _nearest(tables, name.key, near)
        if chosen is None:
            continue
        entries = _entries(tables[chosen][1])
        close = [n for n in entries if n <= m * reach and m <= n * reach]
        if close:
            n = min(close, key=lambda n: (abs(n - m), -n))
            return Found(n, entries[n], *tables[chosen])
        return None
    return None


def digest() -> str:
    """A hash of the user's tables: what was compiled with others is compiled again."""
    return _digest(config_dir())


def forget() -> None:
    """Read all tables again at the next look-up."""
    for kept in (_index, _entries, _digest):
        kept.cache_clear()


@dataclass
class Imposed:
    """What plans are told to do while a kernel is tuned.

    Attributes:
        op: the tables that are asked for.
        key: likewise.
        cut: the answer; None: the rule.
        rule: what the plan would have chosen, once it asked.
        others: entries of other tables, by their keys, which the plan is to follow meanwhile.
    """

    op: str
    key: frozenset[tuple[str, str]]
    cut: Any
    rule: Any = field(default=None)
    others: Mapping[frozenset[tuple[str, str]], Mapping[str, Any]] = field(default_factory=dict)

    def answer(self, rule: C, key: frozenset[tuple[str, str]], op: str, refuse: Any) -> C | str:
        """What `choose` returns: a kernel that asks for another table has its own rule, but for `others`."""
        if (op, key) != (self.op, self.key):
            return from_file(rule, self.others[key], op) if op == self.op and key in self.others else rule
        self.rule = rule
        if self.cut is None:
            return rule
        if refuse is not None and (reason := refuse(self.cut)):
            return str(reason)
        made: C = self.cut
        return made


_imposed: ContextVar[Imposed | None] = ContextVar("imposed", default=None)


@contextmanager
def imposing(
    op: str, key: Mapping[str, object], cut: Any, others: Iterable[tuple[Mapping[str, object], Mapping[str, Any]]] = ()
) -> Iterator[Imposed]:
    """Plans take `cut` where they ask for this table, and their own rule elsewhere; None: everywhere.

    `others`: keys of tables by the same name, and the entries that plans take of them.

    Raises:
        TuningError: no plan asked for it: then its table would never be read.
    """
    given = Imposed(op, Name.of(op, key, "").key, cut, others={Name.of(op, k, "").key: entry for k, entry in others})
    token = _imposed.set(given)
    try:
        yield given
    finally:
        _imposed.reset(token)
    if given.rule is None:
        asked = ", ".join(f"{name}={value}" for name, value in sorted(given.key))
        raise TuningError(f"no plan asks for {asked}", op, "Compare the key with that of the plan's choose()")


def stand_in(arch: Arch, here: str | None, multiprocessors: int | None) -> tuple[str | None, str]:
    """The device whose tables serve `arch` where its own device has none, or None; and why.

    A configuration is as good on another device as both are alike in what it depends on: what a program may have of a
    multiprocessor, which the target says, and how many of these there are, which decides how a product is split and how
    many programs are worth having. An H200 differs from an H100 by its memory alone. How fast other libraries are is
    not among that: see `choose` for entries that are null.

    Args:
        arch: the target.
        here: the device of that target in this process, as tables have it; None: there is none.
        multiprocessors: of that device.
    """
    device = STAND_IN.get(arch.name)
    if device is None:
        return None, f"there are no tables of another device for {arch.name}"
    if here is None:
        return device, f"no device of {arch.name} is here: {device} stands for the target"
    if here == device:
        return None, f"{here} has tables of its own"
    if multiprocessors != arch.multiprocessors:
        return None, f"{here} has {multiprocessors} multiprocessors, {device} {arch.multiprocessors}"
    return device, f"{here} has {multiprocessors} multiprocessors of the same kind, as {device}"


def device_here() -> str | None:
    """The name of the current device, as tables have it; None where this process uses none."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return _device_name(torch.cuda.current_device())


def _multiprocessors_here() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index).replace(" ", "_")


def _devices(arch: Arch) -> Iterator[str]:
    here = device_here()
    if here is not None and Arch.of(torch.device("cuda")) != arch:
        here = None
    if here is not None:
        yield here
    other = stand_in(arch, here, None if here is None else _multiprocessors_here())[0]
    if other is not None:
        yield other


def _shipped() -> Any:
    return files(__package__) / "configs"


_Tables = dict[frozenset[tuple[str, str]], tuple[Name, Any]]


@functools.cache
def _index(folder: Any) -> dict[tuple[str, str], _Tables]:
    """Every table of a folder by op and device, then by key, with where it is. None is opened."""
    found: dict[tuple[str, str], _Tables] = {}
    for path in _children(folder):
        for inner, file in [("", path)] if path.is_file() else [(path.name, file) for file in _children(path)]:
            name = Name.parse(inner, file.name)
            if name is not None:
                found.setdefault((name.op, name.device), {})[name.key] = name, file
    return found


@functools.cache
def _digest(folder: Path | None) -> str:
    made = hashlib.sha256()
    for tables in _index(folder).values():
        for name, path in tables.values():
            made.update(f"{name}\n".encode() + path.read_bytes())
    return made.hexdigest()


def _children(folder: Traversable | None) -> list[Traversable]:
    return sorted(folder.iterdir(), key=lambda path: path.name) if folder is not None and folder.is_dir() else []


@functools.cache
def _entries(path: Any) -> Mapping[int, Entry]:
    entries, others = read(path)
    if others:
        warn_once(f"{path}: keys that are no numbers of rows are left out: {', '.join(sorted(others))}")
    return MappingProxyType({m: None if e is None else MappingProxyType(e) for m, e in entries.items()})


def _nearest(tables: _Tables, key: frozenset[tuple[str, str]], near: str) -> frozenset[tuple[str, str]] | None:
    if key in tables or not near:
        return key if key in tables else None
    wanted = int(dict(key)[near])
    rest = frozenset(part for part in key if part[0] != near)
    sizes = {}
    for other in tables:
        size = dict(other).get(near, "")
        alike = size.isdecimal() and (int(size) - 1).bit_length() == (wanted - 1).bit_length()
        if alike and other - {(near, size)} == rest:
            sizes[int(size)] = other
    return sizes[min(sizes, key=lambda size: (abs(size - wanted), size))] if sizes else None


def _slower(found: Found) -> str:
    """Why an entry that is null says no, with the figures where its metadata have them."""
    record = measured(found.path).get(found.m, {}) if isinstance(found.path, Path) else {}
    beside = {str(name): us for name, us in record.get("beside_us", {}).items()}
    where = f"at {found.m} rows, {','.join(f'{k}={v}' for k, v in found.table.fields)}, on {found.table.device}"
    if not beside:
        return f"something else was measured faster {where}"
    best = min(beside, key=lambda name: beside[name])
    return f"{best}: measured faster ({beside[best]:.2f} against {record['us']:.2f} µs {where})"
