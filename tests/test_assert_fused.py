"""assert_fused: what it accepts, what it says where it does not."""

from typing import Any

import pytest
import torch

import fusionpass
from fusionpass.errors import ConfigError, NotCompiledError
from tests.models import Block, LlamaNorm, static

X = torch.zeros(4, 32, dtype=torch.bfloat16)


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LlamaNorm(32), LlamaNorm(32)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> Any:
        return static(self.first(x), scale), self.second(x)


REPORT = fusionpass.explain(Two(), X, torch.tensor(0.5))
MISSING = fusionpass.explain(
    lambda x, s: (x.float() * s.reciprocal()).clamp(-240, 240).to(torch.float8_e4m3fn), X, X[0, 0]
)


def test_what_is_there() -> None:
    fusionpass.assert_fused(REPORT)
    fusionpass.assert_fused(REPORT, count=2)
    fusionpass.assert_fused(REPORT, "rms_norm_quantize")
    fusionpass.assert_fused(REPORT, "rms_norm_quantize", 1, scheme="fp8_static", where="fir*")
    fusionpass.assert_fused(REPORT, "rms_norm", 1, where="second")
    fusionpass.assert_fused(REPORT, "silu_mul", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rms_norm_quantize", 2), "1 sites run rms_norm_quantize, not 2"),
        (("silu_mul",), "0 sites run silu_mul, not at least 1"),
        ((None, 3), "2 sites run op, not 3"),
    ],
)
def test_what_is_not(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        fusionpass.assert_fused(REPORT, *arguments)
    assert str(REPORT) in str(caught.value)


@pytest.mark.parametrize("where", ["second", "third"])
def test_elsewhere(where: str) -> None:
    with pytest.raises(AssertionError, match=f"0 sites run rms_norm_quantize in {where}"):
        fusionpass.assert_fused(REPORT, "rms_norm_quantize", where=where)
    with pytest.raises(AssertionError, match="0 sites run rms_norm_quantize fp8_token"):
        fusionpass.assert_fused(REPORT, "rms_norm_quantize", scheme="fp8_token")


def test_a_miss_fails_unless_an_op_is_named() -> None:
    assert MISSING.missed
    with pytest.raises(AssertionError, match="1 misses"):
        fusionpass.assert_fused(MISSING)
    fusionpass.assert_fused(MISSING, "rms_norm", 0)


def test_a_compiled_model() -> None:
    block = fusionpass.compile(Block(32))
    with pytest.raises(AssertionError, match="nothing compiled yet"):
        fusionpass.assert_fused(block)
    with torch.no_grad():
        block(X, X)
    fusionpass.assert_fused(block)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"there is no op 'rms_nrom'.*Did you mean 'rms_norm'"):
        fusionpass.assert_fused(REPORT, "rms_nrom")
    with pytest.raises(NotCompiledError, match="was not compiled"):
        fusionpass.assert_fused(Two())
