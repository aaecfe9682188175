"""Small programs, written by the names of their values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusionpass.runtime.program import Input, Program, Step

GPU = "cuda:0"


def tensor(name: str, *shape: int | str, **how: Any) -> Input:
    return Input(**{"kind": "tensor", "name": name, "shape": shape, "device": GPU, **how})


def weight(name: str, *shape: int, **how: Any) -> Input:
    return tensor(name, *shape, kind="weight", **how)


def size(symbol: str) -> Input:
    return Input("size", symbol, symbol=symbol)


def other(name: str) -> Input:
    return Input("other", name)


@dataclass
class S:
    """A step: its name, function, and the names of what it reads and writes."""

    name: str
    call: Callable[..., Sequence[Any]]
    reads: str = ""
    writes: str = ""
    uncapturable: str = ""
    rows: dict[str, Any] = field(default_factory=dict)
    constant: bool = False


def program(inputs: Sequence[Input], steps: Sequence[S], results: str) -> Program:
    slots = {given.name: slot for slot, given in enumerate(inputs)}
    made = []
    for s in steps:
        reads = tuple(slots[name] for name in s.reads.split())
        for name in s.writes.split():
            slots[name] = len(slots)
        writes = tuple(slots[name] for name in s.writes.split())
        made.append(Step(s.name, s.call, reads, writes, (), s.uncapturable, s.rows, s.constant))
    last = {slot: i for i, step in enumerate(made) for slot in (*step.outputs, *step.inputs)}
    returned = tuple(slots[name] for name in results.split())
    made = [
        replace(step, dead=tuple(sorted(slot for slot, at in last.items() if at == i and slot not in returned)))
        for i, step in enumerate(made)
    ]
    return Program(tuple(inputs), tuple(made), returned, len(slots))
