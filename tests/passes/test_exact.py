"""Under numerics="eager" a CPU adds in eager mode's own order, so that a norm is the same to the last bit."""

import pytest
import torch

import fusionpass


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def total(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() * weight.float()).sum(-1)


@pytest.mark.parametrize("width", [576, 1536, 4096])
@pytest.mark.parametrize("function", [norm, total])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_eager_mode(function, width, dtype):
    if dtype == torch.bfloat16 and function is norm and torch.__version__ < "2.13":
        pytest.skip("Inductor's C++ keeps no bfloat16 roundings before torch 2.13")
    torch.manual_seed(0)
    x, weight = torch.randn(2048, width).to(dtype) * 3, torch.rand(width).to(dtype) + 0.5
    compiled = fusionpass.compile(function, numerics="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, weight), function(x, weight))


def test_the_order_is_left_to_inductor_otherwise():
    x, weight = torch.randn(8, 64), torch.rand(64)
    for numerics, kept in (("eager", True), ("fast", False)):
        compiled = fusionpass.compile(norm, numerics=numerics)
        with torch.no_grad():
            compiled(x, weight)
        (source,) = fusionpass.report(compiled).graphs[0].sources
        assert ("aten.mean" in source[source.index("def call(") :]) == kept
