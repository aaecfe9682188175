"""The kernels in front of attention and of decoding attention, as what can be tuned."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton

from ..arch import Arch
from ..op import OPS
from ..ops import attention
from ..ops.attention import decode_triton
from ..ops.rope import heads, table
from ..ops.rope import triton as rope
from ..testing import exact
from . import models
from .tunable import Footprint, Key, Tunable

POSITIONS = (1024, 4096, 32768)
"""Of caches, for which a model's attention is tuned: a table stands for those with the same power of two above."""
ROTATIONS = ("qk_norm", "qk_rope", "qk_norm_rope", "qk_rope_cache", "qk_norm_rope_cache")
"""Kernels of queries and keys by the head; one op each, whose name is that of its tables."""


def _queries(key: Key, m: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    """One token of each of `m` texts over a static cache that is full, with the mask that transformers passes."""
    width, kv_heads, positions = key["head_dim"], key["kv_heads"], key["positions"]

    def drawn(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(m, count, tokens, width, device=device, generator=generator).to(dtype)

    seen = torch.ones(1, 1, 1, positions, dtype=torch.bool, device=device).expand(m, 1, 1, positions)
    made = {name: drawn(kv_heads, positions) for name in ("k", "v")}
    return {"q": drawn(kv_heads * key["rows"], 1), **made, "mask": seen, "enable_gqa": True}


def _attention_space(arch: Arch, key: Key) -> Iterator[decode_triton.Cut]:
    for parts in itertools.product((16, 32, 64, 128), (1, 2, 4, 8, 16, 24, 33, 66, 128), (2, 4, 8)):
        yield decode_triton.Cut(*parts)


def _attention_footprint(arch: Arch, key: Key, m: int, cut: decode_triton.Cut) -> Footprint | str:
    blocks = -(-key["positions"] // cut.block)
    programs = m * key["kv_heads"] * cut.splits
    if cut.splits > blocks:
        return f"splits: there are {blocks} blocks of positions"
    if cut.splits > 1 and programs > 16 * arch.multiprocessors:
        return "splits: there are 16 programs for each multiprocessor without so many"
    if 4 * programs < arch.multiprocessors and 2 * cut.splits <= blocks:
        return "splits: less than a quarter of the multiprocessors would have a program"
    width = triton.next_power_of_2(key["head_dim"])
    threads = cut.warps * arch.warp_size
    # Keys and values of a block in 16 bits, and the sums of its rows.
    held = cut.block * width // threads + max(16, triton.next_power_of_2(key["rows"])) * width // threads
    if held < 8:
        return "warps: less than 8 numbers for each thread"
    return Footprint(2 * cut.block * width * 2, held + 60, cut.warps)


def _attention_work(key: Key, m: int) -> tuple[float, float]:
    each = float(m) * key["kv_heads"] * key["positions"] * key["head_dim"]
    return 4 * each, 4 * each * key["rows"]


def _attentions(model: models.Model | models.Sizes, scheme: str) -> Iterator[tuple[str, Key]]:
    if isinstance(model, models.Sizes) or model.latent is not None or not model.kv_heads:
        return
    width, rows = model.head_dim, model.heads // model.kv_heads
    for positions in POSITIONS if 0 < rows <= decode_triton.ROWS else ():
        yield f"attention over {positions}", decode_triton.table_key(model.kv_heads, rows, width, positions)


def _exact_attention(bound: Mapping[str, Any]) -> torch.Tensor:
    return exact(attention, bound)[0]


def _rotation(name: str) -> Tunable:
    """A kernel of queries and keys by the head."""
    op = next(op for op in OPS.values() if op.name == name)

    def arguments(key: Key, m: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
        width, counts = key["head_dim"], {"q": key["heads"], "k": key["kv_heads"]}
        made: dict[str, Any] = {n: heads(c, m, width, dtype, device, generator) for n, c in counts.items()}
        if "rope" in name:
            made |= table(m, width, dtype, device, generator)
        if "norm" in name:
            for which in ("q_weight", "k_weight"):
                made[which] = torch.rand(width, generator=generator, device=device).add(0.5).to(dtype)
        if "cache" in name:
            made["v"] = heads(counts["k"], m, width, dtype, device, generator)
            for which in ("k_cache", "v_cache"):
                made[which] = torch.zeros(1, counts["k"], m + 8, width, device=device, dtype=dtype)
            made["positions"] = torch.arange(3, m + 3, device=device)
        return made

    def space(arch: Arch, key: Key) -> Iterator[rope.Cut]:
        for parts in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
            yield rope.Cut(*parts)

    def footprint(arch: Arch, key: Key, m: int, cut: rope.Cut) -> Footprint | str:
        count = max(key["heads"], key["kv_heads"])
        if cut.heads > triton.next_power_of_2(count):
            return f"heads: there are {count}"
        if cut.tokens > triton.next_power_of_2(m):
            return f"tokens: there are {m}"
        held = cut.heads * cut.tokens * triton.next_power_of_2(key["head_dim"]) // (cut.warps * arch.warp_size)
        if not 4 <= held <= 64:
            return f"elements: {held} for each thread"
        return Footprint(0, 40 + 2 * held, cut.warps)

    def work(key: Key, m: int) -> tuple[float, float]:
        moved = 4.0 * m * (key["heads"] + (2 if "cache" in name else 1) * key["kv_heads"]) * key["head_dim"]
        return moved, 4 * moved

    def keys(model: models.Model | models.Sizes, scheme: str) -> Iterator[tuple[str, Key]]:
        if isinstance(model, models.Model) and model.latent is None and ("norm" in name) == model.qk_norm:
            yield name, rope.table_key(model.heads, model.kv_heads, model.head_dim)

    return Tunable(name, op, arguments, space, footprint, work, keys, sparse=True, warm=64)


HEADS = {
    "attention": Tunable(
        "attention", attention, _queries, _attention_space, _attention_footprint, _attention_work, _attentions,
        sparse=True, exact=_exact_attention, error=2**-7,
    ),
    **{name: _rotation(name) for name in ROTATIONS},
}  # fmt: skip
"""By the name of their tables."""
