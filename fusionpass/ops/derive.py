"""Ops made from ops: a residual added in front of a norm, a quantisation behind anything."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ArgumentError
from ..op import Op, Tolerance, op
from .quant import CODES, SCALES, quantize, quantized_outputs, static_scale
from .quant.scheme import Scheme

_TENSOR = torch.Tensor
_OPTIONAL = torch.Tensor | None
SUM = Tolerance(ulp=2, fraction=2e-3, fp32_ulp=8, cancels=2)
"""Of a residual sum. It is exact, but where a norm is added, whose element may be one step off."""
_TWICE = Tolerance(ulp=2, fraction=4e-3, fp32_ulp=32, cancels=2)
"""Of a norm behind a norm: the first one's differences come on top."""
MORE = ("scale_2", "scale_3", "scale_4", "scale_5")
"""Further static scales of one tensor: linears that read one norm, each calibrated by itself."""


def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A parameter of a derived op."""
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def quantizing(
    base: Op, output: str, renamed: Mapping[str, str] | None = None, fixed: Mapping[str, Any] | None = None
) -> Op:
    """The op `<base>_quantize`: `quantize(<output of base>)`, and `base`'s outputs where asked for.

    Its docstring names the parameters: those of `base`, and of the quantisation.

    Args:
        base: an op.
        output: its first output, which is quantised.
        renamed: what parameters of `base` are called here that the quantisation has, too.
        fixed: arguments of `base` that are none here.
    """
    renamed, fixed = renamed or {}, fixed or {}
    given = [
        p.replace(name=renamed.get(p.name, p.name))
        for p in base.signature.parameters.values()
        if p.name not in base.options.values() and p.name not in fixed
    ]
    own = {name: old for old, name in renamed.items()}
    flags = [p for p in base.signature.parameters.values() if p.name in base.options.values()]
    parameters = [
        *given,
        parameter("scale", _OPTIONAL, None),
        parameter("scheme", str, "fp8_static"),
        *(parameter(name, _OPTIONAL, None) for name in MORE),
        parameter(f"{output}_out", bool, False),
        *flags,
    ]

    def body(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        results = base.reference(**{own.get(p.name, p.name): arguments[p.name] for p in (*given, *flags)}, **fixed)
        first, *others = [results] if base.single else results
        scheme, more = arguments["scheme"], [arguments[name] for name in MORE if arguments[name] is not None]
        if more and not Scheme.parse(scheme).static:
            raise ArgumentError(f"{scheme!r} computes its own scale", f"{base.name}_quantize", "Pass one scheme a call")
        codes = [c for scale in (arguments["scale"], *more) for c in quantize.reference(first, scale, scheme)]
        return [*codes, *([first] if arguments[f"{output}_out"] else []), *others]

    def outputs(arguments: Mapping[str, Any]) -> tuple[str, ...]:
        codes = quantized_outputs(arguments)
        more = (f"q{name.removeprefix('scale')}" for name in MORE if arguments.get(name) is not None)
        kept = (name for name, flag in {output: f"{output}_out", **base.options}.items() if arguments.get(flag))
        return (*codes, *more, *kept)

    def sample(*args: Any) -> dict[str, Any]:
        made = base.sample(*args)
        return {**made, "scale": static_scale(args[3]), "scheme": "fp8_static"}

    of_renamed = "".join(f"\n        {name}: `{old}` of `{base.name}`." for old, name in renamed.items())
    doc = f"""`quantize({base.name}(...), scale, scheme)`, and what else is read.

    Args:
        {", ".join(p.name for p in given if p.name not in own)}: as `{base.name}`.{of_renamed}
        scale, scheme: as `quantize`.
        scale_2, scale_3, scale_4, scale_5: further scales of a static scheme; each gives codes of its own.
        {output}_out: whether `{output}` itself is returned too.

    Returns:
        What `quantize` returns, the further codes, then {", ".join((output, *base.options))} where asked for.

    Raises:
        ArgumentError: as `{base.name}` and `quantize`, or there are several scales for a scheme that computes its own.
    """
    # A step of 16 bits of the largest value, in steps of the largest code.
    cancels = 0.125 if base.tolerance[output].cancels else 0.0
    codes, scales = dataclasses.replace(CODES, cancels=cancels), SCALES
    if base.tolerance[output].fraction == 1.0:
        # Where any element may be two steps of 16 bits off, any code may be one, and so may the largest element.
        codes, scales = dataclasses.replace(codes, fraction=1.0), Tolerance(ulp=3, fraction=1.0, fp32_ulp=2**17)
    return derived(
        f"{base.name}_quantize",
        parameters,
        body,
        doc,
        list[torch.Tensor],
        outputs=outputs,
        sample=sample,
        tolerance={**base.tolerance, **dict.fromkeys(("q", *(f"q_{i}" for i in range(2, 6))), codes), "scale": scales},
        options={output: f"{output}_out", **base.options},
    )


def adding(base: Op, name: str, output: str, inner: bool = False) -> Op:
    """The op `add_<base>`: `base` of a residual sum, and the sum where asked for; its docstring names the parameters.

    With `inner`, the norm of `x` may be what is added: the sandwich of Gemma and GLM-4.
    """
    own = list(base.signature.parameters.values())
    parameters = [
        own[0],
        parameter("residual", _TENSOR),
        *own[1:],
        parameter("alpha", float, 1.0),
        parameter("second", _OPTIONAL, None),
        *([parameter("inner_weight", _OPTIONAL, None)] if inner else []),
        parameter("residual_out", bool, True),
    ]

    def body(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        rest = {p.name: arguments[p.name] for p in own[1:]}
        x = arguments["x"]
        if arguments.get("inner_weight") is not None:
            x = base.reference(x, arguments["inner_weight"], *(rest[k] for k in ("eps", "weight_offset", "rounding")))
        total = residual_sum(x, arguments["residual"], arguments["alpha"], arguments["second"], name)
        return [base.reference(total, **rest), *([total] if arguments["residual_out"] else [])]

    def outputs(arguments: Mapping[str, Any]) -> tuple[str, ...]:
        return (output, *(("residual",) if arguments["residual_out"] else ()))

    def sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
        residual = torch.randn(tokens, width, generator=generator, device=device).mul(4).to(dtype)
        return {**base.sample(tokens, width, dtype, device, generator), "residual": residual}

    of_inner = (
        f"\n        inner_weight: [width], or None; `x` is first normalised with it, as `{base.name}` otherwise."
        if inner
        else ""
    )
    doc = f"""`{base.name}(x + residual, ...)`, and the sum.

    Args:
        x: [..., width], floating point.
        residual: the shape and dtype of `x`.
        {", ".join(p.name for p in own[1:])}: as `{base.name}`.
        alpha: `x` is multiplied by it first, and rounded to its dtype; 1.0: not at all.
        second: like `x`, or None; added to `residual` before `x` is, and rounded.{of_inner}
        residual_out: whether the sum, rounded to the dtype of `x` (the norm reads it so rounded), is returned too.

    Returns:
        [{output}] or [{output}, sum].

    Raises:
        ArgumentError: the shapes or dtypes of `x` and `residual` differ, or as `{base.name}`.
    """
    return derived(
        name,
        parameters,
        body,
        doc,
        list[torch.Tensor],
        outputs=outputs,
        sample=sample,
        tolerance={**base.tolerance, **({output: _TWICE} if inner else {}), "residual": SUM},
        options={"residual": "residual_out"},
    )


def residual_sum(
    x: torch.Tensor, residual: torch.Tensor, alpha: float = 1.0, second: torch.Tensor | None = None, where: str = "add"
) -> torch.Tensor:
    """`(residual + second) + x * alpha`, rounded after each step.

    Raises:
        ArgumentError: the tensors differ in shape or dtype.
    """
    for other in (residual, *([second] if second is not None else [])):
        if x.shape != other.shape or x.dtype != other.dtype:
            raise ArgumentError(
                f"x is {tuple(x.shape)} {x.dtype}, residual is {tuple(other.shape)} {other.dtype}",
                where,
                "They must be alike",
            )
    if second is not None:
        residual = residual + second
    # x first where nothing is scaled: a tensor keeps the strides of the first operand.
    return x + residual if alpha == 1.0 else residual + x * alpha


def derived(
    name: str,
    parameters: list[inspect.Parameter],
    body: Callable[[Mapping[str, Any]], Any],
    doc: str,
    returns: Any,
    **options: Any,
) -> Op:
    """An op with these parameters, whose reference is `body` of the bound arguments."""
    signature = inspect.Signature(parameters, return_annotation=returns)

    def reference(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(bound.arguments)

    reference.__signature__ = signature  # type: ignore[attr-defined]
    reference.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": returns}
    reference.__name__ = reference.__qualname__ = name
    reference.__doc__ = doc
    return op(**options)(reference)
