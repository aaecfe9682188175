"""Quantisation schemes: what the codes and scales mean, down to the rounding."""

import dataclasses
from dataclasses import dataclass

import torch

from ...errors import SchemeError, nearest


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantised.

    Args:
        dtype: of the codes.
        granularity: which elements share a scale: "tensor", "token", "group128", "block128", "group32", "group16".
        scale_dtype: of the scales.
        layout: of the scales in memory.
        amax_dtype: in which the absolute maximum is taken; None where the scale is given.
        eps: lower bound of a computed scale; 0.0 where the scale is given.
        rounding: "reciprocal" multiplies by 1/scale rounded to float32, "divide" divides by the scale.
    """

    dtype: torch.dtype
    granularity: str
    scale_dtype: torch.dtype = torch.float32
    layout: str = "linear"
    amax_dtype: torch.dtype | None = None
    eps: float = 0.0
    rounding: str = "reciprocal"

    @property
    def static(self) -> bool:
        """Whether the scale is an argument, not computed from the tensor."""
        return self.amax_dtype is None

    @property
    def max(self) -> float:
        """Largest finite code. e4m3fnuz saturates at 240, as gfx942's matrix units expect."""
        return torch.finfo(self.dtype).max

    def __str__(self) -> str:
        for name, known in SCHEMES.items():
            changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(known, f.name)]
            if all(getattr(self, f.name) in _OVERRIDES.get(f.name, {}).values() for f in changed):
                return ",".join([name, *(f"{f.name}={_text(getattr(self, f.name))}" for f in changed)])
        raise SchemeError(f"{self!r} has no name", "Scheme")

    @staticmethod
    def parse(text: str) -> "Scheme":
        """A scheme from its string: a name, then overrides: `"fp8_static,rounding=divide"`.

        Raises:
            SchemeError: the name or an override does not exist.
        """
        if text in SCHEMES:
            return SCHEMES[text]
        name, *overrides = text.split(",")
        if name not in SCHEMES:
            raise SchemeError(f"{name!r} is not a quantisation scheme", "scheme", nearest(name, SCHEMES))
        changes: dict[str, object] = {}
        for override in overrides:
            key, _, value = override.partition("=")
            if value not in _OVERRIDES.get(key, {}):
                known = [f"{k}={v}" for k, values in _OVERRIDES.items() for v in values]
                raise SchemeError(f"{override!r} is not an override of a scheme", "scheme", nearest(override, known))
            changes[key] = _OVERRIDES[key][value]
        return dataclasses.replace(SCHEMES[name], **changes)  # type: ignore[arg-type]


SCHEMES = {"fp8_static": Scheme(torch.float8_e4m3fn, "tensor")}

_OVERRIDES: dict[str, dict[str, object]] = {
    "dtype": {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e4m3fnuz": torch.float8_e4m3fnuz},
    "rounding": {"reciprocal": "reciprocal", "divide": "divide"},
}


def _text(value: object) -> str:
    return str(value).removeprefix("torch.")
