"""Programs to try on a GPU."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from fusionpass.runtime.program import Program
from tests.runtime.programs import S, program, size, tensor, weight

WIDTH = 256
MIB = 2**20

_KEPT: deque[Tensor] = deque(maxlen=300)


def fleeting(*shape: int) -> Tensor:
    """Small integers: products of matrices are exact, in any order."""
    return torch.randint(-3, 4, shape, device="cuda").float()


def numbers(*shape: int) -> Tensor:
    """The same, at an address that no other tensor of the test has."""
    _KEPT.append(fleeting(*shape))
    return _KEPT[-1]


def layers(results: str = "z q", slow: int = 0) -> Program:
    """Two pieces with products of matrices; what mixes rows lies in between and is not captured."""
    apart = {"s0": (0, 0)}

    def first(n: int, x: Tensor, w: Tensor) -> list[Tensor]:
        if slow:
            torch.cuda._sleep(slow)
        return [x @ w, x + 1]

    steps = [
        S("first", first, "s0 x w", "q k", rows=apart),
        S("mix", lambda n, q, k: [q + k.sum(0) + n], "s0 q k", "o", uncapturable="it is attention"),
        S("last", lambda o, w: [o[:, :WIDTH] @ w], "o w", "z", rows={"s0": (0,)}),
    ]
    return program([size("s0"), tensor("x", "s0", WIDTH), weight("w", WIDTH, WIDTH)], steps, results)


def whole(call: Any, **how: Any) -> Program:
    """One step over x[s0, WIDTH] and a weight, captured whole."""
    inputs = [size("s0"), tensor("x", "s0", WIDTH), weight("w", WIDTH, WIDTH)]
    return program(inputs, [S("a", call, "x w", "y", **how)], "y")
