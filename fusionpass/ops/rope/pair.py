"""Queries and keys together, and the write of keys and values to a cache behind them."""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ArgumentError
from ...op import EXACT, Op, op
from ..derive import derived, parameter
from ..norm import BEFORE, NORM, rms_norm
from ..quant import quantize
from ..quant.scheme import Scheme
from ..rows import triton_backend
from . import _STYLE, _TENSOR, _TURN, EACH_HEAD, NORMED, ROTATED, head_dim, heads, norm_rope, rope, table

_OPTIONAL = torch.Tensor | None
STATIC = "fp8_static"
_QK = [parameter("q", _TENSOR), parameter("k", _TENSOR)]
_WEIGHTS = [
    parameter("q_weight", _OPTIONAL, None),
    parameter("k_weight", _OPTIONAL, None),
    parameter("q_eps", float, 1e-6),
    parameter("k_eps", float, 1e-6),
    parameter("weight_offset", float, 0.0),
    parameter("norm_rounding", str, BEFORE),
]
_FIRST = [parameter("norm_first", bool, True), parameter("heads_dim", int, EACH_HEAD)]
_CODES = [parameter("q_scale", _OPTIONAL, None), parameter("code_scheme", str, STATIC)]
_OF_QK = """
        q: [batch, heads, tokens, head_dim], or any other order that `rope` takes.
        k: as `q`, with heads of its own number."""
_OF_NORM = """
        q_weight, k_weight: [head_dim], or None: the weight of the norm of each head.
        q_eps, k_eps: added to the mean squares.
        weight_offset, norm_rounding: as `rms_norm`."""
_OF_CODES = """
        q_scale: one float, or None: queries are returned as codes of this scale.
        code_scheme: the static scheme of the codes, as `quantize` has it, where there are any."""


def _key_heads(width: int) -> int:
    return max(1, width // head_dim(width) // 4)


def _sample_pair(base: Op) -> Any:
    def sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
        dim = head_dim(width)
        made: dict[str, Any] = {
            "q": heads(width // dim, tokens, dim, dtype, device, generator),
            "k": heads(_key_heads(width), tokens, dim, dtype, device, generator),
        }
        if base is not rms_norm:
            made |= table(tokens, dim, dtype, device, generator)
        if base is not rope:
            for name in ("q_weight", "k_weight"):
                made[name] = torch.rand(dim, generator=generator, device=device).add(0.5).to(dtype)
        return made

    return sample


def _each(base: Op, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """`base` of the queries and of the keys."""
    common = {
        {"norm_rounding": "rounding"}.get(name, name) if base is rms_norm else name: value
        for name, value in arguments.items()
        if name in _COMMON[base]
    }
    results = []
    for which in ("q", "k"):
        own = {} if base is rope else {"weight": arguments[f"{which}_weight"], "eps": arguments[f"{which}_eps"]}
        results.append(base.reference(arguments[which], **own, **common))
    return results


def _queries_coded(results: list[torch.Tensor], arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """The results, the first of which is quantised where there is a scale for it."""
    scale, scheme = arguments["q_scale"], arguments["code_scheme"]
    return results if scale is None else [coded(results[0], scale, scheme), *results[1:]]


def coded(x: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    """Codes of `x` with a scale that is given.

    Raises:
        ArgumentError: the scheme computes its scale.
    """
    if not Scheme.parse(scheme).static:
        raise ArgumentError(f"{scheme!r} computes its scale", "code_scheme", f"Pass {STATIC!r}, or an override of it")
    return quantize.reference(x, scale, scheme)[0]  # type: ignore[no-any-return]


_COMMON = {
    rope: ("cos", "sin", "style", "paired", "rounding"),
    norm_rope: (
        "cos",
        "sin",
        "style",
        "paired",
        "rounding",
        "weight_offset",
        "norm_rounding",
        "norm_first",
        "heads_dim",
    ),
    rms_norm: ("weight_offset", "norm_rounding"),
}


def _pair(name: str, base: Op, parameters: list[Any], doc: str) -> Op:
    made = derived(
        name,
        [*parameters, *_CODES],
        lambda arguments: _queries_coded(_each(base, arguments), arguments),
        doc,
        list[torch.Tensor],
        outputs=("q_rotated", "k_rotated"),
        sample=_sample_pair(base),
        tolerance=dict.fromkeys(("q_rotated", "k_rotated"), {rope: ROTATED, norm_rope: NORMED, rms_norm: NORM}[base]),
    )
    made.backends.append(triton_backend(f"{__package__}.triton", f"plan_{name}"))
    return made


qk_rope = _pair(
    "qk_rope",
    rope,
    [*_QK, *_TURN, *_STYLE],
    f"""`rope` of queries and of keys.

    Args:{_OF_QK}
        cos, sin, style, paired, rounding: as `rope`.{_OF_CODES}

    Returns:
        [q, k], rotated.

    Raises:
        ArgumentError: as `rope`.
    """,
)
qk_norm = _pair(
    "qk_norm",
    rms_norm,
    [*_QK, *_WEIGHTS],
    f"""`rms_norm` of each head of queries and of keys.

    Args:{_OF_QK}{_OF_NORM}{_OF_CODES}

    Returns:
        [q, k], normalised.

    Raises:
        ArgumentError: as `rms_norm`.

    Source: Henry et al., "Query-Key Normalization for Transformers", 2020.
    """,
)
qk_norm_rope = _pair(
    "qk_norm_rope",
    norm_rope,
    [*_QK, *_TURN, *_WEIGHTS, *_FIRST, *_STYLE],
    f"""`rope(rms_norm(...))` of queries and of keys, each head by itself.

    Args:{_OF_QK}
        cos, sin, style, paired, rounding: as `rope`.{_OF_NORM}
        norm_first: False: the norm comes behind the rotation.
        heads_dim: as `norm_rope`; not -1: the weights are [heads * head_dim].{_OF_CODES}

    Returns:
        [q, k], normalised and rotated.

    Raises:
        ArgumentError: as `rope` and `rms_norm`.
    """,
)


def _sample_cache(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    count, dim = _key_heads(width), head_dim(width)
    return {
        "cache": torch.zeros(1, count, tokens + 8, dim, device=device).to(dtype),
        "x": heads(count, tokens, dim, dtype, device, generator),
        "positions": torch.arange(3, tokens + 3, device=device),
    }


@op(outputs=("cache",), sample=_sample_cache, tolerance={"cache": EXACT})
def cache_write(
    cache: torch.Tensor,
    x: torch.Tensor,
    positions: torch.Tensor,
    dim: int = 2,
    scale: torch.Tensor | None = None,
    code_scheme: str = STATIC,
) -> torch.Tensor:
    """A cache with new rows: `cache.index_copy(dim, positions, x)`.

    Args:
        cache: [..., slots, ..., head_dim], with the slots in dimension `dim`.
        x: the shape and dtype of `cache`, but for as many rows in `dim` as there are positions.
        positions: [rows], int64; no two the same.
        dim: where the slots are.
        scale: one float, or None: the cache holds codes of this scale, and `x`, floating point, becomes such.
        code_scheme: the static scheme of the codes, as `quantize` has it, where there are any.

    Returns:
        A tensor like `cache`. Compiled, where nobody reads the old values, it is `cache` itself.

    Raises:
        ArgumentError: the shapes or dtypes do not fit.
    """
    if scale is not None:
        x = coded(x, scale, code_scheme)
    slots = list(cache.shape)
    if x.dim() != cache.dim() or not 0 <= dim < x.dim() or x.dtype != cache.dtype:
        raise ArgumentError(f"x is {tuple(x.shape)} {x.dtype}", "cache_write", f"The cache is {slots} {cache.dtype}")
    if positions.dim() != 1 or any(x.shape[i] != slots[i] for i in range(x.dim()) if i != dim):
        raise ArgumentError(
            f"x is {tuple(x.shape)}, positions {tuple(positions.shape)}", "cache_write", f"The cache is {slots}"
        )
    return torch.ops.aten.index_put(cache, [*[None] * dim, positions], x)  # type: ignore[no-any-return]


def _cached(base: Op) -> Op:
    """`base`, then both writes; the values' may be missing."""
    own = list(base.signature.parameters.values())
    required = [p for p in own if p.default is p.empty]
    parameters = [
        *required,
        parameter("k_cache", _TENSOR),
        parameter("positions", _TENSOR),
        *(p for p in own if p not in required),
        parameter("v", _OPTIONAL, None),
        parameter("v_cache", _OPTIONAL, None),
        parameter("dim", int, 2),
        parameter("k_scale", _OPTIONAL, None),
        parameter("v_scale", _OPTIONAL, None),
        parameter("k_out", bool, False),
    ]

    def body(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        q, k = base.reference(**{p.name: arguments[p.name] for p in own})

        def written(name: str, x: torch.Tensor) -> torch.Tensor:
            given = (arguments[name] for name in (f"{name}_scale", "code_scheme"))
            cache: torch.Tensor = arguments[f"{name}_cache"]
            return cache_write.reference(cache, x, arguments["positions"], arguments["dim"], *given)  # type: ignore[no-any-return]

        results = [q, written("k", k)]
        if (arguments["v"] is None) != (arguments["v_cache"] is None):
            raise ArgumentError("only one of v and v_cache is there", f"{base.name}_cache", "Pass both or neither")
        if arguments["v"] is not None:
            results.append(written("v", arguments["v"]))
        return [*results, *([k] if arguments["k_out"] else [])]

    def outputs(arguments: Mapping[str, Any]) -> tuple[str, ...]:
        values = ("v_cache",) if arguments["v"] is not None else ()
        return ("q_rotated", "k_cache", *values, *(("k_rotated",) if arguments["k_out"] else ()))

    def sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
        keys, values = (_sample_cache(tokens, width, dtype, device, generator) for _ in range(2))
        return {
            **base.sample(tokens, width, dtype, device, generator),
            "k_cache": keys["cache"],
            "positions": keys["positions"],
            "v": values["x"],
            "v_cache": values["cache"],
        }

    made = derived(
        f"{base.name}_cache",
        parameters,
        body,
        f"""`{base.name}`, and the write of the keys and the values to a cache.

    Args:
        {", ".join(p.name for p in own)}: as `{base.name}`.
        k_cache, v_cache: as `cache` of `cache_write`.
        positions, dim: as `cache_write`.
        v: like `k`, or None.
        k_scale, v_scale: as `scale` of `cache_write`.
        k_out: whether the keys are returned too.

    Returns:
        [q, k_cache], then v_cache where there is a `v`, then k where asked for.

    Raises:
        ArgumentError: as `{base.name}` and `cache_write`; only one of `v` and `v_cache` is there.
    """,
        list[torch.Tensor],
        outputs=outputs,
        sample=sample,
        tolerance={**base.tolerance, "k_cache": base.tolerance["k_rotated"], "v_cache": EXACT},
        options={"k_rotated": "k_out"},
    )
    made.backends.append(triton_backend(f"{__package__}.triton", f"plan_{base.name}"))
    return made


qk_rope_cache = _cached(qk_rope)
qk_norm_rope_cache = _cached(qk_norm_rope)
