"""Whole graphs: several sizes, writes, kernels that no CPU has, our own ops, and models."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph

from fusionpass import pipeline
from fusionpass.config import Config
from fusionpass.inductor import trace_graph
from fusionpass.op import OPS, Op, op
from fusionpass.ops import add, experts, quantize
from fusionpass.ops.quant import sample_scale
from fusionpass.report.trace import GraphTrace
from fusionpass.runtime.rows import row_dims, row_dims_by_symbol
from tests.kernels import KERNEL_OPS, arguments_for
from tests.models import LlamaNorm, static
from tests.moe import mixture
from tests.runtime.traced_rows import OTHER, N, trace

X, SQUARE = torch.ones(N, 8), torch.ones(8, 8)
aten = torch.ops.aten


def rows(graph: Graph, symbol: Any) -> Any:
    found = row_dims(graph, symbol)
    # The symbol's name is torch's choice.
    return found.replace(str(symbol), "s") if isinstance(found, str) else found


def test_each_symbol_for_itself() -> None:
    """Of [batch, tokens, width], a sum over tokens keeps the batch apart, a linear both."""
    graph, batch, tokens = trace(lambda x, w: (x @ w).sum(1), torch.ones(N, OTHER, 8), SQUARE)
    found = row_dims_by_symbol(graph)
    assert found[str(batch)] == (0,)
    assert "works along the rows, dimension 1 of self" in found[str(tokens)]
    graph, batch, tokens = trace(lambda x, w: F.linear(x, w).relu().transpose(0, 1), torch.ones(N, OTHER, 8), SQUARE)
    assert row_dims_by_symbol(graph) == {str(batch): (1,), str(tokens): (0,)}
    graph, batch, tokens = trace(lambda x: x.view(-1), torch.ones(N, OTHER))
    assert all("no dimension of their own" in found for found in row_dims_by_symbol(graph).values())


def test_an_input_in_an_expression() -> None:
    graph, symbol, _ = trace(lambda x: torch.cat([x, -x]).relu(), X)
    inner = Graph()
    given = inner.placeholder("x")
    given.meta["val"] = next(node for node in graph.nodes if node.target is aten.relu.default).meta["val"]
    inner.output((given,))
    assert rows(inner, symbol) == "x: the input has no dimension of s in [2*s, 8]"


def test_what_reaches_no_output_is_no_reason() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x.sum(0)
        return x * 2

    assert rows(*trace(function, X)[:2]) == (0,)


def test_a_stride_is_no_number_to_count_with() -> None:
    """Padding changes it, and it is a symbol of its own."""
    x = torch.ones(2, N, 13)[:, :, :OTHER]
    graph, first, second = trace(lambda x: x * 2, x)
    assert row_dims_by_symbol(graph) == {str(first): (1,), str(second): (2,)}
    graph, *counted = trace(lambda x: x * x.stride(0), x)
    assert all("do not determine" in rows(graph, symbol) for symbol in counted)


def test_a_stride_as_an_input() -> None:
    """As AOTAutograd gives it."""
    found: list[Any] = []

    def compiled(gm: Any, inputs: Any) -> Any:
        return trace_graph(gm, inputs, lambda graph: found.extend(row_dims_by_symbol(graph).values()))

    x = torch.ones(N, 13)[:, :8]
    torch._dynamo.mark_dynamic(x, 0)
    for function in (lambda x: x * 2, lambda x: x * x.stride(0)):
        torch.compile(function, backend=compiled)(x)
    proven, refused = found
    assert proven == (0,)
    assert "is a stride, and padding changes it" in refused


def test_the_first_reason_in_the_graph() -> None:
    found = rows(*trace(lambda x: (x * 2, x.cumsum(0), x.sum(0)), X)[:2])
    assert str(found).startswith("cumsum: ")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, c, w: c.copy_(w[0]).sum(), (None,)),
        (lambda x, c, w: (x + c.add_(1).sum(), c), (0, None)),
        (lambda x, c, w: c.copy_(x.sum(0)), "sum_1: "),
        (lambda x, c, w: (w.clone(), c.copy_(x[0]))[0], "select: "),
        (lambda x, c, w: (w.clone(), x.copy_(x * 2))[0], "aten.copy_.default writes rows of padding into x_1"),
        (lambda x, c, w: (w.clone(), x.zero_())[0], "writes rows of padding into x_1"),
        (lambda x, c, w: (w.clone(), c.add_(x.shape[0]))[0], "takes the number s as 'other'"),
        (lambda x, c, w: (w.clone(), w.index_put_((x[:, 0].long(),), x))[0], "writes rows of padding into w_1"),
    ],
)
@pytest.mark.parametrize("functional", [True, False])
def test_written_inputs(function: Any, expected: Any, functional: bool) -> None:
    """A tensor without rows may be written to, by what has none."""
    wrapped = torch.func.functionalize(function, remove="mutations") if functional else function
    found = rows(*trace(wrapped, X, torch.ones(8), SQUARE)[:2])
    if functional or isinstance(expected, tuple):
        assert found == expected if isinstance(expected, tuple) else expected in found
    else:
        assert isinstance(found, str)


def test_checks_of_rows_and_of_sizes() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        aten._assert_async.msg((x > 0).all(), "positive")
        return x * 2

    assert "all_1: " in rows(*trace(function, X, table={})[:2])

    def sized(x: torch.Tensor) -> torch.Tensor:
        aten._assert_scalar(x.shape[0] < 100, "few")
        aten._assert_tensor_metadata(x, dtype=torch.float32)
        return x * 2

    assert rows(*trace(sized, X, table={})[:2]) == (0,)


def test_unknown_ops() -> None:
    library = torch.library.Library("rows_test", "DEF")
    library.define("scale(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.impl("scale", lambda x: x * 2, "CompositeExplicitAutograd")
    scale = torch.ops.rows_test.scale
    expected = "scale: rows_test.scale.default is an op of which nothing is known"
    assert rows(*trace(lambda x: scale(x), X)[:2]) == expected
    assert rows(*trace(lambda x, w: x @ scale(w), X, SQUARE)[:2]) == expected
    graph, symbol, _ = trace(lambda x: x * 2, X)
    with graph.inserting_before(graph.output_node()):
        # It may write to what it is given, whoever reads its result.
        graph.call_function(torch.ops.higher_order.triton_kernel_wrapper_mutation, (next(iter(graph.nodes)),))
    assert "triton_kernel_wrapper_mutation is an op of which nothing is known" in rows(graph, symbol)


def test_ops_of_users() -> None:
    """They are what their reference is, which may write to what it has made itself."""
    options = {"outputs": ("y",), "sample": lambda *args: {}, "namespace": "rows_test"}

    def centred(x: torch.Tensor) -> torch.Tensor:
        made = x.clone()
        made[:, :4].sub_(x.mean(0)[:4])
        return made

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def found(function: Any) -> Any:
        made = op(**options)(function)
        try:
            return rows(*trace(lambda x: made.overload(x), X)[:2])
        finally:
            del OPS[made.overload]

    assert found(centred).startswith("centred: rows_test.centred.default is made of mean: aten.mean.dim works along")
    assert found(doubled) == (0,)


def test_an_op_of_one_tensor_twice() -> None:
    """What it is made of has one input less."""
    for function in (lambda x, y: (add(x, y), add(x, x)), lambda x, y: (add(x, x), add(x, y))):
        assert rows(*trace(function, X, X.clone())[:2]) == (0, 0)


def called(target: Any, *args: Any, val: Any, **kwargs: Any) -> Graph:
    """A graph of one call; its tensors are inputs."""
    graph = Graph()
    nodes: list[Any] = []
    for i, arg in enumerate(args):
        nodes.append(graph.placeholder(f"i{i}") if isinstance(arg, torch.Tensor) else arg)
        if isinstance(arg, torch.Tensor):
            nodes[-1].meta["val"] = arg
    call = graph.call_function(target, tuple(nodes), kwargs)
    call.meta["val"] = val
    graph.output([call])
    if isinstance(val, tuple):
        with graph.inserting_before(graph.output_node()):
            results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(val))]
        for result, one in zip(results, val, strict=True):
            result.meta["val"] = one
        graph.output_node().args = (results[:2],)
    return graph


def test_kernels_of_gpus() -> None:
    traced, symbol, _ = trace(lambda x: x * 2, X)
    fake = traced.find_nodes(op="placeholder")[0].meta["val"]
    n = fake.shape[0]

    def empty(*shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with fake.fake_mode:
            return torch.empty(shape, dtype=dtype)

    def found(target: Any, *args: Any, val: Any) -> Any:
        return rows(called(target.default, *args, val=val), symbol)

    seed, batch, sums = empty(), empty(n, 2, 16, 8), empty(n, 2, 16)
    flash, many = aten._scaled_dot_product_flash_attention, (batch, sums, None, None, 16, 16, seed, seed, seed)
    assert found(flash, batch, batch, batch, val=many) == (0, 0)
    assert found(flash, batch, batch, batch, 0.0, True, val=many) == (0, 0)
    assert "draws random numbers" in found(flash, batch, batch, batch, 0.1, val=many)
    efficient, long, key = aten._scaled_dot_product_efficient_attention, empty(1, 2, n, 8), empty(1, 2, 5, 8)
    few = (long, empty(1, 2, n), seed, seed)
    assert found(efficient, long, key, key, None, True, val=few) == (2, 2)
    assert found(efficient, long, key, key, empty(1, 1, n, 5), True, val=few) == (2, 2)
    assert "mixes the rows" in found(efficient, long, key, key, empty(1, 1, 1, n), True, val=few)
    assert "counts positions within the rows" in found(efficient, long, key, key, None, True, 0.0, True, val=few)
    # Sums that are padded to a multiple of 32 are no rows.
    assert isinstance(found(efficient, long, key, key, None, True, val=(long, empty(1, 2, (n + 31) // 32 * 32))), str)
    packed, third, lengths = aten._flash_attention_forward, (batch, sums, seed, seed, seed), empty(3, dtype=torch.int32)
    assert found(packed, batch, batch, batch, None, None, 2, 2, 0.0, True, False, val=third) == (0, 0)
    refused = found(packed, batch, batch, batch, lengths, lengths, 2, 2, 0.0, True, False, val=third)
    assert "counts positions within the rows" in refused
    fp8, exponents, one = torch.float8_e4m3fn, torch.float8_e8m0fnu, empty(1, 1)
    codes, weight, groups, out = empty(n, 256, dtype=fp8), empty(256, 16, dtype=fp8), empty(n, 2), empty(n, 16)
    assert found(aten._scaled_mm, codes, weight, groups, one, val=out) == (0,)
    assert found(aten._scaled_mm, codes, weight, one, one, val=out) == (0,)
    assert "mixes the rows" in found(aten._scaled_mm, codes, weight, empty(2, n), one, val=out)
    assert "layout is not known" in found(aten._scaled_mm, codes, weight, empty(n, 8, dtype=exponents), one, val=out)


SCHEMES = ("fp8_static", "fp8_token", "fp8_group128", "fp8_group128,layout=column_major", "fp8_block128", "mxfp8",
           "mxfp8,layout=swizzled", "nvfp4", "nvfp4,layout=swizzled", "int8_token,divisor=127.5")  # fmt: skip
SHAPES = ((N, 128), (N, 256), (2, N, 128), (N, 3, 128))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str) -> None:
    """Blocks of 128 rows share scales, or a place in memory: an output whose rows are none."""
    made = quantize.sample(N, 256, torch.float32, "cpu", torch.Generator().manual_seed(0))
    scale = sample_scale(scheme, "cpu")
    tensors = [made["x"], *([] if scale is None else [scale])]
    found = rows(*trace(lambda *given: quantize.overload(*[*given, None][:2], scheme), *tensors)[:2])
    if "swizzled" in scheme or "block128" in scheme:
        assert "quantize: fusionpass.quantize.default is made of constant_pad_nd: aten.constant_pad_nd.default" in found
        assert "pads the rows, dimension 0 of self [s, " in found
    else:
        assert found == ((0,) if scheme == "fp8_static" else (0, 0))


NAMES = ("x", "up", "down", "ids", "weights")


def test_a_mixture_of_experts_is_row_by_row() -> None:
    """Though it sorts pairs of all tokens; and run with padding it is, whomever that asks for."""
    given = [mixture(N, 32, 16)[name] for name in NAMES]
    assert rows(*trace(lambda *given: experts.overload(*given), *given)[:2]) == (0,)
    x, up, down, ids, weights = given
    expected = experts(*given)
    for expert in (0, -1, 99):
        padded = [F.pad(x, (0, 0, 0, 3), value=torch.nan), up, down, F.pad(ids, (0, 0, 0, 3), value=expert)]
        assert torch.equal(experts(*padded, F.pad(weights, (0, 0, 0, 3)))[:N], expected)


def test_a_mixture_is_not_by_its_columns() -> None:
    given = [mixture(4, N, 16, dtype=torch.float32)[name] for name in NAMES]
    found = rows(*trace(lambda *given: experts.overload(*given), *given)[:2])
    assert isinstance(found, str)


@pytest.mark.parametrize("one", KERNEL_OPS, ids=str)
@settings(max_examples=settings.default.max_examples // 50)
@given(st.data())
def test_our_ops(one: Op, data: st.DataObject) -> None:
    """Every op of every scheme is row by row, but for blocks of rows; and run with NaN as padding it is."""
    shape = data.draw(st.sampled_from(SHAPES))
    fitting = SCHEMES if len(shape) == 2 else tuple(s for s in SCHEMES if s != "fp8_block128")
    arguments = data.draw(arguments_for(one, shape, "cpu", fitting))
    tensors = {k: v.contiguous() for k, v in arguments.items() if isinstance(v, torch.Tensor)}

    def call(function: Any, *given: torch.Tensor) -> Any:
        return function(**{**arguments, **dict(zip(tensors, given, strict=True))})

    def listed(result: Any) -> list[torch.Tensor]:
        return [result] if isinstance(result, torch.Tensor) else list(result)

    graph, symbol, _ = trace(lambda *given: call(one.overload, *given), *tensors.values())
    assert any(node.target is one.overload for node in graph.nodes)
    found, scheme = rows(graph, symbol), str(arguments.get("scheme", ""))
    if "swizzled" in scheme or "block128" in scheme:
        assert found.startswith(f"{one.name}: {one.overload} is made of constant_pad_nd: ")
        return
    dim = shape.index(N)
    expected = listed(call(one.reference, *tensors.values()))
    assert found == (dim,) * len(expected)
    assert found == (dim,) * len(one.outputs(arguments))
    given = [_padded(v, v.shape.index(N)) if N in v.shape else v for v in tensors.values()]
    for want, other in zip(expected, listed(call(one.reference, *given)), strict=True):
        same = other.narrow(dim, 0, N)
        torch.testing.assert_close(same.double(), want.double(), rtol=0, atol=0, equal_nan=True)


def _padded(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([tensor, torch.full_like(tensor.narrow(dim, 0, 5), torch.nan)], dim)


class Layer(nn.Module):
    """A decoder layer with static FP8 inputs of its MLP, in bfloat16."""

    def __init__(self, heads: int = 2, head_dim: int = 16) -> None:
        super().__init__()
        self.shape, width = (heads, head_dim), heads * head_dim
        self.norms = nn.ModuleList([LlamaNorm(width), LlamaNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width).bfloat16(), nn.Linear(width, width).bfloat16()
        self.up, self.down = nn.Linear(width, 4 * width).bfloat16(), nn.Linear(2 * width, width).bfloat16()
        self.scale = nn.Parameter(torch.tensor(0.02), requires_grad=False)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[batch, tokens, width] → query, key and value, [batch, heads, tokens, head_dim]."""
        packed = self.qkv(self.norms[0](x)).unflatten(-1, (3, *self.shape))
        return [t.transpose(1, 2) for t in packed.unbind(2)]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The reverse, in between."""
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def mlp(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [batch, tokens, width]."""
        residual = x + residual
        codes = static(self.norms[1](residual), self.scale)
        gate, up = self.up(codes.bfloat16()).chunk(2, -1)
        return self.down(F.silu(gate) * up), residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width]."""
        x, residual = self.mlp(self.attend(*self.project(x)), x)
        return x + residual


def proven(function: Any, *tensors: torch.Tensor) -> dict[int, Any]:
    """What is proven of the graphs that Inductor would get, once with our ops in them, by the size that was traced."""
    found: list[dict[int, Any]] = []
    ops: list[Any] = []

    def run(graph: Graph) -> None:
        config = Config()
        for passes in ([], pipeline.early(config, GraphTrace(0)), pipeline.late(config, GraphTrace(0))[:1]):
            for _, step in passes:
                step(graph)
            by_name = {str(e.node.expr): e.node.hint for n in graph.find_nodes(op="placeholder")
                       for e in getattr(n.meta["val"], "shape", ()) if isinstance(e, torch.SymInt)}  # fmt: skip
            found.append({by_name[name]: dims for name, dims in row_dims_by_symbol(graph).items()})
        ops.extend(node.target for node in graph.nodes if "fusionpass" in str(node.target))

    torch.compile(function, backend=lambda gm, inputs: trace_graph(gm, inputs, run))(*tensors)
    assert ops
    assert all(type(a[size]) is type(b[size]) for a in found for b in found for size in a)
    return found[-1]


@torch.no_grad()
def test_a_layer_in_pieces_and_whole() -> None:
    layer, x, residual = Layer(), *torch.randn(2, N, OTHER, 32).bfloat16().unbind()
    for tensor in (x, residual):
        torch._dynamo.mark_dynamic(tensor, (0, 1))
    assert proven(layer.project, x) == {N: (0, 0, 0), OTHER: (2, 2, 2)}
    assert proven(layer.mlp, x, residual) == {N: (0, 0), OTHER: (1, 1)}
    whole = proven(layer, x)
    assert whole[N] == (0,)
    assert "attention" in whole[OTHER]
    assert "mixes the rows, dimension 2 of query" in whole[OTHER]
