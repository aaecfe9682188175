"""One pattern against one graph: what is a step away from a spelling is not it, and the reason says which step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass import Spelling
from fusionpass.match import Attempt, Match, anchor_key
from fusionpass.ops import rms_norm
from fusionpass.passes.normalize import normalize

Function = Callable[..., torch.Tensor]
BF16, F16 = torch.bfloat16, torch.float16
X = torch.zeros(4, 256, dtype=BF16)
W = torch.ones(256, dtype=BF16)


def searched(spelled: Function, model: Function, *args: Any, symbolic: bool = False) -> list[list[Match] | Attempt]:
    """What a spelling of 16-bit tensors finds at each node of a model's graph that may be its anchor."""
    graph = make_fx(model, select_decomp_table(), "symbolic" if symbolic else "fake")(*args).graph
    normalize(graph)
    pattern = Spelling("test.spelling", rms_norm, spelled).patterns("cpu")[0]
    nodes = [node for node in graph.nodes if node.op == "call_function" and anchor_key(node) == pattern.key]
    assert nodes, "no anchor"
    return [pattern.search(node) for node in nodes]


def found(spelled: Function, model: Function, *args: Any, symbolic: bool = False) -> Match:
    (matches,) = searched(spelled, model, *args, symbolic=symbolic)
    assert isinstance(matches, list), matches
    (match,) = matches
    return match


def reason(spelled: Function, model: Function, *args: Any, symbolic: bool = False) -> str:
    (attempt,) = searched(spelled, model, *args, symbolic=symbolic)
    assert isinstance(attempt, Attempt), attempt
    return attempt.reason


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.float().sum(-1, keepdim=True)


def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.float().amax(-1, keepdim=True) * weight.float()


def narrowed(x: torch.Tensor) -> torch.Tensor:
    return x.float().abs().to(x.dtype)


def twice(x: torch.Tensor, eps: float) -> torch.Tensor:
    return (x + eps).abs() * eps


def bounded(x: torch.Tensor, eps: float) -> torch.Tensor:
    return (x - eps).abs().clamp(max=-eps)


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1, dtype=torch.float32)


def counted(x: torch.Tensor) -> torch.Tensor:
    return x.abs() + torch.ones_like(x)


def in_groups(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1] // 128, 128).abs()


def flattened(x: torch.Tensor) -> torch.Tensor:
    return x[None].view(-1, x.shape[1]).abs()


def widest(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight.expand(x.shape[0], -1)


def in_parts(x: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    return x.view(x.shape[0], -1, size).abs() * weight.view(-1, size)


@pytest.mark.parametrize(
    ("spelled", "model", "args"),
    [
        (largest, lambda x: x.view(2, 2, 256).abs().amax(2, keepdim=True), (X,)),
        (whole, lambda x: x.float().sum(1, keepdim=True), (X,)),
        (scaled, scaled, (X.half(), W.half())),
        (scaled, lambda x, w: w.float() * x.float().amax(1, True), (X, W)),
        (narrowed, narrowed, (X.half(),)),
        (in_groups, lambda x: x.view(2, 2, 2, 128).abs(), (X,)),
        (in_groups, lambda x: x.view(4, 2, -1).abs(), (X,)),
        (flattened, lambda x: x[None].view(4, 256).abs(), (X,)),
        (widest, lambda x, w: x * w.expand(4, 256), (X, W)),
        (widest, lambda x, w: x * w.expand(4, -1), (X, W)),
    ],
)
def test_what_is_it(spelled: Function, model: Function, args: tuple[Any, ...]) -> None:
    assert found(spelled, model, *args).arguments.keys() >= {"x"}


@pytest.mark.parametrize(
    ("spelled", "model", "args", "expected"),
    [
        (largest, lambda x: x.sigmoid().amax(-1, keepdim=True), (X,), "expected aten.abs, found aten.sigmoid"),
        (largest, lambda x: x.amax(-1, keepdim=True), (X,), "expected aten.abs, found the placeholder x_1"),
        (largest, lambda x: x.abs().amax(-1), (X,), "aten.amax is called with other arguments"),
        (largest, lambda x: x.abs().amax(0, keepdim=True), (X,), "expected the constant [-1], found [-2]"),
        (largest, lambda x: x.abs().amax((1, 0), keepdim=True), (X,), "expected the constant [-1], found [-1, -2]"),
        (largest, lambda x: x.abs().amax(-1, keepdim=True), (X.int(),), "expected a tensor like bfloat16[4, 256]"),
        (whole, lambda x: x.float().sum(None, keepdim=True), (X,), "expected the constant [-1], found None"),
        (scaled, scaled, (X, W.half()), "expected a tensor like bfloat16[256], found float16[256]"),
        (scaled, scaled, (X.half(), W), "expected a tensor like bfloat16[256], found bfloat16[256]"),
        (scaled, lambda x, w: x.float().amax(-1, keepdim=True) * 2.0, (X, W), "expected a tensor, found the constant"),
        (
            narrowed,
            lambda x: x.float().abs().to(F16),
            (X,),
            "the constant torch.bfloat16, found torch.float16",
        ),
        (narrowed, lambda x: x.float().abs().to(torch.float64), (X,), "found torch.float64"),
        (
            widened,
            lambda x: x.sum(-1, dtype=torch.float64),
            (X,),
            "expected the constant torch.float32, found torch.float",
        ),
        (counted, counted, (X.to("meta"),), "expected the constant cpu, found meta"),
        (in_groups, lambda x: x.view(4, 4, 64).abs(), (X,), "expected the sizes [any, any, 128], found [4, 4, 64]"),
        (in_parts, lambda x, w: x.view(4, -1, 64).abs() * w.view(-1, 1), (X, W[:4]), "expected the sizes [any, size]"),
    ],
)
def test_what_is_not(spelled: Function, model: Function, args: tuple[Any, ...], expected: str) -> None:
    assert expected in reason(spelled, model, *args)


def test_a_number_that_stands_twice_is_one_number() -> None:
    assert found(twice, lambda x: (x + 0.5).abs() * 0.5, X).arguments["eps"] == 0.5
    assert "expected the constant" in reason(twice, lambda x: (x + 0.5).abs() * 0.25, X)


def test_a_number_and_its_negative() -> None:
    assert found(bounded, lambda x: (x - 2.0).abs().clamp(max=-2.0), X).arguments["eps"] == 2.0
    assert "expected the constant" in reason(bounded, lambda x: (x - 2.0).abs().clamp(max=2.0), X)


def test_a_tensor_is_no_number() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x + y).abs() * y

    assert "expected the constant" in reason(twice, model, X, X)


def test_a_size_is_a_number() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, size: Any) -> torch.Tensor:
        return x.view(4, -1, size).abs() * weight.view(-1, size)

    assert found(in_parts, lambda x, w: model(x, w, 64), X, W).arguments["size"] == 64
    why = reason(in_parts, lambda x, w: model(x, w, w.shape[0]), X, W, symbolic=True)
    assert why.startswith("expected the sizes [any, any, size], found [4, 1, sym_size_int")


def test_a_size_is_no_tensor() -> None:
    def weighed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.amax(-1, keepdim=True) * weight

    why = reason(weighed, lambda x: x.amax(-1, keepdim=True) * x.shape[0], X, symbolic=True)
    assert why.startswith("expected a tensor like bfloat16[256], found")
