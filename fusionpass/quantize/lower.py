"""`lower_linears_`: the quantised linears of other libraries' checkpoints, in place."""

from typing import Any

import torch
from torch import nn

from ..errors import ScaleError, SchemeError
from .converters import CONVERTERS, source
from .experts import QuantizedExperts
from .linear import QuantizedLinear, share_input_scales
from .report import LoweredRecord, LowerReport, SkippedRecord
from .select import MULTIPLE, replace

_PLAIN = {torch.bfloat16, torch.float16, torch.float32, torch.float64}


@torch.no_grad()
def lower_linears_(model: nn.Module) -> LowerReport:
    """Replace each linear of `model` that another library quantised by a `QuantizedLinear`, in place.

    transformers' experts with FP8 weights in blocks become `QuantizedExperts`.

    Codes and scales stay where they are; only scales that are stored in another layout are copied. What is known:
    compressed-tensors (FP8, INT8, MXFP8, NVFP4), transformers' finegrained, compressed-tensors and fbgemm FP8,
    torchao's Float8, Int8, MX and NVFP4 tensors, diffusers' BFL linears. docs/quantize.md says where the result equals
    the library's to the bit, and how far off it is elsewhere. A linear that cannot be taken over is left as it is.

    Linears side by side in one module whose static input scales are equal get the same Parameter, so that the
    quantisation can be done once.

    Args:
        model: any module, with its weights loaded. Call this before `fusionpass.compile`.

    Returns:
        For each linear from what to which scheme, or why it was left.
    """
    lowered, left, done = [], [], []
    for path, module in list(model.named_modules()):
        name = source(module)
        made = _reason(module, path) if name is None else _converted(module, path, name)
        if isinstance(made, QuantizedLinear | QuantizedExperts):
            assert name is not None
            done.append((module, made.train(module.training)))
            lowered.append(LoweredRecord(path, (made.out_features, made.in_features), name, made.scheme))
        elif made is not None:
            left.append(SkippedRecord(path, made))
    for module, made in done:
        replace(model, module, made)
    share_input_scales(model)
    _drop_decompression(model)
    return LowerReport(tuple(lowered), tuple(left))


def _converted(module: Any, path: str, name: str) -> QuantizedLinear | QuantizedExperts | str:
    if not path:
        return "it is the whole model, which cannot be replaced in place"
    if not isinstance(module, nn.Linear) and not name.endswith("Experts"):
        return f"it is a {type(module).__name__}, not a linear"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it carries forward hooks, which a replacement would lose"
    if any(p.is_meta for p in module.parameters(recurse=False)):
        return "its weight is not loaded"
    try:
        made = CONVERTERS[name](module)
    except (SchemeError, ScaleError) as error:
        return f"{error.where}: {error.what}"
    if not isinstance(made, QuantizedLinear):
        return made
    wanted = {"in_features": made.kind.multiple, "out_features": MULTIPLE}
    for size, multiple in wanted.items():
        if (value := getattr(made, size)) % multiple:
            return f"{size} {value} is not a multiple of {multiple}, which {made.scheme} needs"
    return made


def _reason(module: nn.Module, path: str) -> str | None:
    """Why a module that no converter is for is left alone; None for what is no linear and is not quantised."""
    if isinstance(module, QuantizedLinear | QuantizedExperts):
        return f"it is quantised by {module.scheme!r} already"
    dtypes = {p.dtype for p in module._parameters.values() if p is not None}
    if isinstance(module, nn.Linear) and type(module._parameters.get("weight")) is nn.Parameter and dtypes <= _PLAIN:
        return "it is not quantised"
    coded = sorted(str(dtype) for dtype in dtypes if dtype.itemsize == 1 and dtype != torch.bool)
    if isinstance(module, nn.Linear) or coded:
        kinds = [type(module), *(type(p) for p in module._parameters.values() if p is not None)]
        special = [f"{k.__module__.partition('.')[0]}.{k.__qualname__}" for k in kinds if k is not nn.Parameter]
        return f"there is no converter for {' with '.join(dict.fromkeys((*special, *coded)))}"
    return None


def _drop_decompression(model: nn.Module) -> None:
    """Take compressed-tensors' hook off a model without linears of its own, where it would only break the graph."""
    for module in model.modules():
        hook = getattr(module, "ct_decompress_hook", None)
        if hook is not None and not any(hasattr(part, "quantization_scheme") for part in module.modules()):
            hook.remove()
            del module.ct_decompress_hook
