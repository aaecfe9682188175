"""Every op's kernel compiled for targets that this machine does not have."""

import re

import pytest
import torch

from fusionpass.aot import compile_launch
from fusionpass.arch import Arch
from fusionpass.op import OPS

pytest.importorskip("triton")

ARCHS = ("sm_90", "sm_100", "gfx942", "gfx950")
READ = re.compile(r"ld\.global|cp\.async\.c[ag]")
WITH_KERNELS = [op for op in OPS.values() if op.backends]


def plan(op, name, tokens=64, width=2048, dtype=torch.bfloat16, **changes):
    arguments = op.bind((), op.sample(tokens, width, dtype, "cpu", torch.Generator()))
    if name == "gfx942":
        # Its FP8 has another bias.
        fnuz = torch.float8_e4m3fnuz
        arguments = {k: torch.empty_like(v, dtype=fnuz) if _is_fp8(v) else v for k, v in arguments.items()}
        arguments |= {"scheme": "fp8_static,dtype=float8_e4m3fnuz"} if "scheme" in arguments else {}
    return op.plan(Arch(name), {**arguments, **changes})


def _is_fp8(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn


def compiled(op, name, **changes):
    launch, reason = plan(op, name, **changes)
    assert launch is not None, reason
    asm = compile_launch(launch, Arch(name))
    return asm["ptx"] if "ptx" in asm else asm["amdgcn"]


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_compiles(op, name):
    text = compiled(op, name)
    if "quantize" in op.name:
        conversions = {
            "sm": r"cvt\.rn\.satfinite\.e4m3x2\.f32",
            "gfx942": r"v_cvt_pk_fp8_f32",
            "gfx950": r"v_cvt_\w*fp8",
        }
        assert re.search(conversions[name if name in conversions else "sm"], text) or (
            name == "gfx950" and _triton() < (3, 8)
        )
    if "norm" in op.name:
        # Sixteen bytes of bfloat16 a thread, and eight of codes: nothing goes through shared memory to be stored.
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32|(global|buffer)_load_dwordx4", text)
        if op.name not in ("rms_norm_quantize", "layer_norm_quantize", "gated_rms_norm_quantize"):
            assert re.search(r"st\.global[\w.:]*\.v4\.b32|(global|buffer)_store_dwordx4", text)
        if "quantize" in op.name:
            assert re.search(r"st\.global[\w.:]*\.v2\.b32|(global|buffer)_store_dwordx2", text)
        # Two a reduction, of which LayerNorm has one more; Triton 3.6 writes one barrier more between those.
        between = "layer" in op.name and _triton() < (3, 8)
        assert text.count("bar.sync") <= (4 if "layer" in op.name else 2) + between


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_waits_and_loads_before_it_launches_its_dependents(op):
    """Inductor's own kernels count on it: on what is older than the kernel before them, and to reuse what it read."""
    text = compiled(op, "sm_90")
    before, *behind = text.split("griddepcontrol.launch_dependents")
    assert before.index("griddepcontrol.wait") < READ.search(before).start()
    assert "st.global" not in before
    # Behind the stores of one branch come the loads of the next.
    for part in behind:
        assert part.index("st.global") < READ.search(part + "ld.global").start()
    assert not READ.search(behind[-1])
    launched, _ = plan(op, "sm_90")
    early = compile_launch(launched.reading_early(), Arch("sm_90"))["ptx"]
    # What reads nothing but activations has nothing to read early.
    assert (READ.search(early).start() < early.index("griddepcontrol.wait")) == bool(launched.early)
    assert "griddepcontrol" not in compiled(op, "gfx950")


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_launched_early_its_dependents_start_between_the_wait_and_the_loads(op):
    launched, _ = plan(op, "sm_90")
    for launch in launched.launching_early().all:
        text = compile_launch(launch, Arch("sm_90"))["ptx"]
        before, behind = text.split("griddepcontrol.launch_dependents")
        assert "griddepcontrol.wait" in before
        assert not re.search(r"ld\.global|st\.global|cp\.async", before)
        assert "st.global" in behind
    away, _ = plan(op, "gfx950")
    assert away.launching_early() == away


@pytest.mark.parametrize("width", [64, 576, 2880, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_spills(dtype, width):
    op = next(op for op in WITH_KERNELS if op.name == "add_rms_norm_quantize")
    assert not re.search(r"(ld|st)\.local", compiled(op, "sm_90", width=width, dtype=dtype))


def _triton():
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


# Attention's result is quantised by the few programs that combine its splits.
OF_ROWS = [op for op in WITH_KERNELS if op.name.endswith("_quantize") and op.name != "attention_quantize"]


@pytest.mark.parametrize("op", OF_ROWS, ids=lambda op: op.name)
def test_numbers_of_16_bits_are_taken_two_at_a_time(op):
    plain = {"mod_scale": None, "mod_shift": None} if "layer" in op.name else {}
    text = compiled(op, "sm_90", **plain)
    assert "gated" in op.name or "0xffff0000" in text or "-65536" in text
    if "layer" in op.name:
        assert "cvt.rn.bf16x2.f32" in text
        assert "cvt.rn.bf16.f32" not in text
    # The conversion to e4m3 saturates: nothing is clamped before.
    if "clamped" not in op.name:
        assert not re.search(r"(min|max)(\.xorsign\.abs|\.NaN)*\.f32", text)


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul", "silu", "gelu"])
def test_activations_divide_by_reciprocals_of_what_is_no_subnormal_number(name):
    op = next(op for op in WITH_KERNELS if op.name == name)
    text = compiled(op, "sm_90")
    assert "ex2.approx.ftz.f32" in text
    assert not re.search(r"div\.(full|rn)\.f32|ex2\.approx\.f32", text)
    assert ("rcp.approx.ftz.f32" in text) == ("silu" in name)


H = torch.ones(2048, dtype=torch.bfloat16)
ROUNDED_TWICE = [
    ("add_rms_norm_quantize", {"inner_weight": H}),
    ("add_rms_norm_quantize", {"alpha": 0.22}),
    ("add_rms_norm_quantize", {"second": torch.ones(64, 2048, dtype=torch.bfloat16), "rounding": "after_weight"}),
    ("add_quantize", {"inner_weight": H}),
    ("layer_norm_quantize", {}),
    ("layer_norm_quantize", {"mod_scale": None, "mod_shift": None}),
    *((op.name, {}) for op in WITH_KERNELS if "silu" in op.name or "swiglu" in op.name or "gated" in op.name),
]


@pytest.mark.parametrize(("name", "changes"), ROUNDED_TWICE, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_multiply_add_skips_a_rounding(name, changes, dtype):
    """LLVM narrows arithmetic on widened 16-bit numbers, which is exact, and then fuses it, which is not."""
    op = next(op for op in WITH_KERNELS if op.name == name)
    cast = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    assert not re.search(r"fma\.rn\.(b?f16)", compiled(op, "sm_90", dtype=dtype, **cast))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", [op for op in WITH_KERNELS if "rope" in op.name], ids=lambda op: op.name)
def test_a_rotation_rounds_each_product(op, dtype):
    assert not re.search(r"fma\.", compiled(op, "sm_90", dtype=dtype))
