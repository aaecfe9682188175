"""Each rule on a small model: the graph after the passes, as text. Every torch release must give the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusionpass
from tests.models import FP8, LlamaNorm, static

WIDTH = 64
X, R = torch.zeros(3, 5, WIDTH, dtype=torch.bfloat16), torch.zeros(3, 5, WIDTH, dtype=torch.bfloat16)
SCALE = torch.tensor(0.5)
NORM = LlamaNorm(WIDTH)


def norm(x: torch.Tensor) -> Any:
    return NORM(x)


def norm_float32(x: torch.Tensor) -> Any:
    return NORM(x.float())


def quantize(x: torch.Tensor, scale: torch.Tensor) -> Any:
    return static(x, scale)


def quantize_divide(x: torch.Tensor, scale: torch.Tensor) -> Any:
    return (x.float() / scale).clamp(-448, 448).to(FP8)


def norm_quantize(x: torch.Tensor, scale: torch.Tensor) -> Any:
    return static(NORM(x), scale)


def add_norm(x: torch.Tensor, residual: torch.Tensor) -> Any:
    total = x + residual
    return NORM(total), total


def add_norm_sum_unread(x: torch.Tensor, residual: torch.Tensor) -> Any:
    return NORM(x + residual)


def add_norm_quantize(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
    total = residual + x
    return static(NORM(total), scale), total


def add_norm_quantize_norm_read(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
    total = x + residual
    y = NORM(total)
    return static(y, scale), y.sum(-1), total * 2


def three_equal_quantisations(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
    total = x + residual
    y = NORM(total)
    return [static(y, scale).view(torch.uint8) + i for i in range(3)], total


def view_in_between(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
    total = x + residual
    return static(NORM(total).reshape(-1, WIDTH), scale), total


def view_read_by_a_router(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
    total = x + residual
    rows = NORM(total).reshape(-1, WIDTH)
    return static(rows, scale), rows.float().sum(-1), total


def two_scales(x: torch.Tensor, scale: torch.Tensor) -> Any:
    y = NORM(x)
    return static(y, scale), static(y, scale + 1)


def silu_mul(x: torch.Tensor, up: torch.Tensor) -> Any:
    return torch.nn.functional.silu(x) * up


def silu_mul_packed_quantize(packed: torch.Tensor, scale: torch.Tensor) -> Any:
    gate, up = packed.chunk(2, dim=-1)
    return static(up * torch.nn.functional.silu(gate), scale)


def gelu_mul_quantize(x: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> Any:
    return static(torch.nn.functional.gelu(x) * up, scale)


def gelu_tanh_mul_quantize_product_read(x: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> Any:
    product = torch.nn.functional.gelu(x, approximate="tanh") * up
    return static(product, scale), product.sum()


def attention_quantize(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> Any:
    return static(fusionpass.ops.attention(q, k, v).transpose(1, 2).reshape(6, -1), scale)


def sum_read_before_the_norm(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
    total = x + residual
    early = total.abs()
    return static(NORM(total), scale + early.float().amax() * 0), total


CASES: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = [
    (norm, (X,)),
    (norm_float32, (X,)),
    (quantize, (X, SCALE)),
    (quantize_divide, (X, SCALE)),
    (norm_quantize, (X, SCALE)),
    (add_norm, (X, R)),
    (add_norm_sum_unread, (X, R)),
    (add_norm_quantize, (X, R, SCALE)),
    (add_norm_quantize_norm_read, (X, R, SCALE)),
    (three_equal_quantisations, (X, R, SCALE)),
    (view_in_between, (X, R, SCALE)),
    (view_read_by_a_router, (X, R, SCALE)),
    (two_scales, (X, SCALE)),
    (sum_read_before_the_norm, (X, R, SCALE)),
    (silu_mul, (X, R)),
    (silu_mul_packed_quantize, (torch.zeros(15, 2 * WIDTH, dtype=torch.bfloat16), SCALE)),
    (gelu_mul_quantize, (X, R, SCALE)),
    (gelu_tanh_mul_quantize_product_read, (X, R, SCALE)),
    (
        attention_quantize,
        (*(torch.zeros(3, n, t, 16, dtype=torch.bfloat16) for n, t in ((4, 2), (2, 9), (2, 9))), SCALE),
    ),
]


@pytest.mark.parametrize(("function", "args"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_golden(
    function: Callable[..., Any], args: tuple[torch.Tensor, ...], golden: Callable[[str, str], None]
) -> None:
    report = fusionpass.explain(function, *args)
    (graph,) = report.graphs
    snapshots = dict(graph.snapshots)
    records = [
        f"# {kind}: {r.op} [{r.rule}] {r.reason}" for kind in ("refused", "missed") for r in getattr(graph, kind)
    ]
    golden(function.__name__, "\n".join([snapshots["fuse"], *records, ""]))
