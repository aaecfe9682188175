"""The quantisation kernel and its epilogue against the reference, bit for bit, for every scheme."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops import quantize
from fusionpass.ops.quant import Scheme, sample_scale
from fusionpass.ops.quant.arithmetic import biased_exponent
from fusionpass.ops.quant.epilogue import biased_exponent as kernel_exponent
from tests.kernels import arguments_for, check, shapes
from tests.profiles import NIGHTLY, by_night, share
from tests.schemes import OVERRIDES, combinations, written

FN, FNUZ = Arch("sm_89"), Arch("gfx942")
KERNEL = [name for name in OVERRIDES if "block128" not in name]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = st.one_of(st.integers(1, 300), st.sampled_from([96, 128, 255, 576, 2176]))
slow = share(100)
newer = pytest.mark.skipif(triton.__version__ < "3.8", reason="the interpreter has e4m3fnuz from Triton 3.8")


def schemes(name, fnuz):
    """Every override but those that another dtype of codes rules out."""
    choices = [c for c in combinations(name) if (c.get("dtype") == "float8_e4m3fnuz") == fnuz]
    return tuple(written(name, choice) for choice in choices)


def rows_of(dtype, rows, width):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator) * 2.0 ** (torch.arange(rows) % 20 - 10)[:, None]
    x[0] = 0
    if rows > 3:
        x[1, width // 2], x[2, 1], x[3, :64] = -torch.inf, torch.nan, 0
    return x.to(dtype)


@pytest.mark.parametrize("name", KERNEL)
@slow
@given(data=st.data())
def test_kernel_equals_reference(name, data):
    shape = data.draw(shapes(5, WIDTHS))
    arguments = data.draw(arguments_for(quantize, shape, "cpu", schemes(name, fnuz=False)))
    check(quantize, FN, arguments, early=data.draw(st.booleans()) and arguments["scale"] is not None)


@newer
@pytest.mark.parametrize("name", ["fp8_static", "fp8_token", "fp8_group128"])
@slow
@given(data=st.data())
def test_kernel_equals_reference_in_e4m3fnuz(name, data):
    shape = data.draw(shapes(4, WIDTHS))
    check(quantize, FNUZ, data.draw(arguments_for(quantize, shape, "cpu", schemes(name, fnuz=True))))


@pytest.mark.parametrize("name", KERNEL)
def test_every_override(name):
    """Each written once, on rows of zeros, of an infinity and of a NaN, whatever else is drawn; by day every sixth."""
    for i, text in enumerate(schemes(name, fnuz=False)[:: 1 if NIGHTLY else 6]):
        x = rows_of(DTYPES[i % 3], 6, 256)
        check(quantize, FN, {"x": x, "scale": sample_scale(text, "cpu"), "scheme": text})


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize(("rows", "groups"), [(0, 5), (1, 1), (3, 37), (127, 3), (128, 4), (131, 6)])
def test_padding_of_swizzled_scales_is_written(name, rows, groups):
    text = f"{name},layout=swizzled"
    x = torch.randn(rows, groups * Scheme.parse(name).group).bfloat16()
    check(quantize, FN, {"x": x, "scale": sample_scale(text, "cpu"), "scheme": text})


@pytest.mark.parametrize(
    "name",
    [
        "fp8_token",
        "fp8_group128,layout=column_major",
        pytest.param("mxfp8,layout=swizzled", marks=by_night),
        "nvfp4",
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, pytest.param(3, marks=by_night), 9])
def test_any_number_of_rows_a_program(name, tokens, rows):
    x = rows_of(torch.bfloat16, tokens, 256)
    arguments = {"x": x, "scale": sample_scale(name, "cpu"), "scheme": name}
    launch, _ = quantize.plan(FN, arguments)
    programs = launch.grid[0] * launch.args["ROWS"]
    cut = dataclasses.replace(launch, args={**launch.args, "ROWS": rows}, grid=(-(-programs // rows),))
    for ours, theirs in zip(cut.run(), launch.run(), strict=True):
        assert torch.equal(ours.float().nan_to_num(-1), theirs.float().nan_to_num(-1))


@pytest.mark.parametrize("rounding", ["ceil", "log2_ceil", "floor"])
def test_exponents_around_powers_of_two(rounding):
    """Float by float: 40 on either side of each power, subnormals, infinity and NaN."""
    powers = torch.arange(-126, 128, dtype=torch.int32).repeat_interleave(81) + 127
    around = ((powers << 23) + torch.arange(-40, 41, dtype=torch.int32).repeat(254)).view(torch.float32)
    least = (torch.arange(-40, 41, dtype=torch.int32) + 0x400000).view(torch.float32)  # around 2**-127
    special = torch.cat([torch.tensor([0.0, 1e-45, 1e-38, torch.inf, torch.nan]), least])
    step = torch.cat([around, special, torch.ones(-len(around) - len(special) & 1023)])
    bytes_ = torch.empty(step.shape, dtype=torch.int32)
    exponents[(len(step) // 1024,)](step, bytes_, 1024, rounding)
    assert torch.equal(bytes_, biased_exponent(step, rounding))


@triton.jit
def exponents(step, out, BLOCK: tl.constexpr, POWER: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, kernel_exponent(tl.load(step + i), POWER))


def test_ties_of_e2m1_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.cat([ties, torch.nextafter(ties, torch.tensor(9.0)), -ties, torch.nextafter(-ties, torch.tensor(9.0))])
    x[8:16].clamp_(max=6.0)
    arguments = {"x": x[None], "scale": torch.tensor(1.0), "scheme": "nvfp4"}
    q, scale = check(quantize, FN, arguments)
    assert (scale.float() == 1).all()
    nibbles = torch.stack([q & 15, q >> 4], -1).flatten()
    assert nibbles.tolist()[:8] == [0, 2, 2, 4, 4, 6, 6, 7]
    assert nibbles.tolist()[16:24] == [8, 10, 10, 12, 12, 14, 14, 15]
