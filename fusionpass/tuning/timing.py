"""Time calls under CUDA graphs, on one set of buffers or on sets rotated past the L2."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..launch import Empty, Launch

MOST_SETS = 1024
"""Sets of buffers beyond which a cell is too small to be timed cold."""


def warm_up(seconds: float = 1.0) -> None:
    """Keep the GPU busy until its clocks are up."""
    matrix = torch.randn(4096, 4096, device="cuda")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        matrix = (matrix @ matrix).clamp(-1, 1)
        torch.cuda.synchronize()


def cold_sets(bytes_moved: int, l2_bytes: int) -> int | None:
    """How many sets of buffers together take three times the L2; None where that would be more than `MOST_SETS`."""
    sets = math.ceil(3 * l2_bytes / bytes_moved) + 1
    return sets if sets <= MOST_SETS else None


def time_calls(call: Callable[[int], Any], sets: int, replays: int = 15, target_us: float = 2000.0) -> list[float]:
    """Time `call(i)`, which must launch its work on set `i` and return what it allocated.

    Calls are captured many to a graph, so that neither the host nor the gap between replays counts. What a call
    returns is kept until its set comes round again, so that outputs rotate as the inputs do.

    Returns:
        Microseconds per call, one figure a replay.
    """
    call(0)
    torch.cuda.synchronize()
    calls = math.ceil(max(16, _calls_for(call, target_us)) / sets) * sets
    kept: list[Any] = [None] * sets
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            kept[i % sets] = call(i % sets)
    for _ in range(3):
        graph.replay()
    samples = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / calls)
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """The median, and the quartiles beside it."""
    low, median, high = statistics.quantiles(samples, n=4)
    return {"us": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def launch_call(launches: Sequence[Launch]) -> Callable[[int], list[torch.Tensor]]:
    """Calls of planned launches, into outputs allocated once and filled with garbage; what they mutate, in place."""
    made = [bound(launch) for launch in launches]

    def call(i: int) -> list[torch.Tensor]:
        for part, arguments in made[i]:
            part.kernel[part.grid](**arguments, **part.options())
        return [arguments[name] for name in launches[i].returns]

    return call


def bound(launch: Launch) -> list[tuple[Launch, dict[str, Any]]]:
    """The launches in order, each with its arguments."""
    buffers: dict[int, torch.Tensor] = {}
    bound = []
    for part in launch.all:
        for value in part.args.values():
            if isinstance(value, Empty) and id(value) not in buffers:
                buffers[id(value)] = _poison(value, launch.device)
        bound.append((part, {name: buffers.get(id(value), value) for name, value in part.args.items()}))
    return bound


def _poison(empty: Empty, device: torch.device) -> torch.Tensor:
    made = empty.new(device)
    made.view(torch.uint8).fill_(0xA5)
    return made


def measure(launches: Sequence[Launch]) -> float:
    """The median of CUDA-graph replays, in microseconds a launch.

    Args:
        launches: the same kernel on one set of buffers, which stay in the L2, or on as many as `cold_sets` says, so
            that each finds its own evicted.
    """
    return statistics.median(time_calls(launch_call(launches), len(launches), replays=9))


def _calls_for(call: Callable[[int], Any], target_us: float) -> int:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(4):
        call(0)
    end.record()
    end.synchronize()
    # Small kernels wait for the host here, so their true time is shorter: never fewer than 256 of them.
    each = start.elapsed_time(end) * 250
    return math.ceil(target_us / each) if each > 100 else 256
