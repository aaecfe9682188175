"""Products of one matrix with several weights."""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ArgumentError
from ..derive import derived, parameter
from ..rows import triton_backend
from . import SUMMED, scaled_mm

_TENSOR = torch.Tensor
_OPTIONAL = torch.Tensor | None
WEIGHTS = ("", "_2", "_3")
"""What is behind the names of a weight's parameters, and of its product."""


def _body(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    if (arguments["b_3"] is None) != (arguments["b_scale_3"] is None):
        raise ArgumentError("only one of b_3 and b_scale_3 is there", "scaled_mms", "Pass both or neither")
    common = {name: arguments[name] for name in ("a", "a_scale", "out_dtype", "fast_accum")}
    return [
        scaled_mm.reference(**common, **{name: arguments[f"{name}{which}"] for name in ("b", "b_scale", "bias")})
        for which in WEIGHTS
        if arguments[f"b{which}"] is not None
    ]


def _outputs(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"product{which}" for which in WEIGHTS if arguments[f"b{which}"] is not None)


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    made = scaled_mm.sample(tokens, width, dtype, device, generator)
    for which, count in (("_2", width), ("_3", 16)):
        other = scaled_mm.sample(1, width, dtype, device, generator)
        made |= {f"b{which}": other["b"][:, :count], f"b_scale{which}": other["b_scale"][:, :count].contiguous()}
    return made


scaled_mms = derived(
    "scaled_mms",
    [
        parameter("a", _TENSOR),
        parameter("a_scale", _TENSOR),
        parameter("b", _TENSOR),
        parameter("b_scale", _TENSOR),
        parameter("b_2", _TENSOR),
        parameter("b_scale_2", _TENSOR),
        parameter("b_3", _OPTIONAL, None),
        parameter("b_scale_3", _OPTIONAL, None),
        parameter("bias", _OPTIONAL, None),
        parameter("bias_2", _OPTIONAL, None),
        parameter("bias_3", _OPTIONAL, None),
        parameter("out_dtype", str, "bfloat16"),
        parameter("fast_accum", bool, False),
    ],
    _body,
    """`scaled_mm` of one matrix with two or three weights: queries, keys and values, or gate and up.

    Args:
        a, a_scale, out_dtype, fast_accum: as `scaled_mm`.
        b, b_scale, bias: as `scaled_mm`; also those with _2 and _3, of a width of their own. `b_3` may be None.

    Returns:
        The products, in this order.

    Raises:
        ArgumentError: as `scaled_mm`.
    """,
    list[torch.Tensor],
    outputs=_outputs,
    sample=_sample,
    tolerance={f"product{which}": SUMMED for which in WEIGHTS},
)
scaled_mms.backends.append(triton_backend(f"{__package__}.stream", "plan_scaled_mms"))
