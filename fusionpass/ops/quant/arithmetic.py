"""What a scheme computes, in plain PyTorch: float32, no control flow that depends on data, so that it traces."""

import torch
import torch.nn.functional as F

from .layout import laid_out, linear
from .scheme import Scheme

_STEPS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Midpoints between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 of e2m1, and whether the upper one is even."""


def static_codes(x: torch.Tensor, scale: torch.Tensor, kind: Scheme) -> torch.Tensor:
    """The arithmetic of a static scheme alone, which Dynamo traces without parsing the scheme."""
    # Explicit float32: a 0-dim scale would otherwise leave the product in bfloat16.
    factor = scale.float().reshape(())
    y = x.float() / factor if kind.rounding == "divide" else x.float() * factor.reciprocal()
    return y.clamp(-kind.max, kind.max).to(kind.dtype)


def quantized(x: torch.Tensor, scale: torch.Tensor | None, kind: Scheme) -> list[torch.Tensor]:
    """The arithmetic of any scheme alone: `quantize` without its checks.

    Args:
        x: [..., width], floating point; the width a multiple of the group.
        scale: the scale that the scheme takes, one element.
        kind: the scheme.

    Returns:
        [codes] or [codes, scales], as `quantize`.
    """
    if kind.static:
        assert scale is not None
        return [static_codes(x, scale, kind)]
    if kind.granularity == "block128":
        return _block_quantized(x, kind)
    grouped = x if kind.group is None else x.unflatten(-1, (x.shape[-1] // kind.group, kind.group))
    step = computed_scale(grouped.abs().amax(-1, keepdim=True), kind, x.dtype)
    if kind.scale_dtype == torch.float8_e4m3fn:
        assert scale is not None
        given = scale.float().reshape(())
        stored = (step / given).clamp(kind.eps, 448.0).to(torch.float8_e4m3fn)
        if kind.rounding == "divide":
            y = grouped.float() / (stored.float() * given)
        else:
            y = grouped.float() * (given.reciprocal() / stored.float())
    elif kind.scale_dtype == torch.float8_e8m0fnu:
        exponent = biased_exponent(step, kind.scale_rounding)
        y, stored = grouped.float() * _inverse_power(exponent), exponent.to(torch.uint8)
    else:
        stored = power_of_two(step, kind.scale_rounding)
        y = grouped.float() / stored if kind.rounding == "divide" else grouped.float() * stored.reciprocal()
    q = codes(y, kind)
    if kind.group is None:
        return [q, stored]
    return [*laid_out(q.flatten(-2), stored.squeeze(-1), kind.layout)]


def computed_scale(amax: torch.Tensor, kind: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The scale before it is rounded to a power of two, or taken relative to another: float32, the shape of `amax`.

    Args:
        amax: largest magnitudes, any floating dtype; NaN where any element is.
        kind: the scheme.
        dtype: of the input.
    """
    amax = amax.float()
    if kind.zero == "one":
        amax = torch.where(amax > 0, amax, 1.0)
    # torch's CUDA kernels multiply by the float32 reciprocal of a Python number, and so do the Triton ones.
    step = amax / kind.denominator
    if kind.amax_dtype == "input":
        step = step.to(dtype).float()
    # Where scales are relative, the bound is on them, not here.
    return step.clamp(min=kind.eps) if kind.eps and kind.scale_dtype != torch.float8_e4m3fn else step


def biased_exponent(step: torch.Tensor, rounding: str) -> torch.Tensor:
    """The e8m0 exponent of `step` rounded to a power of two: int32, 255 for NaN, 254 for infinity, 0 for 2**-127."""
    if rounding == "log2_ceil":
        power = step.log2().ceil()
    else:
        mantissa, exponent = torch.frexp(step)  # a mantissa in [0.5, 1)
        power = exponent - 1 if rounding == "floor" else exponent - (mantissa == 0.5).int()
    biased = (power + 127).clamp(0, 254).int()
    biased = torch.where(step == 0, 0, biased)
    biased = torch.where(step.isinf(), 254, biased)
    return torch.where(step.isnan(), 255, biased)


def power_of_two(step: torch.Tensor, rounding: str) -> torch.Tensor:
    """`step` rounded to a power of two in float32, at least 2**-126; infinity and NaN stay. "none" leaves it alone."""
    if rounding == "none":
        return step
    power = (biased_exponent(step, rounding).clamp(min=1) << 23).view(torch.float32)
    return torch.where(step.isfinite(), power, step)


def _inverse_power(biased: torch.Tensor) -> torch.Tensor:
    """2**(127 - biased) in float32; 1 for byte 0, whose group rounds to zeros, NaN for 255."""
    inverse = ((254 - biased) << 23).view(torch.float32)
    inverse = torch.where(biased == 254, 2.0**-127, inverse)
    inverse = torch.where(biased == 0, 1.0, inverse)
    return torch.where(biased == 255, torch.nan, inverse)


def codes(y: torch.Tensor, kind: Scheme) -> torch.Tensor:
    """float32 values in units of one scale as codes: clamped, rounded to nearest even, packed along the last dimension.

    int8 has no NaN: it becomes 0. e2m1 has none either: it becomes 6.0, as in NVIDIA's conversion.
    """
    if kind.packed:
        magnitude = y.abs()
        code = torch.where(y.isnan(), 7, 0)
        for midpoint, upper_is_even in _STEPS:
            code = code + (magnitude >= midpoint if upper_is_even else magnitude > midpoint)
        code = torch.where(torch.signbit(y) & ~y.isnan(), code + 8, code)
        pairs: torch.Tensor = code.unflatten(-1, (code.shape[-1] // 2, 2)).to(torch.uint8)
        return pairs[..., 0] | pairs[..., 1] << 4
    if not kind.dtype.is_floating_point:
        y = y.round().clamp(kind.min, kind.max)
        return torch.where(y.isnan(), 0.0, y).to(kind.dtype)
    return y.clamp(kind.min, kind.max).to(kind.dtype)


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, scheme: str | Scheme, given: torch.Tensor | None = None
) -> torch.Tensor:
    """What the codes stand for: `code * scale` in float32.

    Args:
        q: codes as `quantize` returns them.
        scale: the scales that it returns; for a static scheme the scale that it was given.
        scheme: a scheme or its string.
        given: for nvfp4, the scale that the block scales are relative to.

    Returns:
        float32, the shape of what was quantised.
    """
    kind = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if kind.group is not None and kind.layout != "column_major":
        groups = q.shape[-1] * (2 if kind.packed else 1) // kind.group
        q, scale = linear(q, scale, kind.layout, (*q.shape[:-1], groups))
    values = _unpacked(q) if kind.packed else q.float()
    if kind.static:
        return values * scale.float().reshape(())
    if kind.granularity == "block128":
        rows, columns = values.shape
        return values * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    if kind.scale_dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(scale.double() - 127).float().where(scale != 255, torch.nan)
    step = scale.float() if given is None else scale.float() * given.float().reshape(())
    if kind.group is None:
        return values * step
    grouped: torch.Tensor = values.unflatten(-1, (-1, kind.group))
    return (grouped * step.unsqueeze(-1)).flatten(-2)


def _unpacked(q: torch.Tensor) -> torch.Tensor:
    # By arithmetic: a table would be a constant of the graph, which keeps equal nodes apart.
    code = torch.stack([q & 15, q >> 4], -1).flatten(-2)
    magnitude = code & 7
    quarters = torch.where(magnitude < 2, magnitude * 2, (2 + (magnitude & 1)) << (magnitude >> 1))
    return quarters.float() * torch.where(code >= 8, -0.25, 0.25)


def _block_quantized(x: torch.Tensor, kind: Scheme) -> list[torch.Tensor]:
    """[N, K] with a scale for every 128 × 128, ragged at the edges: codes [N, K], scales [⌈N/128⌉, ⌈K/128⌉]."""
    rows, columns = x.shape
    down, across = -(-rows // 128), -(-columns // 128)
    blocks = F.pad(x, (0, across * 128 - columns, 0, down * 128 - rows)).view(down, 128, across, 128)
    step = computed_scale(blocks.abs().amax((1, 3), keepdim=True), kind, x.dtype)
    y = blocks.float() / step if kind.rounding == "divide" else blocks.float() * step.reciprocal()
    q = codes(y, kind).view(down * 128, across * 128)[:rows, :columns].contiguous()
    return [q, step.view(down, across)]
