"""Who tunes what: a queue from which every GPU takes the next job, the longest first."""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .search import Job

OVERHEAD = 0.06
"""Seconds that a configuration takes beside its timing: planning, capturing, its share of compiling. Not measured."""
REPLAYS, LEAST, CALLS = 12, 2e-3, 16
"""Replays of a graph, the seconds that one takes at least, and the calls that it holds at least; see `timing`."""


def seconds(configurations: int, microseconds: float) -> float:
    """What it takes to time so many, by estimate, if a launch of each takes so long."""
    return configurations * (OVERHEAD + REPLAYS * max(LEAST, CALLS * microseconds * 1e-6))


@dataclass(frozen=True)
class Queue:
    """Jobs in the order in which they are handed out.

    Attributes:
        jobs: those with `parts` above one are shared by as many GPUs.
        costs: seconds, by estimate, of each.
    """

    jobs: tuple[Job, ...]
    costs: tuple[float, ...]


def arrange(
    jobs: Sequence[Job], costs: Sequence[float], gpus: int, shuffle: int | None = None, as_given: bool = False
) -> Queue:
    """The queue for so many GPUs; the arguments stay as they are.

    Args:
        jobs: whole ones.
        costs: seconds of each, by estimate.
        gpus: how many take from the queue. Where jobs are fewer, their configurations are shared.
        shuffle: the seed of a random order; None: the longest first, those of one length as they came.
        as_given: leave them as they came: those that matter most are done first, whatever time there is.
    """
    parts = -(-gpus // len(jobs)) if jobs else 1
    shared = [
        (replace(job, part=part, parts=parts), cost / parts)
        for job, cost in zip(jobs, costs, strict=True)
        for part in range(parts)
    ]
    if as_given:
        return Queue(tuple(job for job, _ in shared), tuple(cost for _, cost in shared))
    if shuffle is None:
        shared.sort(key=lambda pair: -pair[1])
    else:
        shared = random.Random(shuffle).sample(shared, len(shared))
    return Queue(tuple(job for job, _ in shared), tuple(cost for _, cost in shared))


@dataclass(frozen=True)
class Makespan:
    """What a queue comes to.

    Attributes:
        gpus: the positions in the queue of the jobs that each takes.
        seconds: until the last is done.
        bound: what no order can be faster than: an equal share each, or the longest job.
    """

    gpus: tuple[tuple[int, ...], ...]
    seconds: float
    bound: float


def simulate(costs: Sequence[float], gpus: int) -> Makespan:
    """Who would take which job, if each took as long as its cost: whoever is free first takes the next."""
    free = [(0.0, gpu) for gpu in range(gpus)]
    taken: list[list[int]] = [[] for _ in range(gpus)]
    for position, cost in enumerate(costs):
        time, gpu = heapq.heappop(free)
        taken[gpu].append(position)
        heapq.heappush(free, (time + cost, gpu))
    bound = max(sum(costs) / gpus, max(costs, default=0.0))
    return Makespan(tuple(map(tuple, taken)), max(time for time, _ in free), bound)
