"""SDPA becomes the op where that is the same, and repeated heads are shared again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusionpass
from fusionpass import Arch, Config, Report
from fusionpass.ops import attention
from fusionpass.passes import attend
from fusionpass.report.trace import Record
from tests.fake_gpu import needs_cuda_build
from tests.models import static

SM90 = Config(target=Arch("sm_90"))
BATCH, HEADS, KV, SLOTS, DIM = 2, 4, 2, 24, 64
Q = torch.randn(BATCH, HEADS, 1, DIM).bfloat16()
K, V = (torch.randn(BATCH, KV, SLOTS, DIM).bfloat16() for _ in range(2))
SEEN = torch.rand(BATCH, 1, 1, SLOTS) > 0.3


def repeated(x: Tensor, times: int = HEADS // KV) -> Tensor:
    """As transformers' `repeat_kv`."""
    batch, heads, positions, width = x.shape
    return x[:, :, None].expand(batch, heads, times, positions, width).reshape(batch, -1, positions, width)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen, scale=0.1)


def interleaving(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1)
    return F.scaled_dot_product_attention(q, k, v, seen)


def shared(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def causal(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)


def explained(model: Callable[..., Any], *args: Tensor, config: Config = SM90) -> tuple[Report, str]:
    report = fusionpass.explain(model, *args, config=config)
    return report, dict(report.graphs[0].snapshots)["fuse"]


def attentions(report: Report) -> list[Record]:
    return [record for record in report.fused if record.op == "attention"]


@needs_cuda_build
@pytest.mark.parametrize("model", [masked, interleaving, shared, causal])
def test_one_kernel_reads_each_head_once(model: Callable[..., Any]) -> None:
    report, graph = explained(model, Q, K, V, SEEN)
    (record,) = attentions(report)
    assert (record.backend, record.reason) == ("triton", "")
    assert "expand" not in graph
    assert "clone" not in graph


@pytest.mark.parametrize("model", [masked, interleaving, shared, causal])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_same_numbers(model: Callable[..., Any], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel fits, the op is what the model wrote."""
    monkeypatch.setattr(attend, "DEVICES", ("cpu",))
    q = torch.randn(BATCH, HEADS, tokens, DIM).bfloat16()
    seen = torch.rand(BATCH, 1, tokens, SLOTS) > 0.3
    expected = model(q, K, V, seen)
    compiled = fusionpass.compile(model, numerics="eager", cache=False)
    with torch.no_grad():
        result = compiled(q, K, V, seen)
    assert fusionpass.report(compiled).count("attention") == 1
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()


@needs_cuda_build
@pytest.mark.parametrize(
    "model",
    [
        lambda q, k, v, seen: F.scaled_dot_product_attention(q, repeated(k), repeated(v), dropout_p=0.1),
        lambda q, k, v, seen: F.scaled_dot_product_attention(
            q[0], k[0, :1].expand(4, -1, -1), v[0, :1].expand(4, -1, -1)
        ),
    ],
    ids=["dropout", "three dimensions"],
)
def test_other_calls_stay(model: Callable[..., Any]) -> None:
    report, _ = explained(model, Q, K, V, SEEN)
    assert not attentions(report)


def test_a_cpu_keeps_its_call() -> None:
    report, _ = explained(masked, Q, K, V, SEEN, config=Config())
    assert not attentions(report)


@needs_cuda_build
def test_disabled() -> None:
    report, _ = explained(masked, Q, K, V, SEEN, config=Config(target=Arch("sm_90"), disable={"attention"}))
    assert not attentions(report)


def test_training_keeps_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "DEVICES", ("cpu",))
    q, k, v = (t.float().requires_grad_() for t in (Q, K, V))
    compiled = fusionpass.compile(lambda q, k, v: masked(q, k, v, SEEN), cache=False)
    compiled(q, k, v).sum().backward()
    assert q.grad is not None
    assert "attention" not in {record.op for record in fusionpass.report(compiled).fused}


@needs_cuda_build
@pytest.mark.parametrize(
    "model",
    [
        lambda q, k, v, seen: F.scaled_dot_product_attention(q, repeated(k), repeated(v) + 1, seen),
        lambda q, k, v, seen: F.scaled_dot_product_attention(
            q, *(x[:, None].expand(BATCH, 2, KV, SLOTS, DIM).reshape(BATCH, -1, SLOTS, DIM) for x in (k, v)), seen
        ),
        lambda q, k, v, seen: F.scaled_dot_product_attention(
            q,
            *(x[:1, :, None].expand(BATCH, KV, 2, SLOTS, DIM).reshape(BATCH, HEADS, SLOTS, DIM) for x in (k, v)),
            seen,
        ),
        lambda q, k, v, seen: F.scaled_dot_product_attention(
            q, *(x.transpose(1, 2).reshape(BATCH, HEADS, -1, DIM) for x in (k, v)), seen[..., : SLOTS // 2]
        ),
        lambda q, k, v, seen: F.scaled_dot_product_attention(
            q,
            *(x[:, :, None].expand(-1, -1, 4, -1, -1).reshape(BATCH, HEADS, 2 * SLOTS, DIM) for x in (k, v)),
            torch.cat([seen, seen], -1),
        ),
    ],
    ids=["values changed", "repeated in another order", "batch repeated", "not repeated", "joined otherwise"],
)
def test_heads_that_are_not_repeated_so(model: Callable[..., Any]) -> None:
    report, graph = explained(model, Q, K, V, SEEN)
    assert len(attentions(report)) == 1
    assert "clone" in graph, "what is read is written out"


@needs_cuda_build
def test_many_tokens_are_for_sdpa() -> None:
    report, _ = explained(masked, torch.randn(BATCH, HEADS, 40, DIM).bfloat16(), K, V, SEEN)
    (record,) = attentions(report)
    assert record.backend == "inductor"
    assert "SDPA's own kernels are for many tokens" in record.reason


def rows(attended: Tensor) -> Tensor:
    return attended.transpose(1, 2).contiguous().reshape(BATCH, -1, HEADS * DIM)


def decoded(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Any:
    return static(rows(attention(q, k, v)), scale)


def ops_of(model: Callable[..., Any], *args: Tensor, **config: Any) -> tuple[Report, list[str]]:
    report = fusionpass.explain(model, *args, config=Config(target=Arch("sm_90"), **config))
    return report, [record.op for record in report.fused]


SCALE = torch.tensor(0.01)


@pytest.mark.parametrize(
    "model",
    [
        decoded,
        lambda q, k, v, s: static(rows(attention(q, k, v)).view(-1, HEADS * DIM), s),
        lambda q, k, v, s: static(attention(q, k, v).transpose(1, 2).reshape(-1, HEADS * DIM), s),
        lambda q, k, v, s: static(attention(q, k, v).permute(0, 2, 1, 3).flatten(2), s),
    ],
    ids=["rows", "viewed", "a matrix", "flattened"],
)
def test_a_quantisation_folds_into_attention(model: Callable[..., Any]) -> None:
    report, ops = ops_of(model, Q, K, V, SCALE, verify=True)
    assert ops == ["attention_quantize"]
    (record,) = report.fused
    assert (record.backend, record.rule, record.reason) == ("triton", "attention.quantize", "")


def test_the_same_codes() -> None:
    compiled = fusionpass.compile(decoded, numerics="eager", cache=False)
    with torch.no_grad():
        result, expected = compiled(Q, K, V, SCALE), decoded(Q, K, V, SCALE)
    assert fusionpass.report(compiled).count("attention_quantize") == 0, "on a CPU it is its parts again"
    assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    "model",
    [
        lambda q, k, v, s: static(attention(q, k, v).transpose(1, 2).reshape(BATCH, 2, -1), s),
        lambda q, k, v, s: static(attention(q, k, v).transpose(2, 3).reshape(BATCH, 1, -1), s),
        lambda q, k, v, s: static(attention(q, k, v).reshape(BATCH, 1, -1), s),
        lambda q, k, v, s: static(attention(q, k, v), s),
        lambda q, k, v, s: static((x := attention(q, k, v)).transpose(1, 2).reshape(BATCH, 1, -1), s) + x.sum(),
        lambda q, k, v, s: static(attention(q, k, v).transpose(1, 2).abs().reshape(BATCH, 1, -1), s),
        lambda q, k, v, s: rows(attention(q, k, v)).abs(),
    ],
    ids=["in halves", "columns first", "not moved", "heads", "read", "not itself", "not quantised"],
)
def test_what_is_not_a_tokens_row_stays(model: Callable[..., Any]) -> None:
    def sums(*args: Tensor) -> Tensor:
        return model(*args).float().sum()

    report, ops = ops_of(sums, Q, K, V, SCALE)
    assert "attention" in ops
    assert "attention_quantize" not in ops
    assert "joined" not in dict(report.graphs[0].snapshots)["fuse"]


def test_heads_that_are_not_joined_are_refused() -> None:
    report, _ = ops_of(lambda q, k, v, s: static(attention(q, k, v), s), Q, K, V, SCALE)
    assert "its heads are not joined to rows" in [record.reason for record in report.refused]


def test_what_is_read_besides_is_returned_besides() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Any:
        joined = rows(attention(q, k, v))
        return static(joined, scale), joined.abs()

    report, ops = ops_of(model, Q, K, V, SCALE)
    assert ops == ["attention_quantize"]
    assert "attended_out=True" in dict(report.graphs[0].snapshots)["fuse"]


def test_many_tokens_have_their_attention_and_their_quantisation() -> None:
    """Where the larger op has no kernel, its parts may have theirs."""
    report, ops = ops_of(decoded, torch.randn(BATCH, HEADS, 40, DIM).bfloat16(), K, V, SCALE)
    assert ops == ["attention", "quantize"]
    attended, codes = report.fused
    assert (attended.backend, attended.rule) == ("inductor", "")
    assert (codes.backend, codes.rule) == ("triton", "quant.fp8_static")
    assert attended.reason.startswith("triton: 80 rows a KV head")
    assert codes.reason.startswith("not attention_quantize: triton: 80 rows a KV head")


@needs_cuda_build
def test_a_models_attention_is_quantised_by_one_kernel() -> None:
    """With the model's own call, and heads that are repeated."""

    def model(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: Tensor) -> Tensor:
        return static(rows(masked(q, k, v, seen)), scale)

    report, _ = explained(model, Q, K, V, SEEN, SCALE)
    assert [(record.op, record.backend) for record in report.fused] == [("attention_quantize", "triton")]


FP8 = torch.float8_e4m3fn
K8, V8 = K.to(FP8), V.to(FP8)
HALF = SCALE.bfloat16()


@pytest.mark.parametrize(
    ("wide", "scale"),
    [
        (lambda x, s: (x.float() * s).bfloat16(), SCALE),
        (lambda x, s: (s * x.to(torch.float32)).to(Q.dtype), SCALE.reshape(1)),
        (lambda x, s: x.bfloat16() * s, HALF),
        (lambda x, s: x.bfloat16(), SCALE),
        (lambda x, s: x.float().bfloat16(), SCALE),
    ],
    ids=["product", "factors turned", "in 16 bits", "no scale", "cast twice"],
)
def test_codes_are_read_as_they_are(wide: Callable[..., Tensor], scale: Tensor) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return attention(q, wide(k, s), wide(v, s))

    report, ops = ops_of(model, Q, K8, V8, scale, verify=True)
    graph = dict(report.graphs[0].snapshots)["fuse"]
    assert ops == ["attention"]
    assert report.fused[0].backend == "triton"
    assert "convert_element_type" not in graph
    compiled = fusionpass.compile(model, numerics="eager", cache=False)
    with torch.no_grad():
        assert torch.equal(compiled(Q, K8, V8, scale), model(Q, K8, V8, scale))


@pytest.mark.parametrize(
    "wide",
    [
        lambda x, s: (x.float() * s).half().bfloat16(),
        lambda x, s: (x.float() + s).bfloat16(),
        lambda x, s: (x.float() * s.expand(DIM).clone()).bfloat16(),
        lambda x, s: (x.to(torch.int8).float() * s).bfloat16(),
        lambda x, s: x.to(torch.float8_e5m2).bfloat16(),
        lambda x, s: (x.float() * 0.5).bfloat16(),
    ],
    ids=["rounded twice", "a sum", "scales of columns", "other codes", "other floats", "a number"],
)
def test_what_is_no_product_of_codes_and_a_scale_stays(wide: Callable[..., Tensor]) -> None:
    _, ops = ops_of(lambda q, k, v, s: attention(q, wide(k, s), v), Q, K8, V, SCALE)
    report, _ = ops_of(lambda q, k, v, s: attention(q, wide(k, s), v), Q, K8, V, SCALE)
    assert ops == ["attention"]
    assert "convert_element_type" in dict(report.graphs[0].snapshots)["fuse"]


def test_a_cache_that_is_read_elsewhere_too() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Any:
        wide = (k.float() * s).bfloat16()
        return attention(q, wide, v), wide.sum()

    report, ops = ops_of(model, Q, K8, V, SCALE)
    assert ops == ["attention"]
    assert "k_scale" in dict(report.graphs[0].snapshots)["fuse"]


def test_repeated_heads_of_codes() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        wide = [repeated((x.float() * s).bfloat16()) for x in (k, v)]
        return attention(q, *wide)

    report, _ = ops_of(model, Q, K8, V8, SCALE)
    graph = dict(report.graphs[0].snapshots)["fuse"]
    assert "expand" not in graph
    assert "convert_element_type" not in graph
