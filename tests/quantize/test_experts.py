"""Experts with quantised weights: what they are found to be, what they compute, and what becomes of them in a graph."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fusionpass
from fusionpass import Arch, Config
from fusionpass.errors import CalibrationError, CheckpointError, NothingToQuantizeError, SchemeError
from fusionpass.ops import dequantize, experts
from fusionpass.ops.moe import ACTIVATIONS
from fusionpass.quantize import QuantizedExperts, lower_linears_, quantize_, save_quantized
from fusionpass.quantize.experts import Gate
from tests.fake_gpu import needs_cuda_build
from tests.families import FAMILIES
from tests.moe import SCHEMES

pytest.importorskip("transformers")


def built(name: str) -> tuple[Any, dict[str, Any]]:
    (family,) = [one for one in FAMILIES if one.name == name]
    return family.build()


def first(model: nn.Module, kind: Any = None) -> tuple[str, Any]:
    """The first experts of a model."""
    for path, module in model.named_modules():
        if isinstance(module, kind) if kind else hasattr(module, "gate_up_proj"):
            return path, module
    raise AssertionError("there are none")


def called(module: nn.Module, tokens: int = 9, top: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(tokens, 4, generator=generator).softmax(-1).topk(top)
    return torch.randn(tokens, 256, generator=generator).bfloat16(), scores.indices, scores.values.bfloat16()


@pytest.mark.parametrize("name", ["Qwen3-MoE", "GPT-OSS"])
@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_they_compute_nearly_what_they_did(name: str, scheme: str) -> None:
    model, _ = built(name)
    _, module = first(model)
    for part in (module.gate_up_proj, module.down_proj):
        nn.init.normal_(part, std=part.shape[1] ** -0.5)
    for bias in (getattr(module, f"{n}_proj_bias", None) for n in ("gate_up", "down")):
        if bias is not None:
            nn.init.normal_(bias)
    given = called(module)
    holder = nn.ModuleDict({"experts": copy.deepcopy(module)})
    data = [given] if scheme in ("fp8_static", "nvfp4") else None
    run = None if data is None else (lambda model: [model["experts"](*one) for one in data])
    with torch.no_grad():
        expected = module(*given).double()
        report = quantize_(holder, scheme, run)
        (record,) = report.quantized
        assert (record.where, record.experts) == ("experts", 4)
        assert "0 linears and 1 mixtures of experts quantised" in str(report)
        made = holder["experts"]
        assert isinstance(made, QuantizedExperts)
        got = made(*given)
    assert (got.dtype, got.shape) == (torch.bfloat16, given[0].shape)
    # Codes of e4m3 are off by 2.6 % each: what is between the products by 2.6·√4 %, the result by 2.6·√6 %.
    assert (got.double() - expected).norm() / expected.norm() < (0.25 if scheme == "nvfp4" else 0.08)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "GPT-OSS"])
def test_the_scales_are_those_of_what_is_seen(name: str) -> None:
    model, _ = built(name)
    module = first(model)[1]
    nn.init.normal_(module.gate_up_proj, std=0.1)
    nn.init.normal_(module.down_proj, std=0.1)
    holder, seen = nn.ModuleDict({"experts": module}), []
    gate = module._apply_gate

    def watched(made: torch.Tensor) -> torch.Tensor:
        seen.append(gate(made))
        return seen[-1]

    given = called(module)
    with torch.no_grad():
        module._apply_gate = watched
        module(*given)
        del module._apply_gate
        quantize_(holder, "fp8_static", lambda model: model["experts"](*given))
    made = holder["experts"]
    assert torch.equal(made.x_scale, given[0].abs().max().float() / 448)
    largest = max(part.abs().max().float() for part in seen) / 448
    # Its rows are multiplied one expert at a time for calibration: an element may be rounded to the next.
    torch.testing.assert_close(made.hidden_scale, largest, rtol=2**-7, atol=0)


def test_each_gate_is_found_by_what_it_computes() -> None:
    class Module:
        alpha, limit = 1.5, 3.0

    for activation, (op, more) in ACTIVATIONS.items():
        for interleaved in (False, True):
            numbers = {"alpha": 1.5, "limit": 3.0} if activation == "clamped_swiglu" else {}

            def gate(made: torch.Tensor, i: bool = interleaved, o: Any = op, m: Any = more, n: Any = numbers) -> Any:
                parts = (made[..., ::2], made[..., 1::2]) if i else made.chunk(2, -1)
                return o.reference(*parts, **m, **n)

            module = Module()
            module._apply_gate = gate  # type: ignore[attr-defined]
            assert Gate.of(module) == Gate(activation, interleaved, **numbers)


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (lambda made: torch.relu(made.chunk(2, -1)[0]) * made.chunk(2, -1)[1], "its gate computes none of silu, gelu"),
        (lambda made: torch.nn.functional.silu(made.chunk(2, -1)[1]) * made.chunk(2, -1)[0], "computes none of"),
        (lambda made: made @ made, "its gate cannot be tried: RuntimeError"),
        (lambda made: made.missing, "its gate cannot be tried: AttributeError"),
    ],
)
def test_other_gates_stay_and_why(gate: Any, reason: str) -> None:
    model, _ = built("Qwen3-MoE")
    path, module = first(model)
    type(module)._apply_gate, kept = staticmethod(gate), type(module)._apply_gate
    try:
        report = quantize_(model, "fp8_group128")
    finally:
        type(module)._apply_gate = kept
    assert reason in {one.where: one.reason for one in report.skipped}[path]


def reasons_of(model: nn.Module, scheme: str, **options: Any) -> dict[str, str]:
    return {one.where: one.reason for one in quantize_(model, scheme, **options).skipped}


def test_what_is_left_alone_and_why() -> None:
    path = "model.layers.0.mlp.experts"
    assert reasons_of(built("Qwen3-MoE")[0], "mxfp8", skip="experts")[path] == "skipped by the rule 'experts'"
    assert "not by 'fp8_token'" in reasons_of(built("Qwen3-MoE")[0], "fp8_token")[path]
    assert "not by 'mxfp8/fp8_token'" in reasons_of(built("Qwen3-MoE")[0], "mxfp8/fp8_token")[path]
    for name, value, reason in (
        ("has_gate", False, "its experts have no gate"),
        ("has_post_expert_norm", True, "there is a norm behind each expert"),
        ("forward", lambda *given: given[0], "it carries forward hooks, which a replacement would lose"),
    ):
        model, _ = built("Qwen3-MoE")
        setattr(model.get_submodule(path), name, value)
        assert reasons_of(model, "mxfp8")[path] == reason
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model, _ = built("Qwen3-MoE")
        getattr(model.get_submodule(path), register)(lambda *given: None)
        assert reasons_of(model, "mxfp8")[path] == "it carries forward hooks, which a replacement would lose"
    model, _ = built("Qwen3-MoE")
    module = model.get_submodule(path)
    module.down_proj = nn.Parameter(torch.zeros(4, 200, 128))
    assert "its weights are 200 by 128, no multiple of 16 by 32" in reasons_of(model, "mxfp8")[path]
    model, _ = built("Qwen3-MoE")
    module = model.get_submodule(path)
    module.down_proj = nn.Parameter(torch.zeros(4, 256, 96))
    assert "its weights are 256 by 96, no multiple of 16 by 128" in reasons_of(model, "fp8_group128")[path]
    module.down_proj = nn.Parameter(torch.zeros(4, 256, 128, dtype=torch.float64))
    assert reasons_of(built_like(model), "mxfp8")[path] == "its weights are torch.float64"
    alone = first(built("Qwen3-MoE")[0])[1]
    with pytest.raises(NothingToQuantizeError, match="cannot be replaced in place"):
        quantize_(alone, "mxfp8")


def built_like(model: nn.Module) -> nn.Module:
    """Another model with the first experts of `model`."""
    made, _ = built("Qwen3-MoE")
    made.model.layers[0].mlp.experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr, index]
    return made


def test_experts_that_never_ran() -> None:
    model, _ = built("Qwen3-MoE")
    module = first(model)[1]
    holder = nn.ModuleDict({"experts": module, "plain": nn.Linear(256, 16).bfloat16()})
    with pytest.raises(CalibrationError, match="2 of 3 linears never ran"):
        quantize_(holder, "fp8_static", lambda model: model["plain"](torch.ones(1, 256).bfloat16()))


def test_casts_state_and_checkpoints(tmp_path: Any) -> None:
    model, _ = built("GPT-OSS")
    quantize_(model, "mxfp8")
    made = first(model, QuantizedExperts)[1]
    codes = made.up.clone()
    model.half()
    assert (made.up.dtype, made.up_scale.dtype, made.up_bias.dtype) == (codes.dtype, torch.uint8, torch.float16)
    other, _ = built("GPT-OSS")
    quantize_(other, "mxfp8")
    other.load_state_dict(model.state_dict())
    assert torch.equal(first(other, QuantizedExperts)[1].up.view(torch.uint8), codes.view(torch.uint8))
    state = {name: t.float() if name.endswith("experts.up") else t for name, t in model.state_dict().items()}
    with pytest.raises(SchemeError, match=r"the state dict holds torch\.float32"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="no format for experts in one tensor"):
        save_quantized(model, tmp_path)
    assert "scheme=mxfp8" in repr(made)


def finegrained(**changes: Any) -> Any:
    """transformers' experts with FP8 weights in blocks."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model, _ = built("Qwen3-MoE")
    config = model.config
    for name in ("swiglu_limit", "mlp_gate_softcap"):
        setattr(config, name, changes.pop(name, None))
    made = fp8.FP8Experts(config, block_size=changes.pop("block_size", (128, 128)), **changes)
    generator = torch.Generator().manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(made, name), getattr(made, f"{name}_scale_inv")
        weight.data = torch.randn(weight.shape, generator=generator).mul(64).to(weight.dtype)
        scale.data = torch.rand(scale.shape, generator=generator).add(0.5).div(1024).to(scale.dtype)
    return made


@pytest.mark.parametrize("changes", [{}, {"scale_fmt": "ue8m0"}, {"swiglu_limit": None}], ids=str)
def test_transformers_fp8_experts(changes: dict[str, Any]) -> None:
    module = finegrained(**changes)
    holder = nn.ModuleDict({"experts": module})
    x, ids, weights = called(module)
    report = lower_linears_(holder)
    assert [(one.where, one.source) for one in report.lowered] == [("experts", "transformers.FP8Experts")]
    made = holder["experts"]
    assert made.up.data_ptr() == module.gate_up_proj.data_ptr(), "codes stay where they are"
    (again,) = lower_linears_(holder).left
    assert again.reason == "it is quantised by 'fp8_group128,rounding=divide' already"
    with torch.no_grad():
        got = made(x, ids, weights).double()
    up, down = (
        torch.stack([
            dequantize(q, s, "fp8_block128") for q, s in zip(w, scale.float(), strict=True)
        ])
        for w, scale in (
            (module.gate_up_proj, module.gate_up_proj_scale_inv), (module.down_proj, module.down_proj_scale_inv),
        )
    )  # fmt: skip
    expected = experts.reference(x, up.bfloat16(), down.bfloat16(), ids, weights).double()
    assert (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_scheme": "static"}, "each of its experts has scales of its own for what it reads"),
        ({"block_size": None}, "its weights have one scale each"),
        ({"block_size": (64, 128)}, "its blocks are 64 × 128"),
        ({"expert_dtype": "fp4"}, "its weights are torch.int8"),
        ({"swiglu_limit": 7.0}, "its gate computes none of"),
        ({"has_gate": False}, "its experts have no gate"),
    ],
    ids=str,
)
def test_other_experts_of_transformers_stay_and_why(changes: dict[str, Any], reason: str) -> None:
    if "has_gate" in changes:
        module = finegrained()
        module.has_gate = False
    else:
        module = finegrained(**changes)
    report = lower_linears_(nn.ModuleDict({"experts": module}))
    assert not report.lowered
    (left,) = report.left
    assert reason in left.reason


@pytest.mark.parametrize("what", ["scales", "columns", "rows"])
def test_odd_sizes_of_transformers_experts(what: str) -> None:
    module = finegrained()
    if what == "scales":
        module.gate_up_proj_scale_inv = nn.Parameter(torch.ones(4, 3, 2))
    else:
        odd = module.down_proj[:, :, :96] if what == "columns" else module.down_proj[:, :200]
        module.down_proj = nn.Parameter(odd.contiguous(), requires_grad=False)
    report = lower_linears_(nn.ModuleDict({"experts": module}))
    reasons = {"scales": "has scales of [4, 3, 2]", "columns": "256 by 96", "rows": "200 by 128"}
    assert reasons[what] in report.left[0].reason
    assert lower_linears_(nn.ModuleDict({"experts": nn.ModuleDict({"x": finegrained()})})).lowered


@needs_cuda_build
@pytest.mark.parametrize(("name", "scheme"), [("DeepSeek-V3", "fp8_group128"), ("GPT-OSS", "mxfp8")])
def test_in_a_model(name: str, scheme: str) -> None:
    """The norm quantises for the experts, and gives the router what it reads."""
    model, inputs = built(name)
    quantize_(model, scheme, skip="lm_head")
    report = fusionpass.explain(model, **inputs, config=Config(target=Arch("sm_90")))
    mixed = [record for record in report.fused if record.op == "experts"]
    count = sum(isinstance(module, QuantizedExperts) for module in model.modules())
    assert count > 0
    assert [record.backend for record in mixed] == ["triton"] * count
    norms = [r for r in report.fused if r.op == "add_rms_norm_quantize" and "post_attention" in r.where]
    assert len(norms) >= count
    assert not [r for r in report.missed if r.op == "quantize" and r.where.endswith("mlp.experts")]
