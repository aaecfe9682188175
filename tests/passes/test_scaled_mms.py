"""Products of one matrix with several weights: made of those side by side, and the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.op import OPS
from fusionpass.ops.gemm import SUMMED
from fusionpass.passes import products as pass_
from fusionpass.passes.fuse import fuse
from fusionpass.passes.products import products
from fusionpass.report.trace import GraphTrace
from fusionpass.rules.gemm import FOLDS
from fusionpass.testing import difference
from tests.gemm import FP8, codes

HALF = torch.bfloat16
A, ROWS = codes(8, 64, FP8, torch.Generator().manual_seed(0)), torch.rand(8, 1)
WEIGHTS = [codes(n, 64, FP8, torch.Generator().manual_seed(n)) for n in (48, 16, 32, 64)]
SCALES = [torch.rand(w.shape[0], 1) for w in WEIGHTS]
BIAS = [torch.rand(w.shape[0]).to(HALF) for w in WEIGHTS]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_, "DEVICES", ("cpu",))


def after(model: Callable[..., Any], *args: torch.Tensor) -> tuple[Graph, list[str], list[str]]:
    """The graph, its ops, and why others were not made; the results are eager's, to a step."""
    gm = make_fx(model, tracing_mode="fake")(*args)
    products(gm.graph)
    trace = GraphTrace(0)
    fuse(gm.graph, FOLDS, trace)
    gm.graph.lint()
    for got, expected in zip(GraphModule(gm, gm.graph)(*args), model(*args), strict=True):
        assert difference(got, expected, SUMMED).within(SUMMED)
    names = [OPS[node.target].name for node in gm.graph.nodes if node.target in OPS]
    return gm.graph, names, [record.reason for record in trace.refused]


def projected(count: int, biases: int = 0, halves: int = 4, **options: Any) -> Callable[..., Any]:
    """The products with `count` weights, of which the first `biases` have one; behind `halves`, in float32."""

    def model(a: Any, rows: Any, *given: Any) -> list[torch.Tensor]:
        results = []
        for i, (w, scale) in enumerate(zip(given[:count], given[count : 2 * count], strict=True)):
            bias = given[2 * count + i] if i < biases else None
            dtype = HALF if i < halves else torch.float32
            results.append(torch._scaled_mm(a, w.t(), rows, scale.t(), bias, out_dtype=dtype, **options).relu())
        return results

    return model


def arguments(count: int, biases: int = 0) -> list[torch.Tensor]:
    return [A, ROWS, *WEIGHTS[:count], *SCALES[:count], *BIAS[:biases]]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("count", "expected"), [(1, ["scaled_mm"]), (2, ["scaled_mms"]), (3, ["scaled_mms"]), (4, ["scaled_mms"] * 2)]
)
def test_two_or_three_are_one(count: int, expected: list[str], biased: bool) -> None:
    """Though each weight is transposed only where it is used, behind what reads the product before."""
    biases = count if biased else 0
    _, names, refused = after(projected(count, biases), *arguments(count, biases))
    assert sorted(names) == expected
    assert not refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"biases": 1}, "their scales or biases are of different kinds"),
        ({"halves": 1}, "they differ in out_dtype"),
    ],
)
def test_what_differs_stays_apart(changes: dict[str, int], why: str) -> None:
    _, names, refused = after(projected(2, **changes), *arguments(2, changes.get("biases", 0)))
    assert (names, refused) == (["scaled_mm", "scaled_mm"], [why])


def test_scales_of_different_kinds_stay_apart() -> None:
    def model(a: Any, rows: Any, w: Any, v: Any, scale: Any) -> list[torch.Tensor]:
        one = torch._scaled_mm(a, w.t(), rows[:1], scale[:1], out_dtype=HALF)
        return [one, torch._scaled_mm(a, v.t(), rows, scale.t(), out_dtype=HALF)]

    _, names, refused = after(model, A, ROWS, WEIGHTS[0], WEIGHTS[1], SCALES[1])
    assert (names, refused) == (["scaled_mm", "scaled_mm"], [])


@pytest.mark.parametrize("viewed", [False, True])
def test_a_weight_that_is_computed_from_a_product_stays_apart(viewed: bool) -> None:
    def model(a: Any, rows: Any, w: Any, v: Any, scale: Any, other: Any) -> list[torch.Tensor]:
        one = torch._scaled_mm(a, w.t(), rows, scale.t(), out_dtype=HALF)
        size = one.amax().float().abs()
        scale = (other * size).t() if viewed else other.t() * size
        return [one, torch._scaled_mm(a, v.t(), rows, scale, out_dtype=HALF)]

    _, names, (reason,) = after(model, A, ROWS, *WEIGHTS[:2], *SCALES[:2])
    assert names == ["scaled_mm", "scaled_mm"]
    assert "is computed after" in reason
