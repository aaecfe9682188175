"""The quantisation kernel on the device: bit for bit the reference, for every scheme that its units can convert."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops import quantize
from fusionpass.ops.quant import Scheme, dequantize, sample_scale
from tests.kernels import DTYPES, arguments_for, check, shapes
from tests.schemes import OVERRIDES, combinations, written

KERNEL = [name for name in OVERRIDES if "block128" not in name]
WIDTHS = st.one_of(st.integers(1, 700), st.sampled_from([576, 2048, 2880, 4096, 14336]))
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def arch():
    return Arch.of(torch.device("cuda"))


def schemes(name):
    """Every override that the device has a conversion for."""
    arch = Arch.of(torch.device("cuda"))
    fnuz = arch.name == "gfx942"
    if not fnuz and not arch.has_fp8_e4m3fn and name != "int8_token":
        pytest.skip(f"{arch.name} does not convert to FP8")
    if fnuz and name in ("mxfp8", "nvfp4"):
        pytest.skip("gfx942 does not convert to float8_e4m3fn")
    choices = [c for c in combinations(name) if "dtype" not in c or (c["dtype"] == "float8_e4m3fnuz") == fnuz]
    return tuple(written(name, choice) for choice in choices)


def sample(text, tokens, width, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, device="cuda").to(dtype)
    return {"x": x, "scale": sample_scale(text, "cuda"), "scheme": text}


@pytest.mark.parametrize("name", KERNEL)
@many
@given(data=st.data())
def test_drawn_arguments(name, data):
    arguments = data.draw(arguments_for(quantize, data.draw(shapes(300, WIDTHS)), "cuda", schemes(name)))
    early = data.draw(st.booleans()) and arguments["scale"] is not None
    check(quantize, Arch.of(torch.device("cuda")), arguments, early=early)


@pytest.mark.parametrize("name", KERNEL)
def test_every_override(name, arch):
    for i, text in enumerate(schemes(name)):
        arguments = sample(text, 37, 1152, DTYPES[i % 3], seed=i)
        arguments["x"][0] = 0
        arguments["x"][1, 3], arguments["x"][2, 5] = float("inf"), float("nan")
        check(quantize, arch, arguments)


@pytest.mark.parametrize("name", KERNEL)
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (64, 2048), (1000, 2880 - 64), (8192, 1024), (3, 28672)])
def test_sizes_of_models(name, tokens, width, arch):
    width -= width % (Scheme.parse(name).group or 1)
    for text in schemes(name)[:1] + schemes(name)[-1:]:
        check(quantize, arch, sample(text, tokens, width))


@pytest.mark.parametrize("name", [name for name in KERNEL if name != "fp8_static"])
def test_past_32_bit_offsets(name, arch):
    text = schemes(name)[-1].replace("layout=swizzled", "layout=linear")
    width = 4096
    x = torch.randn(2**31 // width + 3, width, device="cuda", dtype=torch.bfloat16)
    outputs = quantize.plan(arch, {**sample(text, 1, width), "x": x})[0].run()
    last = check(quantize, arch, {**sample(text, 1, width), "x": x[-2:]})
    for output, expected in zip(outputs, last, strict=True):
        assert torch.equal(output[-2:].float(), expected.float())


@pytest.mark.parametrize("rows", [1, 100, 128, 300])
@pytest.mark.parametrize("width", [32, 96, 2880])
def test_swizzled_scales(rows, width, arch):
    schemes("mxfp8")
    for name in ("mxfp8", "nvfp4"):
        check(quantize, arch, sample(f"{name},layout=swizzled", rows, width))


@pytest.mark.parametrize("text", ["mxfp8", "nvfp4"])
def test_a_blockwise_product_reads_them(text):
    """`torch._scaled_mm` with our swizzled scales is the product of what our codes stand for."""
    if torch.version.hip or torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("no block-scaled matrix units")
    text += ",layout=swizzled"
    a, b = sample(text, 130, 256), sample(text, 64, 256, seed=1)
    (q, scale), (w, weight_scale) = quantize(**a), quantize(**b)
    want = dequantize(q, scale, text, a["scale"]) @ dequantize(w, weight_scale, text, b["scale"]).t()
    codes, scales = torch.float8_e4m3fn, torch.float8_e8m0fnu
    if "nvfp4" in text:
        codes, scales = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
    got = torch._scaled_mm(
        q.view(codes),
        w.view(codes).t(),
        scale.view(scales).flatten(),
        weight_scale.view(scales).flatten(),
        out_dtype=torch.float32 if "mxfp8" in text else torch.bfloat16,
    ).float()
    if "nvfp4" in text:
        got = got * a["scale"] * b["scale"]
    assert (got - want).norm() <= 4e-3 * want.norm()
