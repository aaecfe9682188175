"""The quantisation kernel's plans, and its compilation for targets that this machine does not have."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusionpass.arch import Arch
from fusionpass.ops import quantize
from fusionpass.ops.quant import Scheme, sample_scale

pytest.importorskip("triton")

from fusionpass.aot import compile_launch
from fusionpass.ops.quant.triton import configure, refuse_scheme, scheme_constants
from fusionpass.tuning.rows import Cut

H100 = Arch("sm_90")
ARCHS = ("sm_90", "sm_100", "gfx942", "gfx950")
SCHEMES = (
    "fp8_static",
    "fp8_token",
    "fp8_token,amax_dtype=input,eps=0.0,rounding=divide",
    "fp8_group128",
    "fp8_group128,layout=column_major,scale_rounding=log2_ceil",
    "fp8_group128,scale_dtype=float8_e8m0fnu",
    "mxfp8",
    "mxfp8,layout=swizzled,scale_rounding=floor",
    "nvfp4",
    "nvfp4,layout=swizzled,rounding=divide",
    "int8_token",
    "int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5",
)


def plan(arch, text, shape=(64, 2048), dtype=torch.bfloat16, **changes):
    arguments = {"x": torch.zeros(shape, dtype=dtype), "scale": sample_scale(text, "cpu"), "scheme": text}
    return quantize.plan(arch, {**arguments, **changes})


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("text", SCHEMES)
def test_compiles(text, name):
    if name == "gfx942":
        if not text.startswith(("fp8", "int8")):
            launch, why = plan(Arch(name), text)
            assert launch is None
            assert why == "triton: Triton cannot convert to float8_e4m3fn on gfx942"
            return
        text += ",dtype=float8_e4m3fnuz" if text.startswith("fp8") else ""
    launch, why = plan(Arch(name), text)
    assert launch is not None, why
    asm = compile_launch(launch, Arch(name))
    if name.startswith("gfx"):
        assert "s_endpgm" in asm["amdgcn"]
        return
    ptx = asm["ptx"]
    assert not re.search(r"(ld|st)\.local", ptx)
    # Sixteen bytes of bfloat16 a thread; eight codes are stored at once.
    assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
    assert re.search(r"st\.global[\w.:]*\.b32" if "nvfp4" in text else r"st\.global[\w.:]*\.v2\.b32", ptx)
    wait, launched = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    assert wait < ptx.index("ld.global") <= ptx.rindex("ld.global") < launched < ptx.index("st.global")
    if launch.early:
        early = compile_launch(launch.reading_early(), Arch(name))["ptx"]
        assert early.index("ld.global") < early.index("griddepcontrol.wait")
    assert launch.early == (("scale",) if Scheme.parse(text).takes_scale else ())


@pytest.mark.parametrize("width", [64, 576, 4096, 16384, 32768])
def test_a_row_does_not_spill(width):
    launch, _ = plan(H100, "fp8_token", (64, width), torch.float32)
    assert not re.search(r"(ld|st)\.local", compile_launch(launch, H100)["ptx"])


@pytest.mark.parametrize(
    ("arch", "text", "changes", "reason"),
    [
        ("sm_80", "fp8_token", {}, "Triton cannot convert to float8_e4m3fn on sm_80"),
        ("sm_80", "nvfp4", {}, "Triton cannot convert to float8_e4m3fn on sm_80"),
        ("sm_90", "fp8_token,dtype=float8_e4m3fnuz", {}, "sm_90 does not convert to float8_e4m3fnuz"),
        ("sm_90", "fp8_block128", {}, "there is no kernel for scales of 128 x 128 blocks"),
        ("sm_90", "fp8_token", {"shape": (2, 32769)}, "rows of 32769 columns do not fit in registers (at most 32768)"),
        ("sm_90", "mxfp8", {"shape": (2, 80)}, "the width 80 is not a multiple of 32"),
        ("sm_90", "fp8_token", {"scale": torch.ones(())}, "'fp8_token' computes its scale"),
        ("sm_90", "nvfp4", {"scale": None}, "the scale is not one element"),
        ("sm_90", "nvfp4", {"scale": torch.ones(3)}, "the scale is not one element"),
        ("sm_90", "fp8_token", {"dtype": torch.float64}, "x is torch.float64"),
        ("sm_90", "fp8_token", {"shape": (2, 0)}, "the rows are empty"),
    ],
)
def test_what_is_refused(arch, text, changes, reason):
    launch, why = plan(Arch(arch), text, **changes)
    assert launch is None
    assert why == f"triton: {reason}"


def test_int8_runs_where_fp8_does_not():
    for name in ("sm_80", "gfx942"):
        assert plan(Arch(name), "int8_token")[0] is not None


def test_a_device_in_place_of_the_tensor():
    assert refuse_scheme(H100, None, "mxfp8", torch.device("cpu")) is None
    assert "on cpu" in refuse_scheme(H100, torch.ones(()), "nvfp4", torch.device("cuda"))


@pytest.mark.parametrize("text", [text for text in SCHEMES if "," not in text] + ["mxfp8,layout=swizzled"])
def test_a_symbolic_row_count_adds_no_guard(text):
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    x = torch.zeros(12, 2048, dtype=torch.bfloat16)
    dims = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    scale = sample_scale(text, "cpu")
    arguments = {
        "x": mode.from_tensor(x, symbolic_context=dims),
        "scale": None if scale is None else mode.from_tensor(scale),
        "scheme": text,
    }
    launch, why = quantize.plan(H100, arguments)
    assert launch is not None, why
    assert not isinstance(launch.grid[0], int)
    assert not environment.guards


@pytest.mark.parametrize("text", ["mxfp8,layout=swizzled", "fp8_group128,layout=column_major", "nvfp4", "int8_token"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)])
def test_the_buffers_are_the_references_outputs(text, lead):
    x, scale = torch.zeros(*lead, 256), sample_scale(text, "cpu")
    launch, why = quantize.plan(H100, {"x": x, "scale": scale, "scheme": text})
    assert launch is not None, why
    for name, want in zip(launch.returns, quantize.reference(x, scale, text), strict=True):
        made = launch.args[name].new(torch.device("cpu"))
        assert (made.shape, made.dtype) == (want.shape, want.dtype)
        if made.numel():
            strides = zip(made.shape, made.stride(), want.stride(), strict=True)
            assert all(size == 1 or a == b for size, a, b in strides)


@pytest.mark.parametrize(
    ("text", "rows", "width", "cut"),
    [
        ("fp8_static", 4, 2048, Cut(1, 2048, 8)),
        ("fp8_token", 64, 4096, Cut(1, 4096, 4)),
        ("fp8_token", 64, 128, Cut(4, 128, 4)),
        ("fp8_group128", 1, 4096, Cut(1, 512, 2)),
        ("fp8_group128", None, 4096, Cut(2, 1024, 4)),
        ("mxfp8", None, 2880, Cut(2, 1024, 4)),
        ("mxfp8,layout=swizzled", None, 32, Cut(16, 128, 4)),
        ("nvfp4", None, 16, Cut(128, 16, 4)),
    ],
)
def test_how_it_is_cut(text, rows, width, cut):
    assert configure(H100, Scheme.parse(text), rows, width, 2) == cut


def test_constants_can_be_printed_into_a_wrapper():
    for text in SCHEMES:
        constants = scheme_constants(Scheme.parse(text), torch.bfloat16)
        assert {type(value) for value in constants.values()} <= {int, float, bool, str}
        assert eval(repr(constants)) == constants
    assert scheme_constants(None, torch.bfloat16).keys() == constants.keys()
