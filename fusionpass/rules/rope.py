"""Spellings of rotary position embedding and of cache writes, and what folds around them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ArgumentError
from ..graphs import value
from ..op import Op, Refusal
from ..ops.attention.decode import CODE_DTYPES
from ..ops.norm import rms_norm
from ..ops.quant import quantize
from ..ops.quant.scheme import Scheme
from ..ops.rope import DEINTERLEAVED, EACH, INTERLEAVED, LAST, norm_heads, norm_rope, rope, table
from ..ops.rope.pair import (
    cache_write,
    qk_norm_rope,
    qk_norm_rope_cache,
    qk_rope,
    qk_rope_cache,
)
from ..rule import Beside, Fold, Spelling


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    # No two sizes of two samples alike: those that depend on the input's are found so.
    x = torch.zeros(tokens // 2, tokens + 1, tokens, width, dtype=dtype)
    return {"x": x, "half": width // 2, **table(tokens, width, dtype, device, generator)}


def _sample_paired(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    made = _sample(tokens, width, dtype, device, generator)
    return {**made, **table(tokens, width // 2, dtype, device, generator)}


def _sample_rows(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    made = cache_write.sample(tokens, width, dtype, device, generator)
    return {**made, **{name: made[name][0].transpose(0, 1) for name in ("cache", "x")}}


def _of_codes(sample: Callable[..., dict[str, Any]], dtype: torch.dtype) -> Callable[..., dict[str, Any]]:
    def made(*args: Any) -> dict[str, Any]:
        given = sample(*args)
        return {**given, **{name: given[name].to(dtype) for name in ("cache", "x")}}

    return made


def _turned(x: torch.Tensor, half: int) -> torch.Tensor:
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _llama(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> Any:
    return x * cos + _turned(x, half) * sin


def _llama_last(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> Any:
    h = x.float()
    return (h * cos.float() + _turned(h, half) * sin.float()).to(x.dtype)


def _olmo2(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> Any:
    if cos.dtype != torch.float32 or x.dtype == torch.float32:
        raise ArgumentError("the angles are float32, x is not", "rope.olmo2")
    return (x * cos + _turned(x, half) * sin).to(x.dtype)


def _gpt_oss(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> Any:
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return rope.reference(x, cos, sin, INTERLEAVED)


def _interleaved_last(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return rope.reference(x, cos, sin, INTERLEAVED, rounding=LAST)


def _deepseek(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return rope.reference(x, cos, sin, DEINTERLEAVED)


def _halves(arguments: Mapping[str, Any]) -> Refusal:
    """The two parts that change places must be halves."""
    val = value(arguments["cos"])
    columns = val.shape[-1] if val is not None else None
    if columns != 2 * arguments["half"]:
        return f"parts of {arguments['half']} of {columns} columns change places, not halves"
    return None


def _pairs(arguments: Mapping[str, Any]) -> Refusal:
    val = value(arguments["cos"])
    columns = val.shape[-1] if val is not None else None
    if columns != arguments["half"]:
        return f"parts of {arguments['half']} columns are turned by {columns} angles"
    return None


def _written(cache: torch.Tensor, x: torch.Tensor, positions: torch.Tensor) -> Any:
    return cache_write.reference(cache, x, positions, 2)


def _written_rows(cache: torch.Tensor, x: torch.Tensor, positions: torch.Tensor) -> Any:
    return cache_write.reference(cache, x, positions, 0)


SPELLINGS = (
    Spelling("rope.llama", rope, _llama, {"rounding": EACH}, _halves, _sample),
    Spelling("rope.llama_last", rope, _llama_last, {"rounding": LAST}, _halves, _sample),
    Spelling("rope.olmo2", rope, _olmo2, {"rounding": LAST}, _halves, _sample),
    Spelling("rope.gpt_oss", rope, _gpt_oss, {"paired": True}, _pairs, _sample_paired),
    Spelling("rope.interleaved", rope, _interleaved, {"style": INTERLEAVED}, None, _sample),
    Spelling("rope.cohere", rope, _interleaved_last, {"style": INTERLEAVED, "rounding": LAST}, None, _sample),
    Spelling("rope.deepseek", rope, _deepseek, {"style": DEINTERLEAVED}, None, _sample),
    Spelling("cache.write", cache_write, _written, {"dim": 2}),
    Spelling("cache.write_slots", cache_write, _written_rows, {"dim": 0}, None, _sample_rows),
    *(
        Spelling(f"{name}_{str(dtype).removeprefix('torch.float8_')}", cache_write, written, {"dim": dim}, None, sample)
        for dtype in CODE_DTYPES
        for name, written, dim, sample in (
            ("cache.write", _written, 2, _of_codes(cache_write.sample, dtype)),
            ("cache.write_slots", _written_rows, 0, _of_codes(_sample_rows, dtype)),
        )
    ),
)


def _renamed(arguments: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): argument for name, argument in arguments.items()}


def _norm_first(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    if given.get("mod_scale") is not None:
        return "the norm is modulated"
    norm = _renamed(
        {k: given[k] for k in ("x", "weight", "eps", "weight_offset", "rounding")}, {"rounding": "norm_rounding"}
    )
    return {**asked, **norm, "norm_first": True}, {}


def _norm_whole(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    return {**asked, **_renamed(given, {"rounding": "norm_rounding"}), "norm_first": True}, {}


def _norm_last(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    if asked.get("mod_scale") is not None:
        return "the norm is modulated"
    norm = _renamed(
        {k: asked[k] for k in ("weight", "eps", "weight_offset", "rounding")}, {"rounding": "norm_rounding"}
    )
    return {**given, **norm, "norm_first": False}, {"norm": "rotated"}


def _both(q: dict[str, Any], k: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, str]] | str:
    """Queries and keys: what is not theirs alone must be the same."""
    own = {"x": "", "weight": "_weight", "eps": "_eps"}
    for name in q:
        if name not in own and q[name] != k[name]:
            return f"they differ in {name}"
    made = {name: argument for name, argument in q.items() if name not in own}
    for which, arguments in (("q", q), ("k", k)):
        made |= {f"{which}{own[name]}": argument for name, argument in arguments.items() if name in own}
    return made, {"rotated": "q_rotated"}, {"rotated": "k_rotated"}


def _coded(given: dict[str, Any], asked: dict[str, Any], own: str, its: str) -> dict[str, Any] | str:
    """What an op with codes of its own and of what is joined to it has as `own` scale (there: `its`) and scheme."""
    scale, scheme = asked[its], str(asked.get("code_scheme", asked.get("scheme")))
    if not Scheme.parse(scheme).static:
        return f"{scheme!r} computes its scale"
    if scale is None:
        return {}
    held = [given.get(name) for name in ("q_scale", "k_scale", "v_scale", "scale")]
    if any(one is not None for one in held) and given["code_scheme"] != scheme:
        return f"it has codes of {given['code_scheme']!r}, not of {scheme!r}"
    return {own: scale, "code_scheme": scheme}


def _cached(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    codes = _coded(given, asked, "k_scale", "scale")
    if isinstance(codes, str):
        return codes
    written = {"k_cache" if name == "cache" else name: asked[name] for name in ("cache", "positions", "dim")}
    return {**given, **written, **codes}, {"cache": "k_cache"}


def _values(keys: dict[str, Any], v: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, str]] | str:
    if keys["v"] is not None:
        return "it has its values"
    if keys["dim"] != v["dim"]:
        return "they are written along other dimensions"
    codes = _coded(keys, v, "v_scale", "scale")
    if isinstance(codes, str):
        return codes
    return {**keys, "v": v["x"], "v_cache": v["cache"], **codes}, {}, {"cache": "v_cache"}


def _stored(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    """A quantisation, and the write of its codes."""
    codes = "it quantises already" if asked["scale"] is not None else _coded(asked, given, "scale", "scale")
    return codes if isinstance(codes, str) else ({**asked, "x": given["x"], **codes}, {})


def _queries(given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
    codes = "they are codes already" if given["q_scale"] is not None else _coded(given, asked, "q_scale", "scale")
    return codes if isinstance(codes, str) else ({**given, **codes}, {"q": "q_rotated"})


def _around(base: Op, pair: Op, cached: Op) -> tuple[Fold | Beside, ...]:
    return (
        Beside(f"{pair.name}.pair", base, base, pair, ("cos", "sin"), _both, later=cache_write),
        Fold(f"{cached.name}.keys", pair, cache_write, cached, "k_rotated", ("x",), _cached),
        Beside(f"{cached.name}.values", cached, cache_write, cached, ("positions",), _values),
        *(Fold(f"{op.name}.queries", op, quantize, op, "q_rotated", ("x",), _queries) for op in (pair, cached)),
    )


FOLDS = (
    Fold("cache_write.codes", quantize, cache_write, cache_write, "q", ("x",), _stored),
    Fold("norm_rope.before", rms_norm, rope, norm_rope, "norm", (), _norm_first),
    Fold("norm_rope.whole", norm_heads, rope, norm_rope, "norm", (), _norm_whole),
    Fold("norm_rope.after", rope, rms_norm, norm_rope, "unnormed", (), _norm_last),
    *_around(norm_rope, qk_norm_rope, qk_norm_rope_cache),
    *_around(rope, qk_rope, qk_rope_cache),
)
