"""The activations of MLPs, gated and not, with the quantisation behind."""

import dataclasses

import torch
from torch.nn import functional as F

from ...errors import ArgumentError
from ...op import Tolerance, op
from ..derive import quantizing
from ..rows import triton_backend

PRODUCT = Tolerance(ulp=2, fraction=2e-3, fp32_ulp=16, floor=2**-21)
"""The activation may move by one step of its dtype (another exponential), which is up to two of the product's."""

GELU = dataclasses.replace(PRODUCT, fraction=4e-3)
"""Below -2, `1 + erf(x)` has lost so many digits that another erf moves 16-bit results too: 0.23 % of normal inputs."""


def _gated(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    gate, up = (torch.randn(tokens, width, generator=generator, device=device).mul(2).to(dtype) for _ in range(2))
    return {"gate": gate, "up": up}


def _clamped(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    return {**_gated(tokens, width, dtype, device, generator), "alpha": 1.702, "limit": 7.0}


def _ungated(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    return {"x": torch.randn(tokens, width, generator=generator, device=device).mul(2).to(dtype)}


@op(outputs=("product",), sample=_gated, tolerance={"product": PRODUCT})
def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, the activation of Llama's MLP (SwiGLU).

    The activation is computed in float32 and rounded to the dtype of `gate`; the product is rounded again.

    Args:
        gate: [..., width], floating point; a slice of a packed [..., 2 * width] row will do.
        up: the shape and dtype of `gate`.

    Returns:
        [..., width], the dtype of `gate`.

    Raises:
        ArgumentError: the two differ in shape or dtype, or are not floating point.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check("silu_mul", gate, up)
    return F.silu(gate) * up


@op(outputs=("product",), sample=_gated, tolerance={"product": GELU})
def gelu_mul(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """`gelu(gate) * up`, the activation of Gemma's MLP (GeGLU).

    Args:
        gate: [..., width], floating point.
        up: the shape and dtype of `gate`.
        approximate: "none" for the error function, "tanh" for its approximation.

    Returns:
        [..., width], the dtype of `gate`.

    Raises:
        ArgumentError: as `silu_mul`, or another `approximate`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check("gelu_mul", gate, up)
    return _gelu(gate, approximate, "gelu_mul") * up


@op(outputs=("product",), sample=_clamped, tolerance={"product": PRODUCT})
def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> torch.Tensor:
    """`(up' + 1) * gate' * sigmoid(alpha * gate')` with `gate' = min(gate, limit)`, `up' = clamp(up, -limit, limit)`.

    The activation of GPT-OSS. Each step is rounded to the dtype of `gate`.

    Args:
        gate: [..., width], floating point; every second column of an interleaved [..., 2 * width] row will do.
        up: the shape and dtype of `gate`.
        alpha: slope of the sigmoid.
        limit: largest value of `gate`, and largest magnitude of `up`.

    Returns:
        [..., width], the dtype of `gate`.

    Raises:
        ArgumentError: as `silu_mul`.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025.
    """
    _check("clamped_swiglu", gate, up)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@op(outputs=("activation",), sample=_ungated, tolerance={"activation": PRODUCT})
def silu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(x)`, computed in float32 and rounded once.

    Args:
        x: [..., width], floating point.

    Returns:
        [..., width], the dtype of `x`.

    Raises:
        ArgumentError: `x` is not floating point.

    Source: Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units", 2017.
    """
    _check("silu", x)
    return F.silu(x)


@op(outputs=("activation",), sample=_ungated, tolerance={"activation": GELU})
def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU, computed in float32 and rounded once.

    Args:
        x: [..., width], floating point.
        approximate: "none" for the error function, "tanh" for its approximation.

    Returns:
        [..., width], the dtype of `x`.

    Raises:
        ArgumentError: `x` is not floating point, or another `approximate`.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    _check("gelu", x)
    return _gelu(x, approximate, "gelu")


@op(outputs=("activation",), sample=_ungated, tolerance={"activation": PRODUCT})
def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """`relu(x)²`, the activation of Nemotron's MLP.

    Args:
        x: [..., width], floating point.

    Returns:
        [..., width], the dtype of `x`.

    Raises:
        ArgumentError: `x` is not floating point.

    Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
    """
    _check("relu_squared", x)
    return F.relu(x).square()


def _gelu(x: torch.Tensor, approximate: str, where: str) -> torch.Tensor:
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"approximate={approximate!r} does not exist", where, 'Pass "none" or "tanh"')
    return F.gelu(x, approximate=approximate)


def _check(where: str, gate: torch.Tensor, up: torch.Tensor | None = None) -> None:
    alike = up is None or (gate.shape == up.shape and gate.dtype == up.dtype)
    if not alike or not gate.is_floating_point():
        given = " and ".join(f"{tuple(t.shape)} {t.dtype}" for t in (gate, up) if t is not None)
        raise ArgumentError(f"the inputs are {given}", where, "They must be alike, and floating point")


silu_mul_quantize = quantizing(silu_mul, "product")
gelu_mul_quantize = quantizing(gelu_mul, "product")
clamped_swiglu_quantize = quantizing(clamped_swiglu, "product")
silu_quantize = quantizing(silu, "activation")
gelu_quantize = quantizing(gelu, "activation")
relu_squared_quantize = quantizing(relu_squared, "activation")

PAIRS = (
    (silu_mul, silu_mul_quantize),
    (gelu_mul, gelu_mul_quantize),
    (clamped_swiglu, clamped_swiglu_quantize),
    (silu, silu_quantize),
    (gelu, gelu_quantize),
    (relu_squared, relu_squared_quantize),
)
"""Each activation, and what it is with the quantisation behind."""

for _plain_op, _fused_op in PAIRS:
    for _op in (_plain_op, _fused_op):
        _op.backends.append(triton_backend(f"{__name__}.triton", f"plan_{_plain_op.name}"))
