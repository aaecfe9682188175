"""products: PyTorch's calls become the op where that is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass.op import OPS
from fusionpass.passes import products as pass_
from fusionpass.passes.products import products

FP8 = torch.float8_e4m3fn
A, B = torch.ones(8, 64).to(FP8), torch.ones(48, 64).to(FP8).t()
ROWS, COLUMNS, ONE = torch.ones(8, 1), torch.ones(1, 48), torch.ones(())
TWO = torch.full((), 2.0)
BIAS = torch.ones(48).bfloat16()
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_, "DEVICES", ("cpu",))


def after(
    model: Callable[..., Any], *args: torch.Tensor, mode: str = "fake", **options: Any
) -> tuple[Graph, list[dict[str, Any]]]:
    graph = make_fx(model, select_decomp_table(), tracing_mode=mode)(*args).graph
    products(graph, **options)
    graph.lint()
    found = [(OPS[node.target], node) for node in graph.nodes if node.target in OPS]
    return graph, [op.bind(node.args, node.kwargs) for op, node in found]


def call(*args: Any, **kwargs: Any) -> torch.Tensor:
    made: torch.Tensor = torch._scaled_mm(*args, **kwargs)
    return made


@pytest.mark.parametrize(
    ("scales", "bias", "options", "expected"),
    [
        ((ONE, TWO), None, {"out_dtype": HALF}, {"out_dtype": "bfloat16", "fast_accum": False}),
        ((ONE, TWO), BIAS, {"out_dtype": HALF, "use_fast_accum": True}, {"fast_accum": True}),
        ((ROWS, COLUMNS), None, {"out_dtype": torch.float32}, {"out_dtype": "float32"}),
        ((ROWS, COLUMNS), BIAS, {"out_dtype": HALF}, {"out_dtype": "bfloat16"}),
    ],
)
def test_scaled_mm(scales: Any, bias: Any, options: dict[str, Any], expected: dict[str, Any]) -> None:
    def model(a: Any, b: Any, a_scale: Any, b_scale: Any, *bias: Any) -> torch.Tensor:
        return call(a, b, a_scale, b_scale, *bias, **options)

    args = [A, B, *scales, *([] if bias is None else [bias])]
    graph, (found,) = after(model, *args)
    placeholders = graph.find_nodes(op="placeholder")
    assert [found[name] for name in ("a", "b", "a_scale", "b_scale", "bias")][: len(args)] == placeholders
    assert {name: found[name] for name in expected} == expected
    assert "_scaled_mm" not in str(graph).replace("fusionpass.scaled_mm", "")
    assert not after(model, *args, disable=frozenset({"scaled_mm"}))[1]


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="before torch 2.10")
@pytest.mark.parametrize("scales", [(ONE, TWO), (ROWS, COLUMNS)])
def test_the_public_function(scales: Any) -> None:
    from torch.nn.functional import ScalingType, scaled_mm

    kind = ScalingType.RowWise if scales[0].dim() else ScalingType.TensorWise

    def model(a: Any, b: Any, a_scale: Any, b_scale: Any) -> torch.Tensor:
        return scaled_mm(a, b, [a_scale], [kind], [b_scale], [kind], output_dtype=HALF)

    graph, (found,) = after(model, A, B, *scales)
    assert [found[name] for name in ("a", "b", "a_scale", "b_scale")] == graph.find_nodes(op="placeholder")


@pytest.mark.parametrize(
    ("scale", "result", "dtype"),
    [
        (ONE, None, FP8),
        (torch.ones(8, 2, dtype=torch.float8_e8m0fnu), None, HALF),
        (torch.ones(8), None, HALF),
        (ONE, ONE, HALF),
    ],
    ids=["result", "groups", "shape", "scaled result"],
)
def test_what_means_something_else_stays(scale: Any, result: Any, dtype: torch.dtype) -> None:
    graph = Graph()
    given = {"a": A, "b": B, "scale": scale, "result": result}
    with FakeTensorMode() as mode:
        nodes = {name: graph.placeholder(name) for name, value in given.items() if value is not None}
        for name, node in nodes.items():
            node.meta["val"] = mode.from_tensor(given[name])
        scales = (nodes["scale"], nodes["scale"], None, nodes.get("result"), dtype)
        made = graph.call_function(torch.ops.aten._scaled_mm.default, (nodes["a"], nodes["b"], *scales))
        made.meta["val"] = torch.empty(8, 48, dtype=dtype)
    graph.output(made)
    products(graph)
    assert not [node for node in graph.nodes if node.target in OPS]


def router(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), w.float())


@pytest.mark.parametrize("shape", [(8, 64), (2, 3, 64)])
def test_a_router(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape).bfloat16(), torch.randn(48, 64).bfloat16()
    graph, (found,) = after(router, x, w)
    values = [found[name].meta["val"] for name in ("x", "w")]
    assert [tuple(v.shape) for v in values] == [(torch.Size(shape[:-1]).numel(), 64), (48, 64)]
    assert all(v.dtype == HALF and v.is_contiguous() for v in values)
    assert not [n for n in graph.nodes if n.target is torch.ops.prims.convert_element_type.default]
    torch.testing.assert_close(torch.fx.GraphModule({}, graph)(x, w), router(x, w))
    transposed, (turned,) = after(lambda x, w: x.float() @ w.float(), x.flatten(0, -2), w.t().contiguous())
    assert turned["w"].meta["val"].stride() == (1, 48)
    assert transposed.find_nodes(op="call_function", target=torch.ops.aten.mm.default) == []


def test_products_that_are_no_routers_stay() -> None:
    x, w = torch.randn(8, 64), torch.randn(48, 64)
    assert after(router, x, w)[1] == []
    assert after(router, x.bfloat16(), w)[1] == []
    assert after(router, x, w.bfloat16())[1] == []
    assert after(router, x.half(), w.half())[1] == []
    assert after(lambda x, w: x @ w.t(), x.bfloat16(), w.bfloat16(), disable=frozenset({"linear"}))[1] == []
    assert after(lambda x, w: x.double() @ w.double().t(), x.bfloat16(), w.bfloat16())[1] == []
    assert after(router, x.bfloat16(), w.bfloat16(), disable=frozenset({"linear_bf16_fp32"}))[1] == []


def linear_of(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, w)


def biased(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, w, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (32, 64), (2, 3, 64)])
def test_few_rows_of_16_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(shape).to(dtype), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    for model, inputs in ((linear_of, (x, w)), (biased, (x, w, bias))):
        graph, (found,) = after(model, *inputs)
        assert tuple(found["w"].meta["val"].shape) == (48, 64)
        assert found["w"].op == "placeholder"
        assert (found["bias"] is None) == (model is linear_of)
        assert torch.equal(torch.fx.GraphModule({}, graph)(*inputs), model(*inputs))


def test_a_weight_that_lies_the_other_way() -> None:
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    graph, (found,) = after(lambda x, t: x @ t, x, w.t())
    assert found["w"].meta["val"].stride() == (64, 1)
    assert torch.equal(torch.fx.GraphModule({}, graph)(x, w.t()), x @ w.t())
    assert after(lambda x, t: x @ t, x, w.t().contiguous())[1] == []


@pytest.mark.parametrize(("rows", "count"), [(2, 1), (32, 1), (33, 0), (500, 0)])
def test_symbolic_rows_follow_those_that_were_traced(rows: int, count: int) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(rows, 64).bfloat16(), symbolic_context=kinds)
    w = mode.from_tensor(torch.randn(48, 64).bfloat16(), static_shapes=True)
    assert isinstance(x.shape[0], torch.SymInt)
    with mode:
        _, found = after(linear_of, x, w, mode="real")
    assert len(found) == count


def test_linears_that_stay() -> None:
    x, w = torch.randn(33, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    assert after(linear_of, x, w)[1] == []
    assert after(linear_of, x[:4].float(), w.float())[1] == []
    assert after(linear_of, x[:4, :60], w[:, :60])[1] == []
    assert after(lambda b, x, w: torch.addmm(b, x, w.t(), beta=2), w[:4, :48], x[:4], w)[1] == []
    assert after(lambda b, x, w: torch.addmm(b, x, w.t(), alpha=2), x[0, :48], x[:4], w)[1] == []
    assert after(lambda b, x, w: torch.addmm(b, x, w.t()), w[:4, :48], x[:4], w)[1] == []
    assert after(linear_of, x[:4], w, disable=frozenset({"linear"}))[1] == []
