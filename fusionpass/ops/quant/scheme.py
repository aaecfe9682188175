"""Quantisation schemes: what the codes and scales mean, down to the rounding."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...errors import SchemeError, nearest


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantised.

    A code stands for `code * scale`. A computed scale is `amax / divisor`, where `amax` is the largest magnitude among
    the elements that share it; then, in this order: rounded to the input's dtype (`amax_dtype`), bounded (`eps`),
    raised or lowered to a power of two (`scale_rounding`).

    Args:
        dtype: of the codes. float4_e2m1fn_x2 is carried as uint8: two codes a byte, the even element in the low nibble.
        granularity: which elements share a scale: "tensor", "token" (a row), "group128", "group32", "group16" (so many
            neighbours in a row), "block128" (128 × 128 of a matrix, for weights).
        scale_dtype: float32; float8_e8m0fnu, an exponent byte (uint8: 2**(byte - 127)); float8_e4m3fn, relative to a
            float32 scale of the whole tensor that is given.
        layout: of the scales in memory. "linear"; "column_major", with the rows padded to 16 bytes as TMA wants them;
            "swizzled", the 128 × 4 blocks of cuBLAS, padded with zeros; "trtllm" and "deepgemm", for weights, which
            `layout.py` describes.
        amax_dtype: None where the scale is given; "float32"; "input", where the quotient is rounded to the dtype of x.
        eps: lower bound of the computed scale; 0.0 for none.
        rounding: "reciprocal" multiplies by 1/scale rounded to float32, "divide" divides by the scale.
        divisor: what amax is divided by; None for the largest code.
        zero: what a group of zeros counts as: "eps", its scale is `eps`; "one", its amax is 1.
        scale_rounding: "none"; "ceil", the next power of two; "log2_ceil", `2**ceil(log2(v))` with the logarithm
            rounded to float32, which takes a value just above a large power down to it; "floor",
            `2**floor(log2(amax))` over the power of two in the largest code. The last lets codes saturate.
    """

    dtype: torch.dtype
    granularity: str
    scale_dtype: torch.dtype = torch.float32
    layout: str = "linear"
    amax_dtype: str | None = None
    eps: float = 0.0
    rounding: str = "reciprocal"
    divisor: float | None = None
    zero: str = "eps"
    scale_rounding: str = "none"

    @property
    def static(self) -> bool:
        """Whether no scale is computed from the tensor."""
        return self.amax_dtype is None

    @property
    def takes_scale(self) -> bool:
        """Whether a scale is an argument: the only one, or the one that computed scales are relative to."""
        return self.static or self.scale_dtype == torch.float8_e4m3fn

    @property
    def returns_scale(self) -> bool:
        """Whether scales are computed."""
        return not self.static

    @property
    def group(self) -> int | None:
        """Elements of a row that share a scale, or None."""
        return int(self.granularity.removeprefix("group")) if self.granularity.startswith("group") else None

    @property
    def packed(self) -> bool:
        """Whether a byte holds two codes."""
        return self.dtype == torch.float4_e2m1fn_x2

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the tensor that holds the codes."""
        return torch.uint8 if self.packed else self.dtype

    @property
    def stored_scale_dtype(self) -> torch.dtype:
        """Of the tensor that holds the scales."""
        if self.layout == "deepgemm":
            return torch.int32
        return torch.uint8 if self.scale_dtype == torch.float8_e8m0fnu else self.scale_dtype

    @property
    def max(self) -> float:
        """Largest finite code. e4m3fnuz saturates at 240, as gfx942's matrix units expect."""
        if self.packed:
            return 6.0
        return torch.finfo(self.dtype).max if self.dtype.is_floating_point else float(torch.iinfo(self.dtype).max)

    @property
    def min(self) -> float:
        """Smallest code: the largest with its sign, but -128 where an int8 scheme divides by more than 127."""
        return -128.0 if self.dtype == torch.int8 and self.denominator > 127 else -self.max

    @property
    def denominator(self) -> float:
        """What amax is divided by."""
        if self.scale_rounding == "floor":
            return 2.0 ** math.floor(math.log2(self.max))
        return self.max if self.divisor is None else self.divisor

    def __str__(self) -> str:
        for name, known in SCHEMES.items():
            changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
            changed = {key: value for key, value in changed.items() if value != getattr(known, key)}
            text = ",".join([name, *(f"{key}={_text(value)}" for key, value in changed.items())])
            if _parsed(text) == self:
                return text
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
        offered = _OVERRIDES[name]
        changes: dict[str, object] = {}
        for override in overrides:
            key, _, value = override.partition("=")
            choices = offered.get(key, {})
            changes[key] = choices(value) if callable(choices) else choices.get(value)
            if changes[key] is None:
                known = [f"{k}={v}" for k, values in offered.items() for v in (["…"] if callable(values) else values)]
                raise SchemeError(f"{override!r} is not an override of {name}", "scheme", nearest(override, known))
        made = dataclasses.replace(SCHEMES[name], **changes)  # type: ignore[arg-type]
        if made.layout == "deepgemm" and made.scale_dtype != torch.float8_e8m0fnu:
            raise SchemeError(f"{text!r} packs exponents", "scheme", "Add scale_dtype=float8_e8m0fnu")
        if made.scale_dtype == torch.float8_e8m0fnu and made.scale_rounding == "none":
            return dataclasses.replace(made, scale_rounding="ceil")
        return made


SCHEMES = {
    "fp8_static": Scheme(torch.float8_e4m3fn, "tensor"),
    "fp8_token": Scheme(torch.float8_e4m3fn, "token", amax_dtype="float32", eps=1e-12),
    "fp8_group128": Scheme(torch.float8_e4m3fn, "group128", amax_dtype="float32", eps=1e-12),
    "fp8_block128": Scheme(torch.float8_e4m3fn, "block128", amax_dtype="float32", eps=1e-12),
    "mxfp8": Scheme(torch.float8_e4m3fn, "group32", torch.float8_e8m0fnu, amax_dtype="float32", scale_rounding="ceil"),
    "nvfp4": Scheme(torch.float4_e2m1fn_x2, "group16", torch.float8_e4m3fn, amax_dtype="float32", eps=2.0**-6),
    "int8_token": Scheme(torch.int8, "token", amax_dtype="float32", eps=1e-12),
    "int8_group128": Scheme(torch.int8, "group128", amax_dtype="float32", eps=1e-12),
    "int8_block128": Scheme(torch.int8, "block128", amax_dtype="float32", eps=1e-12),
}
"""The named schemes. What becomes of special values, where nothing overrides it:

| scheme | zeros | an infinity | a NaN |
|---|---|---|---|
| fp8_static | zeros | largest code | NaN code |
| fp8_token, _group128, _block128 | zeros; scale eps | NaN code, zeros beside it; scale inf | NaN codes and scale |
| int8_token, _group128, _block128 | zeros; scale eps | zeros; scale inf | zeros; scale NaN |
| mxfp8 | zeros; exponent byte 0 | largest code; byte 254 (2**127) | NaN codes; byte 255 (NaN) |
| nvfp4 | zeros; scale 2**-6 | largest code; scale 448 | codes 6.0, scale NaN |

"Beside it" is the rest of the row, group or block. With `eps=0.0` zeros give NaN codes (0 for int8) and a scale of 0;
with `zero=one` a NaN leaves the scale and the codes beside it alone: amax counts as 1.

- mxfp8: the scale is `amax / 448` raised to a power of two, as cuBLAS's documentation of block scaling has it
  ("ceil"; `cvt.rp.ue8m0`, torchao's RCEIL compiled for Blackwell). torchao's RCEIL in eager mode is
  "scale_rounding=log2_ceil", the same for 16-bit inputs. "scale_rounding=floor" is the OCP MX specification's (6.3).
  A byte 0 stands for a group that rounds to zeros.
- nvfp4: takes `s_global = amax(tensor) / (448 * 6)`; the block scale is `amax / 6 / s_global`, between 2**-6 and 448,
  rounded to e4m3, and the codes are of `x * (1 / s_global / block_scale)`, as torchao computes them.
- Powers of two kept in float32 are at least 2**-126.

As others quantise, to the bit:
torchao per row, "fp8_token,amax_dtype=input,eps=0.0,rounding=divide"; its int8,
"int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5"; transformers' compressed-tensors linears,
"fp8_token,eps=0.0,rounding=divide,zero=one"; diffusers' BFL linears, "fp8_token,rounding=divide".
"""


def _positive(text: str) -> float | None:
    """A finite number from 0 up, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0.0 <= number < math.inf else None


_Choices = Mapping[str, object] | Callable[[str], float | None]


def _named(*values: object) -> Mapping[str, object]:
    return {_text(value): value for value in values}


def _text(value: object) -> str:
    return str(value).removeprefix("torch.")


_FP8: dict[str, _Choices] = {
    "dtype": _named(torch.float8_e4m3fn, torch.float8_e4m3fnuz),
    "rounding": _named("reciprocal", "divide"),
}
_COMPUTED: dict[str, _Choices] = {
    "amax_dtype": _named("float32", "input"),
    "eps": _positive,
    "rounding": _FP8["rounding"],
    "zero": _named("eps", "one"),
}
_OVERRIDES: dict[str, dict[str, _Choices]] = {
    "fp8_static": _FP8,
    "fp8_token": _FP8 | _COMPUTED,
    "fp8_group128": _FP8
    | _COMPUTED
    | {
        "layout": _named("linear", "column_major", "deepgemm"),
        "scale_rounding": _named("none", "ceil", "log2_ceil"),
        "scale_dtype": _named(torch.float32, torch.float8_e8m0fnu),
    },
    "fp8_block128": _FP8 | _COMPUTED,
    "mxfp8": {"layout": _named("linear", "swizzled", "trtllm"), "scale_rounding": _named("ceil", "log2_ceil", "floor")},
    "nvfp4": {"layout": _named("linear", "swizzled", "trtllm"), "rounding": _FP8["rounding"]},
    "int8_token": _COMPUTED | {"divisor": _named(127.5)},
    "int8_group128": _COMPUTED | {"layout": _named("linear", "column_major"), "divisor": _named(127.5)},
    "int8_block128": _COMPUTED,
}


def _parsed(text: str) -> Scheme | None:
    try:
        return Scheme.parse(text)
    except SchemeError:
        return None
