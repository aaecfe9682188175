"""Around attention: how models write it becomes one op with the same bits, and what is only close to it does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.arch import Arch
from fusionpass.config import Config
from fusionpass.op import OPS
from fusionpass.ops import norm_heads, quantize, rms_norm
from fusionpass.pipeline import early, late
from fusionpass.report.trace import GraphTrace

BATCH, TOKENS, DIM, SLOTS = 2, 3, 16, 7
Q = torch.randn(BATCH, TOKENS, 4 * DIM).bfloat16()
K, V = (torch.randn(BATCH, TOKENS, 2 * DIM).bfloat16() for _ in range(2))
ANGLES = torch.rand(1, TOKENS, DIM) * 6.3
COS, SIN = ANGLES.cos().bfloat16(), ANGLES.sin().bfloat16()
CACHES = [torch.randn(BATCH, 2, SLOTS, DIM).bfloat16() for _ in range(2)]
AT = torch.tensor([1, 5, 2])
WEIGHTS = [torch.rand(DIM).add(0.5).bfloat16() for _ in range(2)]


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, TOKENS, -1, DIM).transpose(1, 2)


def half(x: Tensor) -> Tensor:
    n = x.shape[-1] // 2
    return torch.cat((-x[..., n:], x[..., :n]), dim=-1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + half(x) * sin.unsqueeze(1)


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def write(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    return cache.index_copy(2, at, x)


def fused(model: Callable[..., Any], *args: Tensor) -> tuple[list[str], GraphTrace, Graph]:
    """The ops of a model, from its graph after `fuse`; that graph gives the model's bits."""
    with torch.no_grad():
        expected = model(*args)
        graph = make_fx(model, select_decomp_table(), "fake")(*args)
    trace = GraphTrace(0)
    config = Config()
    for _, function in (*early(config, trace), *[p for p in late(config, trace) if p[0] == "fuse"]):
        function(graph.graph)
    graph.graph.lint()
    got = GraphModule(graph, graph.graph)(*args)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.float(), theirs.float())
        assert ours.stride() == theirs.stride()
    return [OPS[node.target].name for node in graph.graph.nodes if node.target in OPS], trace, graph.graph


def qwen3(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
    split = (BATCH, TOKENS, -1, DIM)
    q, k = norm(q.view(split), caches[2]).transpose(1, 2), norm(k.view(split), caches[3], 1e-5).transpose(1, 2)
    q, k = llama(q, cos, sin), llama(k, cos, sin)
    return q, write(caches[0], k, at), write(caches[1], heads(v), at)


def norm_behind(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
    q, k = llama(heads(q), cos, sin), llama(heads(k), cos, sin)
    return norm(q, caches[2]), write(caches[0], norm(k, caches[3]), at), write(caches[1], heads(v), at)


def no_norm(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
    q, k = llama(heads(q), cos, sin), llama(heads(k), cos, sin)
    return q, write(caches[0], k, at), write(caches[1], heads(v), at)


def keys_first(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
    k = llama(heads(k), cos, sin)
    q = llama(heads(q), cos, sin)
    return write(caches[1], heads(v), at), write(caches[0], k, at), q


def keys_read(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
    q, k = llama(heads(q), cos, sin), llama(heads(k), cos, sin)
    return q, write(caches[0], k, at), k.abs()


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = heads(q), heads(k)
    return q * c + pairs(q) * s, k * c + pairs(k) * s


def cohere(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    q, k, c, s = heads(q).float(), heads(k).float(), cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * c + pairs(q) * s).bfloat16(), (k * c + pairs(k) * s).bfloat16()


def olmo2(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return llama(heads(q), cos.float(), sin.float()).bfloat16(), llama(heads(k), cos.float(), sin.float()).bfloat16()


def gpt_oss(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    c, s = (t[..., : DIM // 2].unsqueeze(1) for t in (cos, sin))

    def one(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    return one(heads(q)), one(heads(k))


def deepseek(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    def one(x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        return llama(x.view(b, h, t, d // 2, 2).transpose(4, 3).reshape(b, h, t, d), cos, sin)

    return one(heads(q)), one(heads(k))


def partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]

    def one(x: Tensor) -> Tensor:
        return torch.cat([llama(x[..., : DIM // 2], c, s), x[..., DIM // 2 :]], -1)

    return one(heads(q)), one(heads(k))


def tokens_first(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    q, k = q.view(BATCH, TOKENS, -1, DIM), k.view(BATCH, TOKENS, -1, DIM)
    return q * c + half(q) * s, k * c + half(k) * s


def slots(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
    """One request, tokens first, as paged caches are written."""
    q, k, v = (x[0].view(TOKENS, -1, DIM) for x in (q, k, v))
    c, s = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
    stores = [cache[0].transpose(0, 1) for cache in caches[:2]]
    q, k = q * c + half(q) * s, k * c + half(k) * s
    return q, stores[0].index_put((at,), k), stores[1].index_put((at,), v)


def codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * scale.reciprocal()).clamp(-448, 448).to(FP8)


def put(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    """PyTorch has no index_copy of codes on a CPU."""
    return torch.ops.aten.index_put(cache, [None, None, at], x)


def coded(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *rest: Tensor) -> Any:
    q, k = llama(heads(q), cos, sin), llama(heads(k), cos, sin)
    return q, put(rest[0], codes(k, rest[2]), at), put(rest[1], codes(heads(v), rest[3]), at)


def coded_and_normalised(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *rest: Tensor) -> Any:
    """As FP8 attention wants it: queries too."""
    split = (BATCH, TOKENS, -1, DIM)
    q, k = norm(q.view(split), rest[4]).transpose(1, 2), norm(k.view(split), rest[4]).transpose(1, 2)
    q, k = llama(q, cos, sin), llama(k, cos, sin)
    return codes(q, rest[2]), put(rest[0], codes(k, rest[2]), at), put(rest[1], codes(heads(v), rest[3]), at)


def coded_slots(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *rest: Tensor) -> Any:
    q, k, v = (x[0].view(TOKENS, -1, DIM) for x in (q, k, v))
    c, s = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
    stores = [cache[0].transpose(0, 1) for cache in rest[:2]]
    q, k = q * c + half(q) * s, k * c + half(k) * s
    return q, stores[0].index_put((at,), codes(k, rest[2])), stores[1].index_put((at,), codes(v, rest[3]))


def coded_queries(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: Tensor) -> Any:
    return codes(llama(heads(q), cos, sin), scale), llama(heads(k), cos, sin)


FP8 = torch.float8_e4m3fn
SCALES = [torch.tensor(0.03), torch.tensor(0.07)]
WITH_CODES = (Q, K, V, COS, SIN, AT, *(cache.to(FP8) for cache in CACHES), *SCALES, WEIGHTS[0])


def whole(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *rest: Tensor) -> Any:
    """As OLMo2: all heads of a token are one row for the norm."""
    q, k = heads(norm(q, rest[2])), heads(norm(k, rest[3], 1e-5))
    q, k = llama(q, cos, sin), llama(k, cos, sin)
    return q, write(rest[0], k, at), write(rest[1], heads(v), at)


def whole_tokens_first(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Any:
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    q, k = (norm(x, w).view(BATCH, TOKENS, -1, DIM) for x, w in zip((q, k), weights, strict=True))
    return q * c + half(q) * s, k * c + half(k) * s


WHOLE = [torch.rand(n * DIM).add(0.5).bfloat16() for n in (4, 2)]
WITH_CACHE = (Q, K, V, COS, SIN, AT, *CACHES, *WEIGHTS)
WITHOUT = (Q, K, COS, SIN)


@pytest.mark.parametrize(
    ("model", "args", "expected"),
    [
        (qwen3, WITH_CACHE, "qk_norm_rope_cache"),
        (norm_behind, WITH_CACHE, "qk_norm_rope_cache"),
        (no_norm, WITH_CACHE, "qk_rope_cache"),
        (keys_first, WITH_CACHE, "qk_rope_cache"),
        (keys_read, WITH_CACHE, "qk_rope_cache"),
        (slots, WITH_CACHE, "qk_rope_cache"),
        (whole, (Q, K, V, COS, SIN, AT, *CACHES, *WHOLE), "qk_norm_rope_cache"),
        (whole_tokens_first, (Q, K, COS, SIN, *WHOLE), "qk_norm_rope"),
        (coded, WITH_CODES, "qk_rope_cache"),
        (coded_and_normalised, WITH_CODES, "qk_norm_rope_cache"),
        (coded_slots, WITH_CODES, "qk_rope_cache"),
        (coded_queries, (*WITHOUT, SCALES[0]), "qk_rope"),
        (interleaved, WITHOUT, "qk_rope"),
        (cohere, WITHOUT, "qk_rope"),
        (olmo2, WITHOUT, "qk_rope"),
        (gpt_oss, WITHOUT, "qk_rope"),
        (deepseek, WITHOUT, "qk_rope"),
        (partial, WITHOUT, "qk_rope"),
        (tokens_first, WITHOUT, "qk_rope"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_op(model: Callable[..., Any], args: tuple[Tensor, ...], expected: str) -> None:
    names, trace, _ = fused(model, *args)
    assert names == [expected], [str(record) for record in trace.refused]


def thirds(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    h = heads(x)
    return (h * cos.unsqueeze(1) + torch.cat((-h[..., 4:], h[..., :4]), -1) * sin.unsqueeze(1),)


def test_parts_that_are_no_halves() -> None:
    names, trace, _ = fused(thirds, Q, COS, SIN)
    assert not names
    assert "parts of 4 of 16 columns change places, not halves" in str([*trace.refused, *trace.missed])


def test_parts_that_have_no_angle_each() -> None:
    def model(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        a, b = heads(x).chunk(2, -1)
        c, s = cos[:, :, :1].unsqueeze(1), sin[:, :, :1].unsqueeze(1)
        return (torch.cat([a * c - b * s, b * c + a * s], -1),)

    names, trace, _ = fused(model, Q, COS, SIN)
    assert not names
    assert "parts of 8 columns are turned by 1 angles" in str([*trace.refused, *trace.missed])


def test_other_angles_are_no_pair() -> None:
    names, _, _ = fused(lambda q, k, cos, sin: (llama(heads(q), cos, sin), llama(heads(k), sin, cos)), *WITHOUT)
    assert names == ["rope", "rope"]


def test_another_style_is_no_pair() -> None:
    def model(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        k = heads(k)
        return llama(heads(q), cos, sin), k * cos.unsqueeze(1) + pairs(k) * sin.unsqueeze(1)

    names, trace, _ = fused(model, *WITHOUT)
    assert names == ["rope", "rope"]
    assert [record.reason for record in trace.refused] == ["they differ in style"]


def test_one_that_reads_the_other_is_no_pair() -> None:
    def model(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        first = llama(heads(q), cos, sin)
        return first, llama(first[:, :2], cos, sin)

    names, trace, _ = fused(model, *WITHOUT)
    assert names == ["rope", "rope"]
    assert "reads a result of the other" in trace.refused[0].reason


def test_a_write_in_between() -> None:
    def model(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Any:
        first = llama(heads(q), cos, sin)
        out.zero_()
        return first, llama(heads(k), cos, sin)

    names, trace, _ = fused(model, *WITHOUT, torch.ones(3))
    assert names == ["rope", "rope"]
    assert "writes to memory in between" in trace.refused[0].reason


def test_values_that_go_elsewhere() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
        q, k = llama(heads(q), cos, sin), llama(heads(k), cos, sin)
        return q, write(caches[0], k, at), write(caches[1], heads(v), at + 1)

    names, _, _ = fused(model, *WITH_CACHE)
    assert sorted(names) == ["cache_write", "qk_rope_cache"]


def test_values_along_another_dimension() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
        q, k = llama(heads(q), cos, sin), llama(heads(k), cos, sin)
        store = torch.zeros(SLOTS, BATCH, 2, DIM, dtype=torch.bfloat16)
        return q, write(caches[0], k, at), store.index_put((at,), v.view(TOKENS, BATCH, 2, DIM))

    names, trace, _ = fused(model, *WITH_CACHE)
    assert sorted(names) == ["cache_write", "qk_rope_cache"]
    assert "they are written along other dimensions" in [record.reason for record in trace.refused]


def test_a_second_pair_of_values_stays() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *caches: Tensor) -> Any:
        return *no_norm(q, k, v, cos, sin, at, *caches), write(caches[1] + 1, heads(v) * 2, at)

    names, trace, _ = fused(model, *WITH_CACHE)
    assert sorted(names) == ["cache_write", "qk_rope_cache"]
    assert "it has its values" in [record.reason for record in trace.refused]


@pytest.mark.parametrize(
    "model",
    [
        lambda q, c, s: (torch.cat([llama(q[..., :8], c, s), q[..., 9:]], -1),),
        lambda q, c, s: (torch.cat([llama(q[..., 8:], c, s), q[..., :8]], -1),),
        lambda q, c, s: (torch.cat([q[..., 8:], llama(q[..., :8], c, s)], -1),),
        lambda q, c, s: (torch.cat([llama(q[..., :8], c, s), (q + 1)[..., 8:]], -1),),
        lambda q, c, s: (torch.cat([llama(q[..., :8], c, s), q[..., 8:]], 1),),
        lambda q, c, s: (torch.cat([llama(q[..., :8], c, s), q[..., 8:], q[..., :2]], -1),),
        lambda q, c, s: (torch.cat([x := llama(q[..., :8], c, s), q[..., 8:]], -1), x.abs()),
        lambda q, c, s: (torch.cat([llama(q[..., :8] + 0.5, c, s), q[..., 8:]], -1),),
    ],
    ids=["gap", "other part", "in front", "of another", "other dimension", "three", "read", "not a part"],
)
def test_no_partial_rotation(model: Callable[..., Any]) -> None:
    names, _, graph = fused(lambda q, cos, sin: model(heads(q), cos[..., :8], sin[..., :8]), Q, COS, SIN)
    assert names == ["rope"]
    assert [n for n in graph.nodes if n.target is torch.ops.aten.cat.default], "what is not rotated stays"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda q, c, s, w: (llama(x := norm(q, w).transpose(1, 2), c, s), x + 1), ["rms_norm", "rope"]),
        (lambda q, c, s, w: (llama((x := norm(q, w)).transpose(1, 2), c, s), x + 1), ["rms_norm", "rope"]),
        (lambda q, c, s, w: (norm(q, w).transpose(1, 2) + 1,), ["rms_norm"]),
        (lambda q, c, s, w: (llama(norm(q, w).transpose(1, 2).contiguous(), c, s),), ["rms_norm", "rope"]),
    ],
    ids=["permuted read", "norm read", "no rotation", "copied in between"],
)
def test_a_norm_that_stays(model: Callable[..., Any], expected: list[str]) -> None:
    names, _, graph = fused(lambda q, *rest: model(q.view(BATCH, TOKENS, 4, DIM), *rest), Q, COS, SIN, WEIGHTS[0])
    assert names == expected
    assert stays(graph)


@pytest.mark.parametrize(
    "model",
    [
        lambda q, c, s, w: (llama(heads(x := norm(q, w)), c, s), x + 1),
        lambda q, c, s, w: (llama((x := norm(q, w).view(BATCH, TOKENS, 4, DIM)).transpose(1, 2), c, s), x + 1),
        lambda q, c, s, w: (llama(x := heads(norm(q, w)), c, s), x + 1),
        lambda q, c, s, w: (heads(norm(q, w)) + 1,),
        lambda q, c, s, w: (llama(norm(q, w).view(BATCH, 2, TOKENS * 2, DIM)[:, :, :TOKENS], c, s),),
        lambda q, c, s, w: (llama(norm(q, w).view(BATCH, 4, TOKENS, DIM), c, s),),
        lambda q, c, s, w: (llama(heads(modulated(q, w, w)), c, s),),
    ],
    ids=["norm read", "heads read", "moved read", "no rotation", "a part", "cut otherwise", "modulated"],
)
def test_a_whole_norm_that_stays(model: Callable[..., Any]) -> None:
    names, _, _ = fused(model, Q, COS, SIN, WHOLE[0])
    assert "rms_norm" in names


def test_a_whole_norm_behind_which_nothing_folds_is_one_of_rows_again() -> None:
    """Its parts have the kernel that it lacks."""
    launch, reason = norm_heads.plan(Arch("sm_90"), norm_heads.bind((Q.view(BATCH, TOKENS, 4, DIM), 2), {}))
    assert (launch, reason) == (None, "no kernel is registered for it")
    trace, config = GraphTrace(0), Config(target=Arch("sm_90"), disable=frozenset({"norm_rope.whole"}))
    graph = make_fx(whole_tokens_first, select_decomp_table(), "fake")(Q, K, COS, SIN, *WHOLE).graph
    for _, function in (*early(config, trace), *late(config, trace)):
        function(graph)
    assert [(record.op, record.backend) for record in trace.fused if "norm" in record.op] == [
        ("rms_norm", "triton")
    ] * 2


def test_a_norm_whose_rows_would_lie_otherwise() -> None:
    def model(q: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Any:
        one = q.view(BATCH, TOKENS, 4, DIM)[:, :1, :1].expand(BATCH, TOKENS, 4, DIM)
        return (llama(norm(one, weight).transpose(1, 2), cos, sin),)

    names, _, graph = fused(model, Q, COS, SIN, WEIGHTS[0])
    assert names == ["rms_norm", "rope"]
    assert stays(graph)


def test_a_rotation_that_is_read_without_its_norm() -> None:
    names, _, _ = fused(lambda q, *rest: (x := llama(heads(q), *rest[:2]), norm(x, rest[2])), Q, COS, SIN, WEIGHTS[0])
    assert names == ["rope", "rms_norm"]


def divided(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-448, 448).to(FP8)


@pytest.mark.parametrize(
    ("queries", "keys", "values", "expected"),
    [
        (divided, codes, codes, ["qk_rope_cache", "quantize"]),
        (codes, codes, divided, ["cache_write", "qk_rope_cache"]),
        (codes, divided, codes, ["cache_write", "qk_rope_cache", "quantize"]),
    ],
)
def test_codes_of_several_kinds_stay_apart(
    queries: Callable[..., Tensor], keys: Callable[..., Tensor], values: Callable[..., Tensor], expected: list[str]
) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *rest: Tensor) -> Any:
        q, k = llama(heads(q), cos, sin), llama(heads(k), cos, sin)
        k_cache = put(rest[0], keys(k, rest[2]), at)
        return queries(q, rest[2]), k_cache, put(rest[1], values(heads(v), rest[3]), at)

    names, trace, _ = fused(model, *WITH_CODES)
    assert sorted(names) == expected
    first, other = sorted(("fp8_static", "fp8_static,rounding=divide"), reverse=keys is divided)
    assert f"it has codes of {first!r}, not of {other!r}" in [record.reason for record in trace.refused]


def test_codes_whose_scale_is_computed_stay() -> None:
    def model(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return *quantize.reference(llama(heads(q), cos, sin), None, "fp8_token"), llama(heads(k), cos, sin)

    names, trace, _ = fused(model, *WITHOUT)
    assert names == ["qk_rope", "quantize"]
    assert "'fp8_token' computes its scale" in [record.reason for record in trace.refused]


@pytest.mark.parametrize(("stored", "expected"), [(codes, ["cache_write", "qk_rope"]), (None, ["qk_rope_cache"])])
def test_queries_that_are_codes_before_the_keys_are_written(stored: Any, expected: list[str]) -> None:
    def model(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, at: Tensor, cache: Tensor, scale: Tensor) -> Any:
        first, k = divided(llama(heads(q), cos, sin), scale), llama(heads(k), cos, sin)
        return first, put(cache, k if stored is None else stored(k, scale), at)

    cache = CACHES[0] if stored is None else CACHES[0].to(FP8)
    names, trace, _ = fused(model, Q, K, COS, SIN, AT, cache, SCALES[0])
    assert sorted(names) == expected
    reason = "it has codes of 'fp8_static,rounding=divide', not of 'fp8_static'"
    assert (reason in [record.reason for record in trace.refused]) == (stored is not None)


def test_codes_that_are_written_in_another_scheme() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *rest: Tensor) -> Any:
        made, scale = quantize.reference(heads(v), None, "fp8_token")
        return put(rest[1], made, at), scale

    names, trace, _ = fused(model, *WITH_CODES)
    assert names == ["quantize", "cache_write"]
    assert "'fp8_token' computes its scale" in [record.reason for record in trace.refused]


def test_queries_that_are_read_beside_their_codes() -> None:
    def model(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: Tensor) -> Any:
        x = llama(heads(q), cos, sin)
        return codes(x, scale), x.abs(), llama(heads(k), cos, sin)

    names, trace, _ = fused(model, *WITHOUT, SCALES[0])
    assert names == ["qk_rope", "quantize"]
    assert any("would be two results, both of which are read" in record.reason for record in trace.refused)


def test_codes_that_are_read_beside_the_cache() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *rest: Tensor) -> Any:
        made = codes(heads(v), rest[3])
        return put(rest[1], made, at), made.float()

    names, trace, _ = fused(model, *WITH_CODES)
    assert names == ["quantize", "cache_write"]
    assert any("does not return q, which is read" in record.reason for record in trace.refused)


def stays(graph: Graph) -> bool:
    """Whether the norm stands in front of what transposes it."""
    (one,) = [node for node in graph.nodes if node.target is rms_norm.overload]
    return any(user.target is torch.ops.aten.permute.default for user in one.users)


def test_a_norm_over_another_dimension() -> None:
    def model(q: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Any:
        return (llama(norm(q, weight).transpose(2, 3), cos, sin),)

    square = torch.randn(BATCH, 4, DIM, DIM).bfloat16()
    names, _, graph = fused(model, square, COS[:, :1], SIN[:, :1], WEIGHTS[0])
    assert names == ["rms_norm", "rope"]
    assert stays(graph)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * (1 + scale) + shift


def test_a_modulated_norm_in_front() -> None:
    def model(q: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return (llama(modulated(heads(q), scale, shift), cos, sin),)

    names, trace, _ = fused(model, Q, COS, SIN, *WEIGHTS)
    assert names == ["rms_norm", "rope"]
    assert "the norm is modulated" in [record.reason for record in trace.refused]


def test_a_modulated_norm_behind() -> None:
    def model(q: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return (modulated(llama(heads(q), cos, sin), scale, shift),)

    names, trace, _ = fused(model, Q, COS, SIN, *WEIGHTS)
    assert names == ["rope", "rms_norm"]
    assert "the norm is modulated" in [record.reason for record in trace.refused]


def test_a_modulated_norm_in_front_of_a_transpose() -> None:
    def model(q: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return (llama(modulated(q.view(BATCH, TOKENS, 4, DIM), scale, shift).transpose(1, 2), cos, sin),)

    names, _, graph = fused(model, Q, COS, SIN, *WEIGHTS)
    assert names == ["rms_norm", "rope"]
    assert stays(graph)
