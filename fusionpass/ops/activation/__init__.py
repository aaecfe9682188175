"""The gated activations of an MLP, with the quantisation behind."""

from collections.abc import Mapping

import torch
from torch.nn.functional import gelu, silu

from ...errors import ArgumentError
from ...op import Tolerance, op
from ..quant import CODES, quantize, quantized_outputs, static_scale
from ..rows import triton_backend

PRODUCT = Tolerance(ulp=2, fraction=2e-3, fp32_ulp=16, floor=2**-21)
"""The activation may move by one step of its dtype (another exponential), which is up to two of the product's."""


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    gate, up = (torch.randn(tokens, width, generator=generator, device=device).mul(2).to(dtype) for _ in range(2))
    return {"gate": gate, "up": up}


def _quantized(
    tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, object]:
    return {**_sample(tokens, width, dtype, device, generator), "scale": static_scale(device), "scheme": "fp8_static"}


def _outputs(arguments: Mapping[str, object]) -> tuple[str, ...]:
    return (*quantized_outputs(arguments), *(("product",) if arguments["product_out"] else ()))


@op(outputs=("product",), sample=_sample, tolerance={"product": PRODUCT})
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
    _check(gate, up)
    return silu(gate) * up


@op(outputs=("product",), sample=_sample, tolerance={"product": PRODUCT})
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
    _check(gate, up)
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"approximate={approximate!r} does not exist", "gelu_mul", 'Pass "none" or "tanh"')
    return gelu(gate, approximate=approximate) * up


@op(outputs=_outputs, sample=_quantized, tolerance={"q": CODES, "product": PRODUCT}, options={"product": "product_out"})
def silu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    scale: torch.Tensor | None = None,
    scheme: str = "fp8_static",
    product_out: bool = False,
) -> list[torch.Tensor]:
    """`quantize(silu_mul(gate, up), scale, scheme)`.

    Args:
        gate: [..., width], floating point.
        up: the shape and dtype of `gate`.
        scale: as `quantize`.
        scheme: as `quantize`.
        product_out: whether the product itself is returned too.

    Returns:
        What `quantize` returns, then the product where asked for.

    Raises:
        As `silu_mul` and `quantize`.
    """
    product = silu_mul.reference(gate, up)
    return [*quantize.reference(product, scale, scheme), *([product] if product_out else [])]


@op(outputs=_outputs, sample=_quantized, tolerance={"q": CODES, "product": PRODUCT}, options={"product": "product_out"})
def gelu_mul_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    scale: torch.Tensor | None = None,
    approximate: str = "none",
    scheme: str = "fp8_static",
    product_out: bool = False,
) -> list[torch.Tensor]:
    """`quantize(gelu_mul(gate, up, approximate), scale, scheme)`.

    Args:
        gate: [..., width], floating point.
        up: the shape and dtype of `gate`.
        scale: as `quantize`.
        approximate: as `gelu_mul`.
        scheme: as `quantize`.
        product_out: whether the product itself is returned too.

    Returns:
        What `quantize` returns, then the product where asked for.

    Raises:
        As `gelu_mul` and `quantize`.
    """
    product = gelu_mul.reference(gate, up, approximate)
    return [*quantize.reference(product, scale, scheme), *([product] if product_out else [])]


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ArgumentError(
            f"gate is {tuple(gate.shape)} {gate.dtype}, up is {tuple(up.shape)} {up.dtype}",
            "activation",
            "They must be alike, and floating point",
        )


for _op in (silu_mul, gelu_mul, silu_mul_quantize, gelu_mul_quantize):
    _op.backends.append(triton_backend(f"{__name__}.triton", f"plan_{_op.name}"))
