"""normalize: what is one value becomes one node, and nothing else does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass.graphs import aten
from fusionpass.passes.normalize import normalize

Model = Callable[[torch.Tensor], Any]
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def normalised(model: Model, x: torch.Tensor = X) -> list[str]:
    """The operators that are left, in order, from a graph that still does what the model does, to the bit."""
    module: GraphModule = make_fx(model, select_decomp_table(), "fake")(x)
    normalize(module.graph)
    module.graph.lint()
    module.recompile()
    expected, actual = model(x.clone()), module(x.clone())
    for e, a in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (expected, actual)), strict=True):
        assert (e.dtype, e.shape, e.stride()) == (a.dtype, a.shape, a.stride())
        assert torch.equal(e, a)
    return [str(node.target).removeprefix("aten.") for node in module.graph.nodes if node.op == "call_function"]


def test_a_size_that_is_left_to_torch_is_written_out_where_it_is_known() -> None:
    assert normalised(lambda x: x.view(-1, 2) + x.view(16, -1)) == ["view.default", "add.Tensor"]
    assert normalised(lambda x: x[:1].expand(4, -1) + x[:1].expand(-1, 8).expand(4, 8)).count("expand.default") == 1
    # Rows are symbolic, columns are not.
    sizes: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(X, symbolic_context=sizes, source=ConstantSource("x"))
    graph = make_fx(lambda x: x.view(x.shape[0], -1, 4).view(-1, 4), select_decomp_table())(x).graph
    normalize(graph)
    views = [node for node in graph.nodes if node.target is aten.view.default]
    assert [[size for size in view.args[1] if isinstance(size, int)] for view in views] == [[2, 4], [-1, 4]]


@pytest.mark.parametrize("index", [1, -1])
@pytest.mark.parametrize("reduce", [torch.mean, torch.amax, torch.amin])
def test_a_dimension_that_is_put_back_was_kept(reduce: Callable[..., torch.Tensor], index: int) -> None:
    kept = normalised(lambda x: reduce(x, 1, keepdim=True))
    assert normalised(lambda x: reduce(x, -1).unsqueeze(index)) == kept
    assert len(kept) == 1


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x.amax(-1).unsqueeze(0),
        lambda x: x.amax(-1, keepdim=True).unsqueeze(-1),
        lambda x: x.amax((0, 1)).unsqueeze(-1),
        lambda x: x.amax(()).unsqueeze(-1),
        lambda x: x.mean(None).unsqueeze(-1),
        lambda x: x.mean(-1, dtype=torch.float64).unsqueeze(-1),
        lambda x: x.cumsum(-1).unsqueeze(-1),
        lambda x: x.sum(-1).unsqueeze(-1),
    ],
)
def test_another_dimension_stays(model: Model) -> None:
    assert "unsqueeze.default" in normalised(model)


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (lambda x: x.view(4, 8).float().expand(4, 8) + 1, ["add.Tensor"]),
        (lambda x: x.view(torch.int32).view(torch.float32) + 1, ["add.Tensor"]),
        (lambda x: x.double() + 1, ["prims.convert_element_type.default", "add.Tensor"]),
        (lambda x: x.view(torch.int32) + 1, ["view.dtype", "add.Tensor"]),
        (lambda x: x.view(torch.int8).view(8, 16) + 1, ["view.dtype", "view.default", "add.Tensor"]),
        (lambda x: x.view(torch.int32).view(8, 4) + 1, ["view.default", "view.dtype", "add.Tensor"]),
        (lambda x: x.view(8, 4) + 1, ["view.default", "add.Tensor"]),
        (lambda x: x.relu() + 1, ["relu.default", "add.Tensor"]),
        (lambda x: aten.lift_fresh_copy(x) + 1, ["lift_fresh_copy.default", "add.Tensor"]),
        (lambda x: x[:1].expand(4, 8) + 1, ["slice.Tensor", "expand.default", "add.Tensor"]),
        (lambda x: x + torch.tensor(3.0), ["full.default", "add.Tensor"]),
        (lambda x: x[:, :2] + torch.tensor([3.0, 4.0]), ["slice.Tensor", "lift_fresh_copy.default", "add.Tensor"]),
    ],
)
def test_what_changes_nothing_goes(model: Model, left: list[str]) -> None:
    assert normalised(model) == left


def test_an_empty_view_has_a_shape_too() -> None:
    assert normalised(lambda x: x.view(3, 0).relu(), torch.zeros(2, 0)) == ["view.default", "relu.default"]


def test_a_copy_that_is_laid_out_otherwise_stays() -> None:
    assert normalised(lambda x: x.to(torch.float32, copy=True).relu()) == ["relu.default"]
    left = normalised(lambda x: x[:, ::2].to(torch.float32, copy=True).relu())
    assert left == ["slice.Tensor", "prims.convert_element_type.default", "relu.default"]


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (lambda x: (x + 1) * (1 + x), ["add.Tensor", "pow.Tensor_Scalar"]),
        (lambda x: x.add_(1).mul(1) * x.add_(1), ["add_.Tensor", "mul.Tensor", "add_.Tensor", "mul.Tensor"]),
    ],
)
def test_what_is_one_value_is_one_node(model: Model, left: list[str]) -> None:
    assert normalised(model) == left


def test_a_product_lies_as_its_first_operand_does() -> None:
    def model(x: torch.Tensor) -> Any:
        dense = x.contiguous()
        return x * dense + 1, dense * x - 1

    assert normalised(model, torch.randn(8, 4).t()).count("mul.Tensor") == 2
    assert normalised(model, torch.randn(4, 8)).count("pow.Tensor_Scalar") == 1


def test_a_number_that_two_outputs_hold_is_theirs_alone() -> None:
    assert normalised(lambda x: (x + 1, x + 1)) == ["add.Tensor", "add.Tensor"]


def test_memory_that_holds_nothing_yet_is_no_value() -> None:
    left = normalised(lambda x: torch.empty_like(x).copy_(x) + torch.empty_like(x).copy_(x + 1))
    assert left.count("empty.memory_format") == 2


def test_noise_is_drawn_twice() -> None:
    graph = make_fx(lambda x: x.bernoulli(0.5) + x.bernoulli(0.5), tracing_mode="fake")(X).graph
    normalize(graph)
    assert str(graph).count("aten.bernoulli") == 2


def test_sizes_are_computed_with_pythons_operators() -> None:
    graph = make_fx(lambda x: x.view(x.shape[0] * 2, -1) + 1, tracing_mode="symbolic")(X).graph
    before = str(graph)
    normalize(graph)
    assert str(graph) == before


def test_a_constant_without_a_value() -> None:
    """What a graph's module holds has no fake tensor by itself."""
    graph = Graph()
    constant = graph.get_attr("constant")
    view = graph.call_function(aten.view.default, (constant, [4, 8]))
    view.meta["val"] = X
    graph.output(graph.call_function(aten.relu.default, (view,)))
    normalize(graph)
    assert "aten.view" in str(graph)
