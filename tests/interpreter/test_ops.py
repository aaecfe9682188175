import dataclasses

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.ops import add_rms_norm_quantize, quantize, rms_norm_quantize
from tests.kernels import KERNEL_OPS, arguments_for, check, shapes
from tests.profiles import share

# No programmatic dependent launch in these: the interpreter has no grids to wait for.
FN, FNUZ = Arch("sm_89"), Arch("gfx942")
SCHEMES = ("fp8_static", "fp8_static,rounding=divide")
FNUZ_SCHEME = "fp8_static,dtype=float8_e4m3fnuz"
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 255, 576]))
slow = share(50)
newer = pytest.mark.skipif(triton.__version__ < "3.8", reason="the interpreter has e4m3fnuz from Triton 3.8")


@pytest.mark.parametrize("op", KERNEL_OPS, ids=lambda op: op.name)
@slow
@given(data=st.data())
def test_kernel_equals_reference(op, data):
    shape = data.draw(shapes(5, WIDTHS))
    check(op, FN, data.draw(arguments_for(op, shape, "cpu", SCHEMES)), early=data.draw(st.booleans()))


@newer
@pytest.mark.parametrize("op", [quantize, rms_norm_quantize, add_rms_norm_quantize], ids=lambda op: op.name)
@share(60)
@given(data=st.data())
def test_kernel_equals_reference_in_e4m3fnuz(op, data):
    shape = data.draw(shapes(4, WIDTHS))
    check(op, FNUZ, data.draw(arguments_for(op, shape, "cpu", (FNUZ_SCHEME, FNUZ_SCHEME + ",rounding=divide"))))


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
def test_any_number_of_rows_a_program(tokens, rows):
    generator = torch.Generator().manual_seed(tokens)
    arguments = add_rms_norm_quantize.bind(
        (), add_rms_norm_quantize.sample(tokens, 80, torch.bfloat16, "cpu", generator)
    )
    launch, _ = add_rms_norm_quantize.plan(FN, arguments)
    cut = dataclasses.replace(launch, args={**launch.args, "ROWS": rows}, grid=(-(-tokens // rows),))
    for ours, theirs in zip(cut.run(), add_rms_norm_quantize.reference(**arguments), strict=True):
        assert torch.equal(ours.float(), theirs.float())


def test_infinities_saturate_and_nan_stays_nan():
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1e30, -0.0, 448.0, 1.0, 464.0]])
    launch = quantize.plan(FN, {"x": x, "scale": torch.tensor(1.0), "scheme": "fp8_static"})[0]
    assert isinstance(launch, Launch)
    codes = launch.run()[0].float()
    assert codes[0, 2].isnan()
    assert codes[0, [0, 1, 3, 4, 5, 6, 7]].tolist() == [448.0, -448.0, 448.0, 0.0, 448.0, 1.0, 448.0]


def test_every_code_comes_back_from_its_own_value():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = codes.float()[None]
    launch = quantize.plan(FN, {"x": x, "scale": torch.tensor([1.0]), "scheme": "fp8_static"})[0]
    back = launch.run()[0]
    assert torch.equal(back.float().nan_to_num(1000), x.nan_to_num(1000))
