"""The kernel of products with scales along K on the device: against float64, cut in many ways, and in a graph."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusionpass
from fusionpass.arch import Arch
from fusionpass.launch import Launch, Plain
from fusionpass.ops import block_scaled_mm, quantize
from fusionpass.ops.gemm.blocks import _dequantized
from fusionpass.ops.quant.scheme import Scheme

pytest.importorskip("triton")
from fusionpass.ops.gemm.blocks_triton import Cut
from tests.blocks import KERNEL, KINDS, arguments_for_product, check_product, exact, product_of

DEVICE = torch.device("cuda")
EXTREME = {
    "rows": (1, 7, 83, 512, 2048),
    "columns": (128, 1536, 4096, 13824),
    "k": (256, 1024, 3884, 13824),
}
CUTS = {
    1: [None, Cut(1, 4, 1024, warps=2, stages=1), Cut(1, 16, 256, splits=3, stages=1)],
    2: [None, Cut(16, 64, 128, splits=3), Cut(32, 128, 64, splits=2, warps=8, stages=4)],
    70: [None, Cut(64, 64, 64), Cut(128, 128, 128, grouped=4, warps=4), Cut(64, 256, 128, warps=8, stages=2)],
}


@pytest.mark.parametrize(("rows", "cut"), [(rows, cut) for rows, cuts in CUTS.items() for cut in cuts], ids=str)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_arguments(rows: int, cut: Cut | None, data: st.DataObject) -> None:
    arguments = data.draw(arguments_for_product("cuda", rows, 600, data.draw(st.sampled_from([128, 400, 4096]))))
    if cut is not None and (arguments["a"].shape[0] == 1) != (cut.rows == 1):
        cut = None
    check_product(Arch.of(DEVICE), arguments, cut)


def dense(arguments: dict[str, Any], name: str) -> torch.Tensor:
    codes, scale = arguments[name], arguments[f"{name}_scale"]
    values = _dequantized(codes, scale, Scheme.parse(arguments[f"{name}_scheme"]), None).double()
    given = arguments[f"{name}_global_scale"]
    return values if given is None else values * given.double()


def blocks_of(kind: str, rows: int, columns: int, k: int) -> dict[str, Any]:
    """With a last group that is not whole where K is no multiple of 128."""
    arguments = product_of(kind, rows, columns, -(-k // 128) * 128, "cuda")
    if k % 128:
        arguments |= {name: arguments[name][:, :k].contiguous() for name in "ab"}
    return arguments


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("k", EXTREME["k"])
@pytest.mark.parametrize("columns", EXTREME["columns"])
@pytest.mark.parametrize("rows", EXTREME["rows"])
def test_error_against_float64(rows: int, columns: int, k: int, kind: str) -> None:
    """Relative, of the result before it is rounded to bfloat16."""
    arguments = {**blocks_of(kind, rows, columns, k), "out_dtype": "float32"}
    launch, why = block_scaled_mm.plan(Arch.of(DEVICE), arguments)
    assert isinstance(launch, Launch), why
    expected = dense(arguments, "a") @ dense(arguments, "b").t()
    error = (launch.run()[0].double() - expected).norm() / expected.norm()
    assert error < 1e-3


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(4096, 4096), (1536, 7168), (136, 256)], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64, 300])
def test_unpacked_by_hand(rows: int, shape: tuple[int, int], kind: str) -> None:
    """As the dequantised reference to 1e-5 in float32; and swizzled as linear, bit for bit."""
    plain = product_of(kind, rows, *shape, "cuda", out_dtype="float32")
    blocked = product_of(f"{kind}_swizzled", rows, *shape, "cuda", out_dtype="float32")
    assert torch.equal(plain["a"].view(torch.uint8), blocked["a"].view(torch.uint8))
    results = []
    for arguments in (plain, blocked):
        launch, why = block_scaled_mm.plan(Arch.of(DEVICE), arguments)
        assert isinstance(launch, Launch), why
        results.append(launch.run()[0])
    assert torch.equal(*results)
    expected = dense(plain, "a") @ dense(plain, "b").t()
    assert (results[0].double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_called_as_an_op(rows: int, kind: str) -> None:
    arguments = product_of(kind, rows, 256, 1024, "cuda", out_dtype="float32")
    launch, why = block_scaled_mm.plan(Arch.of(DEVICE), arguments)
    assert isinstance(launch, Launch), why
    assert torch.equal(block_scaled_mm(**arguments), launch.run()[0])


def test_past_32_bit_offsets() -> None:
    """A weight of 2**31 codes and some."""
    k, columns = 8192, 2**18 + 64
    few = product_of("fp8", 3, 64, k, "cuda", b_scheme="fp8_group128", b_scale=torch.ones(64, k // 128, device="cuda"))
    b = torch.empty(columns, k, dtype=torch.float8_e4m3fn, device="cuda")
    b[-64:] = few["b"]
    scale = torch.ones(columns, k // 128, device="cuda")
    for rows in (3, 100):
        a = product_of("fp8", rows, 64, k, "cuda")
        given = {**few, "a": a["a"], "a_scale": a["a_scale"]}
        launch, _ = block_scaled_mm.plan(Arch.of(DEVICE), {**given, "b": b, "b_scale": scale})
        assert isinstance(launch, Launch)
        expected = dense(given, "a") @ dense(given, "b").t()
        assert (launch.run()[0][:, -64:].double() - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize("rows", [1, 8, 128])
def test_chain_under_dependent_launch(rows: int) -> None:
    """Each reads what the one before it wrote, and is launched before that is there: as with a wait in between."""
    arch = Arch.of(DEVICE)
    weights = [product_of("fp8", 1, 1024, 1024, "cuda") for _ in range(4)]

    def chain(wait: bool) -> list[torch.Tensor]:
        x, found = torch.linspace(-1, 1, rows * 1024, device="cuda").view(rows, 1024), []
        for weight in weights:
            q, scale = quantize(x.bfloat16(), scheme="fp8_group128")
            if wait:
                torch.cuda.synchronize()
            launch, _ = block_scaled_mm.plan(arch, {**weight, "a": q, "a_scale": scale}, KERNEL)
            assert isinstance(launch, Launch)
            found.append((launch if wait else launch.launching_early()).run()[0])
            if wait:
                torch.cuda.synchronize()
            x = found[-1]
        return found

    expected = chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(False)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [65, 66, 67, 68, 300, 2047, 2048])
def test_many_rows_by_cublas(rows: int) -> None:
    """Where it is chosen: on Hopper."""
    arguments = product_of("fp8", rows, 1536, 1024, "cuda")
    planned, why = block_scaled_mm.plan(Arch.of(DEVICE), arguments)
    if torch.cuda.get_device_capability() != (9, 0):
        assert isinstance(planned, Launch)
        return
    assert isinstance(planned, Plain), why
    expected, _ = exact(arguments)
    got = block_scaled_mm(**arguments).double()
    assert (got - expected).norm() <= 3e-3 * expected.norm()
    names = ("a", "b", "a_scale", "b_scale")
    compiled = fusionpass.compile(lambda *given: block_scaled_mm(*given) * 2, cache=False)
    with torch.no_grad():
        assert torch.equal(compiled(*(arguments[name] for name in names)).double(), got * 2)
    (record,) = fusionpass.report(compiled).fused
    assert record.backend == "cublas"


@pytest.mark.parametrize("shape", [(67, 1024), (2, 150, 1024), (2048, 1024)], ids=str)
def test_scales_as_cublas_reads_them(shape: tuple[int, ...]) -> None:
    """The quantisation in front writes them by column, and nothing transposes them."""
    weights = [product_of("fp8", 1, columns, 1024, "cuda") for columns in (1536, 256)]
    x = torch.randn(shape, device="cuda").bfloat16()

    def model(x: torch.Tensor, *given: torch.Tensor) -> list[torch.Tensor]:
        codes, scales = quantize(x, scheme="fp8_group128")
        flat = codes.reshape(-1, 1024), scales.reshape(-1, 8)
        return [block_scaled_mm(flat[0], w, flat[1], s) for w, s in zip(given[::2], given[1::2], strict=True)]

    given = [weight[name] for weight in weights for name in ("b", "b_scale")]
    compiled = fusionpass.compile(lambda *given: model(*given), cache=False)
    with torch.no_grad():
        got, expected = compiled(x, *given), model(x, *given)
    for actual, wanted in zip(got, expected, strict=True):
        assert torch.equal(actual, wanted)
    if torch.cuda.get_device_capability() == (9, 0):
        schemes = {record.op: record.scheme for record in fusionpass.report(compiled).fused}
        assert schemes["quantize"] == "fp8_group128,layout=column_major"
        assert [r.backend for r in fusionpass.report(compiled).fused if r.op == "block_scaled_mm"] == ["cublas"] * 2
