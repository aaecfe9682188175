"""fuse: ops become a larger one only where that means the same; else the reason is told and the parts stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass import Fold
from fusionpass.op import OPS
from fusionpass.ops import add_rms_norm, quantize, rms_norm, rms_norm_quantize
from fusionpass.ops.norm import AFTER
from fusionpass.passes.fuse import fuse
from fusionpass.passes.normalize import normalize
from fusionpass.report.trace import GraphTrace
from fusionpass.rules import FOLDS

X = torch.zeros(4, 256, dtype=torch.bfloat16)
W = torch.ones(256, dtype=torch.bfloat16)
SCALE = torch.tensor(0.5)


def fused(folds: Any, model: Callable[..., Any], *args: torch.Tensor) -> tuple[Graph, dict[str, str]]:
    """The graph after the pass, and by rule why it was refused. Writes stay in the graph where the model has them."""
    graph = make_fx(model, select_decomp_table(), "fake")(*args).graph
    normalize(graph)
    trace = GraphTrace(0)
    fuse(graph, folds, trace)
    graph.lint()
    return graph, {record.rule: record.reason for record in trace.refused}


def ops(graph: Graph) -> list[str]:
    return [OPS[node.target].name for node in graph.nodes if node.target in OPS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_producer_that_ends_in_a_rounding(dtype: torch.dtype) -> None:
    def total(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return (x.float() + residual.float()).to(x.dtype)

    fold = Fold("test.fold", (total,), rms_norm, add_rms_norm, "residual")
    graph, refused = fused([fold], lambda x, r, w: rms_norm(total(x, r), w), X.to(dtype), X.to(dtype), W.to(dtype))
    assert not refused
    assert ops(graph) == ["add_rms_norm"]


@pytest.mark.parametrize(
    ("inner", "outer", "reason"),
    [
        ({}, {"inner_weight": "weight"}, "a norm is in there already"),
        ({"weight": None}, {}, "it has no weight"),
        ({}, {"alpha": 0.5}, "what is added is scaled first"),
        ({"eps": 1e-5}, {}, "the two norms differ in eps or rounding"),
        ({"rounding": AFTER}, {}, "the two norms differ in eps or rounding"),
        ({}, {}, ""),
    ],
)
def test_a_norm_of_what_is_added(inner: dict[str, Any], outer: dict[str, Any], reason: str) -> None:
    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        given = {name: weight if value == "weight" else value for name, value in outer.items()}
        return add_rms_norm(rms_norm(x, **{"weight": weight, **inner}), residual, weight, **given)

    graph, refused = fused(FOLDS, model, X, X + 1, W)
    assert refused.get("norm.inner_add_rms_norm", "") == reason
    assert ops(graph) == (["rms_norm", "add_rms_norm"] if reason else ["add_rms_norm"])


def test_another_scheme_of_what_is_quantised_already() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        norm = rms_norm(x, weight)
        return quantize(norm, a), quantize(norm, b, "fp8_static,rounding=divide")

    graph, refused = fused(FOLDS, model, X, W, SCALE, SCALE + 1)
    assert refused == {"norm.again_rms_norm_quantize": "it is quantised as fp8_static already"}
    assert ops(graph) == ["rms_norm_quantize", "quantize"]


def test_more_scales_than_an_op_takes() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, *scales: torch.Tensor) -> Any:
        norm = rms_norm(x, weight)
        return [quantize(norm, scale) for scale in scales]

    graph, refused = fused(FOLDS, model, X, W, *(SCALE + i for i in range(6)))
    assert refused == {"norm.again_rms_norm_quantize": "it is quantised with 5 scales already"}
    assert ops(graph) == ["rms_norm_quantize", "quantize"]


@pytest.mark.parametrize("between", [True, False])
def test_a_write_in_between(between: bool) -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        norm = rms_norm(x, weight)
        if between:
            x.add_(1)
        codes = quantize(norm, scale)
        if not between:
            x.add_(1)
        return codes

    graph, refused = fused(FOLDS, model, X, W, SCALE)
    assert refused == ({"norm.quantize": "add_ writes to memory in between"} if between else {})
    assert ops(graph) == (["rms_norm", "quantize"] if between else ["rms_norm_quantize"])


def test_a_scale_that_is_computed_from_the_norm() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        norm = rms_norm(x, weight)
        return quantize(norm, scale + norm.abs().amax())

    graph, refused = fused(FOLDS, model, X, W, SCALE)
    assert refused == {"norm.quantize": "add is computed after abs_1 reads the norm"}
    assert ops(graph) == ["rms_norm", "quantize"]


def test_views_that_cancel_leave_none() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        return quantize(rms_norm(x, weight).view(2, 2, 256).view(4, 256), scale)

    graph, refused = fused(FOLDS, model, X, W, SCALE)
    assert not refused
    assert ops(graph) == ["rms_norm_quantize"]
    assert "view" not in str(graph)


@pytest.mark.parametrize("between", [torch.relu, lambda y: y.view(-1, 128), lambda y: y.t()])
def test_what_is_no_view_of_the_rows(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        return quantize(between(rms_norm(x, weight)), scale)

    graph, refused = fused(FOLDS, model, X, W, SCALE)
    assert not refused
    assert ops(graph) == ["rms_norm", "quantize"]


def test_another_output_than_the_one_that_folds() -> None:
    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        norm, total = add_rms_norm(x, residual, weight)
        return quantize(total, scale), norm

    graph, refused = fused(FOLDS, model, X, X + 1, W, SCALE)
    assert not refused
    assert ops(graph) == ["add_rms_norm", "quantize"]


Joined = tuple[dict[str, Any], dict[str, str]]


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (
            lambda given, asked: ({**given, **asked}, {"q": "codes"}),
            "fusionpass.rms_norm_quantize does not return codes, which is read",
        ),
        (
            lambda given, asked: ({**given, "scheme": "int8_token"}, {}),
            "q: the op would return torch.int8[4, 256], the graph has torch.float8_e4m3fn[4, 256]",
        ),
        (
            lambda given, asked: ({**given, **asked, "x": given["weight"]}, {}),
            "q: the op would return torch.float8_e4m3fn[256], the graph has torch.float8_e4m3fn[4, 256]",
        ),
    ],
    ids=["output", "dtype", "shape"],
)
def test_a_fold_that_returns_something_else(
    join: Callable[[dict[str, Any], dict[str, Any]], Joined], reason: str
) -> None:
    fold = Fold("test.fold", rms_norm, quantize, rms_norm_quantize, "norm", join=join)
    graph, refused = fused([fold], lambda x, w, s: quantize(rms_norm(x, w), s), X, W, SCALE)
    assert refused == {"test.fold": reason}
    assert ops(graph) == ["rms_norm", "quantize"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("normalised", "fusionpass.rms_norm_quantize does not return normalised, which is read"),
        ("q", "q of fusionpass.rms_norm_quantize would be two results, both of which are read"),
    ],
)
def test_an_output_that_the_larger_op_cannot_return(output: str, reason: str) -> None:
    fold = Fold("test.fold", rms_norm, quantize, rms_norm_quantize, output)

    def model(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
        norm = rms_norm(x, weight)
        return quantize(norm, scale), norm

    graph, refused = fused([fold], model, X, W, SCALE)
    assert refused == {"test.fold": reason}
    assert ops(graph) == ["rms_norm", "quantize"]
