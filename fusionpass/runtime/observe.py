"""What is learned of a program by running it without graphs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .memory import Layout, address, is_plain
from .plan import Plan


@dataclass(frozen=True)
class Recipe:
    """What a capture must know beside the arguments.

    Attributes:
        copied: the inputs that are copied into buffers, and how those lie.
        seen: what units without a graph returned, by slot: the layout and device of a tensor, or the value.
        shared: why what they returned cannot be copied.
    """

    copied: dict[int, Layout]
    seen: dict[int, Any] = field(default_factory=dict)
    shared: str = ""


def observe(plan: Plan, args: Sequence[Any]) -> tuple[list[Any], Recipe]:
    """Run a program without graphs: its results, and what a capture must know of the units that never have one."""
    if plan.mode == "full":
        return plan.program.run(*args), Recipe({})
    values = plan.values(args)
    seen: dict[int, Any] = {}
    shared = ""
    for unit in plan.units:
        results = unit.call(*[values[slot] for slot in unit.reads])
        if unit.eager:
            for slot, value in zip(unit.writes, results, strict=True):
                seen[slot] = (Layout.of(value), value.device) if is_plain(value) else value
            taken = {address(value) for value in values if is_plain(value)}
            returned = [address(value) for value in results if is_plain(value) and value.numel()]
            if len(taken.union(returned)) < len(taken) + len(returned):
                # A copy would tear apart what is one tensor.
                shared = shared or f"{unit.name} returns memory that another value has"
        for slot, value in zip(unit.writes, results, strict=True):
            values[slot] = value
        del results
        for slot in unit.dead:
            values[slot] = None
    return [values[slot] for slot in plan.program.results], Recipe({}, seen, shared)
