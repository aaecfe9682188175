"""The matcher and the guards: what must match, what must not, and the reason that is given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusionpass
from tests.models import FP8, LlamaNorm, static

WIDTH = 32
X = torch.zeros(4, WIDTH, dtype=torch.bfloat16)
WEIGHT = torch.ones(WIDTH, dtype=torch.bfloat16)
SCALE = torch.tensor(0.5)


def llama(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    h = x.to(torch.float32)
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def swapped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.to(torch.float32)
    return (torch.rsqrt(1e-5 + (h * h).mean(dim=x.dim() - 1, keepdim=True)) * h).to(x.dtype) * weight


def power(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * (h.square().mean(-1, keepdim=True) + 1e-5).pow(-0.5)).to(x.dtype)


@pytest.mark.parametrize("spelled", [llama, swapped, power])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_spellings_of_one_norm(spelled: Callable[..., Any], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    report = fusionpass.explain(spelled, X.to(dtype), WEIGHT.to(weight_dtype))
    assert report.count("rms_norm", rule="norm.llama") == 1, str(report)
    assert not report.missed


@pytest.mark.parametrize("eps", [0.0, 1e-12, 9.999999974752427e-07, 1e-6, 3e-4, 1.0])
def test_any_eps_is_bound(eps: float) -> None:
    report = fusionpass.explain(lambda x, w: llama(x, w, eps), X, WEIGHT)
    assert report.count("rms_norm") == 1
    graph = report.graphs[0].snapshots[2][1]
    assert f"eps={eps!r}" in graph if eps != 1e-6 else "eps=" not in graph


@pytest.mark.parametrize("shape", [(WIDTH,), (2, WIDTH), (2, 3, 5, WIDTH)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    assert fusionpass.explain(llama, torch.zeros(shape, dtype=torch.bfloat16), WEIGHT).count("rms_norm") == 1


@pytest.mark.parametrize("scale", [torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]])])
def test_scale_of_any_shape(scale: torch.Tensor) -> None:
    assert fusionpass.explain(static, X, scale).count("quantize", scheme="fp8_static") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("packed", [False, True])
def test_spellings_of_gated_activations(name: str, dtype: torch.dtype, packed: bool) -> None:
    nn = torch.nn.functional
    act = {"silu": nn.silu, "gelu": nn.gelu, "gelu_tanh": lambda x: nn.gelu(x, approximate="tanh")}[name]

    def function(x: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if packed:
            x, up = torch.cat([x, up], -1).split(WIDTH, -1)
        return static(up * act(x), scale)

    report = fusionpass.explain(function, X.to(dtype), X.to(dtype) + 1, SCALE)
    assert report.count(f"{name.partition('_')[0]}_mul_quantize", scheme="fp8_static") == 1, str(report)
    assert not report.missed


def softmax(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


def no_anchor(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def other_axis(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + 1e-5)).to(x.dtype)


def cubed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(3).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def late_cast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (weight.float() * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def other_input(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h, g = x.float(), x.float() + 1
    return weight * (g * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def something_in_between(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).relu().to(x.dtype)


def low_precision_scale(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x * scale.reciprocal()).float().clamp(-448, 448).to(FP8)


def other_bounds(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale.reciprocal()).clamp(-240, 240).to(FP8)


def one_sided(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale.reciprocal()).clamp(max=448).to(FP8)


def other_type(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e5m2)


MISSED: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...], str, str]] = [
    (other_axis, (X, WEIGHT), "norm.llama", "expected the constant [-1], found [-2]"),
    (cubed, (X, WEIGHT), "norm.llama", "expected the constant 2, found 3"),
    (late_cast, (X, WEIGHT), "norm.llama", "then at"),
    (other_input, (X, WEIGHT), "norm.llama", "since the spelling reads one value twice"),
    (something_in_between, (X, WEIGHT), "norm.llama", "expected a cast to bfloat16 to read it, found aten.relu"),
    (low_precision_scale, (X, SCALE), "quant.fp8_static", "then at"),
    (other_bounds, (X, SCALE), "quant.fp8_static", "expected the constant 448.0, found 240"),
    (one_sided, (X, SCALE), "quant.fp8_static", "expected aten.clamp_min, found"),
]


@pytest.mark.parametrize(("spelled", "args", "rule", "reason"), MISSED, ids=[case[0].__name__ for case in MISSED])
def test_near_misses_name_the_rule_and_the_place(
    spelled: Callable[..., Any], args: tuple[torch.Tensor, ...], rule: str, reason: str
) -> None:
    report = fusionpass.explain(spelled, *args)
    assert not report.fused
    (missed,) = report.missed
    assert missed.rule == rule
    assert reason in missed.reason
    assert "test_match.py" in missed.source


@pytest.mark.parametrize(("spelled", "args"), [(no_anchor, (X,)), (other_type, (X, SCALE)), (softmax, (X, X))])
def test_what_looks_like_nothing_is_not_reported(spelled: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> None:
    report = fusionpass.explain(spelled, *args)
    assert (report.fused, report.refused, report.missed) == ([], [], [])


def test_a_second_reader_of_the_reduction_is_refused() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> Any:
        h = x.float()
        inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * (h * inverse).to(x.dtype), inverse * 2

    report = fusionpass.explain(function, X, WEIGHT)
    assert not report.fused
    (refused,) = report.refused
    assert "is also read by" in refused.reason


def test_norms_of_one_tensor_share_all_but_their_weights() -> None:
    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
        return llama(x, a), llama(x, b), llama(x, c)

    report = fusionpass.explain(function, X, WEIGHT, WEIGHT * 2, WEIGHT.float())
    assert report.count("rms_norm") == 3
    assert not report.refused
    assert "aten.rsqrt" not in dict(report.graphs[0].snapshots)["recognise"]


def test_a_broadcast_weight_is_refused() -> None:
    for shape in ((4, WIDTH), (1,)):
        report = fusionpass.explain(llama, X, torch.ones(shape, dtype=torch.bfloat16))
        (fused,) = report.fused
        assert fused.rule == "norm.weightless"
        assert f"not norm.llama: rms_norm: weight has shape {shape}, x has width 32" in fused.reason


def test_a_scale_per_column_is_refused() -> None:
    (refused,) = fusionpass.explain(static, X, torch.ones(WIDTH)).refused
    assert "takes one scale, not (32,)" in refused.reason


NORM = LlamaNorm(WIDTH)


def test_a_broadcast_residual_is_refused() -> None:
    report = fusionpass.explain(lambda x, r: NORM(x + r), X, torch.zeros(WIDTH, dtype=torch.bfloat16))
    assert report.count("rms_norm") == 1
    (refused,) = report.refused
    assert refused.rule == "norm.add"
    assert "They must be alike" in refused.reason


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda x, r: torch.add(x, r, alpha=2), "is called with other arguments"),
        (lambda x, r: x + 1, "expected a tensor, found the constant 1"),
        (lambda x, r: x + r[:1], "They must be alike"),
    ],
)
def test_other_additions_are_refused(add: Callable[..., torch.Tensor], reason: str) -> None:
    report = fusionpass.explain(lambda x, r: NORM(add(x, r)), X, X)
    assert report.count("rms_norm") == 1
    assert reason in report.refused[0].reason


@pytest.mark.parametrize("name", ["norm.llama", "rms_norm"])
def test_disabled_rules_and_ops_are_refused_by_name(name: str) -> None:
    config = fusionpass.Config(disable=frozenset({name}))
    report = fusionpass.explain(lambda x: NORM(x), X, config=config)
    assert not report.fused
    assert report.refused[0].reason == f"{name} is disabled by Config.disable"


@pytest.mark.parametrize("name", ["norm.quantize", "rms_norm_quantize", "fuse"])
def test_disabled_folds_leave_the_parts(name: str) -> None:
    config = fusionpass.Config(disable=frozenset({name}))
    report = fusionpass.explain(lambda x, s: static(NORM(x), s), X, SCALE, config=config)
    assert [r.op for r in report.fused] == ["rms_norm", "quantize"]


def test_linear_in_the_size_of_the_graph() -> None:
    def stack(depth: int) -> float:
        def function(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            for _ in range(depth):
                x = x + static(NORM(x), s).to(x.dtype)
            return x

        report = fusionpass.explain(function, X, SCALE)
        assert len(report.fused) == depth
        return sum(report.graphs[0].seconds[name] for name in ("normalize", "recognise", "fuse"))

    stack(2)
    # Quadratic work would be 64 times as much; the bound leaves room for a noisy machine.
    assert stack(80) < 25 * max(stack(10), 0.005)


def gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, size: int, back: int = WIDTH) -> torch.Tensor:
    h = (x.float() * torch.nn.functional.silu(gate.float())).view(-1, size)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * h.view(-1, back).to(x.dtype)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_a_size_is_bound_to_an_argument(size: int) -> None:
    report = fusionpass.explain(lambda x, gate, w: gated(x, gate, w, size), X, X + 1, WEIGHT)
    assert report.count("gated_rms_norm", rule="norm.gated_before_grouped") == 1, str(report)
    assert f"group_size={size})" in report.graphs[0].snapshots[2][1]


def test_a_size_across_rows_is_refused() -> None:
    report = fusionpass.explain(lambda x, gate, w: gated(x, gate, w, 2 * WIDTH), X, X + 1, WEIGHT)
    assert report.count("gated_rms_norm") == 0
    (reason,) = {record.reason for record in report.refused if record.op == "gated_rms_norm"} | {
        record.reason for record in report.fused if "group_size" in record.reason
    }
    assert "group_size=64 for a width of 32" in reason


def test_two_sizes_of_one_name_must_agree() -> None:
    def function(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
        h = (x.float() * torch.nn.functional.silu(gate.float())).view(4, -1, 8)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        h = (weight.view(-1, size) * h.view(4, -1, size)).view(4, WIDTH)
        return h.to(x.dtype)

    report = fusionpass.explain(lambda *args: function(*args, 8), X, X + 1, WEIGHT)
    assert report.count("gated_rms_norm", rule="norm.gated_before_falcon") == 1, str(report)
    assert not fusionpass.explain(lambda *args: function(*args, 16), X, X + 1, WEIGHT).count("gated_rms_norm")


def test_a_gate_may_be_computed_before_or_after_the_norm() -> None:
    def function(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, first: bool) -> torch.Tensor:
        factor = torch.nn.functional.silu(gate.float()) if first else None
        norm = llama(x, weight)
        return (norm * (torch.nn.functional.silu(gate.float()) if factor is None else factor)).to(x.dtype)

    for first in (True, False):
        report = fusionpass.explain(lambda *args, first=first: function(*args, first), X, X + 1, WEIGHT)
        assert report.count("gated_rms_norm", rule="norm.gated_after") == 1, str(report)
        assert len(report.fused) == 1


def test_a_gate_that_others_read_stays_out_of_the_norm() -> None:
    def function(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> Any:
        factor = torch.nn.functional.silu(gate.float())
        return (llama(x, weight) * factor).to(x.dtype), factor * 2

    report = fusionpass.explain(function, X, X + 1, WEIGHT)
    assert report.count("rms_norm", rule="norm.llama") == 1, str(report)
    assert report.count("gated_rms_norm") == 0


def test_a_sum_that_is_also_the_shift_is_not_folded() -> None:
    def function(x: torch.Tensor, residual: torch.Tensor, by: torch.Tensor) -> Any:
        total = x + residual
        h = total.float()
        norm = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return norm * (1 + by) + total, total

    report = fusionpass.explain(function, X, X + 1, X + 2)
    assert report.count("rms_norm") == 1
    (refused,) = report.refused
    assert refused.rule == "norm.add"
    assert "more than once" in refused.reason
