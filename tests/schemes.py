"""Every scheme that can be written, and what each one means in NumPy, element by element."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

FLOAT32 = np.float32
_COMPUTED = {
    "amax_dtype": ("float32", "input"),
    "eps": ("1e-12", "0.0", "0.001"),
    "rounding": ("reciprocal", "divide"),
    "zero": ("eps", "one"),
}
_FNUZ = {"dtype": ("float8_e4m3fn", "float8_e4m3fnuz")}
OVERRIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "fp8_static": {"rounding": _COMPUTED["rounding"], **_FNUZ},
    "fp8_token": {**_COMPUTED, **_FNUZ},
    "fp8_group128": {
        **_COMPUTED,
        **_FNUZ,
        "layout": ("linear", "column_major"),
        "scale_rounding": ("none", "ceil", "log2_ceil"),
        "scale_dtype": ("float32", "float8_e8m0fnu"),
    },
    "fp8_block128": {**_COMPUTED, **_FNUZ},
    "mxfp8": {"layout": ("linear", "swizzled"), "scale_rounding": ("ceil", "log2_ceil", "floor")},
    "nvfp4": {"layout": ("linear", "swizzled"), "rounding": _COMPUTED["rounding"]},
    "int8_token": {**_COMPUTED, "divisor": ("", "127.5")},
    "int8_group128": {**_COMPUTED, "layout": ("linear", "column_major"), "divisor": ("", "127.5")},
    "int8_block128": {**_COMPUTED},
}


def combinations(name: str) -> Iterator[dict[str, str]]:
    """Every choice of overrides of a named scheme."""
    offered = OVERRIDES[name]
    for values in itertools.product(*offered.values()):
        yield dict(zip(offered, values, strict=True))


def written(name: str, choice: dict[str, str]) -> str:
    """The string of a choice."""
    return ",".join([name, *(f"{key}={value}" for key, value in choice.items() if value)])


def table(dtype: str) -> np.ndarray:
    """The non-negative values of a code, by its own definition."""
    if dtype == "e2m1":
        return np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    bias, top = (7, 126) if dtype == "float8_e4m3fn" else (8, 127)
    values = [math.ldexp(8 * (e > 0) + m, max(e, 1) - bias - 3) for e in range(16) for m in range(8)]
    return np.array(values[: top + 1])


def nearest(values: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """The entry of `values` nearest to each magnitude in float64, ties to the even one, with the sign; NaN stays."""
    magnitude = np.minimum(np.abs(scaled.astype(np.float64)), values[-1])
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    up, down = values[above] - magnitude, magnitude - values[above - 1]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return np.where(np.isnan(scaled), np.nan, np.copysign(values[code], scaled))


def exponent(value: float, rounding: str) -> int:
    """The e8m0 byte of one float32 value."""
    if math.isnan(value):
        return 255
    if math.isinf(value):
        return 254
    if value == 0:
        return 0
    mantissa, power = math.frexp(value)
    if rounding == "floor":
        power -= 1
    elif rounding == "ceil":
        power -= mantissa == 0.5
    else:
        power = math.ceil(FLOAT32(math.log2(value)))
    return min(max(power + 127, 0), 254)


def expected(
    x: np.ndarray, narrow: np.dtype | str, name: str, choice: dict[str, str], given: float | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Values of the codes, scales as numbers, and what each element is counted in, for one float32 row of groups.

    Args:
        x: [groups, n] float32; each row shares a scale.
        narrow: the dtype that `x` was widened from: "float32", "float16" or "bfloat16".
        name: of the scheme.
        choice: its overrides.
        given: the scale that it takes.
    """
    with np.errstate(all="ignore"):
        dtype = "e2m1" if name == "nvfp4" else "int8" if "int8" in name else choice.get("dtype", "float8_e4m3fn")
        limit = 127.0 if dtype == "int8" else table(dtype)[-1]
        rounding = choice.get("scale_rounding", "none")
        divides = choice.get("rounding") == "divide"
        if name == "fp8_static":
            step = np.full((x.shape[0], 1), given, FLOAT32)
        else:
            amax = np.abs(x).max(1, keepdims=True)
            if choice.get("zero") == "one":
                amax = np.where(amax > 0, amax, FLOAT32(1))
            divisor = 256.0 if rounding == "floor" else float(choice.get("divisor") or limit)
            step = amax / FLOAT32(divisor)
            if choice.get("amax_dtype") == "input":
                step = round_to(step, narrow)
            if name not in ("nvfp4", "mxfp8"):
                step = np.where(step < FLOAT32(choice["eps"]), FLOAT32(choice["eps"]), step)
        scales = step
        if name == "nvfp4":
            ratio = np.clip(step / FLOAT32(given), FLOAT32(2**-6), FLOAT32(448))
            scales = nearest(table("float8_e4m3fn"), ratio).astype(FLOAT32)
            step = scales * FLOAT32(given)
            factor = FLOAT32(1) / FLOAT32(given) / scales
        elif name == "mxfp8" or choice.get("scale_dtype") == "float8_e8m0fnu":
            rounding = "ceil" if rounding == "none" else rounding
            scales = np.array([[exponent(float(v), rounding)] for v in step[:, 0]])
            powers = [math.nan if e == 255 else math.ldexp(1.0, int(e) - 127) for e in scales[:, 0]]
            step = np.array(powers, FLOAT32)[:, None]
            factor = np.where(scales == 0, FLOAT32(1), (1 / step.astype(np.float64)).astype(FLOAT32))
            divides = False
        else:
            if rounding != "none":
                power = [math.ldexp(1.0, max(exponent(float(v), rounding), 1) - 127) for v in step[:, 0]]
                step = np.where(np.isfinite(step), np.array(power, FLOAT32)[:, None], step)
            scales, factor = step, FLOAT32(1) / step
        y = x / step if divides else x * factor
        if dtype == "int8":
            low = -128 if choice.get("divisor") == "127.5" else -127
            q = np.nan_to_num(np.clip(np.rint(y.astype(np.float64)), low, 127))
        else:
            q = nearest(table(dtype), y)
            q = np.where(np.isnan(q), 6.0, q) if dtype == "e2m1" else q
        return q, None if name == "fp8_static" else scales, step


def round_to(values: np.ndarray, narrow: np.dtype | str) -> np.ndarray:
    """float32 values rounded to a narrower dtype and widened again."""
    if narrow == "float16":
        return values.astype(np.float16).astype(FLOAT32)
    if narrow == "float32":
        return values
    bits = np.ascontiguousarray(values, FLOAT32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(FLOAT32)
    return np.where(np.isnan(values), values, rounded)
