"""The gated activations' references: float64, rounding points, composition, mistakes."""

import math

import pytest
import torch
from torch.nn import functional

from fusionpass.errors import ArgumentError
from fusionpass.ops import gelu_mul, gelu_mul_quantize, quantize, silu_mul, silu_mul_quantize

SCALE = torch.tensor(0.02)


def pair(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    packed = (torch.randn(7, 2 * 93) * 3).to(dtype)
    return packed[:, :93], packed[:, 93:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype: torch.dtype) -> None:
    gate, up = pair(dtype)
    x, y = gate.double(), up.double()
    exact = {
        "silu": x / (1 + torch.exp(-x)) * y,
        "none": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))) * y,
        "tanh": 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * y,
    }
    got = {"silu": silu_mul(gate, up)} | {a: gelu_mul(gate, up, a) for a in ("none", "tanh")}
    for name, want in exact.items():
        assert got[name].dtype == dtype
        # Two roundings to dtype; in between float32, where 1 + erf cancels.
        bound = 1.01 * torch.finfo(dtype).eps * want.abs() + 2.0**-22 * (x * y).abs()
        assert ((got[name].double() - want).abs() <= bound).all(), name


def test_the_activation_is_rounded_before_the_product() -> None:
    gate, up = pair()
    assert torch.equal(silu_mul(gate, up), functional.silu(gate) * up)
    unrounded = (functional.silu(gate.float()) * up.float()).bfloat16()
    assert not torch.equal(silu_mul(gate, up), unrounded)


@pytest.mark.parametrize("product_out", [False, True])
def test_the_quantised_ops_are_their_parts(product_out: bool) -> None:
    gate, up = pair()
    for op, part in ((silu_mul_quantize, silu_mul), (gelu_mul_quantize, gelu_mul)):
        arguments = op.bind((gate, up), {"scale": SCALE, "product_out": product_out})
        results = op.reference(**arguments)
        assert op.outputs(arguments) == (("q", "product") if product_out else ("q",))
        codes = quantize(part(gate, up), SCALE)
        assert torch.equal(results[0].view(torch.uint8), codes.view(torch.uint8))
        assert len(results) == 1 + product_out
        if product_out:
            assert torch.equal(results[1], part(gate, up))


def test_mistakes() -> None:
    gate, up = pair()
    with pytest.raises(ArgumentError, match="They must be alike"):
        silu_mul(gate, up[:, :-1])
    with pytest.raises(ArgumentError, match="They must be alike"):
        silu_mul(gate, up.float())
    with pytest.raises(ArgumentError, match="floating point"):
        gelu_mul(gate.int(), up.int())
    with pytest.raises(ArgumentError, match="approximate='sigmoid' does not exist"):
        gelu_mul(gate, up, "sigmoid")
