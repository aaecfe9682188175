"""Times of a report's fused ops, measured here, each beside the operators that it stands for."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch.fx.experimental.proxy_tensor import make_fx

from .layers import Row, layers
from .nodes import NodeRecord
from .records import Time
from .replay import Input, on_this_device, random_inputs
from .show import parsed_type

if TYPE_CHECKING:
    from .trace import Report

CALLS = 50
"""Of each on a CPU, behind three that are not counted; on a GPU `tuning.timing` says how many."""


def measure(report: "Report", device: torch.device | str | None = None, progress: bool | None = None) -> None:
    """Time each fused op of each distinct layer, and note it in `report.times`.

    Both sides run on one set of buffers, which stays in a GPU's L2 where it fits; on a GPU as a CUDA graph of many
    calls, so that the host does not count, on a CPU call by call, with what a call costs. The figure is the median.

    Args:
        report: of `explain` for this machine's device, or of a compiled model that has run.
        device: "cuda" or "cpu"; None: a GPU where there is one.
        progress: show a bar; None: where stderr is a terminal.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    values = [{node.name: node for node in (*graph.before, *graph.after)} for graph in report.graphs]
    todo = [(layer.graph, row) for layer in layers(report) for row in layer.rows if row.kind == "fused"]
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    for graph, row in track(todo, "measuring", console=console, disable=not shown, transient=True):
        key = (graph, row.name)
        if key in report.times:
            continue
        try:
            us, replaced = _both(row, report.graphs[graph].before, values[graph], where)
            report.times[key] = Time(us, replaced, name)
        except Exception as error:  # an op that random inputs do not suit, or that the device has no memory for
            said = str(error).strip().splitlines()
            report.times[key] = Time(None, None, name, f"{type(error).__name__}: {said[0] if said else ''}")


def _both(
    row: Row, graph: Sequence[NodeRecord], values: Mapping[str, NodeRecord], device: torch.device
) -> tuple[float, float]:
    """Microseconds of the op, and of what it replaced."""
    from ..compile import compile as with_passes

    own = {node.name for node in row.before}
    read = {name for node in graph if node.name not in own for name in node.inputs}
    inside = {name for node in row.before for name in node.inputs}
    results = [node.name for node in row.before if node.name in read or node.name not in inside]
    replaced = _program(row.before, results, values, device)
    op = _program(row.after[:1], [row.name], values, device)
    with torch.no_grad():
        plain = torch.compile(_traced(*replaced), dynamic=False, fullgraph=True)
        ours = with_passes(_traced(*op), cuda_graphs="off", cache=False)
        return _median_us(ours, op[1], device), _median_us(plain, replaced[1], device)


def _program(
    nodes: Sequence[NodeRecord], results: Sequence[str], values: Mapping[str, NodeRecord], device: torch.device
) -> tuple[Callable[..., Any], list[Any]]:
    """A function of what `nodes` read from outside, and random values of that."""
    own = {node.name for node in nodes}
    names = list(dict.fromkeys(name for node in nodes for name in node.inputs if name not in own))
    inputs = list(_inputs(names, values))
    lines = [f"def forward({', '.join(names)}):", *(f"    {node.name} = {node.text}" for node in nodes)]
    source = on_this_device("\n".join([*lines, f"    return [{', '.join(results)}]"]), device.type)
    scope: dict[str, Any] = {"torch": torch, "aten": torch.ops.aten, "prims": torch.ops.prims, "inf": float("inf")}
    exec(source, scope)
    return scope["forward"], random_inputs(inputs, device.type)


def _inputs(names: Sequence[str], values: Mapping[str, NodeRecord]) -> Iterator[Input]:
    for name in names:
        told = values[name].type if name in values else ""
        found = parsed_type(told)
        if found is None:
            raise ValueError(f"{name} is {told or 'no tensor'}, of which there are no random values")
        yield found


def _traced(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.nn.Module:
    # As operators, which Dynamo takes as they are.
    made: torch.nn.Module = make_fx(function, tracing_mode="fake")(*inputs)
    return made


def _median_us(call: Callable[..., Any], inputs: Sequence[Any], device: torch.device) -> float:
    if device.type == "cuda":
        from ..tuning.timing import time_calls

        return statistics.median(time_calls(lambda i: call(*inputs), 1))
    for _ in range(3):
        call(*inputs)
    samples = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call(*inputs)
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)
