"""What torchao, transformers' compressed-tensors linears and diffusers really emit, traced from them and recognised."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

import fusionpass
from fusionpass import Config
from fusionpass.graphs import aten
from fusionpass.op import OPS
from fusionpass.ops import scaled_mm
from fusionpass.pipeline import early, late, run
from fusionpass.report.trace import GraphTrace
from tests.libraries import (
    RECOGNISED,
    VARIANTS,
    WIDTH,
    Gated,
    Normed,
    Trace,
    Variant,
    operands,
    random_inputs,
    same,
    trace,
)
from tests.models import LlamaNorm

SWAPPED = {
    aten.ceil.default: aten.floor.default,
    aten.ge.Scalar: aten.gt.Scalar,
    aten.gt.Scalar: aten.ge.Scalar,
    aten.lt.Scalar: aten.le.Scalar,
    aten.amax.default: aten.amin.default,
    aten.maximum.default: aten.minimum.default,
    aten.logical_or.default: aten.logical_and.default,
    aten.round.default: aten.floor.default,
    aten.bitwise_or.Tensor: aten.bitwise_and.Tensor,
    aten.__rshift__.Scalar: aten.__lshift__.Scalar,
}

every = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
recognised = pytest.mark.parametrize("variant", RECOGNISED.values(), ids=RECOGNISED)


def rows(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, WIDTH, dtype=torch.bfloat16)


def check_numbers(before: GraphModule, after: GraphModule, special: float | None = None) -> list[bool]:
    """For each operand of the matrix products and each result, whether it is what it was, with several draws."""
    pairs = []
    for seed in range(3):
        inputs = random_inputs(before, seed, special)
        pairs.append([same(a, b) for a, b in zip(operands(before, inputs), operands(after, inputs), strict=True)])
    return [all(equal) for equal in zip(*pairs, strict=True)]


def quantised(found: Trace) -> list[tuple[str, str]]:
    """The ops and their schemes, but for the products behind them."""
    return [(record.op, record.scheme) for record in found.report.fused if "scaled_mm" not in record.op]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(6,), (1,), (128,)], ids=str)
def test_alone(name: str, shape: tuple[int, ...]) -> None:
    variant = VARIANTS[name]
    found = trace(variant, variant.linear(), rows(*shape))
    # The only row's scale is the tensor's.
    scheme = VARIANTS["torchao_row" if name == "torchao_tensor" and shape == (1,) else name].scheme
    assert quantised(found) == ([("quantize", scheme)] if scheme else [])
    assert all(check_numbers(found.before, found.after))


SCALED = {"torchao_row", "torchao_tensor", "torchao_static", "compressed_tensors", "diffusers"}
"""The variants whose products have one scale for a matrix, or one for each row and column."""


@pytest.mark.parametrize("name", VARIANTS)
def test_the_product_is_the_op(name: str) -> None:
    found = trace(VARIANTS[name], VARIANTS[name].linear(), rows(6))
    products = [record.backend for record in found.report.fused if record.op == "scaled_mm"]
    assert products == (["triton"] if name in SCALED else [])


@every
def test_behind_a_norm(variant: Variant) -> None:
    found = trace(variant, Normed(variant.linear()), rows(6))
    fused = quantised(found)
    if variant.scheme and variant.folds:
        assert fused == [("rms_norm_quantize", variant.scheme)]
        assert not found.report.refused
        assert not found.report.missed
    else:
        assert fused == [("rms_norm", ""), *([("quantize", variant.scheme)] if variant.scheme else [])]
    assert all(check_numbers(found.before, found.after))


@every
def test_behind_a_gated_activation(variant: Variant) -> None:
    found = trace(variant, Gated(variant.linear()), rows(6), rows(6))
    fused = quantised(found)
    if variant.scheme and variant.folds:
        assert fused == [("silu_mul_quantize", variant.scheme)]
    else:
        assert fused == [("silu_mul", ""), *([("quantize", variant.scheme)] if variant.scheme else [])]
    assert all(check_numbers(found.before, found.after))


@pytest.mark.parametrize("name", [name for name in RECOGNISED if name != "torchao_static"])
def test_tokens_in_two_dimensions(name: str) -> None:
    """torchao's static linear takes rows only."""
    variant = VARIANTS[name]
    found = trace(variant, Normed(variant.linear()), rows(2, 3))
    assert [r.scheme for r in found.report.fused if "quantize" in r.op] == [variant.scheme]
    assert len(quantised(found)) == (1 if variant.folds else 2)
    assert all(check_numbers(found.before, found.after))


@recognised
def test_two_linears_behind_one_norm(variant: Variant) -> None:
    """What both are given is quantised once; two scales that were calibrated make two quantisations."""
    found = trace(variant, Normed(variant.linear(), variant.linear()), rows(6))
    schemes = [r.scheme for r in found.report.fused if "quantize" in r.op]
    assert schemes == [variant.scheme] * (2 if variant is VARIANTS["torchao_nvfp4_static"] else 1)
    assert all(check_numbers(found.before, found.after))


@pytest.mark.parametrize("name", ["torchao_mxfp8", "torchao_nvfp4_static"])
@pytest.mark.parametrize("tokens", [6, 128, 300])
def test_swizzled_scales_of_a_width_that_needs_padding(name: str, tokens: int) -> None:
    variant = VARIANTS[name]
    model = Normed(variant.linear(96), width=96)
    found = trace(variant, model, torch.zeros(tokens, 96, dtype=torch.bfloat16))
    assert quantised(found) == [("rms_norm_quantize", variant.scheme)]
    assert all(check_numbers(found.before, found.after))


@recognised
@pytest.mark.parametrize("special", [math.inf, math.nan, 3e38, 1e-39], ids=str)
def test_special_values(variant: Variant, special: float) -> None:
    found = trace(variant, variant.linear(), rows(6))
    equal = check_numbers(found.before, found.after, special)
    if "nvfp4" in variant.scheme and not (special < 1e38):
        # e2m1 has no NaN: torchao's bits give any code, ours is 6.0, and its scale is NaN in both.
        equal = equal[1:]
    assert all(equal)


@recognised
def test_other_arithmetic_is_another_scheme(variant: Variant) -> None:
    """Each number and each operation of the library's arithmetic, changed by itself, is not taken for its scheme."""
    before = trace(variant, variant.linear(), rows(6)).before
    normal = copy.deepcopy(before.graph)
    assert variant.scheme in passed(before, normal)
    left = {node.name for node in normal.nodes}
    taken = [node.name for node in before.graph.nodes if node.op == "call_function" and node.name not in left]
    changed = 0
    for name in taken:
        for graph in perturbed(before.graph, name):
            changed += 1
            assert variant.scheme not in passed(before, graph), f"{name} was changed"
    assert changed >= 2


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_compiled(name: str) -> None:
    """The library's own function behind a norm, through Inductor on the CPU, equals eager mode in every bit."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    from torchao.prototype.mx_formats.utils import to_blocked

    norm = LlamaNorm(WIDTH)

    def mxfp8(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales, codes = to_mx(norm(x), torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL, is_swizzled_scales=True)
        return codes.view(torch.uint8), scales.view(torch.uint8)

    def nvfp4(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales, codes = nvfp4_quantize(norm(x), 16, scale)
        return codes, to_blocked(scales).view(torch.uint8)

    function = {"mxfp8": mxfp8, "nvfp4": nvfp4}[name]
    x = torch.randn(7, WIDTH).bfloat16()
    x[1], x[2, :128] = 0, 0
    arguments = x, torch.tensor(0.002)
    compiled = fusionpass.compile(function, numerics="eager")
    pairs = list(zip(compiled(*arguments), function(*arguments), strict=True))
    (record,) = fusionpass.report(compiled).fused
    assert (record.op, "layout=swizzled" in record.scheme) == ("rms_norm_quantize", True)
    if torch.__version__ < "2.13":
        pytest.skip("Inductor's C++ keeps no bfloat16 roundings before torch 2.13")
    for actual, expected in pairs:
        assert torch.equal(actual, expected)


def passed(module: GraphModule, graph: Graph) -> list[str]:
    """The schemes of the ops in `graph` after all passes but the lowering, which are run on it in place."""
    graph.owning_module = module
    config, report = Config(), GraphTrace(0)
    passes = [*early(config, report), *late(config, report)]
    run([step for step in passes if step[0] != "lower"], graph, config, report, keep=False)
    ops = [(op.bind(n.args, n.kwargs), op) for n in graph.nodes if (op := OPS.get(n.target)) is not None]
    return [str(given["scheme"]) for given, op in ops if op is not scaled_mm]


def perturbed(graph: Graph, name: str) -> Iterator[Graph]:
    """Copies of the graph with one number of the named node changed, or its operation."""

    def twin() -> Node:
        return next(node for node in copy.deepcopy(graph).nodes if node.name == name)

    node = twin()
    if "asm_str" in node.kwargs:
        node.update_kwarg("asm_str", node.kwargs["asm_str"].replace(".rp.", ".rz."))
        yield node.graph
        return
    for i, argument in enumerate(node.target._schema.arguments[: len(node.args)]):
        if str(argument.type) == "number":
            changed = twin()
            value = changed.args[i]
            changed.update_arg(i, value + 1 if isinstance(value, int) else value * 1.01 + 1e-3)
            yield changed.graph
    if node.target in SWAPPED:
        node.target = SWAPPED[node.target]
        yield node.graph
