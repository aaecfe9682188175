"""The products' kernels through Triton's interpreter."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops import scaled_mm
from fusionpass.ops.gemm.stream import Cut
from tests.gemm import (
    FP8,
    INT8,
    arguments_for_product,
    arguments_for_products,
    check_linear,
    check_product,
    product_of,
)
from tests.profiles import share

# No programmatic dependent launch in these: the interpreter has no grids to wait for.
ARCH = Arch("sm_89")


@share(25)
@given(data=st.data())
def test_drawn_arguments(data: st.DataObject) -> None:
    arguments = data.draw(arguments_for_product("cpu", 40, 80, 320))
    cuts = st.builds(Cut, st.sampled_from([16, 32]), st.sampled_from([32, 64, 128]), st.sampled_from([1, 1, 2, 3, 20]))
    check_product(ARCH, arguments, data.draw(cuts))


@share(40)
@given(data=st.data())
def test_several_weights(data: st.DataObject) -> None:
    arguments = data.draw(arguments_for_products("cpu", 40, 70, 160))
    cuts = st.builds(Cut, st.sampled_from([16, 32]), st.sampled_from([32, 64]), st.sampled_from([1, 1, 2, 3]))
    check_product(ARCH, arguments, data.draw(st.one_of(st.none(), cuts)))


@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64])
def test_as_planned(dtype: torch.dtype, rows: int) -> None:
    check_product(ARCH, product_of(rows, 48, 272, dtype))


def test_int8_sums_that_float32_cannot_hold() -> None:
    """1100 products of 127 * 127 and one of 1."""
    arguments = product_of(1, 16, 1104, INT8, out_dtype="float32")
    arguments["a"].fill_(127)
    arguments["b"].fill_(127)
    arguments["a"][0, 1101:] = 0
    arguments["a"][0, 1100] = 1
    arguments["b"][1100] = 1
    arguments |= {name: torch.ones(()) for name in ("a_scale", "b_scale")}
    for cut in (Cut(16, 64), Cut(16, 64, splits=3), Cut(8, 64, parts=2), Cut(16, 32, splits=2, parts=4)):
        got = check_product(ARCH, arguments, cut)
        assert got.double().sub(1100 * 127 * 127 + 1).abs().max() <= 1


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_finite_stays_in_its_row(special: float, rows: int) -> None:
    arguments = product_of(rows, 20, 64, FP8)
    arguments["a_scale"] = torch.ones(rows, 1)
    arguments["a_scale"][-1] = special
    finite = check_finite(arguments)
    assert finite[:-1].all()
    assert not finite[-1].any()


def check_finite(arguments: dict[str, Any]) -> torch.Tensor:
    launch, reason = scaled_mm.plan(ARCH, arguments)
    assert launch is not None, reason
    return launch.run()[0].isfinite()


@pytest.mark.parametrize("cut", [None, Cut(16, 64), Cut(16, 64, splits=3), Cut(16, 64, splits=2, parts=2)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("k", [8, 72, 320])
def test_sixteen_bits(rows: int, k: int, cut: Cut | None) -> None:
    # The interpreter multiplies matrices of bfloat16 as if they were integers.
    check_linear(ARCH, rows, 50, k, cut, dtype=torch.bfloat16 if rows == 1 else torch.float16)
