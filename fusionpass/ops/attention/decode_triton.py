"""Plans of the decode kernels: what they accept, and how the positions are split."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...arch import Arch
from ...launch import Empty, Launch
from ...tuning.names import no_power_of_two
from ...tuning.store import choose
from ..quant.epilogue import WIDEST as WIDEST_ROW
from ..quant.epilogue import code_outputs, refuse_codes, refuse_scheme, scheme_constants
from ..quant.scheme import Scheme
from ..rows import known, static
from .combine_kernel import combine_kernel
from .decode import WIDEST
from .decode_kernel import decode_kernel

ROWS = 32
"""Rows, tokens times query heads, that share a KV head: more are for kernels that are bound by their products."""
SCAN, SCANS = 2048, 4
"""Positions of a mask that are looked through at once, for the first and the last that is seen, and how often at most:
each program does it, and waits for it."""
ANY_POSITIONS, ANY_BATCH = 32, 8
"""Splits at most where the number of positions, or that of KV heads in the batch, is not known."""


@dataclass(frozen=True)
class Cut:
    """How the positions are cut.

    Args:
        block: positions a program takes at once.
        splits: programs that share a KV head.
        warps: per program.
    """

    block: int
    splits: int
    warps: int


def configure(arch: Arch, kv_heads: int | None, positions: int | None, width: int, itemsize: int = 2) -> Cut:
    """The cut for `kv_heads` KV heads in the whole batch and `positions` (None: any number) of `width` columns.

    A block's keys and values are loaded at once, 8 KiB of each: four such programs keep a multiprocessor's share of the
    memory busy. So there are as many splits as make four programs for each, and of those that leave the longest split
    as long the fewest, since each is another part to combine.
    """
    block = max(16, min(128, 8192 // itemsize // triton.next_power_of_2(width)))
    most = ANY_BATCH if kv_heads is None else max(1, 4 * arch.multiprocessors // max(1, kv_heads))
    if positions is None:
        return Cut(block, min(most, ANY_POSITIONS), 4)
    blocks = max(1, math.ceil(positions / block))
    longest = math.ceil(blocks / most)
    return Cut(block, math.ceil(blocks / longest), 4)


def table_key(kv_heads: int, rows: int, width: int, positions: int | None) -> dict[str, object]:
    """What tables are for: heads of one sequence, rows that share one, its columns, and positions of the cache."""
    return {"kv_heads": kv_heads, "rows": rows, "head_dim": width, "positions": positions}


def refuse_cut(cut: Cut) -> str | None:
    """Why the kernels cannot be cut so."""
    if cut.block < 16:
        return f"BLOCK: the matrix units take 16 positions, not {cut.block}"
    return no_power_of_two(cut, "block", "warps")


def _refuse(
    arch: Arch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, others: Mapping[str, torch.Tensor | None]
) -> str | None:
    """Why the kernels cannot read these."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}: the products are of 16-bit numbers"
    for name, t in {"k": k, "v": v}.items():
        if t.dtype != q.dtype and (reason := refuse_codes(arch, t.dtype)):
            return f"{name}: {reason}"
    for name, other in {"k": k, "v": v, **others}.items():
        if other is not None and other.device != q.device:
            return f"{name} is on {other.device}, q on {q.device}"
    for name, t in {"q": q, "k": k, "v": v}.items():
        width: Any = t.shape[3]
        if not isinstance(width, int) or not 0 < width <= WIDEST or width % 8:
            return f"{name} has heads of {width} columns, not a multiple of 8 up to {WIDEST}"
        if not known(t.stride(3) == 1):
            return f"{name} has stride {t.stride(3)} in its last dimension, not 1"
    heads, kv_heads, tokens = static(q.shape[1]), static(k.shape[1]), static(q.shape[2])
    if heads is None or kv_heads is None or tokens is None:
        return "the number of heads or of tokens is symbolic: then SDPA's own kernels, which are for many tokens"
    rows = heads // kv_heads * tokens
    if rows == 0:
        return "there is nothing to attend"
    if rows > ROWS:
        return f"{rows} rows a KV head (at most {ROWS}): SDPA's own kernels are for many tokens"
    return None


def _mask_strides(mask: torch.Tensor | None, shape: tuple[Any, ...]) -> tuple[Any, ...] | str:
    """The strides of `mask` over [batch, heads, tokens, positions], 0 where it is broadcast, or why there are none."""
    if mask is None:
        return 0, 0, 0, 0
    missing = 4 - mask.dim()
    strides: list[Any] = [0] * missing
    for size, step, whole in zip(mask.shape, mask.stride(), shape[missing:], strict=True):
        if known(size == 1):
            strides.append(0)
        elif known(size == whole):
            strides.append(step)
        else:
            return f"the mask is {tuple(mask.shape)} for {tuple(shape)}, and may be broadcast"
    return tuple(strides)


def plan_attention(arch: Arch, joined: bool = False, **arguments: Any) -> Launch | str:
    """The launches that run `attention` where few tokens ask, or why there are none."""
    return _plan(arch, **arguments, joined=joined)


def plan_attention_quantize(
    arch: Arch,
    softmax_scale: float | None,
    scale: torch.Tensor | None,
    scheme: str,
    attended_out: bool,
    scale_2: torch.Tensor | None,
    scale_3: torch.Tensor | None,
    scale_4: torch.Tensor | None,
    scale_5: torch.Tensor | None,
    **arguments: Any,
) -> Launch | str:
    """The launches that run `attention_quantize` where few tokens ask, or why there are none."""
    if any(more is not None for more in (scale_2, scale_3, scale_4, scale_5)):
        return "there are several scales: only linears that are calibrated apart would have them"
    codes = Codes(Scheme.parse(scheme), scale, attended_out)
    if reason := _refuse_codes(arch, codes, scheme, arguments["q"], arguments["v"]):
        return reason
    return _plan(arch, **arguments, scale=softmax_scale, joined=True, codes=codes)


@dataclass(frozen=True)
class Codes:
    """How the result is quantised.

    Args:
        kind: the scheme.
        scale: what it takes, or None.
        out: whether the result itself is returned, too.
    """

    kind: Scheme
    scale: torch.Tensor | None
    out: bool

    @property
    def whole(self) -> bool:
        """Whether all heads of a token have one scale, which is computed."""
        return not self.kind.static and self.kind.group is None


def _refuse_codes(arch: Arch, codes: Codes, scheme: str, q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels cannot quantise their result so."""
    kind = codes.kind
    if reason := refuse_scheme(arch, codes.scale, scheme, q.device):
        return reason
    if kind.layout != "linear":
        return f"scales that are {kind.layout} lie across tokens, of which a program has one"
    width: Any = v.shape[3]
    if kind.group is not None and (not isinstance(width, int) or width % kind.group):
        return f"groups of {kind.group} columns are no part of a head of {width}"
    heads = static(q.shape[1])
    if codes.whole and (heads is None or not isinstance(width, int) or heads * width > WIDEST_ROW):
        return f"{heads} heads of {width} columns have one scale (at most {WIDEST_ROW} columns)"
    return None


def _plan(
    arch: Arch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    joined: bool = False,
    codes: Codes | None = None,
) -> Launch | str:
    if reason := _refuse(arch, q, k, v, {"mask": mask, "k_scale": k_scale, "v_scale": v_scale}):
        return reason
    batch, heads, tokens, width = q.shape
    kv_heads, positions, v_width = k.shape[1], k.shape[2], v.shape[3]
    mask_strides = _mask_strides(mask, (batch, heads, tokens, positions))
    if isinstance(mask_strides, str):
        return mask_strides
    group = heads // kv_heads
    rows = max(16, triton.next_power_of_2(group * tokens))
    one_mask = (group == 1 or known(mask_strides[1] == 0)) and (tokens == 1 or known(mask_strides[2] == 0))
    itemsize = min(k.element_size(), v.element_size())
    rule = configure(arch, static(batch * kv_heads), static(positions), max(width, v_width), itemsize)
    key = table_key(kv_heads, group * tokens, max(width, v_width), static(positions))
    measured = static(batch) if static(positions) is not None else None
    name = "attention" if itemsize == 2 else "attention_fp8"
    cut = choose(rule, name, key, arch, measured, near="positions", reach=2, refuse=refuse_cut)
    if isinstance(cut, str):
        return cut
    split = cut.splits > 1
    whole = codes is not None and codes.whole
    if whole and not split:
        return "its positions are not split: a program has some of the heads that have one scale"
    shape = (batch, tokens, heads * v_width) if joined else (batch, heads, tokens, v_width)
    out = Empty(shape, q.dtype, None if joined else (tokens * heads * v_width, v_width, heads * v_width, 1))
    made = code_outputs(codes.kind if codes else None, (batch, tokens, heads * v_width))
    results = {
        "out": out if codes is None or codes.out or whole else None,
        "codes": made["q"],
        "code_scales": made["scales"],
    }
    wanted = {"codes": True, "code_scales": made["scales"] is not None, "out": codes.out} if codes else {"out": True}
    returned = tuple(name for name, there in wanted.items() if there)
    each = (batch, tokens, heads, cut.splits)
    parts = {
        "sums": Empty((*each, v_width), torch.float32) if split else None,
        "peaks": Empty(each, torch.float32) if split else None,
        "totals": Empty(each, torch.float32) if split else None,
        "arrived": Empty((batch, tokens), torch.int32) if whole else None,
    }
    constants = scheme_constants(codes.kind if codes else None, q.dtype)
    columns = {
        "result_rows": batch * tokens * heads,
        "V_DIM": v_width,
        "V_BLOCK": max(16, triton.next_power_of_2(v_width)),
        "GROUP_COLUMNS": constants.pop("GROUP"),
        **constants,
        "PDL": arch.has_pdl,
    }
    given = codes.scale if codes else None
    decode = Launch(
        decode_kernel,
        (batch * kv_heads, cut.splits),
        {
            "q": q,
            "k": k,
            "v": v,
            "mask": mask,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "code_scale": None if split else given,
            **(dict.fromkeys(results) if split else results),
            **parts,
            "kv_heads": kv_heads,
            "positions": positions,
            **_strides("q", q, "token"),
            **_strides("k", k, "position"),
            **_strides("v", v, "position"),
            **dict(zip(("mask_batch", "mask_head", "mask_token", "mask_position"), mask_strides, strict=True)),
            "scale": 1.0 / math.sqrt(width) if scale is None else float(scale),
            "TOKENS": tokens,
            "GROUP": group,
            "ROWS": rows,
            "MASK_ROWS": 1 if one_mask else rows,
            "ADDED": mask is not None and mask.dtype != torch.bool,
            "CAUSAL": causal,
            "DIM": width,
            "DIM_BLOCK": max(16, triton.next_power_of_2(width)),
            **columns,
            "BLOCK": cut.block,
            "SPLITS": cut.splits,
            "SCAN": SCAN,
            "SCANS": SCANS,
        },
        returns=() if split else returned,
        num_warps=cut.warps,
        pdl=arch.has_pdl,
    )
    if not split:
        return decode
    return Launch(
        combine_kernel,
        (batch * tokens * heads,),
        {
            "like": q,
            **parts,
            "code_scale": given,
            **results,
            "SPLITS": cut.splits,
            "SPLITS_BLOCK": triton.next_power_of_2(cut.splits),
            **columns,
            "HEADS": heads if whole else 0,
        },
        returns=returned,
        num_warps=cut.warps,
        pdl=arch.has_pdl,
        before=(decode,),
    )


def _strides(name: str, t: torch.Tensor, third: str) -> dict[str, Any]:
    """By parameter, but for the last one, which is 1."""
    steps = t.stride()
    return {f"{name}_batch": steps[0], f"{name}_head": steps[1], f"{name}_{third}": steps[2]}
