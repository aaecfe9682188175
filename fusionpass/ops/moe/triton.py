"""The plan of a mixture of experts: pairs put in order, two products, and what is between and behind them."""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...arch import Arch
from ...launch import Empty, Late, Launch
from ...tuning.store import choose
from ..gemm import OUTPUTS
from ..gemm.blocks import group_of, kind_of
from ..gemm.blocks_kernel import block_kernel
from ..gemm.blocks_triton import REACH, Cut, by_words, named, native, refuse_cut
from ..quant.scheme import Scheme
from ..quant.triton import plan_quantize
from ..rows import known, static
from . import weight_scheme
from .kernel import align_kernel, combine_kernel


class CutWarning(UserWarning):
    """Both products share one order of pairs, so that the second has to take as many rows a block as the first."""


@dataclass(frozen=True)
class Resolved:
    """How both products are cut.

    Args:
        up: the first.
        down: the second, with as many rows a block.
        reason: why `down` is not as it was asked for, or "".
    """

    up: Cut
    down: Cut
    reason: str = ""


def configure(arch: Arch, pairs: int, experts: int, columns: int, itemsize: int) -> Cut:
    """The cut of the first product, which makes two at once. Not measured.

    Args:
        arch: the target.
        pairs: of a token and one of its experts.
        experts: how many there are.
        columns: of the result.
        itemsize: bytes of an element, or a code.
    """
    rows = max(16, min(64, triton.next_power_of_2(-(-pairs // experts))))
    wide = min(64, max(16, triton.next_power_of_2(columns)))
    stages = 2 if arch.is_rocm else 4 if rows <= 32 else 3
    return Cut(rows, wide, 128 // itemsize, grouped=4, warps=8 if rows * wide >= 64 * 64 else 4, stages=stages)


def follow(up: Cut, columns: int) -> Cut:
    """The cut of the second product: as the first, with as many sums a program."""
    return dataclasses.replace(up, columns=min(2 * up.columns, max(16, triton.next_power_of_2(columns))))


def table_key(scheme: str, experts: int, columns: int, down: bool) -> dict[str, object]:
    """What tables are for, named as other systems name theirs; M is the number of tokens.

    Args:
        scheme: as in `experts`.
        experts: how many there are.
        columns: of what is between the products.
        down: of the second product.
    """
    quantized: dict[str, object] = {}
    if scheme:
        kind = Scheme.parse(scheme)
        quantized = {"dtype": "fp8_w8a8"} if group_of(kind) is None else named(kind_of(kind))
    return {"E": experts, "N": columns, **quantized, "down": down}


def cuts_of(
    arch: Arch, tokens: int, top: int, sizes: tuple[int, int, int], scheme: str, itemsize: int
) -> Resolved | str:
    """How both products are cut, by tables or by rule; or why the kernels should not run.

    Args:
        arch: the target.
        tokens: how many.
        top: experts of each.
        sizes: how many experts there are, columns between the products, and of the result.
        scheme: as in `experts`.
        itemsize: bytes of an element, or a code.
    """
    count, inner, width = sizes
    kind = Scheme.parse(scheme) if scheme else None
    group = 1 if kind is None else (group_of(kind) or 1) // (2 if kind.packed else 1)

    def refuse(cut: Cut) -> str | None:
        if cut.rows == 1:
            return "tile: mixtures have no program for single rows"
        if cut.splits != 1:
            return f"SPLITS: mixtures are not split along K, {cut.splits} ways or any"
        return refuse_cut(cut, group, group == 128)

    rule = configure(arch, tokens * top, count, inner, itemsize)
    up = choose(rule, "experts", table_key(scheme, count, inner, False), arch, tokens, reach=REACH, refuse=refuse)
    if isinstance(up, str):
        return up
    rule = follow(up, width)
    down = choose(rule, "experts", table_key(scheme, count, inner, True), arch, tokens, reach=REACH, refuse=refuse)
    return down if isinstance(down, str) else resolve(up, down)


def resolve(up: Cut, down: Cut) -> Resolved:
    """Both cuts for one order of pairs: `down` takes the rows of `up`, and what depends on them.

    Neither argument changes. What each pair of them gives is warned of once.
    """
    if up.rows == down.rows:
        return Resolved(up, down)
    reason = f"the second product takes {up.rows} rows a block, as the first, not {down.rows}"
    warnings.warn(reason, CutWarning, stacklevel=2)
    return Resolved(up, dataclasses.replace(down, rows=up.rows), reason)


def blocks_of(pairs: int, experts: int, rows: int) -> int:
    """How many blocks of rows there are at most: each expert that has a pair leaves less than one empty."""
    return (pairs + min(pairs, experts) * (rows - 1)) // rows


def _refuse(arch: Arch, tensors: dict[str, torch.Tensor | None], scheme: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on these."""
    x = tensors["x"]
    assert x is not None
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            return f"{name} is on {t.device}, x on {x.device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x is {dtype}"
    if scheme.partition(",")[0] not in ("", "int8_group128") and not arch.has_fp8_e4m3fn:
        return f"{arch.name} has no float8_e4m3fn"
    for name in ("up", "down"):
        t = tensors[name]
        assert t is not None
        if not all(isinstance(size, int) for size in t.shape):
            return f"the size of {name} is symbolic"
        unit = 16 // t.element_size()
        if t.shape[2] % unit:
            return f"{name} has {t.shape[2]} columns, not a multiple of {unit}"
        if _transposed(t) and not t.is_contiguous():
            if scheme:
                return f"{name} is transposed, and the matrix units take codes by the row"
            if t.shape[1] % unit:
                return f"{name} is transposed and has {t.shape[1]} rows, not a multiple of {unit}"
    for name, t in tensors.items():
        transposed = name in ("up", "down") and t is not None and _transposed(t)
        if t is not None and name not in ("x", "x_scales") and not t.is_contiguous() and not transposed:
            return f"{name} has strides {tuple(t.stride())}"
    if not known(x.stride(1) == 1):
        return f"x has strides {tuple(x.stride())}"
    return None


def _transposed(weight: torch.Tensor) -> bool:
    """Whether weights are the transposes of contiguous ones."""
    return weight.transpose(1, 2).is_contiguous()


def plan(
    arch: Arch,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str = "silu",
    x_scheme: str = "",
    up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    up_global_scale: torch.Tensor | None = None,
    down_global_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    hidden_scale: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    x_scales: torch.Tensor | None = None,
    out_dtype: str = "",
) -> Launch | Late | str:
    """The launches that run `experts`, or why there are none."""
    scales = {"up_scale": up_scale, "down_scale": down_scale, "up_global": up_global_scale}
    scales |= {"down_global": down_global_scale, "x_scale": x_scale, "hidden_scale": hidden_scale}
    scales |= {"up_bias": up_bias, "down_bias": down_bias, "x_scales": x_scales}
    dtype = OUTPUTS[out_dtype] if out_dtype else x.dtype
    tensors = {"x": x, "up": up, "down": down, "ids": ids, "weights": weights, **scales}
    if reason := _refuse(arch, tensors, x_scheme, dtype):
        return reason
    tokens, top = static(x.shape[0]), ids.shape[1]
    if tokens is None:
        return Late("few tokens are cut in other ways than many")
    count, width, pairs = up.shape[0], down.shape[1], tokens * top
    inner = up.shape[1] // 2
    made = cuts_of(arch, tokens, top, (count, inner, width), x_scheme, up.element_size())
    if isinstance(made, str):
        return made
    rows = made.up.rows
    blocks = blocks_of(pairs, count, rows)
    order, owners = Empty((blocks * rows,), torch.int32), Empty((blocks,), torch.int32)
    align = Launch(
        align_kernel,
        (1,),
        {
            "ids": ids,
            "order": order,
            "experts": owners,
            "places": Empty((count,), torch.int32),
            "pairs": pairs,
            "blocks": blocks,
            "EXPERTS": count,
            "BINS": max(128, triton.next_power_of_2(count + 1)),
            "ROWS": rows,
            "BLOCK": 1024 if pairs > 256 else 256,
            "PDL": arch.has_pdl,
        },
        returns=(),
        num_warps=8,
        pdl=arch.has_pdl,
    )
    hidden = Empty((pairs, inner), dtype)
    y = Empty((pairs, width), dtype)
    shared = {"order": order, "experts": owners, "rows": pairs, "alpha": None, "limit": None}
    act_of = {"clamped_swiglu": "clamped"}.get(activation, activation)
    first = {"ACT": act_of, "INTERLEAVED": interleaved, "TOP": top}
    first |= {"alpha": alpha, "limit": limit} if act_of == "clamped" else {}
    second = {"ACT": None, "INTERLEAVED": False, "TOP": 1}
    launches = [align]
    for source, weight, bias, scale, relative, given, out, cut, more in (
        (x, up, up_bias, up_scale, up_global_scale, x_scale, hidden, made.up, first),
        (hidden, down, down_bias, down_scale, down_global_scale, hidden_scale, y, made.down, second),
    ):
        codes: Any = source
        own: Any = None
        if out_dtype and source is x:
            own = x_scales
        elif x_scheme:
            quantized = _quantize(arch, source, given, x_scheme)
            if isinstance(quantized, str):
                return quantized
            launches.append(quantized)
            codes, own = quantized.args["q"], quantized.args.get("scales")
        columns = inner if more is first else width
        operands = {"a": codes, "b": weight, "a_scale": own, "b_scale": scale, "a_global": given, "b_global": relative}
        operands["bias"] = bias
        if x_scheme.partition(",")[0] == "fp8_static":
            operands |= {"b_scale": None, "b_global": scale}
        launches.append(_product(arch, operands, out, columns, cut, x_scheme, {**shared, **more}))
    block = min(1024, triton.next_power_of_2(width))
    return Launch(
        combine_kernel,
        (tokens, triton.cdiv(width, block)),
        {
            "y": y,
            "ids": ids,
            "weights": weights,
            "out": Empty((tokens, width), dtype),
            "width": width,
            "EXPERTS": count,
            "TOP": top,
            "BLOCK": block,
            "PDL": arch.has_pdl,
        },
        returns=("out",),
        pdl=arch.has_pdl,
        # Else a rounding between a product and a sum is lost.
        fp_fusion=False,
        before=tuple(launches),
        note=made.reason,
    )


def _quantize(arch: Arch, x: torch.Tensor | Empty, scale: torch.Tensor | None, scheme: str) -> Launch | str:
    """The launch that quantises `x`, which may be a buffer that is not there yet."""
    if isinstance(x, torch.Tensor):
        made = plan_quantize(arch, x, scale, scheme)
    else:
        like = torch.empty(x.shape, dtype=x.dtype, device="meta")
        made = plan_quantize(arch, like, None if scale is None else scale.to("meta"), scheme)
    if isinstance(made, str):
        return made
    return dataclasses.replace(made, args={**made.args, "x": x, "scale": scale}, returns=())


def _product(
    arch: Arch,
    operands: dict[str, Any],
    out: Empty,
    columns: int,
    cut: Cut,
    scheme: str,
    shared: dict[str, Any],
) -> Launch:
    """The launch of one of the two products."""
    a, b, a_scale, b_scale = (operands[name] for name in ("a", "b", "a_scale", "b_scale"))
    group, wide, own, words = 0, None, False, False
    if scheme and (shared_by := group_of(Scheme.parse(scheme))) is not None:
        kind = Scheme.parse(scheme)
        group = shared_by // (2 if kind.packed else 1)
        wide = None if group == 128 else triton.language.float16 if kind.packed else triton.language.bfloat16
        own, words = native(arch, kind, cut), by_words(arch, kind, cut)
    depths, turned = b.shape[2], not b.is_contiguous()
    steps = (0, 1)
    if a_scale is not None and group:
        steps = (a_scale.shape[1], 1) if isinstance(a_scale, Empty) else a_scale.stride()
    # Triton 3.6 cannot stage two products of unpacked codes at once in tensor memory.
    stages = 1 if shared["ACT"] and wide is not None and arch.capability in (100, 103) else cut.stages
    blocks = shared["experts"].shape[0]
    return Launch(
        block_kernel,
        (blocks * triton.cdiv(columns, cut.columns), 1),
        {
            **operands,
            **shared,
            "out": out,
            "sums": None,
            "columns": columns,
            "depths": depths,
            "a_row": a.shape[1] if isinstance(a, Empty) else a.stride(0),
            "b_row": b.stride(2) if turned else b.stride(1),
            "b_expert": b.stride(0),
            "a_scale_row": steps[0],
            "a_scale_group": steps[1],
            "b_scale_row": 0 if b_scale is None else b_scale.stride(1),
            "b_scale_group": 1,
            "b_scale_expert": 0 if b_scale is None else b_scale.stride(0),
            "GROUP": group,
            "SHARED": 128 if scheme and weight_scheme(scheme).granularity == "block128" else 1,
            "TRANSPOSED": turned,
            "A_SWIZZLED": False,
            "B_SWIZZLED": False,
            "WIDE": wide,
            "NATIVE": own,
            "WORDS": words,
            "SUMMED": min(128, cut.depth),
            "EVEN": depths % cut.depth == 0,
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "DEPTH": cut.depth,
            "SPLITS": 1,
            "GROUPED": cut.grouped,
            "PDL": arch.has_pdl,
        },
        returns=(),
        num_warps=cut.warps,
        num_stages=stages,
        pdl=arch.has_pdl,
    )
