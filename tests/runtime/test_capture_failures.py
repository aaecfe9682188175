"""Captures that fail: the call is computed all the same, once, and the report says why there is no graph."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.fake_device import InvalidatedError
from tests.runtime.harness import Bench, W, attention, linear, numbers
from tests.runtime.programs import S, program, tensor


def counting() -> Any:
    """Three captured steps, each of which counts in the cache how often it ran."""

    def step(i: int) -> Any:
        def run(x: Tensor, cache: Tensor) -> list[Tensor]:
            cache[i] += 1
            return [x + cache[i]]

        return run

    steps = [S(f"s{i}", step(i), f"{'xabc'[i]} cache", "abc"[i]) for i in range(3)]
    return program([tensor("x", 4), tensor("cache", 3, mutated=True)], steps, "c")


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("no such kernel\nmore"), torch.OutOfMemoryError("none left")])
def test_an_exception_in_a_capture(number: int, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    bench, cache = Bench(counting(), "piecewise"), torch.zeros(3)
    bench.device.failures[number] = error
    with caplog.at_level(logging.WARNING, "fusionpass"):
        for calls in range(1, 6):
            bench(numbers(4), cache)
            assert cache.tolist() == [calls] * 3
    (reason,) = bench.note.refused.values()
    assert type(error).__name__ in reason
    assert "\n" not in reason
    assert len(caplog.records) == 1
    assert bench.counts() == (number + 1, 0)
    assert not bench.device.live
    assert bench.device.pools[0].closed
    bench.graphs.release()
    for _ in range(3):
        bench(numbers(4), cache)
    assert bench.counts() == (number + 4, 6)
    assert not bench.note.refused


def test_out_of_memory_is_tried_once_more_when_a_graph_was_dropped() -> None:
    bench = Bench(linear(), limit=2)
    bench.device.failures = {i: torch.OutOfMemoryError("none left") for i in (0, 3)}
    for _ in range(4):
        bench(1, numbers(1, 4), W)
    assert bench.device.captures == 1
    for n in (2, 3):
        for _ in range(3):
            bench(n, numbers(n, 4), W)
    bench(1, numbers(1, 4), W)
    assert bench.device.captures == 3, "nothing was dropped so far"
    for _ in range(3):
        bench(4, numbers(4, 4), W)
    assert bench.device.captures == 4, "this fails too"
    assert set(bench.note.refused) == {"s0=1", "s0=4"}
    bench(1, numbers(1, 4), W)
    assert set(bench.note.refused) == {"s0=4"}
    for _ in range(2):
        bench(5, numbers(5, 4), W)
        bench(4, numbers(4, 4), W)
    assert bench.device.captures == 7
    assert not bench.note.refused


@pytest.mark.parametrize("other", [False, True])
def test_a_capture_that_the_driver_gave_up(other: bool) -> None:
    """Nothing more can be captured in its pool, where other graphs may be."""
    bench = Bench(linear())
    for _ in range(3 if other else 0):
        bench(1, numbers(1, 4), W)
    bench.device.failures[bench.device.captures] = InvalidatedError("an operation that waits")
    for n in (2, 2, 2, 3, 3, 3, 1, 4, 4, 4):
        bench(n, numbers(n, 4), W)
    assert set(bench.note.refused) == {"s0=2"}
    assert [graph.replays for graph in bench.note.graphs] == ([3] if other else []) + [2, 2]
    assert len(bench.device.pools) == 2
    assert bench.device.pools[0].closed is not other
    bench.graphs.release()
    assert all(pool.closed for pool in bench.device.pools)
    assert bench.graphs.memory.total == 0


def test_out_of_memory_twice_is_enough() -> None:
    bench = Bench(linear(), limit=1)
    bench.device.failures = {i: torch.OutOfMemoryError("none left") for i in (0, 3)}
    for n in (9, 9, 1, 1, 1, 2, 2, 2, 9, 3, 3, 3, 9, 4, 4, 4, 9, 9):
        bench(n, numbers(n, 4), W)
    assert bench.device.captures == 6
    assert set(bench.note.refused) == {"s0=9"}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("sizes", [(), (3,)])
def test_an_interrupted_capture(number: int, sizes: tuple[int, ...]) -> None:
    bench = Bench(attention(), "auto", *sizes)
    if not sizes:
        bench(3, numbers(3, 4), W)
    bench.device.failures[number] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as kept:
        bench(3, numbers(3, 4), W)
    assert not bench.device.live
    assert bench.device.pools[0].closed
    for _ in range(3):
        bench(3, numbers(3, 4), W)
    assert bench.device.captures == number + 3
    assert not bench.note.refused
    assert kept.value.__traceback__ is not None


class OddError(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("where", ["captured", "eager"])
def test_an_exception_of_the_users(where: str, at: int) -> None:
    """Uncaptured runs raise what the step raises; a graph that is there stays."""
    state = {"raise": False}

    def step(x: Tensor) -> list[Tensor]:
        if state["raise"]:
            raise OddError
        return [x + 1]

    steps = [S("a", step, "x", "y", "no" if where == "eager" else ""), S("b", lambda y: [y * 2], "y", "z")]
    bench = Bench(program([tensor("x", 4)], steps, "z"))
    for i in range(4):
        state["raise"] = i == at
        if i == at and (where == "eager" or at == 0):
            with pytest.raises(OddError):
                bench.call(numbers(4))
        elif i == at == 1:
            with pytest.raises(OddError):  # the capture fails, and then the call without a graph
                bench.call(numbers(4))
            assert "OddError" in next(iter(bench.note.refused.values()))
        elif i != at:
            bench(numbers(4))
    if where == "eager" or at == 0:
        assert not bench.note.refused
        assert bench.device.captures == 1


def test_a_size_that_fails_leaves_the_others() -> None:
    bench = Bench(attention(), "auto", 8, 4, 2)
    bench.device.failures = {0: torch.OutOfMemoryError("none left"), 2: ValueError("odd")}
    for n in (7, 3, 1, 8, 4, 2, 1):
        bench(n, numbers(n, 4), W)
    assert set(bench.note.refused) == {"s0=8", "s0=4"}
    assert [graph.sizes for graph in bench.note.graphs] == ["s0=2"]
    assert bench.device.replays == 6


def test_a_warm_up_that_fails() -> None:
    """What is made up may be nothing that the program takes: nobody asked for that."""

    def step(n: int, x: Tensor) -> list[Tensor]:
        if n > 4:
            raise OddError(f"{n} is too many")
        return [x / 2]

    inputs = linear().inputs[:2]
    bench = Bench(program(inputs, [S("a", step, "s0 x", "y", rows={"s0": (0,)})], "y"), "auto", 8, 4)
    for n in (3, 4, 2):
        bench(n, numbers(n, 4))
    with pytest.raises(OddError):
        bench.call(7, numbers(7, 4))
    assert "OddError while it was captured: 8 is too many" in bench.note.refused.values()


def test_nan_and_infinity_pass_through() -> None:
    bench = Bench(attention("z q k"), "auto", 8)
    for _ in range(3):
        x = numbers(5, 4)
        x[1, 1], x[2, 2], x[3] = math.nan, math.inf, -math.inf
        bench(5, x, W)
