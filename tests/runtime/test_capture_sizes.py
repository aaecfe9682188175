"""Sizes that are captured up front, and calls that run at a larger one."""

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusionpass.runtime.program import Program
from tests.runtime.harness import Bench, W, attention, kept, numbers
from tests.runtime.programs import S, other, program, size, tensor, weight

TABLE = numbers(7, 4)


def embedding(results: str = "z i2", **how: Any) -> Program:
    """Rows of a table by indices, twice; indices that are out of range raise an error."""
    apart = {"s0": (0, 0)}
    steps = [
        S("first", lambda ids, table: [table[ids], ids + 0], "ids table", "y i2", rows=apart),
        S("mix", lambda n, y, i: [y.cumsum(0) + n, (i + 1) % 7], "s0 y i2", "o j", uncapturable="attention"),
        S("last", lambda o, j, table: [o + table[j]], "o j table", "z", rows={"s0": (0,)}),
    ]
    return program([size("s0"), tensor("ids", "s0"), weight("table", 7, 4)], steps, results)


def ids(n: int) -> Tensor:
    return kept(torch.randint(0, 7, (n,)))


def test_captured_at_the_first_call_largest_first(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(attention(), "auto", 2, 8, 4, 8)
    with caplog.at_level(logging.INFO, "fusionpass"):
        bench(3, numbers(3, 4), W)
    assert [record.args[1] for record in caplog.records] == [8, 4, 2]
    assert [graph.sizes for graph in bench.note.graphs] == ["s0=8", "s0=4", "s0=2"]
    assert bench.counts() == (6, 2)
    assert [graph.replays for graph in bench.note.graphs] == [0, 1, 0]
    assert not bench.note.without
    grown = [bytes for _, _, bytes in bench.graphs.memory.graphs]
    assert grown[1:] == [2000, 2000], "smaller sizes lie in the memory of the largest"


@pytest.mark.parametrize("make", [attention, embedding])
def test_a_call_runs_at_the_next_size(make: Any) -> None:
    bench = Bench(make("z q" if make is attention else "z i2"), "auto", 2, 5, 8)
    used = []
    for n in (1, 2, 3, 5, 6, 8, 4, 7, 1, 5):
        args = (numbers(n, 4), W) if make is attention else (ids(n), TABLE)
        before = {graph.sizes: graph.replays for graph in bench.note.graphs}
        bench(n, *args)
        used += [graph.sizes for graph in bench.note.graphs if graph.replays != before.get(graph.sizes, 0)]
    assert used == [f"s0={m}" for m in (2, 2, 5, 5, 8, 8, 5, 8, 2, 5)]
    bench(9, *((numbers(9, 4), W) if make is attention else (ids(9), TABLE)))
    assert bench.note.without == {"there is no graph for its size": 1}
    assert bench.device.captures == 6


def refused(program: Program, *args: Any) -> str:
    """Why a program captured at 4 and 8 is not run there with fewer rows; exact sizes are."""
    bench = Bench(program, "auto", 4, 8)
    for n in (4, 3, 8, 3, 4):
        bench(n, *[arg(n) if callable(arg) else arg for arg in args])
    assert bench.device.replays == 3
    assert bench.note.without == {"there is no graph for its size": 2}
    assert bench.note.padding in str(bench.note)
    return bench.note.padding


def one(call: Any, rows: Any, shape: tuple[int | str, ...] = ("s0", 4), results: str = "y") -> Program:
    return program([size("s0"), tensor("x", *shape)], [S("a", call, "s0 x", "y", rows=rows)], results)


def test_why_rows_may_not_follow() -> None:
    x = lambda n: numbers(n, 4)  # noqa: E731
    assert "not looked at" in refused(one(lambda n, x: [x + 1], {}), x)
    assert "softmax mixes" in refused(one(lambda n, x: [x.softmax(0)], {"s0": "softmax mixes rows"}), x)
    assert "returns 5" in refused(one(lambda n, x: [5], {"s0": (None,)}), x)
    assert "memory of x" in refused(one(lambda n, x: [x[1:]], {"s0": (0,)}), x)
    assert "[2*s0, 4]" in refused(one(lambda n, x: [x + 1], {"s0": (0,)}, ("2*s0", 4)), lambda n: numbers(2 * n, 4))
    assert "[s0, s0]" in refused(one(lambda n, x: [x + 1], {"s0": (0,)}, ("s0", "s0")), lambda n: numbers(n, n))


def test_a_proof_that_is_wrong_is_found_out() -> None:
    bench = Bench(one(lambda n, x: [x.t().contiguous()], {"s0": (0,)}), "auto", 8)
    bench(8, numbers(8, 4))
    bench(3, numbers(3, 4))
    assert "does not count the rows" in next(iter(bench.note.without))


def test_a_result_without_rows_and_one_with_inner_rows() -> None:
    inputs = [size("s0"), tensor("x", 2, "s0", 4), weight("w", 4)]
    step = S(
        "a", lambda x, w: [x * w, w + 1, x.transpose(0, 1).contiguous()], "x w", "y v t", rows={"s0": (1, None, 0)}
    )
    bench = Bench(program(inputs, [step], "y v t"), "auto", 8)
    for n in (3, 8, 1, 5):
        y, v, _ = bench(n, numbers(2, n, 4), W)
        v.add_(1)
        y.add_(1)
    assert bench.counts() == (1, 4)


def test_views_of_one_result_at_fewer_rows() -> None:
    def step(x: Tensor) -> list[Tensor]:
        packed = torch.cat([x, x + 1], 1)
        return [packed[:, :4], packed[:, 4:]]

    inputs = [size("s0"), tensor("x", "s0", 4)]
    bench = Bench(program(inputs, [S("a", step, "x", "y z", rows={"s0": (0, 0)})], "y z"), "auto", 8)
    for n in (3, 8, 1):
        y, z = bench(n, numbers(n, 4))
        assert y.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    assert bench.counts() == (1, 3)


def test_the_warm_up_changes_nothing_of_the_users() -> None:
    def step(x: Tensor, cache: Tensor, w: Tensor) -> list[Tensor]:
        cache.add_(w)
        return [x + cache]

    inputs = [size("s0"), tensor("x", "s0", 4), tensor("cache", 4, mutated=True), weight("w", 4)]
    eager = S("mix", lambda y, cache: [y + cache.mul_(2)], "y cache", "z", uncapturable="no")
    steps = [S("a", step, "x cache w", "y", rows={"s0": (0,)}), eager, S("b", lambda z: [z + 1], "z", "u")]
    cache, x = numbers(4), numbers(4, 4)
    bench = Bench(program(inputs, steps, "u"), "auto", 4, 2)
    bench(4, x, cache, W)
    bench(2, x[:2], cache, W)
    assert bench.counts() == (4, 4)


def test_a_cache_that_grows_is_captured_as_it_comes() -> None:
    step = S("a", lambda n, x, c: [x + c.add_(1)], "s0 x c", "y", rows={"s0": (0,)})
    inputs = [size("s0"), tensor("x", "s0", 4), tensor("c", "s0", 4, mutated=True)]
    bench = Bench(program(inputs, [step], "y"), "auto", 4, 2)
    cache = numbers(4, 4)
    for _ in range(3):
        bench(4, numbers(4, 4), cache)
        bench(3, numbers(3, 4), cache[:3])
    assert bench.counts() == (1, 2)
    assert "c, which the program writes to, grows with s0" in bench.note.why


def test_two_sizes_are_captured_as_they_come() -> None:
    step = S("a", lambda n, m, x: [x + n * m], "s0 s1 x", "y")
    bench = Bench(program([size("s0"), size("s1"), tensor("x", "s0", "s1")], [step], "y"), "auto", 4, 2)
    for _ in range(3):
        bench(3, 2, numbers(3, 2))
    assert bench.counts() == (1, 2)
    assert "it has 2 sizes" in bench.note.why


def test_an_input_that_is_not_what_was_declared() -> None:
    bench = Bench(one(lambda n, x: [x + n], {"s0": (0,)}), "auto", 4, 3)
    for _ in range(3):
        bench(3, numbers(5, 4))
    assert "x is not ('s0', 4)" in bench.note.why
    assert bench.counts() == (1, 2)


def test_a_shape_that_a_size_has_none_of() -> None:
    bench = Bench(one(lambda n, x: [x + n], {}, ("s0", "12//(s0 - 4)")), "auto", 8, 4)
    for _ in range(2):
        bench(8, numbers(8, 3))
    assert "x is not ('s0', '12//(s0 - 4)')" in bench.note.why
    assert bench.counts() == (1, 2)


@pytest.mark.parametrize("way", ["packed", "transposed", "columns", "gaps inside"])
def test_strides_at_other_sizes(way: str) -> None:
    """What lies with gaps, or in another order, lies so at other sizes too, or is not captured up front."""
    shape: tuple[Any, ...] = {
        "packed": ("s0", 4),
        "transposed": (4, "s0"),
        "columns": ("s0", 4),
        "gaps inside": (2, "s0", 3),
    }[way]
    seen: list[tuple[int, ...]] = []

    def step(n: int, x: Tensor) -> list[Tensor]:
        seen.append(x.stride())
        return [x.contiguous() + 1]

    def given(n: int) -> Tensor:
        made = {"packed": (n, 12), "transposed": (n, 4), "columns": (4, n), "gaps inside": (2, n, 12)}[way]
        x = numbers(*made)
        return x.t() if way in ("transposed", "columns") else x[..., : int(shape[-1])]

    rows = {"s0": (shape.index("s0"),)}
    bench = Bench(program([size("s0"), tensor("x", *shape)], [S("a", step, "s0 x", "y", rows=rows)], "y"), "auto", 8, 4)
    for n in (5, 3, 8, 8):
        bench(n, given(n))
    strides = {"packed": {(12, 1)}, "transposed": {(1, 4)}, "columns": {(1, 8), (1, 5), (1, 4), (1, 3)}}
    if way == "gaps inside":
        assert "strides of x" in bench.note.why
        assert bench.counts() == (1, 1)
    else:
        assert bench.counts() == (2, 4)
        assert set(seen) == strides[way]


def test_a_fixed_input_that_moves_is_copied_at_every_size() -> None:
    step = S("a", lambda x, m: [x * m], "x m", "y", rows={"s0": (0,)})
    bench = Bench(program([size("s0"), tensor("x", "s0", 4), tensor("m", 4)], [step], "y"), "auto", 8, 4)
    m = numbers(4)
    for n in (3, 7, 3):
        bench(n, numbers(n, 4), m)
    assert bench.counts() == (2, 3)
    for n in (3, 7, 3, 7):
        bench(n, numbers(n, 4), numbers(4))
    assert bench.counts() == (4, 7)
    assert bench.note.copied == ["x", "m"]


def test_what_was_captured_as_it_came_is_not_for_fewer_rows() -> None:
    """It may read its rows in place."""
    step = S("a", lambda x, f: [x * f], "x f", "y", rows={"s0": (0,)})
    bench = Bench(program([size("s0"), tensor("x", "s0", 4), other("f")], [step], "y"), "auto", 8)
    x = numbers(8, 4)
    bench(8, x, 1.0)
    for _ in range(3):
        bench(8, x, 2.0)
    assert bench.counts() == (2, 3)
    for n in (3, 8, 3):
        bench(n, x[:n], 2.0)
        bench(n, x[:n], 1.0)
    assert [graph.replays for graph in bench.note.graphs] == [4, 3]


def test_a_weight_that_moves() -> None:
    bench = Bench(attention(), "auto", 8, 4)
    for n in (3, 7):
        bench(n, numbers(n, 4), W)
    other = numbers(4)
    for n in (3, 7, 2, 8):
        bench(n, numbers(n, 4), other)
    assert bench.counts() == (8, 12)
    assert bench.note.recaptures == {"w moved": 2}
    assert bench.note.sightings == 2


def test_no_more_than_the_limit() -> None:
    bench = Bench(attention(), "auto", *range(1, 9), limit=3)
    for n in (8, 5, 6, 7):
        bench(n, numbers(n, 4), W)
    assert [graph.sizes for graph in bench.note.graphs] == ["s0=8", "s0=7", "s0=6"]
    assert bench.counts() == (6, 8)
    assert "sizes up to 5 are not captured: there are 3 graphs" in bench.note.why


def test_sizes_that_the_code_is_not_for() -> None:
    """Dynamo's guards keep a call from them; none is made up either."""
    seen: set[int] = set()

    def step(n: int, x: Tensor) -> list[Tensor]:
        seen.add(n)
        return [x + 1]

    made = dataclasses.replace(one(step, {"s0": (0,)}), holds=lambda n: n % 2 == 0)
    bench = Bench(made, "auto", 4, 5, 1, 2)
    for n in (4, 2, 4):
        bench(n, numbers(n, 4))
    assert seen == {2, 4}
    assert set(bench.note.refused) == {"s0=5", "s0=1"}
    assert bench.counts() == (2, 3)


def test_released_and_captured_again() -> None:
    bench = Bench(attention(), "auto", 8, 4)
    for n in (3, 7):
        bench(n, numbers(n, 4), W)
        bench.graphs.release()
    assert bench.device.captures == 8
    assert bench.graphs.memory.total == 0


def test_a_mix_that_returns_something_else_at_fewer_rows() -> None:
    """Its rows are twice as many as those of the call: nobody knows which of them follow."""
    steps = [
        S("a", lambda x: [x * 2], "x", "y", rows={"s0": (0,)}),
        S("mix", lambda y: [torch.cat([y, y])], "y", "o", uncapturable="no"),
        S("b", lambda o: [o.new_ones(4)], "o", "z", rows={"s0": (None,)}),
    ]
    bench = Bench(program([size("s0"), tensor("x", "s0", 4)], steps, "y z"), "auto", 8)
    bench(8, numbers(8, 4))
    assert bench.counts() == (2, 2)
    bench(3, numbers(3, 4))
    assert bench.counts() == (2, 3)
    assert "mix returned a tensor of another shape" in bench.note.without


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    bench = Bench(attention(), "auto", 8, 4)
    bench(3, numbers(3, 4), W)
    assert "CUDA graphs of p" in capsys.readouterr().err
    assert not math.isnan(bench.note.graphs[0].bytes)
