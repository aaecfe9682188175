"""Captures that break on a real device: the allocator, the generator and the streams are as before."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.harness import MIB, WIDTH, fleeting, layers, numbers, whole
from tests.runtime.harness import Compared
from tests.runtime.programs import S, program, size, tensor, weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


@pytest.fixture
def w() -> Tensor:
    return numbers(WIDTH, WIDTH)


def works_again(bench: Compared, w: Tensor) -> None:
    """Random numbers, allocation, and captures by anybody are as before."""
    torch.rand(8, device="cuda")
    large = torch.empty(64 * MIB, device="cuda", dtype=torch.uint8)
    torch.cuda.current_stream().synchronize()
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    graph, x = torch.cuda.CUDAGraph(), numbers(8, WIDTH)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = x @ w + torch.rand_like(x)
    graph.replay()
    assert torch.isfinite(y).all()
    second = bench.graphs.wrap(whole(lambda x, w: [torch.rand_like(x) * 0 + x @ w]), "second")
    for _ in range(4):
        assert torch.equal(second(8, x, w)[0], x @ w)
    assert sum(graph.replays for graph in bench.graphs.notes[-1].graphs) >= 3


def raising(w: Tensor) -> list[Tensor]:
    raise ValueError("an odd\nsize")


FAILURES: dict[str, Any] = {
    "exception": lambda w: raising(w),
    "synchronisation": lambda w: [w.sum().item()],
    "memory": lambda w: [torch.empty(1 << 46, dtype=torch.uint8, device="cuda")],
    "copy from the host": lambda w: [torch.ones(8).to("cuda")],
    "unjoined stream": lambda w: fork(w),
}


def fork(w: Tensor) -> None:
    """Work of the capture on a stream that never comes back to it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        w.add(1)


@pytest.mark.parametrize("kind", sorted(FAILURES))
@pytest.mark.parametrize("at", ["first", "second"])
@pytest.mark.parametrize("sizes", [(), (8, 4)])
def test_a_capture_that_fails(w: Tensor, kind: str, at: str, sizes: tuple[int, ...]) -> None:
    """The call is computed all the same, and writes to its cache once."""

    def step(name: str) -> Any:
        def run(x: Tensor, c: Tensor, w: Tensor) -> list[Tensor]:
            c.add_(1)
            y = x @ w + c + torch.rand_like(x) * 0
            if torch.cuda.is_current_stream_capturing() and name == at:
                FAILURES[kind](w)
            return [y.remainder(3)]

        return run

    rows = {"s0": (0,)}
    steps = [S("first", step("first"), "x c w", "y", rows=rows), S("second", step("second"), "y c w", "z", rows=rows)]
    inputs = [size("s0"), tensor("x", "s0", WIDTH), tensor("c", WIDTH, mutated=True), weight("w", WIDTH, WIDTH)]
    bench, cache = Compared(program(inputs, steps, "z"), "piecewise", *sizes), torch.zeros(WIDTH, device="cuda")
    for calls in range(1, 5):
        bench(8, numbers(8, WIDTH), cache, w)
        assert cache.eq(2 * calls).all()
    assert not bench.note.graphs
    assert bench.note.refused["s0=8"]
    assert "\n" not in bench.note.refused["s0=8"]
    if kind == "memory":
        assert "OutOfMemoryError" in bench.note.refused["s0=8"]
    works_again(bench, w)
    taken = []
    for _ in range(10):
        for _ in range(3):
            bench(8, fleeting(8, WIDTH), cache, w)
        bench.graphs.release()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    assert taken[-1] <= taken[1] + 2 * MIB


@pytest.mark.parametrize("sizes", [(), (8,)])
def test_an_interrupted_capture(w: Tensor, sizes: tuple[int, ...]) -> None:
    state = {"left": 1}

    def step(x: Tensor, w: Tensor) -> list[Tensor]:
        y = x @ w
        if torch.cuda.is_current_stream_capturing() and state["left"]:
            state["left"] -= 1
            raise KeyboardInterrupt
        return [y + torch.rand_like(y) * 0]

    bench = Compared(whole(step, rows={"s0": (0,)}), "auto", *sizes)
    x = numbers(8, WIDTH)
    if not sizes:
        bench(8, x, w)
    with pytest.raises(KeyboardInterrupt) as kept:
        bench(8, x, w)
    for _ in range(3):
        bench(8, numbers(8, WIDTH), w)
    assert bench.replays == 3
    assert not bench.note.refused
    works_again(bench, w)
    assert kept.value is not None


def test_an_exception_between_graphs(w: Tensor) -> None:
    """It is the user's; the graphs stay, and the next call is right."""
    state = {"raise": False}
    base = layers()

    def mix(n: int, q: Tensor, k: Tensor) -> list[Tensor]:
        if state["raise"]:
            raise ValueError("no attention today")
        return [q + k.sum(0) + n]

    first, middle, last = base.steps
    bench = Compared(dataclasses.replace(base, steps=(first, dataclasses.replace(middle, call=mix), last)))
    for i in range(8):
        state["raise"] = i % 3 == 2
        if state["raise"]:
            with pytest.raises(ValueError, match="no attention today"):
                bench.call(8, numbers(8, WIDTH), w)
        else:
            bench(8, numbers(8, WIDTH), w)
    assert bench.replays == 7
