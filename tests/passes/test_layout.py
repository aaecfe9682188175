"""layout: what is behind linear scales is swizzled by the op itself, and nothing else is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.op import OPS
from fusionpass.ops.quant import quantize
from fusionpass.ops.quant.layout import swizzled
from fusionpass.passes import layout
from fusionpass.passes.layout import lay_out

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


def traced(model: Callable[[torch.Tensor], object], x: torch.Tensor) -> tuple[Graph, torch.fx.GraphModule]:
    module = make_fx(torch.func.functionalize(model), select_decomp_table(), tracing_mode="fake")(x)
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
