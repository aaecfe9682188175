"""What the caller gets, and what graphs get of units that run without one."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.harness import Bench, W, attention, numbers, same
from tests.runtime.programs import S, program, size, tensor, weight


def test_results_are_the_callers_to_keep() -> None:
    bench = Bench(attention("z q o k"))
    kept = []
    for i in range(12):
        n = (3, 2)[i % 2]
        got = bench(n, numbers(n, 4), W)
        kept.append((got, [t.clone() for t in got]))
        for t in got:
            t.add_(1)
    for got, copies in kept:
        for a, b in zip(got, copies, strict=True):
            same(a, b + 1)
    assert bench.counts() == (4, 20)


def test_views_of_inputs_are_views_of_the_callers() -> None:
    step = S("a", lambda x, w: [x[1:, ::2].t(), w.view(2, 2), x, x.view(torch.int32)[0], x * 2], "x w", "a b c d e")
    bench = Bench(program([tensor("x", 3, 4), weight("w", 4)], [step], "a b c d x e"))
    for i in range(4):
        x = numbers(3, 4)
        a, b, c, d, identical, e = bench(x, W)
        assert c is x or i == 0
        assert identical is x
        for t in (a, c, d):
            assert t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert b.untyped_storage().data_ptr() == W.untyped_storage().data_ptr()
        x[1, 2] = 99.0
        assert a[1, 0] == 99
        assert not (e == 99).any()
    assert bench.counts() == (1, 3)


def test_a_view_of_an_input_that_lies_otherwise() -> None:
    bench = Bench(program([tensor("x", 3, 3)], [S("a", lambda x: [x[0], x + 1], "x", "v y")], "v y"))
    for _ in range(3):
        bench(numbers(3, 3))
    bench.call(numbers(3, 3).t())
    x = numbers(3, 3).t()
    same(bench.call(x)[0], x[0])


def test_results_that_share_memory_share_it_again() -> None:
    def step(x: Tensor) -> list[Any]:
        y = torch.cat([x, x + 1, x + 2])
        return [
            y[4:8],
            y.view(3, 4).t(),
            y.view(torch.int32)[2:],
            x.new_ones(1).expand(3),
            x.new_empty(0, 3),
            None,
            7,
            (x + 1).view(2, 2).t(),
        ]

    names = "a b c d e f g h"
    bench = Bench(program([tensor("x", 4)], [S("s", step, "x", names)], names))
    for _ in range(4):
        a, b, c, d, e, *_ = bench(numbers(4))
        a[0] = 5.0
        assert b[0, 1] == 5
        assert c.view(torch.float32)[2] == 5
        assert len({t.untyped_storage().data_ptr() for t in (a, b, c)}) == 1
        assert d.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()
        e.resize_(2)
    assert bench.counts() == (1, 3)


def test_no_rows() -> None:
    """What is empty has no address, and is not memory of another that has none."""
    step = S("a", lambda n, x: [x * 2, x.new_empty(0), x[:0]], "s0 x", "y e v")
    bench = Bench(program([size("s0"), tensor("x", "s0", 4)], [step], "y e v"))
    for _ in range(4):
        x = numbers(0, 4)
        _, e, _ = bench(0, x)
        e.resize_(3).fill_(1)
        assert x.shape == (0, 4)
        assert x.untyped_storage().nbytes() == 0
    assert bench.counts() == (1, 3)


def test_a_value_between_graphs_is_let_go() -> None:
    """As soon as nobody reads it, as without graphs."""
    alive: list[Any] = []

    def mix(y: Tensor) -> list[Tensor]:
        made = y.repeat(100)
        alive.append(weakref.ref(made))
        return [made]

    steps = [
        S("a", lambda x: [x + 1], "x", "y"),
        S("mix", mix, "y", "m", uncapturable="no"),
        S("sum", lambda m: [m.sum(0)], "m", "s", uncapturable="no"),
        S("end", lambda s: [s + 1, alive[-1]() is None], "s", "z gone", uncapturable="no"),
        S("b", lambda y: [y * 2], "y", "u"),
    ]
    bench = Bench(program([tensor("x", 4)], steps, "z u gone"))
    assert [bench(numbers(4))[2] for _ in range(4)] == [True] * 4


def test_one_value_returned_twice() -> None:
    bench = Bench(program([tensor("x", 4)], [S("s", lambda x: [x + 1], "x", "y")], "y x y"))
    for _ in range(3):
        a, _, b = bench(numbers(4))
        a[0] = 77
        assert b[0] == 77


def test_a_constant_is_read_where_it_is() -> None:
    scale, cpu = numbers(4), torch.tensor(3.0)
    steps = [
        S("c0", lambda: [scale], "", "c", constant=True),
        S("c1", lambda: [cpu], "", "d", constant=True),
        S("a", lambda x, c, d: [x * c * d], "x c d", "y"),
        S("b", lambda y, c: [y + c.sum()], "y c", "z", uncapturable="no"),
    ]
    bench = Bench(program([tensor("x", 4)], steps, "z c d y"))
    for _ in range(4):
        got = bench(numbers(4))
        assert got[1] is scale
        assert got[2] is cpu
    assert bench.counts() == (1, 3)


@pytest.mark.parametrize("what", ["number", "shape", "type"])
def test_a_unit_that_returns_something_else_is_believed(what: str) -> None:
    """What ran before has written to the cache, and does not run again."""
    state = {"odd": False}

    def mix(q: Tensor) -> list[Any]:
        odd = state["odd"]
        value = {"number": q, "shape": q[:1] if odd else q, "type": q.double() if odd else q}[what]
        return [value + 1, 4 if odd and what == "number" else 3]

    steps = [
        S("first", lambda x, cache: [x * cache.add_(1)], "x cache", "q"),
        S("mix", mix, "q", "o n", uncapturable="no"),
        S("last", lambda o, n, cache: [o.float() * n + cache.add_(1)], "o n cache", "z"),
    ]
    bench = Bench(program([tensor("x", 4, 4), tensor("cache", 4, mutated=True)], steps, "z o n"))
    cache = numbers(4)
    for _ in range(3):
        bench(numbers(4, 4), cache)
    assert bench.counts() == (2, 4)
    state["odd"] = True
    bench(numbers(4, 4), cache)
    assert bench.counts() == (2, 5)
    state["odd"] = False
    bench(numbers(4, 4), cache)
    assert bench.counts() == (2, 5)
    assert any(reason.startswith("mix returned") for reason in bench.note.refused.values())


def test_memory_that_is_returned_under_two_names() -> None:
    """A copy would tear it apart: what the last step writes to one of them would not be in the other."""
    steps = [
        S("first", lambda x: [x * 2], "x", "q"),
        S("mix", lambda q: [q.view(2, 2)], "q", "o", uncapturable="no"),
        S("last", lambda o, q: [o.add_(1) + 1, q + 0], "o q", "z u"),
    ]
    bench = Bench(program([tensor("x", 4)], steps, "z u"))
    for _ in range(4):
        bench(numbers(4))
    assert bench.counts() == (0, 0)
    assert "mix returns memory that another value has" in bench.note.refused.values()


def test_what_a_step_writes_to_a_value_of_another() -> None:
    steps = [
        S("first", lambda x: [x * 2], "x", "q"),
        S("mix", lambda q: [q.add_(1) + 1], "q", "o", uncapturable="no"),
        S("last", lambda o, q: [o.mul_(3) + q], "o q", "z"),
        S("end", lambda o, q, z: [o + q + z], "o q z", "e", uncapturable="no"),
    ]
    bench = Bench(program([tensor("x", 4)], steps, "z e o q"))
    for _ in range(4):
        bench(numbers(4))
    assert bench.counts() == (2, 6)


@pytest.mark.parametrize(
    ("where", "reason"), [("captured", "a returns a tensor on meta"), ("eager", "b returns a tensor")]
)
def test_a_tensor_elsewhere_is_refused(where: str, reason: str) -> None:
    steps = [
        S("a", lambda x: [x + 1, torch.empty(2, device="meta" if where == "captured" else None)], "x", "y m"),
        S("b", lambda y: [torch.empty(2, device="meta")], "y", "k", uncapturable="no"),
        S("c", lambda y, k: [y * k.numel()], "y k", "z"),
    ]
    bench = Bench(program([tensor("x", 4)], steps, "z"))
    for _ in range(3):
        bench(numbers(4))
    assert bench.device.replays == 0
    assert next(iter(bench.note.refused.values())).startswith(reason)
