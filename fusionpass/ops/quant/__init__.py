"""Quantisation of activations."""

import math
from collections.abc import Mapping

import torch

from ...errors import ArgumentError, ScaleError
from ...op import EXACT, Tolerance, op
from ..rows import triton_backend
from .arithmetic import dequantize, quantized, static_codes
from .layout import refuse_layout
from .scheme import Scheme

__all__ = [
    "CODES", "SCALES", "Scheme", "check_quantizable", "dequantize", "quantize", "quantized", "quantized_outputs",
    "sample_scale", "static_codes", "static_scale",
]  # fmt: skip

CODES = Tolerance(ulp=1, fraction=2e-3)
"""A value that a reduction order moves across a rounding boundary lands on the neighbouring code."""
SCALES = Tolerance(ulp=3, fraction=2e-3, fp32_ulp=10)
"""Of scales behind a kernel whose outputs differ by up to two steps (float32: eight): dividing by 448 makes 8/7 of
that, and rounds. In steps of the input's dtype; an exponent byte counts as it is."""


def quantized_outputs(arguments: Mapping[str, object]) -> tuple[str, ...]:
    """The names of what a quantisation with these arguments returns."""
    return ("q", "scale") if Scheme.parse(str(arguments["scheme"])).returns_scale else ("q",)


def static_scale(device: torch.device | str) -> torch.Tensor:
    """A scale that leaves most normal values in range and clamps some."""
    return torch.full((), 0.0078125 * 1.1, dtype=torch.float32, device=device)


def sample_scale(scheme: str, device: torch.device | str) -> torch.Tensor | None:
    """The argument `scale` for a sample of normal values, None where the scheme takes none."""
    kind = Scheme.parse(scheme)
    if not kind.takes_scale:
        return None
    # amax / (448 * 6) for an amax of 4.
    return static_scale(device) if kind.static else torch.full((), 4 / 2688, dtype=torch.float32, device=device)


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    x = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    return {"x": x, "scale": static_scale(device), "scheme": "fp8_static"}


@op(outputs=quantized_outputs, sample=_sample, tolerance={"q": EXACT, "scale": EXACT})
def quantize(x: torch.Tensor, scale: torch.Tensor | None = None, scheme: str = "fp8_static") -> list[torch.Tensor]:
    """Quantise `x` to codes, with a scale that is given or computed.

    Args:
        x: [..., width], floating point; [N, K] for "fp8_block128" and "int8_block128".
        scale: one float element of any shape, where the scheme takes one: what a code of 1.0 stands for
            ("fp8_static"), or what the block scales are relative to ("nvfp4"). Not checked for sign or finiteness here,
            which would read it back from the device.
        scheme: a `Scheme` as a string: `SCHEMES` names them and says what becomes of zeros, infinities and NaN.

    Returns:
        [codes] where the scale is given, else [codes, scales]. Codes have the shape of `x` and the scheme's dtype;
        "nvfp4" packs two a byte: [..., width/2] uint8, the even element in the low nibble. Scales, float32 or as the
        scheme says (uint8 for exponent bytes):
        per token [..., 1];
        per group [..., width/group], in the memory order of the layout: "column_major" has strides (1, rows padded to
        16 bytes) over the flattened rows; "swizzled" is [⌈rows/128⌉·128, ⌈groups/4⌉·4], padded with zeros;
        per 128 × 128 block [⌈N/128⌉, ⌈K/128⌉].

    Raises:
        SchemeError: the scheme does not exist.
        ScaleError: a scale that is missing, of more than one element, or given to a scheme that computes its own.
        ArgumentError: `x` is not floating point, or its width is no multiple of the group.
    """
    kind = Scheme.parse(scheme)
    check_quantizable(x, scale, kind)
    return quantized(x, scale, kind)


def check_quantizable(x: torch.Tensor, scale: torch.Tensor | None, kind: Scheme) -> None:
    """Raise what `quantize` raises for arguments that do not fit the scheme."""
    if not x.is_floating_point():
        raise ArgumentError(f"x has dtype {x.dtype}", "quantize", "Pass a floating-point tensor")
    if kind.takes_scale and scale is None:
        raise ScaleError(f"the scheme '{kind}' needs a scale", "quantize", "Pass scale, a tensor of one element")
    if scale is not None and not kind.takes_scale:
        raise ScaleError(f"the scheme '{kind}' computes its scale", "quantize", "Leave scale out")
    if scale is not None and scale.numel() != 1:
        raise ScaleError(f"the scheme '{kind}' takes one scale, not {tuple(scale.shape)}", "quantize")
    if kind.static:
        return
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ArgumentError(f"x has shape {tuple(x.shape)}, and nothing to take a maximum of", "quantize")
    if kind.granularity == "block128" and x.dim() != 2:
        raise ArgumentError(f"x has {x.dim()} dimensions", "quantize", f"'{kind}' takes a matrix")
    if isinstance(x.shape[0], int) and (reason := refuse_layout(math.prod(x.shape[:-1]), kind.layout)):
        raise ArgumentError(f"x cannot be {str(kind)!r}", "quantize", f"As {reason}; leave the layout linear")
    if kind.group is not None and x.shape[-1] % kind.group:
        raise ArgumentError(
            f"the width {x.shape[-1]} is not a multiple of {kind.group}",
            "quantize",
            f"Pad it, or choose a scheme per token or of smaller groups than '{kind}'",
        )


quantize.backends.append(triton_backend(f"{__name__}.triton", "plan_quantize"))
