"""The products' kernels on the device: against float64, and under programmatic dependent launch."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.launch import Launch
from fusionpass.ops import linear_bf16_fp32, quantize, scaled_mm
from fusionpass.testing import difference

pytest.importorskip("triton")
from fusionpass.ops.gemm.dispatch import FEW
from fusionpass.ops.gemm.stream import Cut, refuse_cut
from tests.gemm import (
    FP8,
    INT8,
    arguments_for_product,
    arguments_for_products,
    check_linear,
    check_product,
    product_of,
)

DEVICE = torch.device("cuda")
# One row multiplies one by one; 16, 32 and 64 are what the others are padded to.
CUTS = [
    None, Cut(8, 512), Cut(16, 256, splits=3), Cut(64, 128, splits=2, warps=8, stages=3), Cut(128, 128, stages=2),
    Cut(32, 256, stages=3, parts=2), Cut(16, 128, parts=4), Cut(32, 128, splits=2, stages=3, parts=2),
]  # fmt: skip

SHAPES = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (2880, 5120), (1001, 7168)]


@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_arguments(dtype: torch.dtype, rows: int, cut: Cut | None, data: st.DataObject) -> None:
    k = data.draw(st.sampled_from([16, 64, 272, 4096]))
    arguments = data.draw(arguments_for_product("cuda", rows, 600, k, (dtype,)))
    one = arguments["a"].shape[0] == 1
    check_product(
        Arch.of(DEVICE), arguments, cut if cut is not None and refuse_cut(cut, 1 if one else 2, 1) is None else None
    )


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("cut", [None, Cut(64, 128, splits=3, stages=3), Cut(32, 128, stages=3, parts=2)], ids=str)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_several_weights(rows: int, cut: Cut | None, data: st.DataObject) -> None:
    k = data.draw(st.sampled_from([16, 272, 4096]))
    arguments = data.draw(arguments_for_products("cuda", rows, 600, k))
    check_product(Arch.of(DEVICE), arguments, cut)


def made(rows: int, columns: int, k: int, dtype: torch.dtype = FP8, **changes: Any) -> dict[str, Any]:
    return product_of(rows, columns, k, dtype, "cuda", **changes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_shapes_of_models(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    check_product(Arch.of(DEVICE), made(rows, *shape, dtype))


@pytest.mark.parametrize("single", [False, True])
def test_within_its_tolerance_of_the_reference(single: bool) -> None:
    one = {name: torch.tensor(0.5, device="cuda") for name in ("a_scale", "b_scale")}
    given = made(16, 6144, 4096, **(one if single else {}))
    tolerance = scaled_mm.tolerance["product"]
    found = difference(scaled_mm(**given), scaled_mm.reference(**given), tolerance)
    assert found.within(tolerance), found


def test_past_32_bit_offsets() -> None:
    """A weight of 2**31 elements and some."""
    k, columns = 8192, 2**18 + 64
    given = made(3, 64, k)
    b = torch.empty(columns, k, dtype=FP8, device="cuda")
    b[-64:] = given["b"].t()
    scale = torch.ones(1, columns, device="cuda")
    scale[:, -64:] = given["b_scale"]
    launch, _ = scaled_mm.plan(Arch.of(DEVICE), {**given, "b": b.t(), "b_scale": scale})
    assert isinstance(launch, Launch)
    assert torch.equal(launch.run()[0][:, -64:], check_product(Arch.of(DEVICE), given))


def test_chain_under_dependent_launch() -> None:
    """Each reads what the one before it wrote, and is launched before that is there: as with a wait in between."""
    arch = Arch.of(DEVICE)
    weights = [made(8, 4096, 4096)["b"] for _ in range(4)]
    given = made(8, 4096, 4096)

    def chain(wait: bool) -> list[torch.Tensor]:
        x, found = given["a"].float(), []
        for weight in weights:
            q, scale = quantize(x.bfloat16(), scheme="fp8_token")
            if wait:
                torch.cuda.synchronize()
            launch, _ = scaled_mm.plan(arch, {**given, "a": q, "a_scale": scale, "b": weight})
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


def test_more_rows_go_to_cublas() -> None:
    assert scaled_mm.plan(Arch.of(DEVICE), made(FEW + 1, 64, 64))[0] is None
    given = made(FEW + 1, 4096, 4096)
    assert torch.equal(scaled_mm(**given), scaled_mm.reference(**given))


@pytest.mark.parametrize("shape", [(768, 6144), (384, 3072), (256, 7168), (1001, 2888), (151936, 4096)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 64])
def test_bfloat16(rows: int, shape: tuple[int, int]) -> None:
    check_linear(Arch.of(DEVICE), rows, *shape, device="cuda")


@pytest.mark.parametrize("rows", [65, 512])
def test_bfloat16_of_many_rows(rows: int) -> None:
    """cuBLAS's, as the op's reference asks for it."""
    x, w = (torch.randn(n, 7168, device=DEVICE).bfloat16() for n in (rows, 256))
    exact = x.double() @ w.double().t()
    for algo in ("auto", "cublas", "upcast"):
        got = linear_bf16_fp32(x, w, algo)
        assert got.dtype == torch.float32
        assert ((got.double() - exact).abs() <= 7168 * 2.0**-24 * (x.double().abs() @ w.double().abs().t())).all(), algo
    with pytest.raises(ArgumentError, match=f"triton cannot: {rows} rows"):
        linear_bf16_fp32(x, w, "triton")
