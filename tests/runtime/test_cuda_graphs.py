"""The dispatcher on a fake device: what is captured when, and by whom it is called."""

import math
import threading

import pytest
import torch

from tests.runtime.harness import Bench, W, attention, linear, numbers, same
from tests.runtime.programs import S, other, program, size, tensor, weight


@pytest.mark.parametrize("case", ["off", "cpu", "two devices", "all eager"])
def test_runs_as_it_is(case: str) -> None:
    given = [tensor("x", 4, device="cpu" if case == "cpu" else "cuda:0")]
    given += [tensor("y", 4, device="cuda:1")] if case == "two devices" else []
    step = S("a", lambda x, *_: [x + 1], "x", "y1", uncapturable="no" if case == "all eager" else "")
    bench = Bench(program(given, [step], "y1"), "off" if case == "off" else "full")
    assert bench.call == bench.program.run
    assert bench.note.mode == "off"
    assert case == "off" or bench.note.why


def test_captured_at_the_second_call_and_replayed() -> None:
    bench = Bench(linear())
    seen = []
    for _ in range(4):
        bench(3, numbers(3, 4), W)
        seen.append(bench.counts())
    assert seen == [(0, 0), (1, 1), (1, 2), (1, 3)]
    bench(5, numbers(5, 4), W)
    bench(3, numbers(3, 4), W)
    assert bench.counts() == (1, 4)
    assert [graph.replays for graph in bench.note.graphs] == [4]


@pytest.mark.parametrize(("mode", "captures"), [("full", 1), ("piecewise", 3)])
def test_modes(mode: str, captures: int) -> None:
    steps = [S("a", lambda x: [x + 1], "x", "y"), S("b", lambda y: [y * 2], "y", "z"), S("c", lambda z: [z], "z", "u")]
    bench = Bench(program([tensor("x", 4)], steps, "u"), mode)
    for _ in range(3):
        bench(numbers(4))
    assert bench.counts() == (captures, 2 * captures)


@pytest.mark.parametrize("mode", ["full", "auto", "piecewise"])
def test_what_cannot_be_captured_runs_between_graphs(mode: str) -> None:
    bench = Bench(attention(), mode)
    for _ in range(4):
        bench(3, numbers(3, 4), W)
    assert bench.counts() == (2, 6)
    assert bench.note.mode == "piecewise"
    assert bench.note.steps == {"mix": "it is attention"}
    assert mode == "piecewise" or "it is attention" in bench.note.why


def test_a_step_that_reads_the_cpu_runs_without_a_graph() -> None:
    steps = [S("cpu", lambda c: [c.sum().item()], "c", "n"), S("gpu", lambda x: [x + 1], "x", "y")]
    steps += [S("both", lambda y, c: [y * c.sum()], "y c", "z")]
    bench = Bench(program([tensor("x", 4), tensor("c", 2, device="cpu")], steps, "z n"))
    for _ in range(4):
        bench(numbers(4), numbers(2))
    assert bench.counts() == (1, 3)
    assert "c, which is on the CPU" in bench.note.steps["both"]


def test_other_inputs_are_part_of_the_key() -> None:
    step = S("a", lambda x, f: [x / f if f is not None else x * 3], "x f", "y")
    bench = Bench(program([tensor("x", 4), other("f")], [step], "y"))
    for _ in range(3):
        for value in (0.0, -0.0, math.nan, None, 2, 2.0, True):
            bench(torch.ones(4), value)
    assert bench.counts() == (7, 14)
    bench(torch.ones(4), torch.tensor(3.0))
    assert "f is a Tensor" in bench.note.without


def test_somebody_elses_capture_is_left_alone() -> None:
    bench = Bench(linear())
    for taken in (False, True, False, True):
        bench.device.taken = taken
        bench(3, numbers(3, 4), W)
    assert bench.counts() == (1, 1)


def test_a_program_inside_a_program() -> None:
    """The inner one would write to the memory that the outer one's values are in."""
    inner = Bench(linear())
    nested = program(
        [size("s0"), tensor("x", "s0", 4), weight("w", 4)],
        [
            S("a", lambda x: [x + 1], "x", "y"),
            S("b", lambda n, y, w: inner.call(n, y, w), "s0 y w", "z", uncapturable="it calls another"),
            S("c", lambda y, z: [y * z], "y z", "u"),
        ],
        "u",
    )
    outer = inner.graphs.wrap(nested, "outer")
    for _ in range(5):
        x = numbers(3, 4)
        same(outer(3, x, W)[0], nested.run(3, x, W)[0])


@pytest.mark.parametrize("sizes", [(), (8, 3)])
def test_gradients_are_not_for_graphs(sizes: tuple[int, ...]) -> None:
    bench = Bench(linear(), "auto", *sizes)
    for _ in range(4):
        bench.call(3, numbers(3, 4).requires_grad_(), W)[0].sum().backward()
    assert bench.counts() == (0, 0)
    assert "gradients are asked for" in bench.note.without


def test_inference_mode_and_back() -> None:
    bench = Bench(attention("z q o"))
    for inference in (True, True, True, False, False, True):
        with torch.inference_mode(inference):
            bench(3, numbers(3, 4), W)
    assert bench.counts() == (2, 10)


def test_another_stream_waits_for_the_last_replay() -> None:
    bench = Bench(attention())
    for stream in (0, 0, 0, 1, 1, 0):
        bench.device.on.stream = stream
        bench(3, numbers(3, 4), W)
    assert bench.device.waits == 2


@pytest.mark.parametrize("sizes", [(), (2, 4, 8)])
def test_eight_threads(sizes: tuple[int, ...]) -> None:
    one = attention("z q")
    bench = Bench(one, "auto", *sizes)
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        bench.device.on.stream = seed % 3
        for _ in range(40):
            n = int(torch.randint(1, 9, (), generator=generator))
            x = torch.randint(-8, 9, (n, 4), generator=generator).float()
            z, q = bench.call(n, x, W)
            expected = one.run(n, x, W)
            if not (torch.equal(z, expected[0]) and torch.equal(q, expected[1])):
                wrong.append(f"thread {seed}, size {n}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert bench.device.replays > 300
