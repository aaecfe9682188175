"""Plans of the heads' kernel: which strides it can follow, and how it is cut."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...arch import Arch
from ...launch import Empty, Launch
from ...tuning.names import no_power_of_two
from ...tuning.store import choose
from ..norm import BEFORE
from ..quant.epilogue import refuse_scheme
from ..quant.scheme import Scheme
from ..rows import FLOATS, known, static
from . import DEINTERLEAVED, EACH, EACH_HEAD, HALF, INTERLEAVED, LAST
from .kernel import heads_kernel

WIDEST = 512
"""Columns of a head that one program holds in registers."""
WIDEST_TOKEN = 16384
"""Columns of all heads of a token, each head's a power of two, where they are normalised together."""
FEW = 1024
"""Rows of heads up to which a program takes few, so that more programs share the work."""


@dataclass(frozen=True)
class _Rows:
    """A tensor seen as groups × heads × tokens, whatever the order of its dimensions: sizes and strides."""

    groups: Any
    heads: Any
    tokens: Any
    group: Any
    head: Any
    token: Any


@dataclass(frozen=True)
class Cut:
    """How the kernel is cut: heads and tokens per program, and warps."""

    heads: int
    tokens: int
    warps: int


def configure(arch: Arch, heads: int, rows: int | None, width: int) -> Cut:
    """The cut on `arch` for `rows` rows of heads (None: any number) of `width` columns, `heads` a token at least.

    A program takes 1024 elements, in halves of heads of which a thread takes 16 bytes: of several heads where rows are
    few, else of one head of several tokens (found by trying, see docs/kernels.md).
    """
    block = triton.next_power_of_2(width)
    together = max(1, 1024 // block)
    few = rows is not None and rows <= FEW
    shared = min(together, triton.next_power_of_2(heads)) if few else 1
    tokens = max(1, together // shared)
    return Cut(shared, tokens, max(1, min(8, shared * tokens * block // 16 // arch.warp_size)))


def all_heads(arch: Arch, heads: int, width: int) -> Cut:
    """The cut on `arch` where all heads of a token are normalised together: a program takes them all, of one token."""
    together = triton.next_power_of_2(heads)
    return Cut(together, 1, max(1, min(16, together * triton.next_power_of_2(width) // 16 // arch.warp_size)))


def table_key(heads: int, key_heads: int, width: int) -> dict[str, object]:
    """What tables are for: heads of the queries and of the keys, if there are, and the columns of each."""
    return {"heads": heads, "kv_heads": key_heads or None, "head_dim": width}


def refuse_cut(cut: Cut) -> str | None:
    """Why the kernel cannot be cut so."""
    return no_power_of_two(cut, "heads", "tokens", "warps")


def plan_one(arch: Arch, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **arguments: Any) -> Launch | str:
    """The launch that runs `rope` or `norm_rope`, or why there is none."""
    names = {"weight": "q_weight", "eps": "q_eps"}
    given = {names.get(name, name): value for name, value in arguments.items()}
    return _plan(arch, q=x, k=None, cos=cos, sin=sin, normed="norm_first" in given, **given)


def plan_qk_rope(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `qk_rope`, with the cache or without, or why there is none."""
    return _plan(arch, normed=False, **{"k_out": True, **arguments})


def plan_qk_norm_rope(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `qk_norm_rope`, with the cache or without, or why there is none."""
    return _plan(arch, normed=True, **{"k_out": True, **arguments})


def plan_qk_norm(arch: Arch, **arguments: Any) -> Launch | str:
    """The launch that runs `qk_norm`, or why there is none."""
    return _plan(arch, normed=True, **arguments)


_Axes = tuple[int | None, int, int]


def _axes(q: torch.Tensor, cos: torch.Tensor | None, dim: int | None, heads_dim: int = EACH_HEAD) -> _Axes | str:
    """Which dimensions of `q` are groups (None: there are none), heads and tokens: a token's heads share a row of cos.

    Args:
        q: three or four dimensions.
        cos: None: nothing is rotated.
        dim: the tokens' dimension, where it is known.
        heads_dim: that of the heads, where it is known.
    """
    if q.dim() not in (3, 4):
        return f"x has {q.dim()} dimensions; the kernel takes heads and tokens, and a batch"
    ahead = (1,) * q.dim() if cos is None else (1,) * (q.dim() - cos.dim()) + tuple(cos.shape[:-1])
    both = {q.dim() - 3, q.dim() - 2}
    for heads in (q.dim() - 3, q.dim() - 2):
        (tokens,) = both - {heads}
        if known(ahead[heads] == 1) and dim in (None, tokens) and heads_dim in (EACH_HEAD, heads):
            return (0 if q.dim() == 4 else None), heads, tokens
    return f"cos is {tuple(ahead)} for heads of {tuple(q.shape)}: each head has its own angles"


def _rows(t: torch.Tensor, axes: _Axes, name: str) -> _Rows | str:
    if not known(t.stride(-1) == 1) and not known(t.shape[-1] == 1):
        return f"{name} has stride {t.stride(-1)} in its last dimension, not 1"
    group, head, token = axes
    groups, step = (1, 0) if group is None else (t.shape[group], t.stride(group))
    return _Rows(groups, t.shape[head], t.shape[token], step, t.stride(head), t.stride(token))


def _table(t: torch.Tensor, q: torch.Tensor, axes: _Axes, name: str) -> tuple[Any, Any] | str:
    """The strides of cos or sin over groups and tokens."""
    group, _, token = axes
    if not known(t.stride(-1) == 1) and not known(t.shape[-1] == 1):
        return f"{name} has stride {t.stride(-1)} in its last dimension, not 1"
    missing = q.dim() - t.dim()

    def step(axis: int | None) -> Any:
        if axis is None or axis < missing or known(t.shape[axis - missing] == 1):
            return 0
        return t.stride(axis - missing)

    for axis in (group, token):
        size = 1 if axis is None or axis < missing else t.shape[axis - missing]
        if axis is not None and not known(size == 1) and not known(size == q.shape[axis]):
            return f"{name} is {tuple(t.shape)} for x of {tuple(q.shape)}"
    return step(group), step(token)


def _strides(name: str, rows: Any) -> dict[str, Any]:
    return {
        f"{name}_group": 0 if rows is None else rows.group,
        f"{name}_head": 0 if rows is None else rows.head,
        f"{name}_token": 0 if rows is None else rows.token,
    }


def _refuse_dtypes(
    q: torch.Tensor,
    likes: Mapping[str, torch.Tensor | None],
    tables: Mapping[str, torch.Tensor | None],
    weights: Mapping[str, torch.Tensor | None],
    rounding: str,
    norm_rounding: str,
) -> str | None:
    if q.dtype not in FLOATS:
        return f"x is {q.dtype}"
    for name, other in likes.items():
        if other is not None and (other.dtype != q.dtype or other.device != q.device):
            return f"{name} is {other.dtype} on {other.device}, x is {q.dtype} on {q.device}"
    dtypes = {t.dtype for t in tables.values() if t is not None}
    if len(dtypes) > 1 or any(t is not None and t.device != q.device for t in tables.values()):
        return f"cos and sin are {sorted(map(str, dtypes))}, and on {q.device} or not"
    for dtype in dtypes if rounding == EACH else ():
        if torch.promote_types(q.dtype, dtype) not in (q.dtype, dtype):
            return f"x is {q.dtype} and cos {dtype}: steps are rounded to neither"
    for name, weight in weights.items():
        if weight is None:
            continue
        if weight.dtype not in FLOATS or weight.device != q.device or not known(weight.stride(0) == 1):
            return f"{name} is {weight.dtype} on {weight.device} with strides {tuple(weight.stride())}"
        if norm_rounding == BEFORE and weight.dtype != q.dtype:
            return f"{name} is {weight.dtype}, x is {q.dtype}: the normalised heads would have another dtype than x"
    return None


def _out(
    rows: _Rows, shape: Any, dtype: torch.dtype, axes: _Axes, in_order: bool, by_token: bool
) -> tuple[Empty, _Rows]:
    """The rotated heads, laid out as the reference has them: as they came, `in_order` of dimensions, or `by_token`."""
    order = [axis for axis in axes if axis is not None]
    inner_heads = by_token or (known(rows.head <= rows.token) and not known(rows.tokens == 1))
    if in_order:
        order.sort()
    elif inner_heads:
        order = [*order[:-2], order[-1], order[-2]]
    strides: dict[int, Any] = {len(shape) - 1: 1}
    step = shape[-1]
    for axis in reversed(order):
        strides[axis] = step
        step = step * shape[axis]
    group, head, token = axes
    made = tuple(strides[axis] for axis in range(len(shape)))
    steps = (0 if group is None else made[group], made[head], made[token])
    return Empty(tuple(shape), dtype, made), _Rows(rows.groups, rows.heads, rows.tokens, *steps)


def _plan(
    arch: Arch,
    q: torch.Tensor,
    k: torch.Tensor | None,
    normed: bool,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    q_eps: float = 1e-6,
    k_eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_rounding: str = BEFORE,
    norm_first: bool = True,
    heads_dim: int = EACH_HEAD,
    style: str = HALF,
    paired: bool = False,
    rounding: str = EACH,
    v: torch.Tensor | None = None,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dim: int = 2,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    code_scheme: str = "fp8_static",
    k_out: bool = True,
) -> Launch | str:
    caches = {"k_cache": (k_cache, k_scale), "v_cache": (v_cache, v_scale)}
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    kind = Scheme.parse(code_scheme)
    for scale in scales.values():
        if scale is not None and (reason := refuse_scheme(arch, scale, code_scheme, q.device)):
            return reason
    for name, (cache, scale) in caches.items():
        if cache is not None and scale is not None and (cache.dtype, cache.device) != (kind.code_dtype, q.device):
            return f"{name} is {cache.dtype}, not {kind.code_dtype}, or on {cache.device}, not {q.device}"
    likes = {"k": k, "v": v, **{name: cache for name, (cache, scale) in caches.items() if scale is None}}
    given = {"cos": cos, "sin": sin}
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    if reason := _refuse_dtypes(q, likes, given, weights, rounding, norm_rounding):
        return reason
    width: Any = q.shape[-1]
    turned = width if cos is None else cos.shape[-1] * (2 if paired else 1)
    if not isinstance(width, int) or not isinstance(turned, int) or not 0 < width <= WIDEST or turned % 2:
        return f"heads of {width} columns, {turned} of them rotated (at most {WIDEST}, an even number)"
    if turned == 2 and cos is not None:
        return "two rotated columns: PyTorch may lay out what it joins of single columns with the heads innermost"
    wide = cos is not None and rounding == EACH and torch.promote_types(q.dtype, cos.dtype) != q.dtype
    if wide and normed and not norm_first:
        return f"x is {q.dtype} and the norm reads it rotated, which is wider"
    if wide and k_cache is not None and k_scale is None:
        return f"the cache is {k_cache.dtype}, and the rotated keys are wider"
    axes = _axes(q, cos, None if positions is None else dim, heads_dim)
    if isinstance(axes, str):
        return axes
    tables = {name: _table(t, q, axes, name) if t is not None else (0, 0) for name, t in given.items()}
    read = {"q": q, **likes, "k_cache": k_cache, "v_cache": v_cache}
    rows = {name: _rows(t, axes, name) for name, t in read.items() if t is not None}
    for found in (*tables.values(), *rows.values()):
        if isinstance(found, str):
            return found
    shape: Any = rows["q"]
    keys: Any = rows.get("k")
    heads, key_heads = static(shape.heads), static(keys.heads) if keys is not None else 0
    if heads is None or key_heads is None:
        return "the number of heads is symbolic"
    whole = heads_dim != EACH_HEAD
    in_order = (paired or turned < width or style == DEINTERLEAVED) and (norm_first or not whole)
    dtype = cos.dtype if wide and cos is not None else q.dtype
    q_dtype = dtype if q_scale is None else kind.code_dtype
    q_out, q_out_rows = _out(shape, q.shape, q_dtype, axes, in_order, whole)
    made, made_rows = _out(keys, k.shape, dtype, axes, in_order, whole) if k is not None and k_out else (None, None)
    tokens = shape.groups * shape.tokens
    count = static(tokens)
    rule = configure(
        arch, min(heads, key_heads or heads), None if count is None else count * (heads + key_heads), width
    )
    if whole:
        rule = all_heads(arch, max(heads, key_heads), width)
        if rule.heads * triton.next_power_of_2(width) > WIDEST_TOKEN:
            return f"{rule.heads} heads of {width} columns do not fit in registers (at most {WIDEST_TOKEN} columns)"
    parts = {"qk": k is not None, "norm": normed, "rope": cos is not None, "cache": k_cache is not None}
    name = "_".join(part for part, there in parts.items() if there)
    key = table_key(heads, key_heads, width)
    cut: Any = rule if whole else choose(rule, name, key, arch, count, reach=2, refuse=refuse_cut)
    if isinstance(cut, str):
        return cut
    key_blocks = -(-key_heads // cut.heads)
    blocks = -(-heads // cut.heads) + key_blocks * (2 if v is not None else 1)
    outputs = {"q_out": q_out, "k_cache": k_cache, "v_cache": v_cache, "k_out": made}
    half = turned // 2
    return Launch(
        heads_kernel,
        ((tokens + cut.tokens - 1) // cut.tokens, blocks),
        {
            "q": q,
            "k": k,
            "v": v,
            **given,
            **weights,
            **scales,
            "positions": positions,
            **outputs,
            "tokens": tokens,
            "per_group": shape.tokens,
            "q_heads": heads,
            "k_heads": key_heads,
            **_strides("q", shape),
            **_strides("k", keys),
            **_strides("v", rows.get("v")),
            "cos_group": tables["cos"][0],
            "cos_token": tables["cos"][1],
            "sin_group": tables["sin"][0],
            "sin_token": tables["sin"][1],
            **_strides("q_out", q_out_rows),
            **_strides("k_out", made_rows),
            **_strides("k_cache", rows.get("k_cache")),
            **_strides("v_cache", rows.get("v_cache")),
            "positions_step": 0 if positions is None else positions.stride(0),
            "slots": 0 if k_cache is None else k_cache.shape[dim],
            "q_eps": q_eps,
            "k_eps": k_eps,
            "offset": weight_offset or None,
            "DIM": width,
            "HALF": half,
            "BLOCK": triton.next_power_of_2(half),
            "REST": width - turned,
            "READ_PAIRS": style != HALF,
            "WRITE_PAIRS": style == INTERLEAVED,
            "PAIRED": paired,
            "NORM": ("before" if norm_first else "after") if normed else "",
            "AFTER": norm_rounding != BEFORE,
            "LAST": rounding == LAST,
            "LIMIT": kind.max,
            "DIVIDE": kind.rounding == "divide",
            "WIDE": wide,
            "WHOLE": whole,
            "HEADS": cut.heads,
            "TOKENS": cut.tokens,
            "PDL": arch.has_pdl,
        },
        returns=tuple(name for name, output in outputs.items() if output is not None),
        num_warps=cut.warps,
        pdl=arch.has_pdl,
        fp_fusion=False,
        mutates=tuple(name for name, (cache, _) in caches.items() if cache is not None),
    )
