"""A compiled graph as data: which callables read and write which values, and what may be captured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node


@dataclass(frozen=True)
class Input:
    """An input of a program.

    Attributes:
        kind: "weight": a parameter or buffer, whose address should not change; "tensor": any other tensor; "size": an
            int on which shapes depend; "other": anything else, which Dynamo guards on.
        name: for reports.
        shape: of a tensor: ints, and expressions of symbols as text ("s0").
        symbol: of a size: its name in `shape`.
        mutated: whether the program writes to it.
        device: of a tensor: "cuda:0".
    """

    kind: str
    name: str
    shape: tuple[int | str, ...] = ()
    symbol: str = ""
    mutated: bool = False
    device: str = ""


@dataclass(frozen=True)
class Step:
    """One callable of a program.

    Attributes:
        name: for reports.
        call: takes the values of `inputs` in order, returns those of `outputs` in a sequence.
        inputs: the slots that it reads.
        outputs: the slots that it writes.
        dead: the slots that nobody reads afterwards.
        uncapturable: why it cannot be in a CUDA graph; empty if it can.
        rows: for each symbol, the dimension of each output that counts it (None: it does not depend on the rows); or
            the reason why a row of an output depends on other rows. A symbol that is missing was not looked at.
        constant: it reads nothing and returns the same objects at each call.
        key: what its code is kept under on disk; None where it is not.
    """

    name: str
    call: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...] = ()
    uncapturable: str = ""
    rows: dict[str, tuple[int | None, ...] | str] = field(default_factory=dict)
    constant: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Program:
    """Steps in order over a table of values; the first slots are the inputs.

    Attributes:
        inputs: one per argument.
        steps: in order.
        results: what it returns: slots.
        slots: how many values there are.
        holds: whether what was assumed of the sizes holds for these, one for each input of that kind.
    """

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    slots: int
    holds: Callable[..., bool] = lambda *sizes: True

    def run(self, *args: Any) -> list[Any]:
        """Run all steps, with no CUDA graph. A value is let go as soon as nobody reads it."""
        values: list[Any] = [*args, *[None] * (self.slots - len(args))]
        del args
        for step in self.steps:
            results = step.call(*(values[slot] for slot in step.inputs))
            for slot, value in zip(step.outputs, results, strict=True):
                values[slot] = value
            del results
            for slot in step.dead:
                values[slot] = None
        return [values[slot] for slot in self.results]


def is_weight(node: Node) -> bool:
    """Whether an input of one of Dynamo's graphs is a parameter or a buffer, or marked as one that stays in place."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return True
    return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))
