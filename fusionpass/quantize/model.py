"""`quantize_`: every linear of a model, and its experts, in place."""

from collections.abc import Iterable, Mapping

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ..errors import CalibrationError, NothingToQuantizeError
from ..ops.quant.scheme import Scheme
from .calibrate import Calibration, Observed, between, calibrate
from .experts import QuantizedExperts, select_experts
from .linear import QuantizedLinear
from .report import QuantizedRecord, QuantizeReport, SkippedRecord
from .scheme import given_scale, linear_scheme, weight_given_scale
from .select import replace, select, skip_rules


def quantize_(
    model: nn.Module,
    scheme: str,
    calibration: Calibration | None = None,
    skip: str | Iterable[str] = (),
    *,
    tied: bool = False,
    percentile: float = 100.0,
    progress: bool | None = None,
) -> QuantizeReport:
    """Replace each `nn.Linear` of `model` by a `QuantizedLinear`, and experts by `QuantizedExperts`, in place.

    Experts are transformers' modules with the weights of all of them in `gate_up_proj` and `down_proj`, in the schemes
    that `fusionpass.ops.experts` has; where it has not, they are left alone, with the reason.

    `QuantizedLinear` says what each scheme makes of the input and the weight. The scale of an input is computed from
    it as the model runs; but "fp8_static" takes one that was measured, `max |t| / 448` over all the calibration data,
    and "nvfp4" one that its block scales are relative to, `max |t| / (6 * 448)`. Linears that read the same tensor (q,
    k and v; gate and up) in every calibration run share that scale, the same Parameter, so that a pass can quantise
    the tensor once.

    Everything is checked before anything is changed: a call that raises one of the errors below leaves `model` as it
    was. After that each weight is converted and freed in turn, the largest first, so that memory never holds two copies
    of the model, and is at its highest before the first is replaced.

    Args:
        model: any module; its training mode is restored. Call this before `fusionpass.compile`.
        scheme: "fp8_static", "fp8_token", "fp8_group128", "mxfp8", "nvfp4", "int8_token", or as `LinearScheme.parse`
            takes it: "fp8_static/fp8_token" has a scale for each output channel of the weight.
        calibration: for schemes whose inputs take a scale that is given, and no other: an iterable of inputs (a tensor,
            a dict of keywords, or a tuple of arguments each), or a function that is called with `model` and runs it.
        skip: rules naming modules to leave alone, each a run of whole dotted segments of the path, globs allowed:
            "lm_head", "layers.0", "layers.*.mlp"; or "re:" and a regular expression for the beginning of the path. What
            a Hugging Face model's `config.quantization_config` leaves alone is left alone, too.
        tied: also quantise linears whose weight belongs to another module too; the other module keeps its own.
        percentile: of each input's magnitudes in the calibration data, what stands for the largest of them, up to 100;
            over several inputs the largest of these counts. What lies above it saturates.
        progress: show a bar; None: where stderr is a terminal.

    Returns:
        What was quantised with which scales, and why the rest was not.

    Raises:
        SchemeError: there is no such scheme.
        SkipError: a rule matches no module.
        NothingToQuantizeError: no linear and no experts are left to quantise.
        CalibrationError: calibration data is missing or unusable, a linear never ran on it, or the scheme takes none.
        ScaleError: a weight or a calibrated input is not finite, or is all zeros and has one scale.
    """
    kind = linear_scheme(scheme, "quantize_")
    if calibration is not None and not kind.calibrated:
        raise CalibrationError(f"{scheme!r} computes the scales of its inputs", "calibration", "Leave calibration out")
    if not 0 < percentile <= 100:
        raise CalibrationError(f"the percentile is {percentile}", "percentile", "It lies above 0 and up to 100")
    if percentile < 100 and not kind.calibrated:
        raise CalibrationError(f"{scheme!r} computes the scales of its inputs", "percentile", "Leave percentile out")
    told = skip_rules(model, skip)
    chosen, reasons = select(model, told, tied, scheme)
    mixtures, others = select_experts(model, told, scheme)
    reasons |= others
    if not chosen and not mixtures:
        raise NothingToQuantizeError(*_nothing(model, reasons))
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    # Before the calibration: a NaN in a weight would otherwise be blamed on the inputs behind it.
    weight_scales = {
        path: weight_given_scale(linear.weight, kind.weight, f"{path}.weight") for path, linear in chosen.items()
    }
    modules = {path: model.get_submodule(path) for path in mixtures}
    readers = [*chosen, *(name for path in mixtures for name in (path, between(path)))]
    input_scales: dict[str, nn.Parameter | None] = dict.fromkeys(readers)
    if kind.calibrated:
        owners: dict[str, nn.Module] = {**chosen, **modules, **{between(path): m for path, m in modules.items()}}
        devices = {path: next(owner.parameters()).device for path, owner in owners.items()}
        observed = calibrate(model, chosen, calibration, shown, percentile, mixtures)
        input_scales |= _input_scales(readers, observed, kind.input, devices)

    first: dict[nn.Parameter | None, str] = {}
    records = tuple(
        QuantizedRecord(
            path,
            (linear.out_features, linear.in_features),
            _number(weight_scales[path]),
            _number(scale := input_scales[path]),
            path if scale is None else first.setdefault(scale, path),
        )
        for path, linear in chosen.items()
    )
    records += tuple(
        QuantizedRecord(
            path,
            _sizes(module),
            None,
            _number(scale := input_scales[path]),
            path if scale is None else first.setdefault(scale, path),
            len(module._parameters["down_proj"]),  # type: ignore[arg-type]
        )
        for path, module in modules.items()
    )
    everything: dict[str, nn.Module] = {**chosen, **modules}
    chosen.clear()
    modules.clear()
    order = sorted(everything, key=lambda path: sum(p.numel() for p in everything[path].parameters()), reverse=True)
    for path in track(order, "quantising", console=console, disable=not shown, transient=True):
        linear = everything.pop(path)
        if path in mixtures:
            scales = input_scales[path], input_scales[between(path)]
            replace(model, linear, QuantizedExperts.from_experts(linear, mixtures[path], scheme, scales))
            continue
        assert isinstance(linear, nn.Linear)
        replace(model, linear, QuantizedLinear.from_linear(linear, input_scales[path], weight_scales[path], scheme))
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
    if any(isinstance(module, QuantizedLinear | QuantizedExperts) for module in model.modules()):
        return "its linears are quantised already", where, "Call quantize_ once"
    return "it holds no nn.Linear", where, "Pass a module with linears"


def _input_scales(
    readers: Iterable[str], observed: dict[str, Observed], kind: Scheme, devices: Mapping[str, torch.device]
) -> dict[str, nn.Parameter]:
    shared: dict[tuple[int, ...], nn.Parameter] = {}
    for path in readers:
        seen = observed[path]
        if seen.inputs not in shared:
            amax = torch.tensor(seen.amax, device=devices[path])
            shared[seen.inputs] = nn.Parameter(given_scale(amax, kind, f"{path} (its input)"), requires_grad=False)
    return {path: shared[observed[path].inputs] for path in readers}


def _sizes(module: nn.Module) -> tuple[int, int]:
    """The rows and the columns of the first weight of an expert."""
    rows, columns = module._parameters["gate_up_proj"].shape[1:]  # type: ignore[union-attr]
    return (columns, rows) if getattr(module, "is_transposed", False) else (rows, columns)


def _number(scale: torch.Tensor | None) -> float | None:
    return None if scale is None else scale.item()
