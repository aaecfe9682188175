"""Calls captured once and replayed in turns with others, so that none has the better minute of the GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FEWEST, MOST = 16, 256
"""Calls of a graph: enough that neither the host nor the gap between replays counts, and no more than that."""
LONG_US = 2000.0
BANDWIDTH = 2.5e6
"""Bytes a microsecond, to guess how long a call takes."""


@dataclass(frozen=True)
class Replay:
    """A graph of many calls."""

    graph: torch.cuda.CUDAGraph
    calls: int

    def us(self) -> float:
        """Microseconds a call, of one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / self.calls


def calls_for(bytes_moved: int, sets: int) -> int:
    """How many calls, of as many on each set, take `LONG_US` by their bytes."""
    wanted = math.ceil(LONG_US / max(1.0, bytes_moved / BANDWIDTH))
    return math.ceil(min(max(wanted, FEWEST), MOST) / sets) * sets


def capture(call: Callable[[int], Any], sets: int, calls: int) -> Replay:
    """`call(i)` on each set in turn. What it returns is kept until its set comes round: outputs rotate as inputs do."""
    call(0)
    torch.cuda.synchronize()
    kept: list[Any] = [None] * sets
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            kept[i % sets] = call(i % sets)
    for _ in range(2):
        graph.replay()
    return Replay(graph, calls)
