"""What of a program is captured, and what is known of its rows: all that can be said before it runs."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
from torch import Tensor

from .memory import Layout, is_plain
from .program import Input, Program, Step


@dataclass(frozen=True)
class Unit:
    """What is captured as one graph, or runs without one.

    Attributes:
        name: for reports.
        call: takes the values of `reads`, returns those of `writes`.
        dead: the slots that nobody reads afterwards.
        eager: why it runs without a graph; empty if it is captured.
    """

    name: str
    call: Callable[..., Sequence[Any]]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    dead: tuple[int, ...] = ()
    eager: str = ""


@dataclass(frozen=True)
class Plan:
    """How a program runs.

    Attributes:
        mode: "full": one unit; "piecewise": a unit for each step; "off": nothing is captured.
        why: why not another mode.
        device: of its tensors: "cuda:0".
        constants: the values of steps that always return the same, by slot.
        rows: for each input that has rows, the dimension that counts them.
        dims: the same for what steps write, where it is proven; None: no dimension does.
        padding: why it cannot run at a size larger than it was called at; empty if it can.
    """

    program: Program
    mode: str
    why: str
    device: str
    units: tuple[Unit, ...]
    constants: dict[int, Any]
    rows: dict[int, int]
    dims: dict[int, int | None]
    padding: str

    @functools.cached_property
    def needs(self) -> frozenset[int]:
        """The slots that captured units read."""
        return frozenset(slot for unit in self.units if not unit.eager for slot in unit.reads)

    @functools.cached_property
    def reads(self) -> tuple[int, ...]:
        """The inputs that captured units read."""
        return tuple(i for i in range(len(self.program.inputs)) if i in self.needs)

    def slots(self, kind: str) -> tuple[int, ...]:
        """The inputs of a kind."""
        return tuple(i for i, declared in enumerate(self.program.inputs) if declared.kind == kind)

    def values(self, args: Sequence[Any]) -> list[Any]:
        """A table of values at the start of a run."""
        values = [*args, *[None] * (self.program.slots - len(args))]
        for slot, constant in self.constants.items():
            values[slot] = constant
        return values

    def overlapping(self, one: int, another: int) -> str:
        """That two inputs overlap, as a reason."""
        names = [self.program.inputs[slot].name for slot in (one, another)]
        return f"{names[0]} and {names[1]} overlap, and one of them would be copied"

    def layouts(self, args: Sequence[Any], rows: int) -> dict[int, Layout] | str:
        """How the inputs whose shape has the size would lie if it were `rows`, or why that cannot be said."""
        (size,) = self.slots("size")
        symbol, found = self.program.inputs[size].symbol, {}
        for slot, declared in enumerate(self.program.inputs):
            if not any(symbol in _symbols(part) for part in declared.shape):
                continue
            if declared.mutated:
                return f"{declared.name}, which the program writes to, grows with {symbol}"
            now = _evaluated(declared.shape, symbol, args[size])
            shape = _evaluated(declared.shape, symbol, rows)
            if shape is None or now != tuple(args[slot].shape):
                return f"{declared.name} is not {declared.shape}"
            stride = _stride(args[slot], shape) if is_plain(args[slot]) else None
            if stride is None:
                return f"the strides of {declared.name} at other sizes are not known"
            found[slot] = Layout(shape, stride, args[slot].dtype)
        return found


def plan(program: Program, mode: str) -> Plan:
    """The plan of a program.

    Args:
        program: any.
        mode: "full", "piecewise", "auto" (full, if every step can be captured) or "off".
    """
    devices = {declared.device for declared in program.inputs if declared.device}
    accelerators = sorted(d for d in devices if not d.startswith("cpu"))
    if mode == "off" or len(accelerators) != 1:
        why = "" if mode == "off" else f"its tensors are on {', '.join(sorted(devices)) or 'no device'}"
        return Plan(program, "off", why, "", (), {}, {}, {}, "")
    eager = {step.name: reason for step in program.steps if (reason := _eager(program, step))}
    why = "" if mode == "piecewise" else "; ".join(f"{name}: {reason}" for name, reason in list(eager.items())[:1])
    full = mode != "piecewise" and not eager
    units = _whole(program) if full else _pieces(program)
    if all(unit.eager for unit in units):
        return Plan(program, "off", why or "no step can be captured", "", (), {}, {}, {}, "")
    constants: dict[int, Any] = {}
    if not full:
        for step in program.steps:
            constants |= dict(zip(step.outputs, step.call(), strict=True)) if step.constant else {}
    rows, dims, padding = _rows(program)
    chosen = "full" if full else "piecewise"
    return Plan(program, chosen, why, accelerators[0], units, constants, rows, dims, padding)


def _eager(program: Program, step: Step) -> str:
    """Why a step runs without a graph."""
    given = [program.inputs[slot] for slot in step.inputs if slot < len(program.inputs)]
    on_cpu = [declared.name for declared in given if declared.device.startswith("cpu")]
    return step.uncapturable or (f"it reads {on_cpu[0]}, which is on the CPU" if on_cpu else "")


def _pieces(program: Program) -> tuple[Unit, ...]:
    return tuple(
        Unit(step.name, step.call, step.inputs, step.outputs, step.dead, _eager(program, step))
        for step in program.steps
        if not step.constant
    )


def _whole(program: Program) -> tuple[Unit, ...]:
    """All steps as one unit, which reads the inputs that any step reads."""
    count = len(program.inputs)
    reads = tuple(sorted({slot for step in program.steps for slot in step.inputs if slot < count}))
    writes = tuple(dict.fromkeys(slot for slot in program.results if slot >= count))
    inner = replace(program, results=writes)

    def call(*values: Any) -> list[Any]:
        args: list[Any] = [None] * count
        for slot, value in zip(reads, values, strict=True):
            args[slot] = value
        return inner.run(*args)

    return (Unit("all steps", call, reads, writes),) if writes or reads else ()


def _rows(program: Program) -> tuple[dict[int, int], dict[int, int | None], str]:
    """Where inputs and outputs have rows, and why rows of padding may not follow them."""
    sizes = [declared for declared in program.inputs if declared.kind == "size"]
    if len(sizes) != 1:
        return {}, {}, f"it has {len(sizes)} sizes, not 1"
    symbol = sizes[0].symbol
    rows: dict[int, int] = {}
    dims: dict[int, int | None] = {}
    reason = ""
    for slot, declared in enumerate(program.inputs):
        found = [i for i, part in enumerate(declared.shape) if symbol in _symbols(part)]
        if len(found) > 1 or (found and declared.shape[found[0]] != symbol):
            reason = reason or f"{declared.name} is {_text(declared)}"
        elif found:
            rows[slot] = found[0]
    for step in program.steps:
        if _eager(program, step):
            continue
        none = (None,) * len(step.outputs)
        proven = step.rows.get(symbol, f"its rows of {symbol} were not looked at") if step.inputs else none
        if isinstance(proven, str):
            reason = reason or f"{step.name}: {proven}"
        else:
            dims |= dict(zip(step.outputs, proven, strict=True))
    return rows, dims, reason


def _text(declared: Input) -> str:
    return f"[{', '.join(map(str, declared.shape))}]"


def _symbols(part: int | str) -> set[str]:
    return set() if isinstance(part, int) else {str(symbol) for symbol in sympy.sympify(part).free_symbols}


def _evaluated(shape: Sequence[int | str], symbol: str, value: int) -> tuple[int, ...] | None:
    """A shape with a number for its symbol."""
    try:
        return tuple(p if isinstance(p, int) else int(sympy.sympify(p).subs(symbol, value)) for p in shape)
    except (TypeError, ValueError):
        return None


def _stride(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a tensor like this one if its shape were another: None where they are not known."""
    if tensor.is_contiguous():
        return _dense(shape, range(len(shape)))
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda i: (-strides[i], i))
    if _dense(tensor.shape, order) == strides:
        return _dense(shape, order)
    outermost = all(a == b or i == order[0] for i, (a, b) in enumerate(zip(shape, tensor.shape, strict=True)))
    return strides if outermost else None


def _dense(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps, the dimensions from the outermost to the innermost in `order`."""
    strides, step = [0] * len(shape), 1
    for i in reversed(order):
        strides[i] = step
        step *= max(shape[i], 1)
    return tuple(strides)


def same(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors are the same, to the sign of a zero and the type."""
    return type(a) is type(b) and (a.hex() == b.hex() if isinstance(a, float) else bool(a == b))
