"""Plans of the norms' kernel: what it accepts, and how it is cut."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton

from ...arch import Arch
from ...launch import Empty, Launch
from ...tuning.rows import Cut, choose_rows
from ..derive import MORE
from ..quant.epilogue import code_outputs, covered_rows, fewest_columns, refuse_scheme, scheme_constants
from ..quant.scheme import Scheme
from ..rounding import in_pairs
from ..rows import FLOATS, alike, alike_shape, known, row_count, row_stride, static
from . import BEFORE, LAST
from .kernel import norm_kernel

WIDEST = 16384
"""Columns that one program holds in registers."""
MANY = 4096
"""Rows from which on starting their programs takes longer than short rows do."""


def configure(arch: Arch, rows: int | None, width: int, itemsize: int = 2) -> Cut:
    """The rule for `rows` rows (None: any number) of `width` columns.

    A row of 128 to 256 threads' 16-byte loads takes one load a thread, a much narrower one shares its program with
    others, and a wider one takes 128 threads, or as many as leave none with more than 64 elements.
    """
    block = triton.next_power_of_2(width)
    loads = max(1, block * itemsize // 16)
    threads = loads if 128 <= loads <= 256 else max(128, block // 64)
    # Starting a program takes a GPU over a nanosecond: many short rows are bound by that, so two share a program.
    fewest = 2 if rows is not None and rows >= MANY and loads <= 128 else 1
    return Cut(max(fewest, min(16, 64 // loads)), block, threads // arch.warp_size)


def plan_rms_norm(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `rms_norm`, or that with a residual or a quantisation around it, or why there is none."""
    return _plan(arch, "rms", **arguments)


def plan_layer_norm(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `layer_norm`, or that with a residual or a quantisation around it, or why there is none."""
    return _plan(arch, "layer", **{k: v for k, v in arguments.items() if k != "moments"})


def plan_add(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `add_quantize`, or why there is none."""
    sum_out = arguments.pop("residual_out")
    return _plan(arch, "", **arguments, norm_out=sum_out)


def refuse_inputs(
    x: torch.Tensor, likes: Mapping[str, torch.Tensor | None], vectors: Mapping[str, torch.Tensor | None]
) -> str | None:
    """Why a kernel that holds whole rows of `x` cannot read these tensors of its shape and vectors of its width."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    for name, other in likes.items():
        if other is not None and not alike(x, other):
            return f"x and the {name} differ in shape, dtype or device"
    width: Any = x.shape[-1] if x.dim() else 0
    if not isinstance(width, int):
        return "the width is symbolic"
    if width == 0:
        return "the rows are empty"
    if width > WIDEST:
        return f"rows of {width} columns do not fit in registers (at most {WIDEST})"
    for name, vector in vectors.items():
        if vector is None:
            continue
        dense = vector.dim() == 1 and vector.shape[0] == width and vector.stride(0) == 1
        if not dense or vector.dtype not in FLOATS or vector.device != x.device:
            return (
                f"the {name} is {vector.dtype} {tuple(vector.shape)} on {vector.device}, not a dense vector of {width}"
            )
    return None


def _modulation(x: torch.Tensor, by: torch.Tensor | None) -> tuple[Any, Any] | str:
    """Rows of `x` that share a row of `by`, and the stride between its rows; a reason where there is no such number."""
    if by is None:
        return 1, 0
    wide = by.dim() > 0 and known(by.shape[-1] == x.shape[-1]) and known(by.stride(-1) == 1)
    if not wide or by.dtype not in FLOATS or by.device != x.device:
        return f"the modulation is {by.dtype} {tuple(by.shape)} with strides {tuple(by.stride())} on {by.device}"
    ahead = (1,) * (x.dim() - by.dim()) + tuple(by.shape[:-1])
    if all(known(size == 1) for size in ahead):
        return 1, 0
    if alike_shape(by, x):
        stride = row_stride(by, "the modulation")
        return stride if isinstance(stride, str) else (1, stride)
    if by.dim() == x.dim() and known(by.shape[0] == x.shape[0]) and all(known(size == 1) for size in ahead[1:]):
        return math.prod(x.shape[1:-1]), by.stride(0)
    return f"the modulation has shape {tuple(by.shape)} for x of {tuple(x.shape)}"


def _modulations(
    x: torch.Tensor, mod_scale: torch.Tensor | None, mod_shift: torch.Tensor | None
) -> tuple[Any, Any, Any] | str:
    """Rows of `x` that share rows of both, and the strides between those; a reason where they cannot be read so."""
    scale, shift = _modulation(x, mod_scale), _modulation(x, mod_shift)
    if isinstance(scale, str):
        return scale
    if isinstance(shift, str):
        return shift
    per = shift[0] if known(scale[1] == 0) else scale[0]
    if not known(per == shift[0]) and not known(shift[1] == 0):
        return "mod_scale and mod_shift are shared by different numbers of rows"
    return per, scale[1], shift[1]


def _plan(
    arch: Arch,
    kind: str,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str = BEFORE,
    bias: torch.Tensor | None = None,
    mod_scale: torch.Tensor | None = None,
    mod_shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    second: torch.Tensor | None = None,
    inner_weight: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    scheme: str | None = None,
    norm_out: bool = True,
    residual_out: bool = False,
    **more: torch.Tensor | None,
) -> Launch | str:
    extra = {name: s for name, s in more.items() if s is not None}
    for given in (scale, *extra.values()):
        if scheme is not None and (reason := refuse_scheme(arch, given, scheme, x)):
            return reason
    likes = {"residual": residual, "second residual": second}
    vectors = {"weight": weight, "bias": bias, "inner weight": inner_weight}
    if reason := refuse_inputs(x, likes, vectors):
        return reason
    strides = [0 if t is None else row_stride(t, name) for name, t in {"x": x, **likes}.items()]
    modulation = _modulations(x, mod_scale, mod_shift)
    for found in (*strides, modulation):
        if isinstance(found, str):
            return found
    rows, width, shape = row_count(x), x.shape[-1], tuple(x.shape)
    parts = {"add": residual is not None, f"{kind}_norm": kind, "quantize": scheme}
    name = "_".join(part for part, there in parts.items() if there)
    size = (arch, static(rows), width)
    cut = choose_rows(configure(*size, x.element_size()), name, scheme, *size, x.element_size(), whole=True)
    if isinstance(cut, str):
        return cut
    codes = None if scheme is None else Scheme.parse(scheme)
    # A weight of another dtype, multiplied behind the rounding, makes the norm wider.
    plain = x.dtype if weight is None or not kind or rounding != BEFORE else torch.promote_types(x.dtype, weight.dtype)
    dtype = plain
    for wider in (mod_scale, mod_shift) if rounding != LAST else ():
        dtype = dtype if wider is None else torch.promote_types(dtype, wider.dtype)
    made = code_outputs(codes, shape)
    outputs = {
        "q": made["q"],
        "scales": made["scales"],
        **{f"q_{i}": made["q"] if f"scale_{i}" in extra else None for i in range(2, 6)},
        "norm": Empty(shape, dtype) if norm_out else None,
        "total": Empty(shape, x.dtype) if residual_out else None,
    }
    block = max(fewest_columns(codes), cut.columns)
    # Where other programs hide the wait, registers are worth more; not for RMSNorm, nor with a residual.
    late = kind == "layer" and residual is None and codes is not None and (static(rows) or 0) >= MANY
    read_early = {"weight": weight, "bias": bias, "inner": inner_weight, "scale": scale}
    return Launch(
        norm_kernel,
        ((covered_rows(codes, rows) + cut.rows - 1) // cut.rows,),
        {
            "x": x,
            "residual": residual,
            "second": second,
            **read_early,
            "mod_scale": mod_scale,
            "mod_shift": mod_shift,
            **{name: more.get(name) for name in MORE},
            **outputs,
            "rows": rows,
            "x_row": strides[0],
            "residual_row": strides[1],
            "second_row": strides[2],
            "per_modulation": modulation[0],
            "scale_row": modulation[1],
            "shift_row": modulation[2],
            "unit": 1.0 if mod_scale is not None or inner_weight is not None or alpha != 1.0 else None,
            "eps": eps,
            "offset": weight_offset or None,
            "alpha": alpha if alpha != 1.0 else None,
            "NORM": kind,
            "AFTER": rounding != BEFORE,
            "LAST": rounding == LAST and mod_scale is not None,
            "WIDE": plain != x.dtype,
            "WIDTH": width,
            "BLOCK": block,
            "ROWS": cut.rows,
            "VECTOR": 16 // x.element_size(),
            **scheme_constants(codes, dtype),
            "LATE": late,
            "PAIRS": in_pairs(arch, cut.rows * block, cut.warps),
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=tuple(name for name, output in outputs.items() if output is not None),
        num_warps=cut.warps,
        pdl=arch.has_pdl,
        early=tuple(name for name, tensor in read_early.items() if tensor is not None),
    )
