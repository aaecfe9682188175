"""The plan of products whose scales change along K: what the kernel takes, and how it is cut."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...arch import Arch
from ...launch import Empty, Late, Launch
from ...tuning.names import no_power_of_two
from ...tuning.store import choose
from ..quant.scheme import Scheme
from ..rows import known, static
from . import OUTPUTS
from .blocks import group_of, kind_of
from .blocks_kernel import block_kernel
from .dispatch import FEW, Request, why_not
from .kernel import split_kernel


@dataclass(frozen=True)
class Cut:
    """How a product is cut.

    Args:
        rows: of `a`, a program; 1 multiplies one by one, more are a size that `tl.dot` takes.
        columns: rows of `b`, a program.
        depth: bytes of K, a step.
        splits: programs that share their rows and columns, a part of K each.
        grouped: blocks of rows whose programs are next to one another.
        warps: per program.
        stages: steps in flight.
    """

    rows: int
    columns: int
    depth: int
    splits: int = 1
    grouped: int = 1
    warps: int = 4
    stages: int = 3


def configure(arch: Arch, rows: int, columns: int, depths: int, by_sum: bool) -> Cut:
    """The cut for so many rows.

    Few rows are cut as in `stream.configure`, which was measured on an H100. So was what scales the sum of each group:
    of many rows its best takes 64 by 128 a program, since a larger tile's two sums do not fit the registers. The rest
    is not measured.

    Args:
        arch: the target.
        rows: of `a`.
        columns: rows of `b`.
        depths: bytes of a row of codes.
        by_sum: the sum of each group is scaled.
    """
    count = arch.multiprocessors
    if rows == 1:
        return Cut(1, 4 if columns <= 32 * count else 8, 512, warps=2 if columns <= 32 * count else 4, stages=1)
    if rows <= FEW:
        programs = triton.cdiv(columns, 64)
        splits = 1 if 3 * programs >= 2 * count else max(1, min(8, 2 * count // programs, depths // 256))
        return Cut(max(16, triton.next_power_of_2(rows)), 64, 128, splits, stages=6 if arch.is_cuda else 2)
    stages = 2 if arch.is_rocm else 3
    if by_sum:
        return Cut(64, 128, 128, grouped=8, stages=stages)
    return Cut(128, 128, 128, grouped=8, warps=8, stages=stages)


REACH = 4
"""An entry of a table stands for numbers of rows within this factor: one row has a program of its own."""

NEWER = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
"""Whether this Triton compiles products of scaled FP4 for sm_121: 3.6 does for sm_120 alone."""

PLAIN: dict[str, Any] = {
    "order": None, "experts": None, "b_expert": 0, "b_scale_expert": 0, "alpha": None, "limit": None, "TOP": 1,
    "ACT": None, "INTERLEAVED": False, "TRANSPOSED": False, "SUMMED": 128,
}  # fmt: skip
"""The kernel's arguments where there is one weight, and nothing behind its product."""


def native(arch: Arch, kind: Scheme, cut: Cut) -> bool:
    """Whether the matrix units multiply such codes with their scales."""
    if group_of(kind) == 128:
        return False
    if arch.capability in (100, 103):  # by 128 columns of the tensor memory
        return cut.columns >= 128
    if arch.capability == 121 and kind.packed:
        return NEWER
    return arch.capability in (120, 121) or (arch.name == "gfx950" and not kind.packed)


def by_words(arch: Arch, kind: Scheme, cut: Cut) -> bool:
    """Whether packed codes are unpacked by PTX, two an instruction; the interpreter of tests has none for sm_89."""
    return kind.packed and arch.capability >= 90 and (cut.rows == 1 or not native(arch, kind, cut))


def table_key(kind: str, columns: int, k: int) -> dict[str, object]:
    """What tables are for: those of blocks are named as other systems name theirs.

    Args:
        kind: of `kind_of`.
        columns: rows of `b`.
        k: codes of a row.
    """
    return {"N": columns, "K": k, **named(kind)}


def named(kind: str) -> dict[str, object]:
    """What tables say of how both operands are quantised."""
    dtype, _, block = kind.partition("_block")
    return {"dtype": f"{dtype}_w8a8", "block_shape": [int(block), int(block)]} if block else {"dtype": kind}


def refuse_cut(cut: Cut, group: int, by_sum: bool) -> str | None:
    """Why the kernel cannot be cut so.

    Args:
        cut: the configuration.
        group: bytes that share a scale.
        by_sum: the sum of each group is scaled.
    """
    if cut.rows > 1 and (cut.rows < 16 or cut.columns < 16 or cut.depth < 32):
        return f"tile: the matrix units take 16 by 16 of 32 bytes, not {cut.rows} by {cut.columns} of {cut.depth}"
    if cut.rows > 1 and by_sum and cut.depth > group:
        return f"BLOCK_SIZE_K: {group} bytes share a scale, and {cut.depth} would be summed"
    if not by_sum and cut.depth < group:
        return f"BLOCK_SIZE_K: {group} bytes share a scale, more than {cut.depth}"
    return no_power_of_two(cut, "rows", "columns", "depth", "warps")


def _refuse(arch: Arch, kinds: tuple[Scheme, Scheme], tensors: dict[str, torch.Tensor | None], k: Any) -> str | None:
    """Why the kernel cannot multiply these."""
    a = tensors["a"]
    assert a is not None
    for name, t in tensors.items():
        if t is not None and t.device != a.device:
            return f"{name} is on {t.device}, a on {a.device}"
    if a.dtype == torch.float8_e4m3fn and arch.name == "gfx942":
        return "gfx942 has no float8_e4m3fn"
    if a.dtype == torch.float8_e4m3fnuz and arch.name != "gfx942":
        return f"{arch.name} has no float8_e4m3fnuz"
    if not isinstance(k, int) or not isinstance(tensors["b"].shape[0], int):  # type: ignore[union-attr]
        return "the size of the weight is symbolic"
    codes = k * (2 if kinds[0].packed else 1)
    columns: int = tensors["b"].shape[0]  # type: ignore[union-attr]
    request = Request(kind_of(kinds[0]), static(a.shape[0]), columns, codes, layout=kinds[1].layout)
    if reason := why_not(arch, request, "triton"):
        return reason
    for name in ("a", "b", "bias"):
        t = tensors[name]
        if t is not None and not known(t.stride(-1) == 1):
            return f"{name} has strides {tuple(t.stride())}, not contiguous rows"
    return None


def plan(
    arch: Arch,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    a_scheme: str = "fp8_group128",
    b_scheme: str = "fp8_block128",
    a_global_scale: torch.Tensor | None = None,
    b_global_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: str = "bfloat16",
) -> Launch | Late | str:
    """The launches that run `block_scaled_mm`, or why there are none."""
    kinds = Scheme.parse(a_scheme), Scheme.parse(b_scheme)
    scales = {"a_scale": a_scale, "b_scale": b_scale, "a_global": a_global_scale, "b_global": b_global_scale}
    depths = b.shape[1]
    if kinds[0].layout in ("trtllm", "deepgemm"):
        return f"a lies as {kinds[0].layout} wants it"
    if reason := _refuse(arch, kinds, {"a": a, "b": b, **scales, "bias": bias}, depths):
        return reason
    rows, columns = static(a.shape[0]), b.shape[0]
    if rows is None:
        return Late("few rows are cut in other ways than many")
    group = (group_of(kinds[0]) or 1) // (2 if kinds[0].packed else 1)
    by_sum = group == 128
    cut = choose(
        configure(arch, rows, columns, depths, by_sum),
        "block_scaled_mm",
        table_key(kind_of(kinds[0]), columns, depths * (2 if kinds[0].packed else 1)),
        arch,
        rows,
        reach=REACH,
        refuse=lambda cut: refuse_cut(cut, group, by_sum),
    )
    if isinstance(cut, str):
        return cut
    split = cut.splits > 1
    out, wide = Empty((rows, columns), OUTPUTS[out_dtype]), tl.float16 if kinds[0].packed else tl.bfloat16
    finish = {
        "bias": bias,
        "sums": Empty((cut.splits, rows, columns), torch.float32) if split else None,
        "rows": rows,
        "columns": columns,
        "SPLITS": cut.splits,
        "PDL": arch.has_pdl,
    }
    steps: dict[str, Any] = {}
    for name, scale, kind in (("a", a_scale, kinds[0]), ("b", b_scale, kinds[1])):
        swizzled = kind.layout == "swizzled"
        steps[f"{name}_scale_row"] = scale.shape[1] // 4 if swizzled else scale.stride(0)
        steps[f"{name}_scale_group"] = 1 if swizzled else scale.stride(1)
        steps[f"{name.upper()}_SWIZZLED"] = swizzled
    product = Launch(
        block_kernel,
        (triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns), cut.splits),
        {
            **finish,
            **scales,
            **steps,
            "a": a,
            "b": b,
            "out": None if split else out,
            "depths": depths,
            "a_row": a.stride(0),
            "b_row": b.stride(0),
            **PLAIN,
            "GROUP": group,
            "SHARED": 128 if kinds[1].granularity == "block128" else 1,
            "WIDE": None if by_sum else wide,
            "NATIVE": native(arch, kinds[0], cut),
            "WORDS": by_words(arch, kinds[0], cut),
            "EVEN": depths % cut.depth == 0,
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "DEPTH": cut.depth,
            "GROUPED": cut.grouped,
        },
        returns=() if split else ("out",),
        num_warps=cut.warps,
        num_stages=cut.stages,
        pdl=arch.has_pdl,
    )
    if not split:
        return product
    block = 1024
    others = [f"{name}{which}" for which in ("_2", "_3") for name in ("b_scale", "bias", "out")]
    given = {
        **finish,
        "a_scale": a_global_scale,
        "b_scale": b_global_scale,
        "out": out,
        **dict.fromkeys(others),
        "columns_2": 0,
        "columns_3": 0,
        "A_SCALES": False,
        "B_SCALES": False,
        "COLUMNS": block,
    }
    grid = (triton.cdiv(columns, block), rows)
    return Launch(split_kernel, grid, given, returns=("out",), pdl=arch.has_pdl, before=(product,))
