"""Gated RMSNorm: its arithmetic against float64 and against transformers' own modules, and what finds it in those."""

import importlib
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusionpass
from fusionpass.arch import Arch
from fusionpass.errors import ArgumentError
from fusionpass.ops import Scheme, gated_rms_norm, gated_rms_norm_quantize, quantize
from fusionpass.ops.quant import quantized
from tests.models import static

WIDTH = 96
FP8 = Scheme.parse("fp8_token")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
AFTER_ONCE = {"gating": "after", "rounding": "after_weight"}
SIGMOID = {**AFTER_ONCE, "activation": "sigmoid"}

# The module and class, what it is made with, the op's arguments, and the rule that finds it.
Case = tuple[str, dict[str, Any], dict[str, Any], str]
CASES: list[Case] = [
    *(
        (f"{name}RMSNormGated", {"group_size": size}, {"group_size": size}, "norm.gated_before_grouped")
        for name in ("mamba2.Mamba", "bamba.Bamba", "zamba2.Zamba2", "nemotron_h.NemotronH")
        for size in (WIDTH, 32, 12)
    ),
    *(
        (
            "falcon_h1.FalconH1RMSNormGated",
            {"n_groups": groups, "norm_before_gate": after},
            {"group_size": WIDTH // groups, **(AFTER_ONCE if after else {"rounding": "after_weight"})},
            f"norm.gated_{'after' if after else 'before'}_falcon",
        )
        for groups in (1, 3)
        for after in (False, True)
    ),
    ("qwen3_next.Qwen3NextRMSNormGated", {}, {"gating": "after"}, "norm.gated_after"),
    ("olmo_hybrid.OlmoHybridRMSNormGated", {}, {"gating": "after"}, "norm.gated_after"),
    ("kimi_linear.KimiLinearRMSNormGated", {}, SIGMOID, "norm.gated_after_sigmoid"),
]
each_module = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[1].values()))}"
)


def module_of(case: Case, dtype: torch.dtype) -> torch.nn.Module:
    folder, name = case[0].split(".")
    try:
        found = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"no {case[0]} in this transformers")
    made: torch.nn.Module = found(WIDTH, eps=1e-5, **case[1])
    torch.nn.init.normal_(made.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(2))
    return made.to(dtype)


def inputs(dtype: torch.dtype, gate_dtype: torch.dtype, *lead: int) -> list[torch.Tensor]:
    """An activation and a gate that is a part of a wider row, as a mixer's projection gives it."""
    generator = torch.Generator().manual_seed(1)
    x, packed = (torch.randn(*lead, n, generator=generator).mul(3) for n in (WIDTH, 2 * WIDTH))
    return [x.to(dtype), packed.to(gate_dtype)[..., WIDTH:]]


@each_module
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, F32, F32), (F16, F16, F16), (F32, BF16, BF16)], ids=str)
def test_it_is_transformers_bit_for_bit(case: Case, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    module = module_of(case, dtypes[2])
    x, gate = inputs(dtypes[0], dtypes[1], 2, 17)
    expected = module(x, gate)
    found = gated_rms_norm(x, gate, module.weight, 1e-5, **case[2])
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def oracle(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, gating: str, size: int, activation: str
) -> torch.Tensor:
    """Group by group, in float64."""
    x, gate, weight = (t.double() for t in (x, gate, weight))
    slope = 1 / (1 + (-gate).exp())
    factor = gate * slope if activation == "silu" else slope
    h = x * factor if gating == "before" else x
    parts = [h[..., i : i + size] / (h[..., i : i + size].square().mean(-1, True) + eps).sqrt()
             for i in range(0, x.shape[-1], size)]  # fmt: skip
    y = torch.cat(parts, -1) * weight
    return y * factor if gating == "after" else y


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from([BF16, F16, F32]),
    st.sampled_from([BF16, F32]),
    st.sampled_from(["before", "after"]),
    st.sampled_from(["before_weight", "after_weight"]),
    st.sampled_from(["silu", "sigmoid"]),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([1e-6, 1e-3]),
    st.integers(0, 2**31),
)
def test_it_is_near_float64(
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    gating: str,
    rounding: str,
    activation: str,
    groups: int,
    size: int,
    eps: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, gate, weight = (torch.randn(*shape, groups * size, generator=generator) for shape in ((2, 3), (2, 3), ()))
    x, gate, weight = x.to(dtype), gate.to(gate_dtype), weight.to(dtype)
    found = gated_rms_norm(x, gate, weight, eps, gating, size, rounding, activation)
    exact = oracle(x, gate, weight, eps, gating, size, activation)
    # Every rounding on the way is half a unit, of the product too.
    roundings = 1 if rounding == "after_weight" else 2 if gating == "before" else 3
    share = roundings * torch.finfo(dtype).eps / 2 + 32 * torch.finfo(F32).eps
    least = roundings * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    floor = least * (1 + weight.double().abs()) * (1 + gate.double().abs())
    assert ((found.double() - exact).abs() <= 1.01 * share * exact.abs() + floor).all()


def test_what_no_weight_and_no_group_mean() -> None:
    x, gate = inputs(BF16, BF16, 5)
    ones = torch.ones(WIDTH, dtype=BF16)
    for gating in ("before", "after"):
        for rounding in ("before_weight", "after_weight"):
            found = gated_rms_norm(x, gate, None, 1e-5, gating, None, rounding)
            assert torch.equal(found, gated_rms_norm(x, gate, ones, 1e-5, gating, WIDTH, rounding))


def test_zero_rows_infinities_and_nan_stay_where_they_are() -> None:
    x, gate = inputs(F32, F32, 4)
    x[0], x[1, 5], gate[2, 40] = 0, torch.inf, torch.nan
    found = gated_rms_norm(x, gate, None, group_size=32)
    assert torch.equal(found[0], torch.zeros(WIDTH))
    assert found[1, 5].isnan()
    assert torch.equal(found[1, :32].nan_to_num(0), torch.zeros(32))
    assert found[2, 32:64].isnan().all()
    assert found[[1, 2], 64:].isfinite().all()
    assert found[2, :32].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("group_size", [None, 4])
def test_empty(shape: tuple[int, ...], group_size: int | None) -> None:
    x = torch.empty(shape, dtype=BF16)
    assert gated_rms_norm(x, x, torch.empty(shape[-1], dtype=BF16), group_size=group_size).shape == shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gate": torch.zeros(3, 8)}, r"gate is torch.float32 \(3, 8\), x has shape \(2, 8\)"),
        ({"gate": torch.zeros(2, 8).int()}, "gate is torch.int32"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\), x has width 8"),
        ({"group_size": 3}, "group_size=3 for a width of 8"),
        ({"group_size": -2}, "group_size=-2"),
        ({"gating": "in"}, "gating='in' does not exist"),
        ({"rounding": "never"}, "rounding='never' does not exist"),
        ({"activation": "relu"}, "activation='relu' does not exist"),
    ],
)
def test_what_it_does_not_take(changes: dict[str, Any], reason: str) -> None:
    given = {"x": torch.zeros(2, 8), "gate": torch.zeros(2, 8), **changes}
    with pytest.raises(ArgumentError, match=reason):
        gated_rms_norm(**given)


def test_as_an_operator() -> None:
    x, gate = inputs(F32, F32, 3)
    arguments = (x, gate, torch.rand(WIDTH), 1e-5, "after", 32, "after_weight", "sigmoid")
    torch.library.opcheck(gated_rms_norm.overload, arguments)
    wanted = [t.clone().requires_grad_() for t in arguments[:3]]
    cotangent = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(gated_rms_norm(*wanted, *arguments[3:]), wanted, cotangent)
    exact = [t.double().requires_grad_() for t in arguments[:3]]
    gradients = torch.autograd.grad(oracle(*exact, 1e-5, "after", 32, "sigmoid"), exact, cotangent.double())
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@each_module
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F32, BF16)], ids=str)
def test_transformers_modules_are_found(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    module = module_of(case, dtypes[1])
    report = fusionpass.explain(module, *inputs(*dtypes, 2, 3))
    assert report.count("gated_rms_norm", rule=case[3]) == 1, str(report)
    assert not report.missed
    assert not report.refused
    graph = dict(report.graphs[0].snapshots)["recognise"]
    assert all(f"{name}={value!r}" in graph.replace('"', "'") for name, value in case[2].items())

    def codes(x: torch.Tensor, gate: torch.Tensor) -> Any:
        return quantized(module(x, gate), None, FP8)

    report = fusionpass.explain(codes, *inputs(*dtypes, 2, 3))
    assert report.count("gated_rms_norm_quantize", scheme="fp8_token") == 1, str(report)
    assert len(report.fused) == 1
    assert not report.missed


def test_several_static_scales_are_one_launch() -> None:
    module = module_of(CASES[1], BF16)

    def codes(x: torch.Tensor, gate: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        norm = module(x, gate)
        return static(norm, a), static(norm, b), norm

    report = fusionpass.explain(codes, *inputs(BF16, BF16, 2, 3), torch.tensor(0.5), torch.tensor(0.25))
    (fused,) = report.fused
    assert fused.op == "gated_rms_norm_quantize"
    assert fused.rule == "norm.again_gated_rms_norm_quantize"


def test_a_quantised_norm_is_its_parts() -> None:
    x, gate = inputs(BF16, BF16, 7)
    weight = torch.rand(WIDTH).to(BF16)
    norm = gated_rms_norm(x, gate, weight, 1e-5, "after", 32)
    q, scale, again = gated_rms_norm_quantize(x, gate, weight, 1e-5, "after", 32, scheme="fp8_token", norm_out=True)
    assert torch.equal(again, norm)
    for ours, theirs in zip((q, scale), quantize(norm, None, "fp8_token"), strict=True):
        assert torch.equal(ours.float(), theirs.float())


def sample(width: int = 2048, tokens: int = 64, **changes: Any) -> dict[str, Any]:
    made = gated_rms_norm_quantize.sample(tokens, width, BF16, "cpu", torch.Generator())
    return {**gated_rms_norm_quantize.bind((), made), **changes}


def test_plans() -> None:
    arch = Arch("sm_90")

    def reason(**changes: Any) -> str:
        return gated_rms_norm_quantize.plan(arch, sample(96, **changes))[1]

    assert reason(group_size=48) == "triton: groups of 48 columns: rows in registers divide by powers of two"
    assert reason(gate=torch.zeros(1, 96)) == "triton: the gate is torch.float32 (1, 96) on cpu"
    assert "evenly spaced" in reason(gate=torch.zeros(8, 8, 96).transpose(0, 1), x=torch.zeros(8, 8, 96))
    assert reason(weight=torch.ones(48)).startswith("triton: the weight is torch.float32 (48,)")
    packed = torch.zeros(64, 300, dtype=BF16)
    for size, span in ((None, 128), (96, 128), (32, 32), (1, 1)):
        launch, _ = gated_rms_norm_quantize.plan(arch, sample(96, group_size=size, gate=packed[:, 200:296]))
        assert launch is not None
        assert (launch.args["SPAN"], launch.args["gate_row"]) == (span, 300)
        assert launch.early == ("weight", "scale")


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("gating", ["before", "after"])
@pytest.mark.parametrize(("width", "group_size"), [(128, None), (8192, 1024), (3072, 512)])
@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_token"])
def test_compiled_ahead(name: str, gating: str, width: int, group_size: int | None, scheme: str) -> None:
    pytest.importorskip("triton")
    from fusionpass.aot import compile_launch

    given = sample(width, gating=gating, group_size=group_size)
    given["scheme"] = scheme if name == "sm_90" else f"{scheme},dtype=float8_e4m3fnuz"
    given["scale"] = given["scale"] if scheme == "fp8_static" else None
    launch, reason = gated_rms_norm_quantize.plan(Arch(name), given)
    assert launch is not None, reason
    made = compile_launch(launch, Arch(name))
    assert "convert_layout" not in made["ttgir"] or scheme == "fp8_token"
    text = made["ptx"] if name == "sm_90" else made["amdgcn"]
    assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f32|v_cvt_pk_fp8_f32", text)
    assert not re.search(r"(ld|st)\.local|scratch_(load|store)", text)
