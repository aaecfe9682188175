"""Schemes of linears: how the input and the weight of each are quantised."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ScaleError, SchemeError, nearest
from ..ops.quant import quantized
from ..ops.quant.layout import linear, stored_shape
from ..ops.quant.scheme import Scheme

_ELEMENTS = 1 << 22
"""Of a weight that are quantised at once, about, which bounds the memory for it."""


@dataclass(frozen=True)
class LinearScheme:
    """How a linear is quantised.

    Args:
        input: the scheme of what it reads.
        weight: the scheme of its weight [N, K]; "per token" is per output channel there.
        amax_dtype: None where the scale that the input's scheme takes is given; else it is computed, from the largest
            magnitude of the whole input: "float32", or "input", where the quotient is rounded to the input's dtype.
    """

    input: Scheme
    weight: Scheme
    amax_dtype: str | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the input's scheme takes a scale that the linear holds, which calibration data has to give."""
        return self.input.takes_scale and self.amax_dtype is None

    @property
    def multiple(self) -> int:
        """What K has to be a multiple of: the groups, and 16 for the matrix units."""
        return max(16, self.input.group or 1, self.weight.group or 1)

    def input_scale(self, x: torch.Tensor) -> torch.Tensor:
        """The scale that the input's scheme takes for `x` [..., K], from its largest magnitude: 0-dim fp32."""
        # An input without tokens has no maximum.
        amax = F.pad(x.abs().amax(-1).flatten(), (0, 1)).amax()
        step = amax.float() / _divisor(self.input)
        if self.amax_dtype == "input":
            step = step.to(x.dtype).float()
        return step.clamp(min=_LEAST)

    def __str__(self) -> str:
        text = str(self.input)
        name = text.partition(",")[0]
        if self.amax_dtype is not None:
            whole = next(key for key, given in WHOLE.items() if given == name)
            rounded = ",amax_dtype=input" if self.amax_dtype == "input" else ""
            text = whole + rounded + text.removeprefix(name)
        return text if self.weight == Scheme.parse(_WEIGHTS.get(name, name)) else f"{text}/{self.weight}"

    @staticmethod
    def parse(text: str) -> "LinearScheme":
        """A scheme from `"INPUT"` or `"INPUT/WEIGHT"`, each as `Scheme.parse` takes it.

        Without a weight's scheme it is the input's by name, blocks of 128 × 128 for groups of 128. "fp8_tensor" and
        "nvfp4_tensor" are "fp8_static" and "nvfp4" whose input's scale is computed from the whole of it; they have the
        override `amax_dtype=input`.

        Raises:
            SchemeError: the name or an override does not exist, or the two schemes do not go together.
        """
        given, _, weight = text.partition("/")
        name, *overrides = given.split(",")
        amax_dtype = None
        if name in WHOLE:
            name, amax_dtype = WHOLE[name], "float32"
            if "amax_dtype=input" in overrides:
                overrides.remove("amax_dtype=input")
                amax_dtype = "input"
        kind = Scheme.parse(",".join([name, *overrides]))
        made = LinearScheme(kind, Scheme.parse(weight or _WEIGHTS.get(name, name)), amax_dtype)
        if kind.granularity == "block128":
            raise SchemeError(f"{name!r} is for weights", "scheme", f"An input takes {_INPUTS[name]!r}")
        if (torch.int8 in (kind.dtype, made.weight.dtype)) and kind.dtype != made.weight.dtype:
            raise SchemeError(f"{text!r} multiplies {kind.dtype} by {made.weight.dtype}", "scheme", "Use one dtype")
        return made


WHOLE = {"fp8_tensor": "fp8_static", "nvfp4_tensor": "nvfp4"}
"""Schemes of a linear whose input's scale is computed from the whole of it: how the input is quantised then."""
_WEIGHTS = {"fp8_group128": "fp8_block128", "int8_group128": "int8_block128"}
"""By the name of an input's scheme, the weight's where it is another."""
_INPUTS = {weight: given for given, weight in _WEIGHTS.items()}
_LEAST = 1e-12
"""Of a scale computed from a whole input, so that zeros give zeros."""

SCHEMES = {
    name: LinearScheme.parse(name)
    for name in ("fp8_static", "fp8_token", "fp8_group128", "mxfp8", "nvfp4", "int8_token")
}
"""The common ones by name; `LinearScheme.parse` makes the others."""


def linear_scheme(scheme: str | LinearScheme, where: str) -> LinearScheme:
    """The scheme of that name, or the one given.

    Raises:
        SchemeError: there is none.
    """
    if isinstance(scheme, LinearScheme):
        return scheme
    known = [*SCHEMES, *WHOLE, "int8_group128"]
    if str(scheme).partition("/")[0].partition(",")[0] not in known:
        raise SchemeError(f"there is no scheme {scheme!r}", where, nearest(str(scheme), known))
    return LinearScheme.parse(scheme)


def _divisor(kind: Scheme) -> float:
    """What the largest magnitude is divided by, for the scale that `kind` takes."""
    return kind.max if kind.static else kind.max * torch.finfo(kind.scale_dtype).max


def given_scale(amax: torch.Tensor, kind: Scheme, where: str) -> torch.Tensor:
    """The scale that `kind` takes for a tensor with this largest magnitude, 0-dim fp32.

    `amax / 448` for e4m3fn codes; `amax / (6 * 448)` for e2m1 codes whose block scales are e4m3fn.

    Raises:
        ScaleError: `amax` is zero or not finite.
    """
    try:
        return checked_scale(amax / _divisor(kind), where)
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
    """The shape of the scales of a weight [rows, columns], as they lie."""
    return stored_shape(linear_shape(kind, rows, columns), kind.layout)


def linear_shape(kind: Scheme, rows: int, columns: int) -> tuple[int, ...]:
    """That of scales in the linear layout."""
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
        # What a layout pads with is no scale.
        plain = linear(value, value, kind.layout, linear_shape(kind, rows, columns))[1]
        # An exponent byte of 255 is NaN, and every other one a power of two.
        bad = plain == 255 if plain.dtype == torch.uint8 else ~((plain.float() > 0) & plain.float().isfinite())
        if bad.any():
            raise ScaleError(f"{int(bad.sum())} of {plain.numel()} scales are not positive and finite", where)
    return value
