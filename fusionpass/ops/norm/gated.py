"""RMSNorm with a gate in front or behind, as the mixers of state-space and linear-attention models have it."""

import torch
from torch.nn import functional as F

from ...errors import ArgumentError
from ...op import Tolerance, op
from ..derive import quantizing
from ..rows import triton_backend
from . import AFTER, BEFORE, check_inputs

GATED = Tolerance(ulp=4, fraction=4e-3, fp32_ulp=32, floor=2**-21)
"""Behind the norm the gate's product is a third rounding: a step of the first is up to two of the second and four of
the third. The exponential of a very negative gate has few correct digits, of something very small."""


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, object]:
    x, gate = (torch.randn(tokens, width, generator=generator, device=device).mul(2).to(dtype) for _ in range(2))
    weight = torch.rand(width, generator=generator, device=device).add(0.5).to(dtype)
    return {"x": x, "gate": gate, "weight": weight, "eps": 1e-6}


@op(outputs=("norm",), sample=_sample, tolerance={"norm": GATED})
def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    gating: str = "before",
    group_size: int | None = None,
    rounding: str = BEFORE,
    activation: str = "silu",
) -> torch.Tensor:
    """RMSNorm of `x * silu(gate)`, or `silu(gate)` times the RMSNorm of `x`; all in float32 but for the roundings.

    Args:
        x: [..., width], floating point.
        gate: the shape of `x`, floating point; widened to float32 before its activation.
        weight: [width], floating point, or None.
        eps: added to the mean square.
        gating: "before" the norm, as Mamba2, or "after" its weight, as Qwen3-Next.
        group_size: the mean square is taken over so many neighbouring columns; None: over all.
        rounding: "before_weight": the normalised value is rounded to `x.dtype`, then multiplied by the weight, which
            rounds again (Mamba2, Qwen3-Next). "after_weight": rounded to `x.dtype` once, at the end (Falcon-H1). A gate
            "after" multiplies in float32, and rounds to `x.dtype`.
        activation: "silu", or "sigmoid" as Kimi-Linear has it.

    Returns:
        [..., width], `x.dtype`; "before", "before_weight" and a weight of a wider dtype give what the two promote to.

    Raises:
        ArgumentError: the weight is not [width], the gate has another shape, a tensor is not floating point,
            `group_size` does not divide the width, or one of the strings does not exist.

    Source: Dao and Gu, "Transformers are SSMs", 2024 (before); Yang, Kautz and Hatamizadeh, "Gated Delta Networks",
    2024 (after).
    """
    _check(x, gate, weight, gating, group_size, rounding, activation)
    groups = None if group_size is None else (x.shape[-1] // group_size, group_size)
    h, g = x.float(), F.silu(gate.float()) if activation == "silu" else torch.sigmoid(gate.float())
    if gating == "before":
        h = h * g
    if groups is not None:
        h = h.unflatten(-1, groups)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == AFTER and weight is not None:
        h = (weight if groups is None else weight.unflatten(0, groups)).float() * h
    if groups is not None:
        h = h.flatten(-2)
    if rounding == BEFORE:
        h = h.to(x.dtype) if weight is None else weight * h.to(x.dtype)
    if gating == "after":
        h = h * g
    return h if (gating, rounding) == ("before", BEFORE) else h.to(x.dtype)


def _check(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    gating: str,
    group_size: int | None,
    rounding: str,
    activation: str,
) -> None:
    check_inputs("gated_rms_norm", x, weight)
    if gate.shape != x.shape or not gate.is_floating_point():
        raise ArgumentError(
            f"gate is {gate.dtype} {tuple(gate.shape)}, x has shape {tuple(x.shape)}",
            "gated_rms_norm",
            "Pass one floating-point gate per element",
        )
    if group_size is not None and (group_size < 1 or x.shape[-1] % group_size):
        raise ArgumentError(
            f"group_size={group_size} for a width of {x.shape[-1]}", "gated_rms_norm", "It must divide the width"
        )
    for name, given, known in (
        ("gating", gating, ("before", "after")),
        ("rounding", rounding, (BEFORE, AFTER)),
        ("activation", activation, ("silu", "sigmoid")),
    ):
        if given not in known:
            raise ArgumentError(
                f"{name}={given!r} does not exist", "gated_rms_norm", f"Pass {known[0]!r} or {known[1]!r}"
            )


gated_rms_norm_quantize = quantizing(gated_rms_norm, "norm")

for _op in (gated_rms_norm, gated_rms_norm_quantize):
    _op.backends.append(triton_backend(f"{__package__}.gated_triton", "plan_gated_rms_norm"))
