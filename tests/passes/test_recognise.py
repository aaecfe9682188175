"""recognise: a spelling becomes an op only where the op would return the same, at a place where it can stand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass import Spelling
from fusionpass.ops import add_rms_norm, quantize, rms_norm
from fusionpass.ops.quant import Scheme, quantized
from fusionpass.passes.normalize import normalize
from fusionpass.passes.recognise import recognise
from fusionpass.report.trace import GraphTrace
from fusionpass.rules import SPELLINGS

X = torch.zeros(4, 256, dtype=torch.bfloat16)
W = torch.ones(256, dtype=torch.bfloat16)


def recognised(spelling: Spelling, model: Callable[..., Any], *args: torch.Tensor) -> tuple[Graph, list[str]]:
    """The graph after the pass, and why anything was refused. Writes stay in the graph where the model has them."""
    graph = make_fx(model, select_decomp_table(), "fake")(*args).graph
    normalize(graph)
    trace = GraphTrace(0)
    recognise(graph, [spelling], trace)
    graph.lint()
    assert not trace.missed
    return graph, [record.reason for record in trace.refused]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    made: torch.Tensor = rms_norm.reference(x, weight, eps)
    return made


def norm_of_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    total = x + residual
    return norm(total, weight, eps), total


NORM = Spelling("test.norm", rms_norm, norm)
BOTH = Spelling("test.both", add_rms_norm, norm_of_sum)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y.float(), "torch.bfloat16[4, 256], the graph has torch.float32[4, 256]"),
        (lambda y: y.unsqueeze(0), "torch.bfloat16[4, 256], the graph has torch.bfloat16[1, 4, 256]"),
        (lambda y: y.t().contiguous().t(), "strides (256, 1), the graph has (1, 4)"),
    ],
    ids=["dtype", "shape", "strides"],
)
def test_a_spelling_that_returns_something_else(change: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    def spelled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return change(norm(x, weight, eps))

    graph, refused = recognised(Spelling("test.norm", rms_norm, spelled), lambda x, w: spelled(x, w, 1e-5), X, W)
    assert refused == [f"the op would return {reason}"]
    assert "rms_norm" not in str(graph)


def test_a_spelling_that_returns_too_little() -> None:
    def spelled(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norm(x + residual, weight, eps)

    _, refused = recognised(
        Spelling("test.norm", add_rms_norm, spelled), lambda x, r, w: spelled(x, r, w, 1e-5), X, X, W
    )
    assert refused == ["the op would return 2 values, the spelling has 1"]


def test_an_input_that_is_computed_from_an_output() -> None:
    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        total = x + residual
        return norm(total, weight + total.abs().amax(), 1e-5), total

    graph, refused = recognised(BOTH, model, X, X + 1, W)
    (reason,) = refused
    assert reason == "add_1 is computed after abs_1 reads the result"
    assert "add_rms_norm" not in str(graph)


def test_an_input_that_is_computed_late() -> None:
    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        total = x + residual
        return norm(total, weight + weight.abs().amax(), 1e-5), total

    graph, refused = recognised(BOTH, model, X, X + 1, W)
    assert not refused
    assert "add_rms_norm" in str(graph)


def test_a_constant_where_the_spelling_has_a_tensor() -> None:
    def spelled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        h = x.float()
        return (torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) / weight.float()).to(x.dtype)

    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return (torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) / 2.0).to(x.dtype)

    graph = make_fx(model, select_decomp_table(), "fake")(X, W).graph
    trace = GraphTrace(0)
    recognise(graph, [Spelling("test.norm", rms_norm, spelled)], trace)
    (missed,) = trace.missed
    assert "expected a tensor, found the constant 2.0" in missed.reason


@pytest.mark.parametrize("between", [True, False])
def test_a_write_in_between(between: bool) -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        if between:
            weight.add_(1)
        y = weight * h.to(x.dtype)
        if not between:
            weight.add_(1)
        return y

    graph, refused = recognised(NORM, model, X, W)
    assert refused == (["add_ writes to memory in between"] if between else [])
    assert ("rms_norm" in str(graph)) is not between


@pytest.mark.parametrize("scheme", ["fp8_token", "mxfp8"])
def test_two_equal_quantisations_that_the_caller_receives(scheme: str) -> None:
    """Their codes and scales are four buffers, of one computation: no pair may take what another has taken."""

    def model(x: torch.Tensor) -> Any:
        return [*quantized(x, None, Scheme.parse(scheme)), *quantized(x, None, Scheme.parse(scheme))]

    graph = make_fx(model, select_decomp_table(), "fake")(X).graph
    normalize(graph)
    trace = GraphTrace(0)
    recognise(graph, SPELLINGS, trace)
    graph.lint()
    assert sum(node.target is quantize.overload for node in graph.nodes) == 2
    assert not trace.refused
    assert not trace.missed
