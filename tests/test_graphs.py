"""Questions and small changes that passes share."""

import warnings
from typing import Any

import pytest
import torch
from torch.fx import Graph

from fusionpass.graphs import aten, differs, erase_unused, same_number


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1, True),
        (1, 2, False),
        (2**24, 2**24 + 1, False),
        (0.1, float(torch.tensor(0.1)), True),
        (0.1, 0.1000001, False),
        (1.0, 1, True),
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
        (float("inf"), float("inf"), True),
        (True, True, True),
        (True, 1, False),
        (1, True, False),
        (1.0, None, False),
        (1.0, [1.0], False),
        (1.0, "1.0", False),
    ],
)
def test_same_number(a: Any, b: Any, same: bool) -> None:
    assert same_number(a, b) is same


@pytest.mark.parametrize(
    ("shape", "a", "b", "same"),
    [
        ((4, 8), (8, 1), (8, 1), True),
        ((4, 8), (8, 1), (1, 4), False),
        ((1, 8), (8, 1), (77, 1), True),
        ((4, 1), (1, 1), (1, 77), True),
        ((2, 1), (1, 1), (2, 1), False),
        ((0, 8), (8, 1), (1, 77), True),
        ((), (), (), True),
    ],
)
def test_strides_that_no_address_depends_on(
    shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], same: bool
) -> None:
    one, another = torch.empty_strided(shape, a), torch.empty_strided(shape, b)
    assert (differs(one, another) is None) == same


def test_what_is_read_stays_and_so_do_inputs() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    used = graph.call_function(aten.relu.default, (x,))
    unused = graph.call_function(aten.add.Tensor, (graph.call_function(aten.abs.default, (used,)), used))
    alone = graph.call_function(aten.neg.default, (graph.placeholder("y"),))
    graph.output(used)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for node in (used, unused, unused, alone):
            erase_unused(graph, node)
    graph.lint()
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "placeholder", "output"]
