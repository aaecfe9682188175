"""Where graphs read their inputs: in place or from a copy, and what happens when they move."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from fusionpass.errors import ChangedError
from fusionpass.runtime.program import Program
from tests.runtime.harness import Bench, W, linear, numbers, same
from tests.runtime.programs import S, program, tensor, weight


def test_a_weight_that_moved_is_never_stale() -> None:
    bench = Bench(linear())
    w = torch.nn.Parameter(W.clone(), requires_grad=False)
    for _ in range(3):
        bench(3, numbers(3, 4), w)
    w.copy_(numbers(4))
    bench(3, numbers(3, 4), w)
    assert bench.counts() == (1, 3)
    old, w.data = w.data, numbers(4)
    old.fill_(math.nan)
    bench(3, numbers(3, 4), w)
    bench(3, numbers(3, 4), w)
    assert bench.counts() == (2, 5)
    assert bench.note.recaptures == {"w moved": 1}


@pytest.mark.parametrize(
    "other", [numbers(5), numbers(4, 2)[:, 0], numbers(4).double()], ids=["shape", "stride", "dtype"]
)
def test_a_weight_that_is_another_kind_of_tensor(other: Tensor) -> None:
    """Where nobody guards on it: the code was compiled for the one that was there."""
    bench = Bench(linear())
    for _ in range(3):
        bench(3, numbers(3, 4), W)
    with pytest.raises(ChangedError, match=r"w: its shape, strides or dtype changed\. Compile the model again"):
        bench.call(3, numbers(3, 4), other)
    bench(3, numbers(3, 4), W)


def test_weights_that_move_all_the_time() -> None:
    bench = Bench(linear())
    for _ in range(60):
        bench(3, numbers(3, 4), numbers(4))
    assert bench.device.captures < 8
    assert bench.note.sightings >= 16


def test_an_input_that_stays_is_read_in_place_until_it_moves() -> None:
    bench = Bench(linear())
    x = numbers(3, 4)
    for _ in range(3):
        bench(3, x.copy_(numbers(3, 4)), W)
    assert bench.note.copied == []
    bench(3, numbers(3, 4), W)
    assert bench.note.copied == ["x"]
    assert bench.note.recaptures == {"x moved": 1}
    for _ in range(3):
        bench(3, numbers(3, 4), W)
    assert bench.counts() == (2, 6)


@pytest.mark.parametrize("way", ["strides", "offset", "type"])
def test_the_same_memory_seen_otherwise_has_moved(way: str) -> None:
    bench = Bench(program([tensor("x", 4, 4)], [S("a", lambda x: [(x * 2).contiguous()], "x", "y")], "y"))
    memory = numbers(5, 4)
    x = memory[:4]
    for _ in range(3):
        bench(x)
    bench({"strides": x.t(), "offset": memory[1:], "type": x.as_strided((4, 4), (4, 1))}[way])
    assert bench.device.captures == (1 if way == "type" else 2)


def cached() -> Program:
    """Writes to its cache, which is returned too."""

    def step(x: Tensor, cache: Tensor) -> list[Tensor]:
        return [x + cache.add_(1), cache[1:]]

    return program([tensor("x", 4), tensor("cache", 4, mutated=True)], [S("a", step, "x cache", "y v")], "y v cache")


def test_what_is_written_to_is_never_copied() -> None:
    bench = Bench(cached())
    first, second = numbers(4), numbers(4)
    for _ in range(3):
        bench(numbers(4), first)
    assert bench.counts() == (1, 2)
    for i in range(4):
        bench(numbers(4), (first, second)[i % 2])
    assert bench.counts() == (1, 4)
    assert bench.note.without["cache, which the program writes to, moved"] == 2
    for _ in range(3):
        bench(numbers(4), second)
    assert bench.counts() == (2, 7)
    assert bench.note.copied == ["x"]


def test_a_cache_that_is_another_at_each_call() -> None:
    bench = Bench(cached())
    for _ in range(6):
        bench(numbers(4), numbers(4))
    assert bench.counts() == (0, 0)
    assert "cache, which the program writes to, moves" in bench.note.without


def test_inputs_that_overlap() -> None:
    step = S("a", lambda x, y: [x + y.add_(1)], "x y", "z")
    bench = Bench(program([tensor("x", 4), tensor("y", 4, mutated=True)], [step], "z"))
    y, memory = numbers(4), numbers(8)
    for _ in range(3):
        bench(numbers(4), y)
    assert bench.counts() == (1, 2)
    bench(memory[4:], y)  # one storage, yet apart
    assert bench.counts() == (1, 3)
    expected = [2 * (y + 1)]
    same(bench.call(y, y)[0], expected[0])
    assert bench.counts() == (1, 3)
    assert "x and y overlap, and one of them would be copied" in bench.note.without


def test_overlapping_inputs_that_stay() -> None:
    bench = Bench(program([tensor("x", 4), tensor("y", 4)], [S("a", lambda x, y: [x + 2 * y], "x y", "z")], "z"))
    memory = numbers(6)
    for _ in range(3):
        bench(memory[:4], memory[2:].copy_(numbers(4)))
    assert bench.counts() == (1, 2)


def test_a_weight_made_of_several() -> None:
    """Of a wrapper's parts each address counts; it has none itself."""
    step = S("a", lambda x, w: [x * w.a + w.b], "x w", "y")
    bench = Bench(program([tensor("x", 4), weight("w", 4)], [step], "y"))
    w = TwoTensor(numbers(4), numbers(4))
    for _ in range(3):
        bench(numbers(4), w)
    w.b = numbers(4)
    bench(numbers(4), w)
    assert bench.note.recaptures == {"w moved": 1}


def test_what_is_no_strided_tensor_is_left_alone() -> None:
    step = S("a", lambda x, w: [w @ x], "x w", "y")
    bench = Bench(program([tensor("x", 4, 4), weight("w", 4, 4)], [step], "y"))
    w = torch.eye(4).to_sparse()
    for _ in range(4):
        bench(numbers(4, 4), w)
    assert bench.counts() == (0, 0)
    assert "w is not a strided tensor" in bench.note.without


@pytest.mark.parametrize("lazy", [torch.conj, lambda x: x.conj().imag, lambda x: TwoTensor(x, x)])
def test_results_that_are_more_than_their_memory(lazy: Any) -> None:
    bench = Bench(program([tensor("x", 4)], [S("a", lambda x: [lazy(x * 2)], "x", "y")], "y"))
    for _ in range(4):
        bench.call(torch.complex(numbers(4), numbers(4)))
    assert bench.device.replays == 0
    assert "more than its memory" in next(iter(bench.note.refused.values()))
