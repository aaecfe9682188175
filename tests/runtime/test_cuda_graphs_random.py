"""Random sequences of calls, of moves, failures and releases: every result is what the program without graphs returns.

Whatever was returned is kept and compared again at the end; what moved away is overwritten.
"""

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionpass.runtime.cuda_graphs import Graphs
from fusionpass.runtime.program import Program
from tests.runtime.fake_device import FakeDevice, InvalidatedError
from tests.runtime.harness import same
from tests.runtime.programs import S, other, program, size, tensor, weight

SIZES = (1, 2, 3, 5, 8, 9)
KINDS = ("full", "middle", "between", "fresh")


def model(kind: str, views: bool) -> Program:
    """Three steps, over rows x, y and indices, a weight, a table, a cache that all write to, and a number.

    Args:
        kind: "full": all may be captured, and the rows do not mix; "middle": the second step may not be, and mixes
            them; "between": the same, and what it returns is written to afterwards; "fresh": the first may not be.
        views: results are views of inputs and of one another, and one is a number: no rows may follow.
    """

    def first(n: int, x: Tensor, y: Tensor, w: Tensor, cache: Tensor) -> list[Any]:
        cache.add_(w)
        return [
            x * w + y,
            torch.cat([x, y], 1),
            x.clone()[:, 1:] if kind == "fresh" else x[:, 1:],
            n * 2 if views else None,
        ]

    def second(n: int, q: Tensor, k: Tensor, cache: Tensor) -> list[Any]:
        cache.mul_(-1)
        return [q + (k[:, :4].sum(0) / n if kind == "middle" else k[:, :4]) + cache, q[:, 0].isnan().long()]

    def third(o: Tensor, i: Tensor, ids: Tensor, table: Tensor, f: float | None, cache: Tensor) -> list[Any]:
        if kind == "between":
            o.add_(1)
        z = o * (1 if f is None else f) + table[ids] + table[i] + cache
        return [z, z.t(), z[:, 1:3], cache[2:]]

    apart = {"s0": (0, 0, 0, None)}
    steps = [
        S("first", first, "s0 x y w cache", "q k v n2", "no" if kind == "fresh" else "", apart),
        S("second", second, "s0 q k cache", "o i", "no" if kind in ("middle", "between") else "", {"s0": (0, 0)}),
        S("third", third, "o i ids table f cache", "z zt zs c", rows={"s0": (0, 1, 0, None)}),
    ]
    inputs = [
        size("s0"), tensor("x", "s0", 4), tensor("y", "s0", 4), tensor("ids", "s0"), weight("w", 4),
        weight("table", 6, 4), tensor("cache", 4, mutated=True), other("f"),
    ]  # fmt: skip
    return program(inputs, steps, "z zt v zs n2 c x cache o" if views else "z k o" if kind != "full" else "z k")


class World:
    """A program, its arguments at home and away, and what was returned so far."""

    def __init__(self, seed: int, kind: str, views: bool, mode: str, declared: bool, limit: int, cap: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = FakeDevice()
        sizes = (2, 5, 8) if declared else None
        self.graphs = Graphs(mode, sizes, limit, None, lambda _: self.device)
        if cap:  # what two or three graphs take
            self.graphs._cache.cap = 7000
        self.program = model(kind, views)
        self.call = self.graphs.wrap(self.program, kind)
        self.homes: dict[tuple[str, int], Tensor] = {}
        self.weights = {"w": self.numbers(4), "table": self.numbers(6, 4)}
        self.caches = [self.numbers(4), self.numbers(4)]
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.gone: list[Tensor] = []
        self.alive: list[Any] = []

    def numbers(self, *shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=self.generator).float()

    def rows(self, name: str, n: int, away: bool) -> Tensor:
        """An input of n rows: where it always is, or somewhere else."""
        fresh = self.numbers(n, 4) if name != "ids" else torch.randint(0, 6, (n,), generator=self.generator)
        if name == "x" and int(torch.randint(0, 4, (), generator=self.generator)) == 0:
            fresh[0, 0], fresh[-1, -1] = math.nan, math.inf
        if away:
            self.gone.append(fresh)
            return fresh
        return self.homes.setdefault((name, n), torch.empty_like(fresh)).copy_(fresh)

    def run(self, n: int, away: str, cache: int, f: float | None, stream: int) -> None:
        args = {name: self.rows(name, n, name in away) for name in ("x", "y", "ids")}
        written = self.caches[cache]
        given = [n, *args.values(), *self.weights.values(), written, f]
        theirs = [arg.clone() if arg is written else arg for arg in given]
        expected = self.program.run(*theirs)
        self.device.on.stream = stream
        got = self.call(*given)
        self.device.taken = False
        assert self.graphs._cache.cap is None or self.graphs.memory.total <= self.graphs._cache.cap
        for mine, right in zip(got, expected, strict=True):
            same(mine, right)
            if not isinstance(mine, Tensor):
                continue
            view = [i for i, arg in enumerate(theirs) if isinstance(arg, Tensor) and shares(arg, right)]
            assert view == [i for i, arg in enumerate(given) if isinstance(arg, Tensor) and shares(arg, mine)]
            if not view:
                self.kept.append((mine, right))
        for i, mine in enumerate(got):
            for j, later in enumerate(got[:i]):
                if isinstance(mine, Tensor) and isinstance(later, Tensor):
                    assert shares(mine, later) == shares(expected[i], expected[j])
        same(written, theirs[6])
        written.copy_(self.numbers(4))
        for left in self.gone:
            left.fill_(math.nan if left.is_floating_point() else 1 << 40)
        self.alive += self.gone
        self.gone.clear()

    def move(self, name: str, in_place: bool) -> None:
        """A weight is loaded anew, where it is or elsewhere."""
        fresh = self.numbers(*self.weights[name].shape)
        if in_place:
            self.weights[name].copy_(fresh)
            return
        old = self.weights[name].data
        self.alive.append(old)
        self.weights[name].data = fresh
        old.fill_(math.nan)

    def check(self) -> None:
        for mine, right in self.kept:
            same(mine, right)


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


ERRORS = {
    "odd": RuntimeError,
    "invalid": InvalidatedError,
    "memory": torch.OutOfMemoryError,
    "interrupt": KeyboardInterrupt,
}
away = st.sampled_from(["", "", "x", "x y ids", "y", "ids"])
call = st.tuples(
    st.just("call"), st.sampled_from(SIZES), away, st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([None, None, 2.0, -0.0]), st.sampled_from([0, 0, 0, 1]), st.sampled_from([1, 2, 3, 5]),
)  # fmt: skip
action = st.one_of(
    call,
    call,
    call,
    st.tuples(st.just("weight"), st.sampled_from(["w", "table"]), st.booleans()),
    st.tuples(st.just("cache"), st.sampled_from([0, 1])),
    st.tuples(st.just("fail"), st.sampled_from(sorted(ERRORS)), st.integers(0, 2)),
    st.just(("release",)),
    st.just(("taken",)),
)
worlds = st.builds(
    World, st.integers(0, 2**31), st.sampled_from(KINDS), st.booleans(), st.sampled_from(["auto", "piecewise"]),
    st.booleans(), st.sampled_from([1, 2, 64]), st.booleans(),
)  # fmt: skip


@settings(max_examples=settings().max_examples // 2)
@given(worlds, st.lists(action, min_size=12, max_size=40))
def test_any_sequence(world: World, actions: list[Any]) -> None:
    for kind, *values in actions:
        if kind == "call":
            *how, times = values
            for _ in range(times):
                try:
                    world.run(*how)
                except KeyboardInterrupt:
                    world.gone.clear()
        elif kind == "weight":
            world.move(*values)
        elif kind == "cache":
            world.alive.append(world.caches[values[0]])
            world.caches[values[0]] = world.numbers(4)
        elif kind == "fail":
            error, ahead = values
            world.device.failures[world.device.captures + ahead] = ERRORS[error]("made up")
        elif kind == "taken":
            world.device.taken = True
        else:
            world.graphs.release()
            assert not world.device.live
            assert world.graphs.memory.total == 0
    world.check()
    world.graphs.release()
    world.check()


def test_graphs_are_used() -> None:
    """The same without chance: most calls replay."""
    for kind in KINDS:
        for declared in (False, True):
            world = World(0, kind, False, "auto", declared, 64, False)
            for _ in range(3):
                for n in (2, 3, 5, 8):
                    for times in ("x", "", "x y ids"):
                        world.run(n, times, 0, None, 0)
            note = world.graphs.notes[0]
            assert sum(graph.replays for graph in note.graphs) >= 36 - 4 * 3, (kind, declared, str(note))
            world.check()
