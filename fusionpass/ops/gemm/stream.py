"""The plan of products with few rows: what the kernels take, and how they are cut."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from ...arch import Arch
from ...launch import Empty, Late, Launch
from ...tuning.names import no_power_of_two
from ...tuning.store import choose
from ..rows import known, static
from . import NAMES, OUTPUTS, is_single
from .dispatch import PLAIN, Request, kind_of_codes, why_not
from .kernel import split_kernel, stream_kernel

TABLES = {"bf16": "linear", "fp16": "linear", "bf16_fp32": "linear_bf16_fp32"}
"""Whose tuned tables have the cuts, where it is not `scaled_mm`; by kind."""

SUMMED = 128
"""FP8 products that Hopper's matrix units sum, in 14 bits, before the sum is added in float32."""


@dataclass(frozen=True)
class Cut:
    """How a product is cut.

    Args:
        columns: of `b`, a program.
        depth: of K, a step.
        splits: programs that share their columns.
        warps: per program.
        stages: steps in flight.
        parts: of K, that a program reads side by side.
    """

    columns: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    parts: int = 1


def configure(arch: Arch, rows: int, columns: int, k: int, itemsize: int = 1) -> Cut:
    """The cut for so many rows, by `python -m bench.gemm --search` on an H100, for parts of K side by side on an H200.

    2 % from the best there at most, but for 8 % on the H200 at one row of 6144 columns, where the two differ.

    One row multiplies one by one, and each program reads 2 to 4 KiB at once. More go through the matrix units, with up
    to 48 KiB of weights in flight a program, more of them the smaller a step is. Where there would be programs for
    fewer than two in three multiprocessors, a program reads two parts of K side by side, or K is split, but the more
    rows, the more that costs to add up. Elements of 16 bits are half as many a byte, and their cuts are others.
    """
    count = arch.multiprocessors
    if itemsize == 2 and (found := _configure_half(arch, rows, columns)) is not None:
        return found
    if rows == 1:
        return Cut(4, 1024, warps=2, stages=1) if columns <= 32 * count else Cut(8, 512, stages=1)
    if arch.capability not in (90, 100, 103):
        return Cut(32, 128, stages=2)
    programs = triton.cdiv(columns, 64)
    enough = 3 * programs >= 2 * count
    if rows <= (16 if enough else 32) and count // 3 < programs <= count and k <= 8192:
        return Cut(32, 128, stages=6, parts=2)
    if 16 < rows <= 32 and enough and programs <= count:
        return Cut(64, 128, 2, stages=6)
    most = 8 if rows <= 16 else 4 if rows <= 32 else 2
    splits = 1 if enough else max(1, min(most, 2 * count // programs, k // 256))
    if rows <= 32 and (splits > 1 or programs > count):
        return Cut(64, 256, splits, stages=3)
    return Cut(64, 128, splits, stages=6)


def _configure_half(arch: Arch, rows: int, columns: int) -> Cut | None:
    """The cut of 16-bit elements where it is not that of codes: within 6 % of the best of a search."""
    if rows == 1:
        return Cut(4, 4096, stages=1)
    programs = triton.cdiv(columns, 64)
    if arch.capability not in (90, 100, 103) or 3 * programs < arch.multiprocessors:
        return None
    if 3 * programs < 2 * arch.multiprocessors:
        return Cut(32, 256, stages=6, parts=2)
    if programs <= arch.multiprocessors:
        return Cut(32, 256, warps=2, stages=6) if rows <= 16 else Cut(64, 256)
    if rows > 16 and programs > 8 * arch.multiprocessors:
        return Cut(128, 256, warps=8)
    return Cut(64, 256, stages=3)


def refuse_cut(cut: Cut, rows: int, itemsize: int) -> str | None:
    """Why a product of so many rows, of elements of `itemsize` bytes, cannot be cut so."""
    if rows > 1 and (cut.columns * cut.parts < 16 or cut.depth < 32):
        return f"tile: the matrix units take 16 columns of 32 bytes, not {cut.columns * cut.parts} of {cut.depth}"
    if rows == 1 and cut.parts > 1:
        return f"PARTS: one row is multiplied one by one, not in {cut.parts} parts"
    if cut.depth < itemsize:
        return f"BLOCK_SIZE_K: {cut.depth} bytes hold no element"
    return no_power_of_two(cut, "columns", "depth", "warps", "parts")


def _refuse(
    arch: Arch,
    kind: str,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> str | None:
    """Why the kernels cannot multiply these."""
    scales = {name: t for name, t in {"a_scale": a_scale, "b_scale": b_scale}.items() if t is not None}
    for name, t in {"b": b, **scales, "bias": bias}.items():
        if t is not None and t.device != a.device:
            return f"{name} is on {t.device}, a on {a.device}"
    if a.dtype == torch.float8_e4m3fn and arch.name == "gfx942":
        return "gfx942 has no float8_e4m3fn"
    if a.dtype == torch.float8_e4m3fnuz and arch.name != "gfx942":
        return f"{arch.name} has no float8_e4m3fnuz"
    k: Any = b.shape[0]
    if not isinstance(k, int) or not isinstance(b.shape[1], int):
        return "the size of the weight is symbolic"
    unit = 16 // a.element_size()
    if reason := why_not(arch, Request(kind, static(a.shape[0]), b.shape[1], k), "triton"):
        return reason
    if not known(a.stride(1) == 1) or not known(a.stride(0) % unit == 0):
        return f"a has strides {tuple(a.stride())}, not rows of 16 bytes each"
    if not known(b.stride(0) == 1) or not known(b.stride(1) % unit == 0):
        return f"b has strides {tuple(b.stride())}, not columns of 16 bytes each"
    for name, t in scales.items():
        if not is_single(t) and not t.is_contiguous():
            return f"{name} has strides {tuple(t.stride())}"
    if bias is not None and not known(bias.stride(0) == 1):
        return f"bias has stride {bias.stride(0)}"
    return None


def _kind(a: torch.Tensor, a_scale: torch.Tensor | None, b_scale: torch.Tensor | None, out_dtype: str) -> str:
    """What is multiplied, as `dispatch` has it."""
    if a_scale is None or b_scale is None:
        return PLAIN[a.dtype] if out_dtype == NAMES[a.dtype] else "bf16_fp32"
    return kind_of_codes(a, is_single(a_scale) and is_single(b_scale))


class Weight(NamedTuple):
    """One of the matrices that `a` is multiplied by.

    Attributes:
        b: [K, N], stored column by column.
        scale: where `b` is one of codes.
        bias: [N], behind the product.
        of: the argument that `b` is a view of, where it is one: launches take arguments.
    """

    b: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    of: torch.Tensor | None = None


def plan_scaled_mm(
    arch: Arch,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: str = "bfloat16",
    fast_accum: bool = False,
) -> Launch | Late | str:
    """The launches that run `scaled_mm` where `a` has few rows, or why there are none."""
    return _plan(arch, a, a_scale, [Weight(b, b_scale, bias)], out_dtype, fast_accum)


def plan_linear(arch: Arch, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> Launch | Late | str:
    """The launches that run `linear`, likewise."""
    return _plan(arch, x, None, [Weight(w.t(), None, bias, w)], NAMES[x.dtype], False)


def plan_router(arch: Arch, x: torch.Tensor, w: torch.Tensor) -> Launch | Late | str:
    """The launches that run `linear_bf16_fp32`, likewise."""
    return _plan(arch, x, None, [Weight(w.t(), None, None, w)], "float32", False)


def plan_scaled_mms(
    arch: Arch,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_2: torch.Tensor,
    b_scale_2: torch.Tensor,
    b_3: torch.Tensor | None = None,
    b_scale_3: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bias_2: torch.Tensor | None = None,
    bias_3: torch.Tensor | None = None,
    out_dtype: str = "bfloat16",
    fast_accum: bool = False,
) -> Launch | Late | str:
    """The launches that run `scaled_mms`, likewise."""
    weights = [Weight(b, b_scale, bias), Weight(b_2, b_scale_2, bias_2)]
    if b_3 is not None and b_scale_3 is not None:
        weights.append(Weight(b_3, b_scale_3, bias_3))
    if any(weight.b.shape[1] == 1 for weight in weights):
        return "a weight has one column"
    kinds = {(w.scale is not None and is_single(w.scale), None if w.bias is None else w.bias.dtype) for w in weights}
    if len(kinds) > 1:
        return "the weights' scales or biases are of different kinds"
    return _plan(arch, a, a_scale, weights, out_dtype, fast_accum)


def _plan(
    arch: Arch, a: torch.Tensor, a_scale: torch.Tensor | None, weights: list[Weight], out_dtype: str, fast_accum: bool
) -> Launch | Late | str:
    kind = _kind(a, a_scale, weights[0].scale, out_dtype)
    for weight in weights:
        if reason := _refuse(arch, kind, a, weight.b, a_scale, weight.scale, weight.bias):
            return reason
    rows, k = static(a.shape[0]), weights[0].b.shape[0]
    a_scales, b_scales = (scale is not None and not is_single(scale) for scale in (a_scale, weights[0].scale))
    if rows is None:
        return Late("few rows have a kernel, more go to cuBLAS")
    columns = [weight.b.shape[1] for weight in weights]
    cut = choose(
        configure(arch, rows, sum(columns), k, a.element_size()),
        TABLES.get(kind, "scaled_mm"),
        {"N": sum(columns), "K": k, "dtype": kind},
        arch,
        rows,
        refuse=lambda cut: refuse_cut(cut, rows, a.element_size()),
    )
    if isinstance(cut, str):
        return cut
    depth = cut.depth // a.element_size()  # as many bytes
    split = cut.splits > 1
    matrices: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    outs: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    for i, name in enumerate(("", "_2", "_3")):
        one = weights[i] if i < len(weights) else None
        matrices[f"b{name}"] = None if one is None else one.b if one.of is None else one.of
        sizes[f"b_scale{name}"], sizes[f"bias{name}"] = (one.scale, one.bias) if one is not None else (None, None)
        sizes[f"columns{name}"], steps[f"b_column{name}"], outs[f"out{name}"] = 0, 0, None
        if one is not None:
            sizes[f"columns{name}"], steps[f"b_column{name}"] = columns[i], one.b.stride(1)
            outs[f"out{name}"] = Empty((rows, columns[i]), OUTPUTS[out_dtype])
    returns = tuple(name for name, out in outs.items() if out is not None)
    number = torch.int32 if a.dtype == torch.int8 else torch.float32
    shared = {
        **sizes,
        "a_scale": a_scale,
        "sums": Empty((cut.splits, rows, sum(columns)), number) if split else None,
        "rows": rows,
        "SPLITS": cut.splits,
        "A_SCALES": a_scales,
        "B_SCALES": b_scales,
        "PDL": arch.has_pdl,
    }
    product = Launch(
        stream_kernel,
        (sum(triton.cdiv(size, cut.columns) for size in columns), cut.splits),
        {
            **shared,
            **matrices,
            **steps,
            **(dict.fromkeys(outs) if split else outs),
            "a": a,
            "a_row": a.stride(0),
            "depths": k,
            "EVEN": k % (depth if cut.parts == 1 else depth * cut.parts * cut.splits) == 0,
            "ROWS": 1 if rows == 1 else max(16, triton.next_power_of_2(rows)),
            "COLUMNS": cut.columns,
            "DEPTH": depth,
            "PARTS": cut.parts,
            "SUMMED": 0 if a.element_size() > 1 else depth if fast_accum else min(SUMMED, depth),
        },
        returns=() if split else returns,
        num_warps=cut.warps,
        num_stages=cut.stages,
        pdl=arch.has_pdl,
    )
    if not split:
        return product
    block = 1024
    return Launch(
        split_kernel,
        (sum(triton.cdiv(size, block) for size in columns), rows),
        {**shared, **outs, "COLUMNS": block},
        returns=returns,
        pdl=arch.has_pdl,
        before=(product,),
    )
