"""What the tests of mixtures of experts share: arguments, and the check against exact arithmetic."""

from typing import Any
from unittest import mock

import torch

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.ops import dequantize, experts, quantize
from fusionpass.ops.moe import weight_scheme
from fusionpass.ops.moe.triton import resolve
from fusionpass.ops.quant.scheme import Scheme
from tests.kernels import poisoned

SCHEMES = ("", "fp8_static", "fp8_group128", "int8_group128", "mxfp8", "nvfp4")


def mixture(
    tokens: int,
    hidden: int,
    inner: int,
    count: int = 6,
    top: int = 2,
    scheme: str = "",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    bias: bool = False,
    transposed: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of that size, with weights of about one and results of about one.

    `bias`: both products have one. `transposed`: weights lie as [experts, in, out], where they are no codes.
    """
    generator = torch.Generator(device).manual_seed(tokens * hidden + inner + top)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scores = normal(tokens, count).softmax(-1).topk(top)
    made: dict[str, Any] = {"x": normal(tokens, hidden).to(dtype), "ids": scores.indices, "x_scheme": scheme}
    made["weights"] = scores.values.to(dtype)
    weights = {"up": normal(count, 2 * inner, hidden) / hidden**0.5, "down": normal(count, hidden, inner) / inner**0.5}
    if bias:
        made |= {f"{name}_bias": normal(*w.shape[:2]).to(dtype) for name, w in weights.items()}
    if not scheme:
        given = {name: w.to(dtype) for name, w in weights.items()}
        if transposed:
            given = {name: w.transpose(1, 2).contiguous().transpose(1, 2) for name, w in given.items()}
        return experts.bind((), {**made, **given, **changes})
    kind = weight_scheme(scheme)
    for name, weight in weights.items():
        given = [w.abs().amax() / (2688 if kind.packed else 448) if kind.takes_scale else None for w in weight]
        found = [quantize.reference(w, scale, str(kind)) for w, scale in zip(weight, given, strict=True)]
        if kind.static:
            made[name], made[f"{name}_scale"] = (
                torch.stack([one[0] for one in found]),
                torch.stack([s for s in given if s is not None]),
            )
            continue
        made[name], made[f"{name}_scale"] = (torch.stack([one[i] for one in found]) for i in range(2))
        if kind.takes_scale:
            made[f"{name}_global_scale"] = torch.stack([s for s in given if s is not None])
    if kind.takes_scale:
        largest = 2688 if kind.packed else 448
        made |= {name: torch.tensor(4.0 / largest, device=device) for name in ("x_scale", "hidden_scale")}
    return experts.bind((), {**made, **changes})


def coded(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with the codes of `x`."""
    x, scheme = arguments["x"], arguments["x_scheme"]
    codes, *scales = quantize.reference(x, arguments["x_scale"], scheme)
    return {**arguments, "x": codes, "x_scales": scales[0] if scales else None, "out_dtype": str(x.dtype)[6:]}


def exact(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, roundings to the dtype of `x` as in eager mode, and the sum of its terms' magnitudes.

    What is quantised between the products is so from the rounded values.
    """
    x, ids, scheme = arguments["x"], arguments["ids"], arguments["x_scheme"]
    up, down = (weight_of(arguments, name) for name in ("up", "down"))
    kind = x.dtype
    if arguments["out_dtype"]:
        kind = getattr(torch, arguments["out_dtype"])
        given, scale = arguments["x_scale"], arguments["x_scales"]
        inputs = dequantize(x, given if scale is None else scale, Scheme.parse(scheme), given).double()
    else:
        inputs = _seen(x, scheme, arguments["x_scale"])
    out, terms = (torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
    for token in range(x.shape[0]):
        for k in range(ids.shape[1]):
            expert = int(ids[token, k])
            if not 0 <= expert < up.shape[0]:
                continue
            made = (up[expert] @ inputs[token]).to(kind)
            if (bias := arguments["up_bias"]) is not None:
                made = made + bias[expert]
            gate, beside = made.view(-1, 2).unbind(1) if arguments["interleaved"] else made.chunk(2)
            hidden = _gated(arguments, gate, beside)
            seen = _seen(hidden[None], scheme, arguments["hidden_scale"])[0]
            weight, y = arguments["weights"][token, k].double(), down[expert] @ seen
            if (bias := arguments["down_bias"]) is not None:
                y += bias[expert].double()
            out[token] += weight * y
            terms[token] += weight.abs() * (down[expert].abs() @ seen.abs() + y.abs())
    return out, terms


def _gated(arguments: dict[str, Any], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The activation, each of its steps in float64 and rounded to the dtype of `gate`."""
    kind = gate.dtype
    if arguments["activation"] != "clamped_swiglu":
        acted = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[arguments["activation"]]
        return acted(gate.double()).to(kind) * up
    alpha, limit = arguments["alpha"], arguments["limit"]
    gate, up = gate.double().clamp(max=limit).to(kind), up.double().clamp(-limit, limit).to(kind)
    slope = (gate.double() * alpha).to(kind).double().sigmoid().to(kind)
    return (up.double() + 1).to(kind) * (gate * slope)


def weight_of(arguments: dict[str, Any], name: str) -> torch.Tensor:
    """What the codes of all experts stand for, in float64."""
    codes, scale, relative = (arguments[f"{name}{which}"] for which in ("", "_scale", "_global_scale"))
    if not arguments["x_scheme"]:
        return codes.double()
    kind = weight_scheme(arguments["x_scheme"])
    given = [None] * len(codes) if relative is None else list(relative)
    each = [dequantize(q, s, kind, g) for q, s, g in zip(codes, scale, given, strict=True)]
    return torch.stack(each).double()


def _seen(x: torch.Tensor, scheme: str, scale: torch.Tensor | None) -> torch.Tensor:
    if not scheme:
        return x.double()
    codes, *scales = quantize.reference(x, scale, scheme)
    return dequantize(codes, scales[0] if scales else scale, Scheme.parse(scheme), scale).double()


def check_mixture(arch: Arch, arguments: dict[str, Any], cuts: Any = None, **changes: Any) -> torch.Tensor:
    """Run the kernels: within what the roundings between them, moved by sums in another order, may change.

    Args:
        arch: the target.
        arguments: of `experts`.
        cuts: instead of those planned, of both products.
        changes: of the arguments of both products' launches.
    """
    import dataclasses

    made = mock.patch("fusionpass.ops.moe.triton.cuts_of", return_value=resolve(*cuts)) if cuts else mock.MagicMock()
    with made:
        launch, reason = experts.plan(arch, arguments)
    assert isinstance(launch, Launch), reason
    if changes:
        before = tuple(
            dataclasses.replace(one, args={**one.args, **changes}) if "WIDE" in one.args else one
            for one in launch.before
        )
        launch = dataclasses.replace(launch, before=before)
    with poisoned():
        (got,) = launch.run()
    expected, terms = exact(arguments)
    dtype = getattr(torch, arguments["out_dtype"]) if arguments["out_dtype"] else arguments["x"].dtype
    assert (got.shape, got.dtype, got.is_contiguous()) == (expected.shape, dtype, True)
    scale = expected.norm()
    error = (got.double() - expected).norm() / scale if scale > 0 else got.double().norm()
    assert error < (0.02 if arguments["x_scheme"] else 5e-3), error
    # What is rounded between the products may move by a step; of codes that is up to an eighth.
    step = {"": 2.0**-7, "nvfp4": 0.5}.get(arguments["x_scheme"], 2.0**-3)
    assert ((got.double() - expected).abs() <= step * terms + 2.0**-20).all()
    return got
