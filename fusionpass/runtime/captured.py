"""A program captured at one key: what its graphs read and where, and a call of it."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device import Device
from .memory import Layout, address, is_plain, overlap, parts
from .observe import Recipe
from .plan import Plan, Unit, same
from .results import Owner, hand_out


class UncapturableError(Exception):
    """Why a program cannot be captured."""


@dataclass
class _Frame:
    """The memory of a captured program, or of the first rows of it.

    Attributes:
        targets: where the inputs in `Recipe.copied` are copied to, in their order.
        tails: what follows the rows there.
        values: what units write, and constants; by slot.
        buffers: where what units without a graph return is copied to, and what follows the rows there; by slot.
    """

    targets: list[Tensor]
    tails: list[Tensor]
    values: list[Any]
    buffers: dict[int, tuple[Tensor, list[Tensor]]]


class Captured:
    """A program's graphs at one key.

    Nothing is computed while they are captured. What a graph writes is kept until nobody reads it, and no longer, so
    that graphs share memory; afterwards there are aliases alone.

    Args:
        plan: of the program.
        device: where.
        pool: the memory that the graphs share with others.
        args: the arguments; those in `recipe.copied` are not looked at.
        recipe: what else is known.

    Attributes:
        exact: why it cannot run with fewer rows; empty if it can.
        broken: why the last call had to be finished without graphs; empty if it had not.

    Raises:
        UncapturableError: a value cannot be told apart, copied or kept.
        Exception: whatever a step raises.
    """

    def __init__(self, plan: Plan, device: Device, pool: Any, args: Sequence[Any], recipe: Recipe) -> None:
        if recipe.shared:
            raise UncapturableError(recipe.shared)
        self.recipe = recipe
        self.exact = self.broken = ""
        self._plan, self._device = plan, device
        self._count = len(args)
        self._copied = tuple(recipe.copied)
        sizes = plan.slots("size")
        self._rows = args[sizes[0]] if len(sizes) == 1 else None
        self._look(args)
        values = plan.values(args)
        self._base = _Frame([], [], [None] * len(values), {})
        for slot, constant in plan.constants.items():
            self._base.values[slot] = constant
        for slot, layout in recipe.copied.items():
            values[slot] = device.empty(layout, pool)
            self._base.targets.append(device.alias(values[slot]))
        self._owners: dict[int, Owner] = {
            slot: (slot, values[slot].data_ptr()) for slot in plan.reads if is_plain(values[slot])
        }
        self._viewed: set[int] = set()
        self._stages: list[tuple[Any, Unit, tuple[int, ...]]] = []
        for unit in plan.units:
            handle = None
            if unit.eager:
                self._stand_in(unit, values, pool)
            else:
                handle = self._capture(unit, values, pool)
            for slot in unit.dead:
                values[slot] = None
            ours = tuple(slot for slot in unit.dead if self._base.values[slot] is None)
            self._stages.append((handle, unit, ours))
        written = [value for slot, value in enumerate(self._base.values) if self._owners.get(slot) is True]
        self._pool = frozenset(map(address, [*written, *self._base.targets])) - {0}
        self._frames: dict[int | None, _Frame] = {None: self._base}

    def _look(self, args: Sequence[Any]) -> None:
        """Remember where the inputs are that graphs read in place."""
        tensors = [s for s in self._plan.reads if isinstance(args[s], Tensor) and s not in self.recipe.copied]
        self._in_place = plain = tuple(slot for slot in tensors if is_plain(args[slot]))
        self._pick = _picker(plain)
        self._pointers = tuple(map(Tensor.data_ptr, self._pick(args)))
        self._storages: dict[int, list[int]] = {}
        for slot in plain:
            self._storages.setdefault(address(args[slot]), []).append(slot)
        inputs = self._plan.program.inputs
        self._layouts = [(s, args[s].shape, args[s].stride()) for s in plain if inputs[s].kind != "weight"]
        self._weights = {s: Layout.of(args[s]) for s in plain if inputs[s].kind == "weight"}
        self._wrapped = [(slot, parts(args[slot])) for slot in tensors if slot not in plain]

    def _capture(self, unit: Unit, values: list[Any], pool: Any) -> Any:
        """Capture a unit; its outputs come to `values`, aliases of them to the frame."""
        handle, outputs = self._device.capture(unit.call, [values[slot] for slot in unit.reads], pool)
        read = {address(values[s]): self._owners.get(s, True) for s in unit.reads if is_plain(values[s])}
        read[0] = True
        for slot, value in zip(unit.writes, outputs, strict=True):
            values[slot] = value
            if not isinstance(value, Tensor):
                self._base.values[slot] = _constant(unit, value)
                self.exact = self.exact if value is None else f"{unit.name} returns {value}"
                continue
            if not is_plain(value) or value.is_conj() or value.is_neg():
                raise UncapturableError(f"{unit.name} returns a {type(value).__name__} that is more than its memory")
            if value.device != self._device.device:
                raise UncapturableError(f"{unit.name} returns a tensor on {value.device}, whose values would be frozen")
            self._base.values[slot] = self._device.alias(value)
            owner = self._owners[slot] = read.get(address(value), True)
            if isinstance(owner, tuple) and slot in self._plan.program.results:
                self._viewed.add(owner[0])
                if owner[0] in self._plan.rows:
                    self.exact = f"a result is memory of {self._plan.program.inputs[owner[0]].name}"
        return handle

    def _stand_in(self, unit: Unit, values: list[Any], pool: Any) -> None:
        """Put memory where later graphs will read what a unit without one returns."""
        for slot in self._plan.needs.intersection(unit.writes):
            seen = self.recipe.seen[slot]
            if not isinstance(seen, tuple):
                values[slot] = _constant(unit, seen)
                continue
            layout, where = seen
            if where != self._device.device:
                raise UncapturableError(f"{unit.name} returns a tensor on {where}, which a graph reads")
            values[slot] = self._device.empty(layout, pool)
            alias = self._base.values[slot] = self._device.alias(values[slot])
            self._base.buffers[slot] = alias, []
            self._owners[slot] = True

    def moved(self, args: Sequence[Any]) -> list[int]:
        """The inputs that are not where the graphs read them, or lie otherwise."""
        found: list[int] = []
        if tuple(map(Tensor.data_ptr, self._pick(args))) != self._pointers:
            pairs = zip(self._in_place, self._pointers, strict=True)
            found = [slot for slot, pointer in pairs if args[slot].data_ptr() != pointer]
        for slot, shape, stride in self._layouts:
            if (args[slot].shape != shape or args[slot].stride() != stride) and slot not in found:
                found.append(slot)
        for slot, pointers in self._wrapped:
            if parts(args[slot]) != pointers:
                found.append(slot)
        return found

    def changed(self, args: Sequence[Any], moved: Sequence[int]) -> list[int]:
        """The weights among those that moved which are not what the code was compiled for."""
        return [slot for slot in moved if slot in self._weights and Layout.of(args[slot]) != self._weights[slot]]

    def refusal(self, args: Sequence[Any], rows: int | None) -> str:
        """Why arguments of which none has moved cannot be run all the same, at `rows` rows; empty if they can."""
        if rows is not None and (reason := self.exact or self._narrow(rows)):
            return reason
        given = [args[slot] for slot in self._copied]
        for slot, tensor, target in zip(self._copied, given, self._frames[rows].targets, strict=True):
            same_view = slot not in self._viewed or tensor.stride() == target.stride()
            if tensor.shape != target.shape or tensor.dtype != target.dtype or not same_view:
                return f"{self._plan.program.inputs[slot].name} is not what it was when it was captured"
        storages = set(map(address, given)) - {0}
        if len(storages) < len(given) or not storages.isdisjoint(self._storages):
            near = [slot for storage in storages for slot in self._storages.get(storage, ())]
            if pair := overlap(args, [*self._copied, *near], self._copied):
                return self._plan.overlapping(*pair)
        return ""

    def _narrow(self, rows: int) -> str:
        """Make the frame of the first `rows` rows, or say why there is none."""
        if rows in self._frames:
            return ""
        plan, base = self._plan, self._base
        frame = _Frame([], [], base.values.copy(), dict(base.buffers))
        for slot, target in zip(self._copied, base.targets, strict=True):
            dim = plan.rows.get(slot)
            frame.targets.append(target if dim is None else target.narrow(dim, 0, rows))
            frame.tails += [] if dim is None else _tail(target, dim, rows)
        for slot, value in enumerate(base.values):
            dim = plan.dims.get(slot)
            if isinstance(value, Tensor) and dim is not None:
                if value.shape[dim] != self._rows:
                    return f"dimension {dim} of {list(value.shape)} does not count the rows, which are {self._rows}"
                frame.values[slot] = value.narrow(dim, 0, rows)
        self._frames[rows] = frame
        return ""

    def run(self, args: Sequence[Any], rows: int | None) -> list[Any]:
        """The results for arguments that have neither moved nor been refused.

        Args:
            args: of the call.
            rows: how many there are; None: as many as were captured.
        """
        frame = self._frames[rows]
        self.broken = ""
        if frame.targets:
            torch._foreach_copy_(frame.targets, [args[slot] for slot in self._copied])
        for tail in frame.tails:
            tail.zero_()
        values, count = frame.values, self._count
        if len(self._stages) > 1:
            values = values.copy()
            values[:count] = args
        for handle, unit, ours in self._stages:
            if handle is not None and not self.broken:
                self._device.replay(handle)
            else:
                outputs = unit.call(*[values[slot] for slot in unit.reads])
                for slot, value in zip(unit.writes, outputs, strict=True):
                    values[slot] = value
                del outputs
                self.broken = self.broken or self._keep(unit, values, frame, rows)
            for slot in ours:
                values[slot] = None
        results = [args[slot] if slot < count else values[slot] for slot in self._plan.program.results]
        owners = [self._owner(slot, values[slot], frame) for slot in self._plan.program.results]
        first = [rows is not None and values[s] is not self._base.values[s] for s in self._plan.program.results]
        return hand_out(results, owners, args, first)

    def _owner(self, slot: int, value: Any, frame: _Frame) -> Owner:
        """Whose memory a result lies in, unless it is the caller's already."""
        if slot < self._count:
            return False
        if value is frame.values[slot]:
            return self._owners.get(slot, False)
        return is_plain(value) and address(value) in self._pool

    def _keep(self, unit: Unit, values: list[Any], frame: _Frame, rows: int | None) -> str:
        """Copy what a unit without a graph returned to where graphs read it, or say why that cannot be."""
        for slot in unit.writes:
            if slot not in self._plan.needs:
                continue
            value = values[slot]
            if slot not in frame.buffers:
                if not same(value, self.recipe.seen[slot]):
                    return f"{unit.name} returned {value}, not {self.recipe.seen[slot]}"
                continue
            target, tail = frame.buffers[slot]
            if not is_plain(value) or (value.dtype, value.device) != (target.dtype, target.device):
                return f"{unit.name} returned another type of value"
            if value.shape != target.shape:
                buffer = self._base.buffers[slot][0]
                dims = [i for i, size in enumerate(buffer.shape) if value.shape[i : i + 1] != (size,)]
                sizes = [(value.shape[i], buffer.shape[i]) for i in dims if i < value.dim()]
                if rows is None or value.dim() != buffer.dim() or sizes != [(rows, self._rows)]:
                    return f"{unit.name} returned a tensor of another shape"
                target, tail = buffer.narrow(dims[0], 0, rows), _tail(buffer, dims[0], rows)
                frame.buffers[slot] = target, tail
            # From here on there is one such tensor, whoever writes to it.
            values[slot] = target.copy_(value)
            for rest in tail:
                rest.zero_()
        return ""


def _picker(slots: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes some arguments out of all; `slots` ascend."""
    if not slots:
        return lambda args: ()
    side_by_side = slots[-1] - slots[0] == len(slots) - 1
    return operator.itemgetter(slice(slots[0], slots[-1] + 1)) if side_by_side else operator.itemgetter(*slots)


def _tail(buffer: Tensor, dim: int, rows: int) -> list[Tensor]:
    """What follows the rows, if it could be an index: one that is out of range would be an error, in any row."""
    if buffer.is_floating_point() or buffer.is_complex():
        return []
    return [buffer.narrow(dim, rows, buffer.shape[dim] - rows)]


def _constant(unit: Unit, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UncapturableError(f"{unit.name} returns a {type(value).__name__}, which may change")
