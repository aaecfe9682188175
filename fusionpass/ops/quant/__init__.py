"""Quantisation of activations."""

from collections.abc import Mapping

import torch

from ...errors import ArgumentError, ScaleError
from ...op import Tolerance, op
from ..rows import triton_backend
from .scheme import Scheme

CODES = Tolerance(ulp=1, fraction=2e-3)
"""A value that a reduction order moves across a rounding boundary lands on the neighbouring code."""


def quantized_outputs(arguments: Mapping[str, object]) -> tuple[str, ...]:
    """The names of what a quantisation with these arguments returns."""
    return ("q",) if Scheme.parse(str(arguments["scheme"])).static else ("q", "scale")


def static_scale(device: torch.device | str) -> torch.Tensor:
    """A scale that leaves most normal values in range and clamps some."""
    return torch.full((), 0.0078125 * 1.1, dtype=torch.float32, device=device)


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    x = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    return {"x": x, "scale": static_scale(device), "scheme": "fp8_static"}


@op(outputs=quantized_outputs, sample=_sample, tolerance={"q": Tolerance()})
def quantize(x: torch.Tensor, scale: torch.Tensor | None = None, scheme: str = "fp8_static") -> list[torch.Tensor]:
    """Quantise `x` to 8-bit codes: `clamp(x / scale, -max, max)` in float32, rounded to nearest even.

    Args:
        x: [..., width], float32, float16 or bfloat16.
        scale: one float element of any shape; the value that one step of code 1.0 stands for. Not checked for sign or
            finiteness here, which would read it back from the device: a NaN scale gives NaN codes.
        scheme: a `Scheme` as a string. "fp8_static" multiplies by the reciprocal rounded to float32;
            "fp8_static,rounding=divide" divides.

    Returns:
        [codes], the shape of `x`. Infinities become the largest finite code; NaN stays NaN.

    Raises:
        SchemeError: the scheme does not exist.
        ScaleError: a static scheme without a scale, or a scale of more than one element.
        ArgumentError: `x` is not floating point.
    """
    kind = Scheme.parse(scheme)
    if not x.is_floating_point():
        raise ArgumentError(f"x has dtype {x.dtype}", "quantize", "Pass a floating-point tensor")
    if scale is None:
        raise ScaleError(f"the scheme {scheme!r} needs a scale", "quantize", "Pass scale, a tensor of one element")
    if scale.numel() != 1:
        raise ScaleError(f"the scheme {scheme!r} takes one scale, not {tuple(scale.shape)}", "quantize")
    return [static_codes(x, scale, kind)]


def static_codes(x: torch.Tensor, scale: torch.Tensor, kind: Scheme) -> torch.Tensor:
    """The arithmetic of a static scheme alone, which Dynamo traces without parsing the scheme."""
    # Explicit float32: a 0-dim scale would otherwise leave the product in bfloat16.
    factor = scale.float().reshape(())
    y = x.float() / factor if kind.rounding == "divide" else x.float() * factor.reciprocal()
    return y.clamp(-kind.max, kind.max).to(kind.dtype)


quantize.backends.append(triton_backend(f"{__name__}.triton", "plan_quantize"))
