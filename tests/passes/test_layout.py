"""layout: what is behind linear scales is swizzled by the op itself, and nothing else is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass.arch import Arch
from fusionpass.op import OPS
from fusionpass.ops import block_scaled_mm
from fusionpass.ops.quant import quantize
from fusionpass.ops.quant.layout import swizzled
from fusionpass.passes import layout
from fusionpass.passes.layout import lay_out, lay_out_by_column

Rearrange = Callable[[torch.Tensor], torch.Tensor]


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """The same by another way: padded by a write, two permutations, one dimension, read as exponents."""
    rows, groups = scales.shape
    down, across = -(-rows // 128), -(-groups // 4)
    padded = torch.zeros(down * 128, across * 4, dtype=torch.uint8)
    padded[:rows, :groups] = scales
    blocks = padded.view(down, 128, across, 4).permute(0, 2, 1, 3).reshape(-1, 4, 32, 4).transpose(1, 2)
    return blocks.reshape(-1).view(torch.float8_e8m0fnu)


def in_place(scales: torch.Tensor) -> torch.Tensor:
    """Padded, and left where they are."""
    return F.pad(scales, (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128))


def of_rows(scales: torch.Tensor) -> torch.Tensor:
    """Blocks of 128 × 4 as they lie, without the order inside them."""
    full = in_place(scales)
    return full.view(-1, 128, full.shape[1] // 4, 4).permute(0, 2, 1, 3).reshape(full.shape)


def padded_with_ones(scales: torch.Tensor) -> torch.Tensor:
    rows, groups = scales.shape
    full = F.pad(scales, (0, -groups % 4, 0, -rows % 128), value=1)
    return full.view(-1, 4, 32, full.shape[1] // 4, 4).permute(0, 3, 2, 1, 4).reshape(full.shape)


def one_more(scales: torch.Tensor) -> torch.Tensor:
    return swizzled(scales + 1)


def traced(model: Callable[..., object], *given: torch.Tensor) -> tuple[Graph, torch.fx.GraphModule]:
    module = make_fx(torch.func.functionalize(model), select_decomp_table(), tracing_mode="fake")(*given)
    module.graph.eliminate_dead_code()
    return module.graph, module


def schemes(graph: Graph) -> list[str]:
    return [op.bind(n.args, n.kwargs)["scheme"] for n in graph.nodes if (op := OPS.get(n.target)) is not None]


@pytest.mark.parametrize("shape", [(6, 256), (128, 128), (300, 96), (1, 32)], ids=str)
@pytest.mark.parametrize("rearrange", [swizzled, tiled], ids=lambda f: f.__name__)
def test_swizzled_by_the_op(rearrange: Rearrange, shape: tuple[int, int]) -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = quantize(x, scheme="mxfp8")
        return codes, rearrange(scales)

    x = torch.randn(shape).bfloat16()
    graph, module = traced(model, x)
    lay_out(graph)
    graph.lint()
    assert schemes(graph) == ["mxfp8,layout=swizzled"]
    assert "permute" not in str(graph)
    module.recompile()
    for actual, expected in zip(module(x), model(x), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("rearrange", [in_place, of_rows, padded_with_ones, one_more], ids=lambda f: f.__name__)
def test_another_order_stays(rearrange: Rearrange) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return rearrange(quantize(x, scheme="mxfp8")[1])

    graph, _ = traced(model, torch.randn(200, 512).bfloat16())
    before = str(graph)
    lay_out(graph)
    assert str(graph) == before


def test_scales_that_others_read_stay() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, scales = quantize(x, scheme="mxfp8")
        return swizzled(scales), scales

    graph, _ = traced(model, torch.randn(4, 256).bfloat16())
    lay_out(graph)
    assert schemes(graph) == ["mxfp8"]


def test_nothing_is_run_where_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's scales are large, and there are many of them."""
    monkeypatch.setattr(layout, "swizzled", None)
    graph, _ = traced(lambda x: [part + 1 for part in quantize(x, scheme="mxfp8")], torch.randn(4, 256).bfloat16())
    lay_out(graph)
    assert schemes(graph) == ["mxfp8"]


@pytest.mark.parametrize("rearrange", [swizzled, lambda scales: scales.view(torch.int8)])
def test_sizes_that_are_not_known(rearrange: Rearrange) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return rearrange(quantize(x, scheme="mxfp8")[1])

    graph = make_fx(model, tracing_mode="symbolic")(torch.randn(4, 256).bfloat16()).graph
    lay_out(graph)
    assert schemes(graph) == ["mxfp8"]


H100 = Arch("sm_90")
COLUMNS = "fp8_group128,layout=column_major"
WEIGHTS = [t for n in (48, 128, 40) for t in quantize(torch.randn(n, 512), scheme="fp8_block128")]
"""The codes and the scales of three."""


def several(x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    """Products of one quantisation, as linears call them."""
    codes, scales = quantize(x, scheme="fp8_group128")
    flat = codes.reshape(-1, 512), scales.reshape(-1, 4)
    pairs = zip(weights[::2], weights[1::2], strict=True)
    return [block_scaled_mm(flat[0], w, flat[1], s).view(*x.shape[:-1], w.shape[0]) for w, s in pairs]


def all_schemes(graph: Graph) -> list[str]:
    """Of quantisations, then of what products read."""
    found = graph.find_nodes(op="call_function", target=block_scaled_mm.overload)
    made = graph.find_nodes(op="call_function", target=quantize.overload)
    bound = [*(quantize.bind(n.args, n.kwargs)["scheme"] for n in made)]
    return [*bound, *(str(block_scaled_mm.bind(n.args, n.kwargs)["a_scheme"]) for n in found)]


@pytest.mark.parametrize("shape", [(65, 512), (2, 40, 512), (1, 3, 64, 512)], ids=str)
def test_by_column_where_cublas_may_read_them(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).bfloat16()
    graph, module = traced(several, x, *WEIGHTS[:4])
    lay_out_by_column(graph, H100)
    graph.lint()
    assert all_schemes(graph) == [COLUMNS] * 3
    for node in graph.find_nodes(op="call_function", target=block_scaled_mm.overload):
        scales = node.args[2].meta["val"]
        assert scales.stride() == (1, -(-scales.shape[0] // 4) * 4)
    module.recompile()
    for actual, expected in zip(module(x, *WEIGHTS[:4]), several(x, *WEIGHTS[:4]), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "rows", "weights"),
    [("sm_90", 64, WEIGHTS[:4]), ("sm_100", 68, WEIGHTS[:4]), ("cpu", 68, WEIGHTS[:4]), ("sm_90", 68, WEIGHTS[4:])],
    ids=["few rows", "another target", "a CPU", "40 columns"],
)
def test_by_row_where_our_kernel_reads_them(name: str, rows: int, weights: list[torch.Tensor]) -> None:
    graph, _ = traced(several, torch.randn(rows, 512).bfloat16(), *weights)
    before = str(graph)
    lay_out_by_column(graph, Arch(name))
    assert str(graph) == before


def test_by_row_on_a_device_without_a_name() -> None:
    graph, _ = traced(several, *(t.to("meta") for t in (torch.randn(68, 512).bfloat16(), *WEIGHTS[:4])))
    before = str(graph)
    lay_out_by_column(graph)
    assert str(graph) == before


@pytest.mark.parametrize("which", ["output", "weight", "sum"])
def test_scales_that_others_read_stay_by_row(which: str) -> None:
    def model(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        codes, scales = quantize(x, scheme="fp8_group128")
        made = [block_scaled_mm(codes, w, scales, s)]
        if which == "output":
            return [*made, scales]
        if which == "weight":
            return [*made, block_scaled_mm(codes, codes, scales, scales, "fp8_group128", "fp8_group128")]
        return [*made, scales + 1]

    graph, _ = traced(model, torch.randn(128, 512).bfloat16(), *WEIGHTS[2:4])
    before = str(graph)
    lay_out_by_column(graph, H100)
    assert str(graph) == before


def test_views_that_need_rows_side_by_side_stay() -> None:
    """Four rows of 512 read as one of 2048: no view of columns."""

    def model(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        codes, scales = quantize(x, scheme="fp8_group128")
        return block_scaled_mm(codes.view(-1, 2048), w, scales.view(-1, 16), s)

    weight = quantize(torch.randn(128, 2048), scheme="fp8_block128")
    graph, _ = traced(model, torch.randn(512, 512).bfloat16(), *weight)
    lay_out_by_column(graph, H100)
    assert all_schemes(graph) == ["fp8_group128"] * 2


def test_by_column_for_any_number_of_rows() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = [torch.randn(1, 70, 512).bfloat16(), *WEIGHTS[:4]]
    static, dynamic = DimDynamic.STATIC, DimDynamic.DYNAMIC
    contexts = [StatelessSymbolicContext(dims) for dims in ([static, dynamic, static], *[[static, static]] * 4)]
    fake = [mode.from_tensor(t, symbolic_context=context) for t, context in zip(given, contexts, strict=True)]
    with mode:
        module = make_fx(several)(*fake)
    module.graph.eliminate_dead_code()
    lay_out_by_column(module.graph, H100)
    for guard in mode.shape_env.guards:  # type: ignore[union-attr]
        (rows,) = guard.expr.free_symbols
        assert all(guard.expr.subs(rows, size) for size in range(1, 300)), guard
    assert all_schemes(module.graph) == [COLUMNS] * 3
    module.recompile()
    other = torch.randn(1, 9, 512).bfloat16(), *WEIGHTS[:4]
    for actual, expected in zip(module(*other), several(*other), strict=True):
        assert torch.equal(actual, expected)
