"""Schemes of linears: how the input and the weight of each are quantised."""

from dataclasses import dataclass

import torch

from ..errors import ScaleError
from ..ops.quant import quantized
from ..ops.quant.scheme import Scheme

_ELEMENTS = 1 << 22
"""Of a weight that are quantised at once, about, which bounds the memory for it."""


@dataclass(frozen=True)
class LinearScheme:
    """How a linear is quantised.

    Args:
        input: the scheme of what it reads.
        weight: the scheme of its weight [N, K]; "per token" is per output channel there.
    """

    input: Scheme
    weight: Scheme

    @property
    def calibrated(self) -> bool:
        """Whether the input's scheme takes a scale, which calibration data has to give."""
        return self.input.takes_scale

    @property
    def multiple(self) -> int:
        """What K has to be a multiple of: the group, and 16 for the matrix units."""
        return max(16, self.input.group or 1)


def _linear_scheme(name: str, weight: str | None = None) -> LinearScheme:
    return LinearScheme(Scheme.parse(name), Scheme.parse(weight or name))


SCHEMES = {
    "fp8_static": _linear_scheme("fp8_static"),
    "fp8_token": _linear_scheme("fp8_token"),
    "fp8_group128": _linear_scheme("fp8_group128", "fp8_block128"),
    "mxfp8": _linear_scheme("mxfp8"),
    "nvfp4": _linear_scheme("nvfp4"),
    "int8_token": _linear_scheme("int8_token"),
}
"""By the name of the input's scheme."""


def given_scale(amax: torch.Tensor, kind: Scheme, where: str) -> torch.Tensor:
    """The scale that `kind` takes for a tensor with this largest magnitude, 0-dim fp32.

    `amax / 448` for e4m3fn codes; `amax / (6 * 448)` for e2m1 codes whose block scales are e4m3fn.

    Raises:
        ScaleError: `amax` is zero or not finite.
    """
    try:
        return checked_scale(amax / (kind.max if kind.static else kind.max * torch.finfo(kind.scale_dtype).max), where)
    except ScaleError:
        raise _useless(amax, where) from None


def weight_given_scale(weight: torch.Tensor, kind: Scheme, where: str) -> torch.Tensor | None:
    """The scale that `kind` takes for `weight`; None where it takes none.

    Raises:
        ScaleError: `weight` is not finite, or is all zeros and `kind` takes a scale.
    """
    amax = absolute_maximum(weight)
    if kind.takes_scale:
        return given_scale(amax, kind, where)
    if not amax.is_meta and not amax.isfinite():
        raise _useless(amax, where)
    return None


def _useless(amax: torch.Tensor, where: str) -> ScaleError:
    return ScaleError(
        f"its largest absolute value is {amax.item():g}, which gives no scale", where, "Name the linear in skip"
    )


def quantize_weight(weight: torch.Tensor, given: torch.Tensor | None, kind: Scheme) -> list[torch.Tensor]:
    """Codes and computed scales of a weight [N, K], contiguous; `given` as `quantize` takes it."""
    # A whole number of blocks of 128 rows.
    rows = max(1, _ELEMENTS // weight.shape[1] // 128) * 128
    parts = [quantized(part, given, kind) for part in weight.detach().split(rows)]
    return [torch.cat(list(part)).contiguous() for part in zip(*parts, strict=True)]


def scale_shape(kind: Scheme, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the scales of a weight [rows, columns]."""
    if kind.static:
        return ()
    if kind.granularity == "block128":
        return (-(-rows // 128), -(-columns // 128))
    return (rows, columns // kind.group if kind.group else 1)


def absolute_maximum(x: torch.Tensor) -> torch.Tensor:
    """`max |x|` as a 0-dim fp32 tensor; NaN if there is one in `x`. Makes no copy of `x`."""
    low, high = torch.aminmax(x.detach())
    return torch.maximum(low.abs(), high.abs()).float()


def checked_scale(scale: torch.Tensor | float, where: str) -> torch.Tensor:
    """`scale` as a 0-dim fp32 tensor.

    Raises:
        ScaleError: more than one element; or zero, negative or not finite, itself or its reciprocal.
    """
    value = torch.as_tensor(scale, dtype=torch.float32).detach()
    if value.numel() != 1:
        raise ScaleError(f"the scale has shape {list(value.shape)}", where, "A per-tensor scale has one element")
    value = value.reshape(())
    # A meta tensor has no value yet; load_state_dict checks the one that it gets.
    if not value.is_meta and not (value > 0 and torch.isfinite(value) and torch.isfinite(1 / value)):
        raise ScaleError(
            f"the scale is {value.item():g}",
            where,
            "A scale is positive and finite: an absolute maximum over the largest code",
        )
    return value


def checked_scales(scales: torch.Tensor | float, kind: Scheme, rows: int, columns: int, where: str) -> torch.Tensor:
    """The scales of a weight [rows, columns], in the dtype in which the scheme stores them.

    Raises:
        ScaleError: another shape or dtype; or one that is zero, negative or not finite.
    """
    if kind.static:
        return checked_scale(scales, where)
    value = torch.as_tensor(scales).detach()
    shape, dtype = scale_shape(kind, rows, columns), kind.stored_scale_dtype
    if value.shape != shape or value.dtype != dtype:
        raise ScaleError(
            f"the scales are {value.dtype}, shape {list(value.shape)}",
            where,
            f"Pass {dtype} [{', '.join(map(str, shape))}]",
        )
    if not value.is_meta:
        # An exponent byte of 255 is NaN, and every other one a power of two.
        bad = value == 255 if dtype == torch.uint8 else ~((value.float() > 0) & value.float().isfinite())
        if bad.any():
            raise ScaleError(f"{int(bad.sum())} of {value.numel()} scales are not positive and finite", where)
    return value
