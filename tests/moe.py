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
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of that size, with weights of about one and results of about one."""
    generator = torch.Generator(device).manual_seed(tokens * hidden + inner + top)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scores = normal(tokens, count).softmax(-1).topk(top)
    made: dict[str, Any] = {"x": normal(tokens, hidden).to(dtype), "ids": scores.indices, "x_scheme": scheme}
    made["weights"] = scores.values.to(dtype)
    weights = {"up": normal(count, 2 * inner, hidden) / hidden**0.5, "down": normal(count, hidden, inner) / inner**0.5}
    if not scheme:
        return experts.bind((), {**made, **{name: w.to(dtype) for name, w in weights.items()}, **changes})
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


def exact(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, roundings to the dtype of `x` as in eager mode, and the sum of its terms' magnitudes.

    What is quantised between the products is so from the rounded values.
    """
    x, ids, scheme = arguments["x"], arguments["ids"], arguments["x_scheme"]
    up, down = (weight_of(arguments, name) for name in ("up", "down"))
    inputs = _seen(x, scheme, arguments["x_scale"])
    out, terms = (torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
    for token in range(x.shape[0]):
        for k in range(ids.shape[1]):
            expert = int(ids[token, k])
            if not 0 <= expert < up.shape[0]:
                continue
            gate, beside = (up[expert] @ inputs[token]).to(x.dtype).chunk(2)
            acted = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}.get(arguments["activation"])
            assert acted is not None
            hidden = acted(gate.float()).to(x.dtype) * beside
            seen = _seen(hidden[None], scheme, arguments["hidden_scale"])[0]
            weight = arguments["weights"][token, k].double()
            out[token] += weight * (down[expert] @ seen)
            terms[token] += weight.abs() * (down[expert].abs() @ seen.abs())
    return out, terms


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
    assert (got.shape, got.dtype, got.is_contiguous()) == (expected.shape, arguments["x"].dtype, True)
    scale = expected.norm()
    error = (got.double() - expected).norm() / scale if scale > 0 else got.double().norm()
    assert error < (0.02 if arguments["x_scheme"] else 5e-3), error
    # What is rounded between the products may move by a step; of codes that is up to an eighth.
    step = {"": 2.0**-7, "nvfp4": 0.5}.get(arguments["x_scheme"], 2.0**-3)
    assert ((got.double() - expected).abs() <= step * terms + 2.0**-20).all()
    return got
