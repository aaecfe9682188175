"""Matrix products of quantised operands."""

from typing import Any

import torch

from ...errors import ArgumentError, nearest
from ...op import Tolerance, op
from ..rows import known, static, triton_backend
from .arithmetic import int8_scales, row_scales, single_scales
from .dispatch import Request, check_algorithm, kind_of_codes, named

__all__ = ["CODES", "NAMES", "OUTPUTS", "SUMMED", "is_single", "request_of", "scaled_mm"]

SUMMED = Tolerance(ulp=1, fraction=0.05, floor=2**-12)
"""Of sums in another order that are rounded once. Hopper's FP8 units, which the reference uses there, keep 14 bits of
what they add: off by 2**-14 of the largest at each of a few steps, which moves some results to the next 16-bit one."""

OUTPUTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The dtypes of results by name."""

NAMES = {dtype: name for name, dtype in OUTPUTS.items()}
"""The names of those dtypes."""

CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8)
"""The dtypes of operands."""


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    a, b = (
        torch.randn(rows, width, generator=generator, device=device).mul(64).to(torch.float8_e4m3fn)
        for rows in (tokens, width)
    )
    a_scale, b_scale = (
        torch.rand(rows, 1, generator=generator, device=device).add(0.5).div(64) for rows in (tokens, width)
    )
    name = str(dtype).removeprefix("torch.")
    return {"a": a, "b": b.t(), "a_scale": a_scale, "b_scale": b_scale.t(), "out_dtype": name}


@op(outputs=("product",), sample=_sample, tolerance={"product": SUMMED})
def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: str = "bfloat16",
    fast_accum: bool = False,
    algo: str = "auto",
) -> torch.Tensor:
    """The product of two matrices of codes, `(a @ b) * a_scale * b_scale + bias`.

    Codes are multiplied and summed in float32 (int8: exactly, in int32), scaled there, and rounded once.

    Args:
        a: codes [M, K], e4m3fn, e4m3fnuz or int8, contiguous rows.
        b: codes [K, N], `a.dtype`, column-major as `weight.t()` is.
        a_scale: float32, one element, or one for each row, [M, 1].
        b_scale: float32, one element, or one for each column, [1, N].
        bias: [N], floating point.
        out_dtype: "bfloat16", "float16" or "float32".
        fast_accum: Hopper's matrix units may sum any number of FP8 products in the 14 bits that they have, not 128.
        algo: "triton" (few rows), "cublas", "reference", or "auto", the first of them that can; `dispatch.choose` says
            why the others cannot.

    Returns:
        [M, N], contiguous.

    Raises:
        ArgumentError: shapes or dtypes do not fit, there is no such algorithm, or it was named and cannot compute this.

    Source: torch._scaled_mm and torch._int_mm, whose arithmetic this is.
    """
    _check(a, b, a_scale, b_scale, bias, out_dtype)
    check_algorithm(_request(a, b, a_scale, b_scale, out_dtype), algo, a.device)
    dtype = OUTPUTS[out_dtype]
    if a.dtype == torch.int8:
        return int8_scales(a, b, a_scale, b_scale, bias, dtype)
    if is_single(a_scale) and is_single(b_scale):
        return single_scales(a, b, a_scale, b_scale, bias, dtype, fast_accum)
    each = a_scale.expand(a.shape[0], 1).contiguous(), b_scale.expand(1, b.shape[1]).contiguous()
    return row_scales(a, b, *each, bias, dtype, fast_accum)


def is_single(scale: torch.Tensor) -> bool:
    """Whether a scale is one for the whole matrix, whatever sizes its symbols stand for."""
    return all(known(size == 1) for size in scale.shape)


def _request(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: str = "bfloat16",
    **_: Any,
) -> Request:
    kind = kind_of_codes(a, is_single(a_scale) and is_single(b_scale))
    return Request(kind, static(a.shape[0]), b.shape[1], b.shape[0], out_dtype)


def _check(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: str,
) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ArgumentError(f"a is {tuple(a.shape)}, b {tuple(b.shape)}", "scaled_mm", "Pass [M, K] and [K, N]")
    if a.dtype != b.dtype or a.dtype not in CODES:
        raise ArgumentError(f"a is {a.dtype}, b {b.dtype}", "scaled_mm", "Pass codes of one 8-bit dtype")
    for name, scale, wanted in (("a_scale", a_scale, (a.shape[0], 1)), ("b_scale", b_scale, (1, b.shape[1]))):
        if scale.dtype != torch.float32 or not (is_single(scale) or tuple(scale.shape) == wanted):
            raise ArgumentError(
                f"{name} is {scale.dtype}, shape {tuple(scale.shape)}",
                "scaled_mm",
                f"Pass float32, one element or {list(wanted)}",
            )
    if bias is not None and (tuple(bias.shape) != (b.shape[1],) or not bias.is_floating_point()):
        raise ArgumentError(f"bias is {bias.dtype}, shape {tuple(bias.shape)}", "scaled_mm", f"Pass [{b.shape[1]}]")
    if out_dtype not in OUTPUTS:
        raise ArgumentError(f"out_dtype is {out_dtype!r}", "scaled_mm", nearest(out_dtype, OUTPUTS))


def request_of(**arguments: Any) -> Request | None:
    """The request that the op's arguments are; None where a size of the weight is symbolic."""
    sizes = arguments["b"].shape
    return _request(**arguments) if all(isinstance(size, int) for size in sizes) else None


scaled_mm.backends.append(named(triton_backend(f"{__name__}.stream", "plan_scaled_mm"), request_of))
