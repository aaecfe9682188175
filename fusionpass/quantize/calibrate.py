"""Running a model on calibration data: the range of every linear's input, and which linears read the same tensor."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import CalibrationError
from ..ops.moe import gated
from .scheme import absolute_maximum

if TYPE_CHECKING:
    from .experts import Gate

Calibration = Iterable[Any] | Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Observed:
    """What a linear saw: the largest magnitude or a percentile; a key, equal for linears that read the same tensors."""

    amax: float
    inputs: tuple[int, ...]


class _Inputs:
    """Numbers the distinct tensors that linears are called with."""

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.amax: list[torch.Tensor] = []
        # A weak reference keeps the storage's address from being used again, not its memory.
        self.alive: list[StorageWeakRef] = []
        self.seen: dict[str, list[int]] = {}

    def record(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: torch.Tensor = args[0] if args else kwargs["input"]
        storage = StorageWeakRef(x.untyped_storage())
        # Inference tensors count no versions: one written to in between is then taken for one tensor with both ranges.
        version = 0 if x.is_inference() else x._version
        # Tokens of one batch, and the same in a row, are one tensor.
        lies = (x.numel(), x.shape[-1:]) if x.is_contiguous() else (x.shape, x.stride())
        key = (storage.cdata, x.storage_offset(), *lies, x.dtype, version)
        if key not in self.numbers:
            self.numbers[key] = len(self.amax)
            self.amax.append(absolute_percentile(x, self.percentile))
            self.alive.append(storage)
        self.seen.setdefault(path, []).append(self.numbers[key])

    def record_experts(
        self, path: str, gate: "Gate", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """What both products of experts read: tokens, and for each expert what its own tokens become."""
        x, ids = (args[i] if len(args) > i else list(kwargs.values())[i - len(args)] for i in range(2))
        self.record(path, module, (x,), {})
        given: Any = module
        for expert in ids.unique().tolist():
            if not 0 <= expert < len(given.gate_up_proj):
                continue
            weight = (
                given.gate_up_proj[expert].t() if getattr(given, "is_transposed", False) else given.gate_up_proj[expert]
            )
            bias = given.gate_up_proj_bias[expert] if getattr(given, "has_bias", False) else None
            made = F.linear(x[(ids == expert).any(-1)], weight, bias)
            self.record(between(path), module, (gated(made, **vars(gate)),), {})


def between(path: str) -> str:
    """What stands for the input of the second product of experts at `path`."""
    return f"{path}.down_proj"


def absolute_percentile(x: torch.Tensor, percentile: float) -> torch.Tensor:
    """The least magnitude that `percentile` % of the elements do not exceed, 0-dim fp32: at 100 the largest.

    NaN if there is one in `x`; 0 for no elements.
    """
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    amax = absolute_maximum(x)
    if percentile == 100 or not amax.isfinite():
        return amax
    # A float product may lie just above a whole number.
    kth = math.ceil(round(x.numel() * percentile / 100, 6))
    return x.detach().abs().flatten().float().kthvalue(max(kth, 1)).values


def calibrate(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: Calibration | None,
    progress: bool,
    percentile: float = 100.0,
    experts: "Mapping[str, Gate] | None" = None,
) -> dict[str, Observed]:
    """What each of `linears`, and both products of `experts`, saw while `model` ran on `calibration`.

    That is in evaluation mode and without gradients.

    Where `percentile` is less than 100, that of each input's magnitudes stands for their largest; over several calls
    the largest of these counts.

    Raises:
        CalibrationError: there is no data, it has an item of a kind that cannot be passed on, or a linear never ran.
    """
    inputs = _Inputs(percentile)
    handles = [
        linear.register_forward_pre_hook(partial(inputs.record, path), with_kwargs=True)
        for path, linear in linears.items()
    ]
    for path, gate in (experts or {}).items():
        hook = partial(inputs.record_experts, path, gate)
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        # A model that is compiled already would not call the hooks.
        with _evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            _run(model, calibration, progress)
    finally:
        for handle in handles:
            handle.remove()
    wanted = [*linears, *(name for path in experts or () for name in (path, between(path)))]
    idle = [path for path in wanted if path not in inputs.seen]
    if idle:
        raise CalibrationError(
            f"{len(idle)} of {len(wanted)} linears never ran on the calibration data",
            ", ".join(idle[:8]) + (", …" if len(idle) > 8 else ""),
            "Add inputs that reach them, or name them in skip",
        )
    amax = [float(a) for a in inputs.amax]
    # fmax would drop a NaN, and so may max(): the check of the scale has to see it.
    return {
        path: Observed(torch.tensor([amax[n] for n in seen]).amax().item(), tuple(seen))
        for path, seen in inputs.seen.items()
    }


def _run(model: nn.Module, calibration: Calibration | None, progress: bool) -> None:
    if calibration is None:
        raise CalibrationError(
            "scales that are given need calibration data",
            "calibration",
            "Pass a list of inputs, or a function running the model",
        )
    if callable(calibration):
        calibration(model)
        return
    if isinstance(calibration, torch.Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration is a single {type(calibration).__name__}", "calibration", "Pass a list: [inputs, …]"
        )
    index = -1
    for index, item in enumerate(track(calibration, "calibrating", disable=not progress, transient=True)):
        try:
            _call(model, item, f"calibration[{index}]")
        except CalibrationError:
            raise
        except Exception as error:
            error.add_note(f"while running the model on calibration[{index}]")
            raise
    if index < 0:
        raise CalibrationError("the calibration data is empty", "calibration", "Pass at least one input")


def _call(model: nn.Module, item: Any, where: str) -> None:
    if isinstance(item, torch.Tensor):
        model(item)
    elif isinstance(item, Mapping):
        model(**item)
    elif isinstance(item, tuple | list):
        model(*item)
    else:
        raise CalibrationError(
            f"the item is a {type(item).__name__}", where, "Pass a tensor, a dict of keywords or a tuple of arguments"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
