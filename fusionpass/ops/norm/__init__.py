"""RMSNorm, with the residual add in front and the quantisation behind."""

from collections.abc import Mapping

import torch

from ...errors import ArgumentError
from ...op import EXACT, Tolerance, op
from ..quant import CODES, quantize, quantized_outputs, static_scale
from ..rows import triton_backend

NORM = Tolerance(ulp=2, fraction=2e-3, fp32_ulp=8)
"""The order of the sum can move the normalised value by one step, and a step of it is up to two of its product."""


def _tensors(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    x = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    weight = torch.rand(width, generator=generator, device=device).add(0.5).to(dtype)
    return {"x": x, "weight": weight, "eps": 1e-6}


def _with_residual(
    tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, object]:
    residual = torch.randn(tokens, width, generator=generator, device=device).mul(4).to(dtype)
    return {**_tensors(tokens, width, dtype, device, generator), "residual": residual}


def _quantized(
    tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, object]:
    return {**_tensors(tokens, width, dtype, device, generator), "scale": static_scale(device), "scheme": "fp8_static"}


def _residual_quantized(
    tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, object]:
    return {
        **_with_residual(tokens, width, dtype, device, generator),
        "scale": static_scale(device),
        "scheme": "fp8_static",
    }


@op(outputs=("norm",), sample=_tensors, tolerance={"norm": NORM})
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm as Llama spells it: `weight * (x32 * rsqrt(mean(x32²) + eps)).to(x.dtype)`.

    The reduction and the scaling are in float32; the normalised value is rounded to `x.dtype` before the weight.

    Args:
        x: [..., width], floating point.
        weight: [width], floating point; where its dtype is wider than `x`'s, so is the result.
        eps: added to the mean square.

    Returns:
        [..., width], `torch.promote_types(x.dtype, weight.dtype)`.

    Raises:
        ArgumentError: the weight is not [width], or `x` is not floating point.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ArgumentError(
            f"x and weight have dtypes {x.dtype} and {weight.dtype}", "rms_norm", "Both must be floating point"
        )
    if x.dim() == 0:
        raise ArgumentError("x has no dimensions", "rms_norm", "Pass [..., width]")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ArgumentError(
            f"weight has shape {tuple(weight.shape)}, x has width {x.shape[-1]}",
            "rms_norm",
            "Pass one weight per column",
        )
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def _add_outputs(arguments: Mapping[str, object]) -> tuple[str, ...]:
    return ("norm", *(("residual",) if arguments["residual_out"] else ()))


@op(
    outputs=_add_outputs,
    sample=_with_residual,
    tolerance={"norm": NORM, "residual": EXACT},
    options={"residual": "residual_out"},
)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, residual_out: bool = True
) -> list[torch.Tensor]:
    """`rms_norm(x + residual, weight, eps)`, and the sum.

    Args:
        x: [..., width], floating point.
        residual: the shape and dtype of `x`.
        weight: [width].
        eps: added to the mean square.
        residual_out: whether the sum, rounded to `x.dtype` (the norm reads it so rounded), is returned too.

    Returns:
        [norm] or [norm, sum].

    Raises:
        ArgumentError: the shapes or dtypes of `x` and `residual` differ, or as `rms_norm`.
    """
    total = _sum(x, residual)
    return [rms_norm.reference(total, weight, eps), *([total] if residual_out else [])]


def _norm_quantize_outputs(arguments: Mapping[str, object]) -> tuple[str, ...]:
    extra = [name for name, flag in (("norm", "norm_out"), ("residual", "residual_out")) if arguments.get(flag)]
    return (*quantized_outputs(dict(arguments)), *extra)


@op(
    outputs=_norm_quantize_outputs,
    sample=_quantized,
    tolerance={"q": CODES, "norm": NORM},
    options={"norm": "norm_out"},
)
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    scheme: str = "fp8_static",
    norm_out: bool = False,
) -> list[torch.Tensor]:
    """`quantize(rms_norm(x, weight, eps), scale, scheme)`.

    Args:
        x: [..., width], floating point.
        weight: [width].
        scale: as `quantize`.
        eps: added to the mean square.
        scheme: as `quantize`.
        norm_out: whether the norm itself is returned too.

    Returns:
        What `quantize` returns, then the norm where asked for.

    Raises:
        As `rms_norm` and `quantize`.
    """
    norm = rms_norm.reference(x, weight, eps)
    return [*quantize.reference(norm, scale, scheme), *([norm] if norm_out else [])]


@op(
    outputs=_norm_quantize_outputs,
    sample=_residual_quantized,
    tolerance={"q": CODES, "norm": NORM, "residual": EXACT},
    options={"norm": "norm_out", "residual": "residual_out"},
)
def add_rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    scheme: str = "fp8_static",
    norm_out: bool = False,
    residual_out: bool = True,
) -> list[torch.Tensor]:
    """`quantize(rms_norm(x + residual, weight, eps), scale, scheme)`, and the sum.

    Args:
        x: [..., width], floating point.
        residual: the shape and dtype of `x`.
        weight: [width].
        scale: as `quantize`.
        eps: added to the mean square.
        scheme: as `quantize`.
        norm_out: whether the norm is returned too.
        residual_out: whether the sum is returned too.

    Returns:
        What `quantize` returns, then the norm, then the sum, where asked for.

    Raises:
        As `add_rms_norm` and `quantize`.
    """
    total = _sum(x, residual)
    return [
        *rms_norm_quantize.reference(total, weight, scale, eps, scheme, norm_out),
        *([total] if residual_out else []),
    ]


def _sum(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ArgumentError(
            f"x is {tuple(x.shape)} {x.dtype}, residual is {tuple(residual.shape)} {residual.dtype}",
            "add_rms_norm",
            "They must be alike",
        )
    return x + residual


for _op in (rms_norm, add_rms_norm, rms_norm_quantize, add_rms_norm_quantize):
    _op.backends.append(triton_backend(f"{__name__}.triton", f"plan_{_op.name}"))
