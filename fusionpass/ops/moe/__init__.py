"""Mixtures of experts: each token's rows times the weights of the experts that it was given."""

from typing import Any

import torch

from ...errors import ArgumentError, nearest
from ...op import Op, Tolerance, op
from ..activation import clamped_swiglu, gelu_mul, silu_mul
from ..gemm import OUTPUTS
from ..gemm.blocks import group_of
from ..quant import dequantize, quantize
from ..quant.scheme import Scheme
from ..rows import triton_backend

ACTIVATIONS: dict[str, tuple[Op, dict[str, Any]]] = {
    "silu": (silu_mul, {}),
    "gelu": (gelu_mul, {}),
    "gelu_tanh": (gelu_mul, {"approximate": "tanh"}),
    "clamped_swiglu": (clamped_swiglu, {}),
}
"""What becomes of gate and up, by name: the op, and arguments of it."""

SCHEMES = ("fp8_static", "fp8_group128", "int8_group128", "mxfp8", "nvfp4")
"""Of the inputs of both products; the weights have that by the same name, blocks for groups of 128."""

MIXED = Tolerance(ulp=1, fraction=0.05, fp32_ulp=4, floor=2**-8)
"""Of two products in turn: what is rounded between them moves by a step where a sum in another order crosses one."""


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    experts, inner, k = 4, max(16, width // 2), max(16, -(-width // 16) * 16)
    scores = normal(tokens, experts).softmax(-1).topk(2)
    x, up, down = normal(tokens, k), normal(experts, 2 * inner, k) / k**0.5, normal(experts, k, inner) / inner**0.5
    return {
        "x": x.to(dtype),
        "up": up.to(dtype),
        "down": down.to(dtype),
        "ids": scores.indices,
        "weights": scores.values.to(dtype),
    }


@op(outputs=("output",), sample=_sample, tolerance={"output": MIXED})
def experts(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str = "silu",
    x_scheme: str = "",
    up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    up_global_scale: torch.Tensor | None = None,
    down_global_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    hidden_scale: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    x_scales: torch.Tensor | None = None,
    out_dtype: str = "",
) -> torch.Tensor:
    """`sum_k weights[:, k] * (down[e] @ act(gate, up) + b[e])`, `[gate, up] = up[e] @ x + a[e]` and `e = ids[:, k]`.

    As eager mode computes it: both products, what has a bias added, the activation, what it is multiplied by, and each
    weighted expert are rounded to the dtype of `x`; the sum over k is in float32. Codes are multiplied as in
    `block_scaled_mm`.

    Args:
        x: [T, H], floating point; or codes of the scheme (nvfp4: [T, H/2]), where `quantize` has been at it.
        up: [E, 2·I, H], the gate's rows first; codes where there is a scheme (nvfp4: [E, 2·I, H/2]). Where there is
            none, the transpose of a contiguous [E, H, 2·I] will do as well.
        down: [E, H, I], likewise.
        ids: [T, K], integers; one that is no expert's, below 0 or from E on, adds nothing.
        weights: [T, K], floating point.
        activation: "silu", "gelu" or "gelu_tanh" of the gate, times up; or "clamped_swiglu" of both.
        x_scheme: how `x`, and what is between the products, are quantised, overrides of roundings included; "" for not
            at all.
        up_scale: scales of `up` as `quantize` gives them, [E, …]; for "fp8_static" one each, [E].
        down_scale: of `down`.
        up_global_scale: what `up_scale` is relative to, [E]; for nvfp4.
        down_global_scale: for `down`.
        x_scale: the scale that the scheme takes for `x`, one float32 element.
        hidden_scale: for what is between the products.
        up_bias: `a`, [E, 2·I], its elements as the rows of `up`.
        down_bias: `b`, [E, H].
        interleaved: rows of `up` are of gate and up in turn, the gate's first, not each in a half.
        alpha: of `clamped_swiglu`.
        limit: of `clamped_swiglu`.
        x_scales: of codes `x`, as `quantize` gives them with linear layout; None where the one scale is given.
        out_dtype: with codes `x`, "bfloat16", "float16" or "float32": what stands for the dtype of `x` everywhere.

    Returns:
        [T, H] in the dtype of `x`, or in `out_dtype`.

    Raises:
        ArgumentError: shapes, dtypes or names do not fit.
        SchemeError: there is no such scheme.
    """
    given = (up_scale, down_scale, up_global_scale, down_global_scale, x_scale, hidden_scale)
    check(x, up, down, ids, weights, activation, x_scheme, given, (up_bias, down_bias), x_scales, out_dtype)
    count, (tokens, top) = up.shape[0], ids.shape
    kind = OUTPUTS[out_dtype] if out_dtype else x.dtype
    # Those of no expert go behind all others, where no product is made of them.
    flat = torch.where((ids >= 0) & (ids < count), ids, count).flatten()
    order = flat.argsort()
    owners = flat[order]
    if out_dtype:
        stepped = x_scales if x_scales is not None else _one(x_scale)
        x_rows = dequantize(x, stepped, x_scheme, x_scale).to(_wide(x))[order // top]
    else:
        x_rows = _matrix(x, x_scheme, x_scale)[order // top]
    dtype = x_rows.dtype
    made = _grouped(x_rows, _weight(up, x_scheme, up_scale, up_global_scale, dtype), owners, kind, up_bias)
    hidden = gated(made, activation, interleaved, alpha, limit)
    y = _grouped(
        _matrix(hidden, x_scheme, hidden_scale),
        _weight(down, x_scheme, down_scale, down_global_scale, dtype),
        owners,
        kind,
        down_bias,
    )
    y = y * weights.flatten()[order, None]
    y = torch.where((owners < count)[:, None], y, 0)
    return y[order.argsort()].view(tokens, top, y.shape[-1]).sum(1).to(kind)


def gated(made: torch.Tensor, activation: str, interleaved: bool, alpha: float, limit: float) -> torch.Tensor:
    """The activation of rows that are gate and up, named and placed as in `experts`."""
    gate, beside = (made[..., ::2], made[..., 1::2]) if interleaved else made.chunk(2, -1)
    act, more = ACTIVATIONS[activation]
    hidden: torch.Tensor = act.reference(
        gate, beside, **({"alpha": alpha, "limit": limit} if act is clamped_swiglu else more)
    )
    return hidden


def _grouped(
    rows: torch.Tensor, weight: torch.Tensor, owners: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor:
    """Each row times the weight of its owner and its bias, in the order of these; those of no weight give anything."""
    count = weight.shape[0]
    last = owners.clamp(max=count - 1)
    if rows.dtype == torch.bfloat16:
        ends = (owners[:, None] < torch.arange(1, count + 1, device=rows.device)).sum(0, dtype=torch.int32)
        made = torch._grouped_mm(rows, weight.transpose(1, 2), ends).to(dtype)
    else:
        # PyTorch groups products of bfloat16 alone.
        made = (weight[last] @ rows[:, :, None]).squeeze(-1).to(dtype)
    return made if bias is None else (made + bias[last]).to(dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of products of what was quantised: CUDA multiplies groups of bfloat16 alone."""
    return torch.float32 if x.device.type == "cpu" else torch.bfloat16


def _matrix(x: torch.Tensor, scheme: str, scale: torch.Tensor | None) -> torch.Tensor:
    """What `x` stands for once it is quantised."""
    if not scheme:
        return x
    codes, *scales = quantize.reference(x, scale, scheme)
    return dequantize(codes, scales[0] if scales else _one(scale), scheme, scale).to(_wide(x))


def _one(scale: torch.Tensor | None) -> torch.Tensor:
    assert scale is not None
    return scale


def _weight(
    codes: torch.Tensor, scheme: str, scale: torch.Tensor | None, given: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What the codes of all experts stand for."""
    if not scheme:
        return codes
    assert scale is not None
    kind = weight_scheme(scheme)
    each = [dequantize(codes[e], scale[e], kind, None if given is None else given[e]) for e in range(codes.shape[0])]
    return torch.stack(each).to(dtype)


def weight_scheme(scheme: str) -> Scheme:
    """How the weights are quantised where the inputs are so."""
    return Scheme.parse(scheme.replace("group128", "block128"))


def check(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    scheme: str,
    given: tuple[torch.Tensor | None, ...],
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    x_scales: torch.Tensor | None = None,
    out_dtype: str = "",
) -> None:
    """Raise what `experts` raises."""

    def wrong(what: str, fix: str) -> ArgumentError:
        return ArgumentError(what, "experts", fix)

    if activation not in ACTIVATIONS:
        raise wrong(f"there is no activation {activation!r}", nearest(activation, ACTIVATIONS))
    if scheme and scheme.partition(",")[0] not in SCHEMES:
        raise wrong(f"there is no scheme {scheme!r} for experts", nearest(scheme, SCHEMES))
    coded = bool(scheme) and x.dtype == Scheme.parse(scheme).code_dtype
    if coded != (out_dtype in OUTPUTS) or bool(out_dtype) != coded:
        raise wrong(
            f"x is {x.dtype}, out_dtype {out_dtype!r}", f"Pass one of {list(OUTPUTS)} with codes, and else none"
        )
    if x.dim() != 2 or up.dim() != 3 or down.dim() != 3:
        raise wrong(
            f"x is {tuple(x.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}", "Pass matrices, and stacks"
        )
    packed = 2 if scheme and Scheme.parse(scheme).packed else 1
    hidden, inner = up.shape[2] * packed, down.shape[2] * packed
    if (
        x.shape[1] * (packed if coded else 1) != hidden
        or tuple(down.shape[:2]) != (up.shape[0], hidden)
        or up.shape[1] != 2 * inner
    ):
        shapes = f"x is {tuple(x.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
        raise wrong(shapes, "Pass [T, H], [E, 2·I, H] and [E, H, I]")
    dtype = Scheme.parse(scheme).code_dtype if scheme else x.dtype
    if up.dtype != dtype or down.dtype != dtype or not (coded or x.is_floating_point()):
        raise wrong(f"x is {x.dtype}, up {up.dtype}, down {down.dtype}", f"Pass weights of {dtype}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.is_floating_point() or weights.shape != ids.shape:
        raise wrong(f"ids are {ids.dtype} {tuple(ids.shape)}, weights {tuple(weights.shape)}", "Pass [T, K] of both")
    for name, bias, weight in (("up_bias", biases[0], up), ("down_bias", biases[1], down)):
        if bias is not None and (bias.shape != weight.shape[:2] or not bias.is_floating_point()):
            raise wrong(
                f"{name} is {bias.dtype} {tuple(bias.shape)}", f"Pass one float for each of {list(weight.shape[:2])}"
            )
    if not scheme:
        if any(scale is not None for scale in given):
            raise wrong("there are scales and no scheme", "Name the scheme")
        return
    kind, takes = Scheme.parse(scheme), Scheme.parse(scheme).takes_scale
    if kind.layout != "linear":
        raise wrong(f"the scales of {scheme!r} are {kind.layout}", "Pass a scheme with linear ones")
    group = group_of(kind)
    expected = (x.shape[0], hidden // group) if coded and group is not None else None
    found = None if x_scales is None else tuple(x_scales.shape)
    if found != expected:
        raise wrong(f"x_scales is {found}", f"Pass {expected} here")
    for name, codes, scale, relative in (("up", up, given[0], given[2]), ("down", down, given[1], given[3])):
        wanted = _scales_of(codes, weight_scheme(scheme))
        if scale is None or tuple(scale.shape) != wanted:
            found = None if scale is None else tuple(scale.shape)
            raise wrong(f"{name}_scale is {found}", f"{scheme!r} has {list(wanted)} here")
        if (relative is not None) != kind.packed or (relative is not None and tuple(relative.shape) != (up.shape[0],)):
            raise wrong(f"{name}_global_scale does not fit", f"{scheme!r} takes {'[E]' if kind.packed else 'none'}")
    for name, scale in (("x_scale", given[4]), ("hidden_scale", given[5])):
        if (scale is not None) != takes or (scale is not None and scale.numel() != 1):
            raise wrong(f"{name} does not fit", f"{scheme!r} takes {'one element' if takes else 'none'}")


def _scales_of(codes: torch.Tensor, kind: Scheme) -> tuple[Any, ...]:
    """The shape of the scales of all experts' codes."""
    count, rows, k = codes.shape[0], codes.shape[1], codes.shape[2] * (2 if kind.packed else 1)
    group = group_of(kind)
    if group is None:
        return (count,)
    return (count, -(-rows // 128) if kind.granularity == "block128" else rows, -(-k // group))


experts.backends.append(triton_backend(f"{__name__}.triton", "plan"))
