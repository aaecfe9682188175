"""verify=True: a rewrite that changes numbers is not made, is told, and raises where asked."""

from typing import Any

import pytest
import torch

import fusionpass
from fusionpass import Config, Fold, Spelling
from fusionpass.errors import MissError
from fusionpass.ops import add_rms_norm, rms_norm
from fusionpass.ops.norm import AFTER
from fusionpass.ops.quant import Scheme, quantized
from tests.models import Block, LlamaNorm, static

X = torch.zeros(6, 64, dtype=torch.bfloat16)
NORM = LlamaNorm(64)


def model(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
    total = x + residual
    return static(NORM(total), scale), total


def explained(function: Any, *args: torch.Tensor, **options: Any) -> fusionpass.Report:
    return fusionpass.explain(function, *args, config=Config(verify=True, **options))


def test_true_rewrites_pass() -> None:
    report = explained(model, X, X, torch.tensor(0.5))
    assert report.count("add_rms_norm_quantize", scheme="fp8_static") == 1, str(report)
    assert not report.refused


@pytest.mark.parametrize("scheme", ["fp8_static", "fp8_token"])
def test_a_fold_across_a_view_of_the_rows(scheme: str) -> None:
    def regrouped(x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Any:
        total = x + residual
        codes = quantized(NORM(total).view(-1, 64), scale if scheme == "fp8_static" else None, Scheme.parse(scheme))
        return codes, total

    x = X.view(2, 3, 64)
    report = explained(regrouped, x, x, torch.tensor(0.5))
    assert report.count("add_rms_norm_quantize", scheme=scheme) == 1, str(report)
    assert not report.refused


def llama(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm.reference(x, weight, eps)  # type: ignore[no-any-return]


@pytest.mark.parametrize("constants", [{"rounding": AFTER}, {"weight_offset": 1.0, "rounding": AFTER}])
def test_a_spelling_that_means_something_else(constants: dict[str, Any]) -> None:
    wrong = Spelling("mine.norm", rms_norm, llama, constants)
    options = {"rules": (wrong,), "disable": frozenset({"norm.llama", "norm.weightless"})}
    assert fusionpass.explain(NORM, X, config=Config(**options)).count("rms_norm", rule="mine.norm") == 1
    report = explained(NORM, X, **options)
    assert not report.fused
    (refused,) = report.refused
    assert refused.rule == "mine.norm"
    assert refused.reason.startswith("verify: on random inputs norm differs in ")


def test_a_difference_that_only_zeros_show() -> None:
    """The spelling's eps is twice the op's: next to a mean of one nothing, next to zero everything."""

    def doubled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps + eps)).to(x.dtype)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return doubled(x, weight, 1e-9)

    report = explained(norm, X, torch.ones(64).bfloat16(), rules=(Spelling("mine.norm", rms_norm, doubled),))
    assert not report.fused
    (refused,) = report.refused
    assert refused.reason.startswith("verify: on subnormal inputs norm differs in ")


def test_a_fold_that_means_something_else() -> None:
    def difference(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual - x

    wrong = Fold("mine.sub", (difference,), rms_norm, add_rms_norm, "residual")

    def subtracting(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = NORM(residual - x)
        return out

    assert fusionpass.explain(subtracting, X, X, config=Config(rules=(wrong,))).count("add_rms_norm") == 1
    report = explained(subtracting, X, X, rules=(wrong,))
    assert [r.op for r in report.fused] == ["rms_norm"]
    assert [r.rule for r in report.refused] == ["mine.sub"]
    assert "verify: on random inputs" in report.refused[0].reason


def test_it_raises_where_a_miss_is_an_error() -> None:
    wrong = Spelling("mine.norm", rms_norm, llama, {"weight_offset": 1.0, "rounding": AFTER})
    options = Config(verify=True, on_miss="error", rules=(wrong,), disable=frozenset({"norm.llama", "norm.weightless"}))
    compiled = fusionpass.compile(LlamaNorm(64), options)
    with pytest.raises(Exception, match="verify: on random inputs") as caught, torch.no_grad():
        compiled(X)
    assert isinstance(caught.value, MissError) or "MissError" in str(caught.value)


def test_it_checks_symbolic_sizes_by_what_was_traced() -> None:
    block = fusionpass.compile(Block(32), verify=True, numerics="eager")
    with torch.no_grad():
        for tokens in (5, 9):
            x = torch.randn(1, tokens, 32, dtype=torch.bfloat16)
            block(x, x)
    assert not fusionpass.report(block).refused
    fusionpass.assert_fused(block)
