"""`quantize_`: every linear of a model, in place."""

from collections.abc import Iterable

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ..errors import NothingToQuantizeError, ScaleError, SchemeError, nearest
from .calibrate import Calibration, Observed, calibrate
from .linear import FP8_MAX, QuantizedLinear, absolute_maximum, checked_scale
from .report import QuantizedRecord, QuantizeReport, SkippedRecord
from .select import select

SCHEMES = ("fp8_static",)


def quantize_(
    model: nn.Module,
    scheme: str,
    calibration: Calibration | None = None,
    skip: str | Iterable[str] = (),
    *,
    tied: bool = False,
    progress: bool | None = None,
) -> QuantizeReport:
    """Replace the `nn.Linear`s of `model` by `QuantizedLinear`s, in place.

    "fp8_static": e4m3fn codes, one fp32 scale per tensor, `scale = max |t| / 448`; for a weight over itself, for an
    input over all the calibration data. Linears that read the same tensor (q, k and v; gate and up) in every
    calibration run share one input scale, the same Parameter, so that a pass can quantise that tensor once.

    Everything is checked before anything is changed: a call that raises one of the errors below leaves `model` as it
    was. After that each weight is converted and freed in turn, the largest first, so that memory never holds two copies
    of the model, and is at its highest before the first is replaced.

    Args:
        model: any module; its training mode is restored. Call this before `fusionpass.compile`.
        scheme: "fp8_static".
        calibration: an iterable of inputs (a tensor, a dict of keywords, or a tuple of arguments each), or a function
            that is called with `model` and runs it.
        skip: rules naming modules to leave alone, each a run of whole dotted segments of the path, globs allowed:
            "lm_head", "layers.0", "layers.*.mlp".
        tied: also quantise linears whose weight belongs to another module too; the other module keeps its own.
        progress: show a bar; None: where stderr is a terminal.

    Returns:
        What was quantised with which scales, and why the rest was not.

    Raises:
        SchemeError: there is no such scheme.
        SkipError: a rule matches no module.
        NothingToQuantizeError: no linear is left to quantise.
        CalibrationError: calibration data is missing or unusable, or a linear never ran on it.
        ScaleError: a weight or an input is all zeros, or not finite.
    """
    if scheme not in SCHEMES:
        raise SchemeError(f"there is no scheme {scheme!r}", "quantize_", nearest(str(scheme), SCHEMES))
    chosen, reasons = select(model, skip, tied)
    if not chosen:
        raise NothingToQuantizeError(*_nothing(model, reasons))
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    # Before the calibration: a NaN in a weight would otherwise be blamed on the inputs behind it.
    weight_scales = {path: _scale(absolute_maximum(linear.weight), f"{path}.weight") for path, linear in chosen.items()}
    observed = calibrate(model, chosen, calibration, shown)
    input_scales = _input_scales(chosen, observed)

    first: dict[nn.Parameter, str] = {}
    records = tuple(
        QuantizedRecord(
            path,
            (linear.out_features, linear.in_features),
            weight_scales[path].item(),
            input_scales[path].item(),
            first.setdefault(input_scales[path], path),
        )
        for path, linear in chosen.items()
    )
    order = sorted(chosen, key=lambda path: chosen[path].weight.numel(), reverse=True)
    for path in track(order, "quantising", console=console, disable=not shown, transient=True):
        linear = chosen.pop(path)
        _replace(model, linear, QuantizedLinear.from_linear(linear, input_scales[path], weight_scales[path]))
    return QuantizeReport(scheme, records, tuple(SkippedRecord(path, reason) for path, reason in reasons.items()))


def _nothing(model: nn.Module, reasons: dict[str, str]) -> tuple[str, str, str]:
    where = type(model).__name__
    if reasons:
        listed = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in list(reasons.items())[:4])
        return (
            f"none of its {len(reasons)} linears can be quantised ({listed})",
            where,
            "Change skip, or wrap the model",
        )
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return "its linears are quantised already", where, "Call quantize_ once"
    return "it holds no nn.Linear", where, "Pass a module with linears"


def _input_scales(linears: dict[str, nn.Linear], observed: dict[str, Observed]) -> dict[str, nn.Parameter]:
    shared: dict[tuple[int, ...], nn.Parameter] = {}
    for path, linear in linears.items():
        seen = observed[path]
        if seen.inputs not in shared:
            scale = _scale(torch.tensor(seen.amax, device=linear.weight.device), f"{path} (its input)")
            shared[seen.inputs] = nn.Parameter(scale, requires_grad=False)
    return {path: shared[observed[path].inputs] for path in linears}


def _scale(amax: torch.Tensor, where: str) -> torch.Tensor:
    try:
        return checked_scale(amax / FP8_MAX, where)
    except ScaleError:
        raise ScaleError(
            f"its largest absolute value is {amax.item():g}, which gives no scale", where, "Name the linear in skip"
        ) from None


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered; one module may hang under several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
