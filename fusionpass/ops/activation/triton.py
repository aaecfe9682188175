"""Plans of the kernel of the activations: what it accepts, and how it is cut."""

from typing import Any

import torch
import triton

from ...arch import Arch
from ...launch import Empty, Launch
from ...tuning.rows import Cut, choose_rows, tile
from ..derive import MORE
from ..quant.epilogue import (
    code_outputs,
    covered_rows,
    fewest_columns,
    refuse_scheme,
    scheme_constants,
)
from ..quant.scheme import Scheme
from ..rounding import in_pairs
from ..rows import FLOATS, alike, known, row_count, row_stride, static
from .kernel import activation_kernel


def plan_silu_mul(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `silu_mul` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "silu", **arguments)


def plan_gelu_mul(arch: Arch, approximate: str = "none", **arguments: Any) -> Launch | str:
    """The launch that runs `gelu_mul` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "gelu" if approximate == "none" else "gelu_tanh", **arguments)


def plan_clamped_swiglu(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `clamped_swiglu` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "clamped", **arguments)


def plan_silu(arch: Arch, x: torch.Tensor, **arguments: Any) -> Launch | str:
    """The launch that runs `silu` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "silu", x, **arguments)


def plan_gelu(arch: Arch, x: torch.Tensor, approximate: str = "none", **arguments: Any) -> Launch | str:
    """The launch that runs `gelu` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "gelu" if approximate == "none" else "gelu_tanh", x, **arguments)


def plan_relu_squared(arch: Arch, x: torch.Tensor, **arguments: Any) -> Launch | str:
    """The launch that runs `relu_squared` or its quantising form on `arch`, or why it cannot."""
    return _plan(arch, "relu_squared", x, **arguments)


def configure(arch: Arch, kind: Scheme | None, rows: int | None, width: int) -> Cut:
    """The rule for `rows` rows (None: any number) of `width` columns: a row where it has one scale, else a tile."""
    if kind is not None and kind.granularity == "token":
        block = int(triton.next_power_of_2(width))
        threads = min(512, max(32, block // 16))
        # No thread has whole vectors behind the end of the row.
        while threads > 128 and triton.cdiv(width, threads * 8) * threads * 8 > 1.1 * width:
            threads //= 2
        return Cut(1, block, max(1, threads // arch.warp_size))
    elements = rows * width if rows is not None else 2**31
    return tile(
        elements, width, fewest_columns(kind), arch.warp_size, grouped=kind is not None and kind.group is not None
    )


def _column_stride(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[Any, Any, Any] | str:
    """The strides between rows of both and between columns: 1, or 2 where gate and up are interleaved in one row."""
    tensors = {"gate": gate} if up is None else {"gate": gate, "up": up}
    steps = [t.stride(-1) for t in tensors.values()]
    if all(known(step == 2) for step in steps) and all(known(t.shape[-1] > 1) for t in tensors.values()):
        halves = [t.as_strided(t.shape, (*(s // 2 for s in t.stride()[:-1]), 1)) for t in tensors.values()]
        odd = any(not known(s % 2 == 0) for t in tensors.values() for s in t.stride()[:-1])
        rows = ["odd row strides" if odd else row_stride(t, name) for name, t in zip(tensors, halves, strict=True)]
        scale = 2
    else:
        rows, scale = [row_stride(t, name) for name, t in tensors.items()], 1
    for found in rows:
        if isinstance(found, str):
            return found
    return rows[0] * scale, rows[-1] * scale, scale


def _plan(
    arch: Arch,
    act: str,
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    alpha: float | None = None,
    limit: float | None = None,
    scale: torch.Tensor | None = None,
    scheme: str | None = None,
    product_out: bool | None = None,
    activation_out: bool | None = None,
    **more: torch.Tensor | None,
) -> Launch | str:
    extra = {name: s for name, s in more.items() if s is not None}
    for given in (scale, *extra.values()):
        if scheme is not None and (reason := refuse_scheme(arch, given, scheme, gate)):
            return reason
    if gate.dtype not in FLOATS or (up is not None and not alike(gate, up)):
        given_up = f", up is {up.dtype} {tuple(up.shape)}" if up is not None else ""
        return f"gate is {gate.dtype} {tuple(gate.shape)}{given_up}"
    width: Any = gate.shape[-1] if gate.dim() else 0
    if not isinstance(width, int):
        return "the width is symbolic"
    if width == 0:
        return "the rows are empty"
    strides = _column_stride(gate, up)
    if isinstance(strides, str):
        return strides
    codes = None if scheme is None else Scheme.parse(scheme)
    rows, shape = row_count(gate), tuple(gate.shape)
    name = {"gelu_tanh": "gelu", "clamped": "clamped_swiglu"}.get(act, act) + "_mul" * (
        up is not None and act != "clamped"
    )
    name += "_quantize" * (codes is not None)
    size = (arch, static(rows), width)
    rule, whole = configure(arch, codes, *size[1:]), codes is not None and codes.granularity == "token"
    fewest = fewest_columns(codes)
    cut = choose_rows(rule, name, scheme, *size, gate.element_size(), whole=whole, fewest=fewest)
    if isinstance(cut, str):
        return cut
    made = code_outputs(codes, shape)
    outputs = {
        "q": made["q"],
        "scales": made["scales"],
        **{f"q_{i}": made["q"] if f"scale_{i}" in extra else None for i in range(2, 6)},
        "product": Empty(shape, gate.dtype) if codes is None or product_out or activation_out else None,
    }
    return Launch(
        activation_kernel,
        ((covered_rows(codes, rows) + cut.rows - 1) // cut.rows * triton.cdiv(width, cut.columns),),
        {
            "gate": gate,
            "up": up,
            "scale": scale,
            **{name: more.get(name) for name in MORE},
            **outputs,
            "rows": rows,
            "gate_row": strides[0],
            "up_row": strides[1],
            "step_of_columns": strides[2],
            "alpha": alpha,
            "limit": limit,
            "WIDTH": width,
            "BLOCK": cut.columns,
            "ROWS": cut.rows,
            "VECTOR": 16 // gate.element_size(),
            "ACT": act,
            **scheme_constants(codes, gate.dtype),
            "PAIRS": in_pairs(arch, cut.rows * cut.columns, cut.warps),
            "PDL": arch.has_pdl,
            "EARLY": False,
        },
        returns=tuple(name for name, output in outputs.items() if output is not None),
        num_warps=cut.warps,
        pdl=arch.has_pdl,
        early=("scale",) if scale is not None else (),
    )
