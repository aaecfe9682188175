"""Programs under graphs, and small ones to try."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from fusionpass.runtime.cuda_graphs import Graphs
from fusionpass.runtime.program import Program
from tests.runtime.fake_device import FakeDevice
from tests.runtime.programs import S, program, size, tensor, weight


class Compared:
    """A program under graphs, each call of which is compared with the program run as it is."""

    def __init__(self, program: Program, mode: str = "auto", *sizes: int, **options: Any) -> None:
        self.graphs = Graphs(mode, sizes or None, **options)
        self.program = program
        self.call = self.graphs.wrap(program, "p")

    @property
    def note(self) -> Any:
        return self.graphs.notes[0]

    @property
    def replays(self) -> int:
        """How often the graphs ran that are there now."""
        return sum(graph.replays for graph in self.note.graphs)

    def __call__(self, *args: Any) -> list[Any]:
        """A call; inputs that it writes to are compared too."""
        pairs = zip(args, self.program.inputs, strict=True)
        theirs = [a.clone() if isinstance(a, Tensor) and i.mutated else a for a, i in pairs]
        expected = self.program.run(*theirs)
        got = self.call(*args)
        for a, b in zip([*got, *args], [*expected, *theirs], strict=True):
            same(a, b)
        return got


class Bench(Compared):
    """The same on a fake device, and what happened there."""

    def __init__(self, program: Program, mode: str = "auto", *sizes: int, **options: Any) -> None:
        self.device = FakeDevice()
        super().__init__(program, mode, *sizes, device_factory=lambda _: self.device, **options)

    def counts(self) -> tuple[int, int]:
        return self.device.captures, self.device.replays


def same(a: Any, b: Any) -> None:
    if a is b:
        return
    if isinstance(b, Tensor):
        assert [s for n, s in zip(a.shape, a.stride(), strict=True) if n > 1] == [
            s for n, s in zip(b.shape, b.stride(), strict=True) if n > 1
        ]
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else:
        assert type(a) is type(b)
        assert a == b


_KEPT: deque[Tensor] = deque(maxlen=2000)


def kept(tensor: Tensor) -> Tensor:
    """The same; no other tensor of a test gets its address."""
    _KEPT.append(tensor)
    return tensor


def numbers(*shape: int) -> Tensor:
    """Small integers, somewhere else at each call."""
    return kept(torch.randint(-8, 9, shape).float())


W = numbers(4)


def linear(**how: Any) -> Program:
    """x[s0, 4] → x * w + s0."""
    step = S("mul", lambda n, x, w: [x * w + n], "s0 x w", "y", **how)
    return program([size("s0"), tensor("x", "s0", 4), weight("w", 4)], [step], "y")


def attention(results: str = "z") -> Program:
    """Two pieces whose rows are apart, with what mixes rows in between."""
    steps = [
        S("first", lambda n, x, w: [x * w, x + 1], "s0 x w", "q k", rows={"s0": (0, 0)}),
        S("mix", lambda n, q, k: [q / n + k.sum(0)], "s0 q k", "o", uncapturable="it is attention"),
        S("last", lambda o, w: [o * 2 + w], "o w", "z", rows={"s0": (0,)}),
    ]
    return program([size("s0"), tensor("x", "s0", 4), weight("w", 4)], steps, results)
