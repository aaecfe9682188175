"""`repack_linears_`: the weights of quantised linears, and their scales, as a library's kernels want them to lie."""

import dataclasses

import torch
from torch import nn

from ..errors import LayoutError, nearest
from ..ops.quant.layout import laid_out, linear, refuse_layout
from ..ops.quant.scheme import Scheme
from .linear import QuantizedLinear
from .report import RepackedRecord, RepackReport, SkippedRecord
from .scheme import LinearScheme, linear_shape

LAYOUTS = ("linear", "swizzled", "trtllm", "deepgemm")
"""Of weights; `ops/quant/layout.py` says what each is, and who reads it."""


@torch.no_grad()
def repack_linears_(model: nn.Module, layout: str, keep_pointers: bool = False) -> RepackReport:
    """Let the weights of a model's quantised linears lie as `layout` says, in place.

    What they stand for stays, and so do the state dict and `load_state_dict`, which have the linear layout whatever the
    linear's own is. A linear knows its layout (it is in `scheme`), so that doing this twice changes nothing, and an op
    refuses a layout that it cannot read. Where the new tensors have the shape and the dtype of the old they are copied
    into them, which no captured CUDA graph notices; else the parameter is bound to new memory.

    Args:
        model: any module with `QuantizedLinear`s. Call this before `fusionpass.compile` and `pack_linears_`.
        layout: "linear", "swizzled", "trtllm" or "deepgemm".
        keep_pointers: no parameter may be bound to new memory; nothing is changed where one would be.

    Returns:
        What was copied, what was rebound, and why the rest is as it was.

    Raises:
        LayoutError: there is no such layout, or a pointer would move.
    """
    if layout not in LAYOUTS:
        raise LayoutError(f"there is no layout {layout!r}", "repack_linears_", nearest(layout, LAYOUTS))
    moved, left = [], []
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        if reason := _refuse(layer, layout):
            left.append(SkippedRecord(path, reason))
        else:
            moved.append((path, layer, _scheme(layer.kind, layout)))
    if keep_pointers:
        for path, layer, kind in moved:
            if names := _rebound(layer, kind):
                raise LayoutError(
                    f"{' and '.join(names)} would be bound to new memory: {_sizes(layer, kind)}",
                    path,
                    "Repack before anything is captured, or leave keep_pointers out",
                )
    return RepackReport(layout, tuple(_repack(path, layer, kind) for path, layer, kind in moved), tuple(left))


def _scheme(kind: LinearScheme, layout: str) -> LinearScheme:
    return dataclasses.replace(kind, weight=dataclasses.replace(kind.weight, layout=layout))


def _refuse(layer: QuantizedLinear, layout: str) -> str | None:
    """Why a linear cannot lie so, or need not."""
    kind = layer.kind.weight
    if kind.layout == layout:
        return f"it is {layout} already"
    if layer.pack is not None:
        return "it shares its storage with others: repack first, then pack"
    if layer.weight.is_meta:
        return "its weight is not loaded"
    if layout != "linear" and layout not in layouts_of(kind):
        able = [name for name in LAYOUTS if name in layouts_of(kind)]
        return f"{str(kind)!r} can be {' or '.join(able)} alone"
    return refuse_layout(layer.out_features, layout)


def layouts_of(kind: Scheme) -> tuple[str, ...]:
    """Those that a weight of this scheme may have."""
    if kind.group in (16, 32):
        return "linear", "swizzled", "trtllm"
    exponents = kind.group == 128 and kind.scale_dtype == torch.float8_e8m0fnu
    return ("linear", "deepgemm") if exponents else ("linear",)


def _repacked(layer: QuantizedLinear, kind: LinearScheme) -> tuple[torch.Tensor, torch.Tensor]:
    shape = linear_shape(kind.weight, layer.out_features, layer.in_features)
    plain = linear(layer.weight, layer.weight_scale, layer.kind.weight.layout, shape)
    return laid_out(*plain, kind.weight.layout)


def _rebound(layer: QuantizedLinear, kind: LinearScheme) -> list[str]:
    """The parameters whose shape or dtype would change."""
    new = zip(("weight", "weight_scale"), _metas(layer, kind), strict=True)
    return [name for name, t in new if (t.shape, t.dtype) != (getattr(layer, name).shape, getattr(layer, name).dtype)]


def _metas(layer: QuantizedLinear, kind: LinearScheme) -> tuple[torch.Tensor, torch.Tensor]:
    shape = linear_shape(kind.weight, layer.out_features, layer.in_features)
    scales = torch.empty(shape, dtype=dataclasses.replace(kind.weight, layout="linear").stored_scale_dtype)
    return laid_out(layer.weight.to("meta"), scales.to("meta"), kind.weight.layout)


def _sizes(layer: QuantizedLinear, kind: LinearScheme) -> str:
    new = zip(("weight", "weight_scale"), _metas(layer, kind), strict=True)
    told = [f"{list(getattr(layer, name).shape)} becomes {list(t.shape)}" for name, t in new if name == "weight_scale"]
    return ", ".join(told)


def _repack(path: str, layer: QuantizedLinear, kind: LinearScheme) -> RepackedRecord:
    new, rebound = _repacked(layer, kind), _rebound(layer, kind)
    before = layer.kind.weight.layout
    for name, value in zip(("weight", "weight_scale"), new, strict=True):
        if name in rebound:
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
        else:
            getattr(layer, name).copy_(value)
    layer.describe(kind)
    return RepackedRecord(path, before, kind.weight.layout, tuple(rebound))
