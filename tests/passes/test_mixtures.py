"""transformers' experts over grouped products become the op, where they are exactly that."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass import Arch, Config
from fusionpass.ops import experts
from fusionpass.passes import mixtures
from fusionpass.passes.normalize import normalize
from fusionpass.passes.recognise import recognise
from fusionpass.report.trace import GraphTrace, Record
from fusionpass.rules import SPELLINGS
from tests.fake_gpu import needs_cuda_build
from tests.families import FAMILIES, Family

TOKENS, HIDDEN, INNER, EXPERTS, TOP = 6, 64, 32, 4, 2


def inputs(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.randn(tokens, EXPERTS).softmax(-1).topk(TOP)
    return torch.randn(tokens, HIDDEN).bfloat16(), scores.indices, scores.values


class Experts(nn.Module):
    """A mixture in parts, each of which a test may replace."""

    def __init__(self, **parts: Callable[..., Any]) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN).bfloat16() / HIDDEN**0.5, requires_grad=False)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER).bfloat16() / INNER**0.5, requires_grad=False)
        self.parts = parts

    def part(self, name: str, usual: Callable[..., Any], *given: Any) -> Any:
        return self.parts.get(name, usual)(*given)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        owners, order = self.part("sort", torch.sort, ids.reshape(-1))
        rows = x[self.part("token", lambda order: order // TOP, order)]
        hide = self.parts.get("hide", lambda y, owners: y)
        rows = hide(rows, owners)
        weight = weights.reshape(-1)[self.part("weighing", lambda order: order, order)]
        counts = self.part("count", lambda owners: torch.histc(owners.float(), EXPERTS, 0, EXPERTS - 1), owners)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        first = self.part("up", torch._grouped_mm, rows, self.up.transpose(-2, -1), ends)
        first = hide(first, owners)
        hidden = self.part("act", lambda y: torch.nn.functional.silu(y[:, :INNER]) * y[:, INNER:], first)
        after = self.part("ends", lambda ends: ends, ends)
        down = self.part("turn", lambda w: w.transpose(-2, -1), self.down)
        y = self.part("read", lambda y: y, hide(torch._grouped_mm(hidden, down, after), owners))
        y = y * weight.unsqueeze(-1)
        places = self.part("places", lambda order: torch.arange(order.size(0)), order)
        back = torch.empty_like(order).index_put((order,), places)
        y = y[back].view(-1, TOP, HIDDEN)
        return self.part("sum", lambda y: y.sum(1), y).to(x.dtype)


class Biased(Experts):
    """As GPT-OSS has its experts: weights of [experts, in, out], biases, and gate and up side by side."""

    def __init__(self, **parts: Callable[..., Any]) -> None:
        super().__init__(**parts)
        for name in ("up", "down"):
            weight = getattr(self, name)
            setattr(self, name, nn.Parameter(weight.transpose(1, 2).contiguous(), requires_grad=False))
            bias = nn.Parameter(torch.randn(weight.shape[:2]).bfloat16(), requires_grad=False)
            setattr(self, f"{name}_bias", bias)

    def act(self, y: Tensor) -> Tensor:
        gate, up = y[:, ::2].clamp(max=1.25), y[:, 1::2].clamp(-1.25, 1.25)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.5))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        owners, order = torch.sort(ids.reshape(-1))
        rows, weight = x[order // TOP], weights.reshape(-1)[order]
        ends = torch.cumsum(torch.histc(owners.float(), EXPERTS, 0, EXPERTS - 1), 0, dtype=torch.int32)
        hide = self.parts.get("hide", lambda y, owners: y)
        hidden_by = owners
        owners = self.part("clamp", lambda owners: owners, owners)
        add = self.parts.get("add", lambda y, bias, owners: y + bias[owners])
        first = hide(add(torch._grouped_mm(hide(rows, hidden_by), self.up, ends), self.up_bias, owners), hidden_by)
        hidden = self.part("act", self.act, first)
        y = hide(add(torch._grouped_mm(hidden, self.down, ends), self.down_bias, owners), hidden_by)
        y = y * weight.unsqueeze(-1)
        y = y[torch.empty_like(order).index_put((order,), torch.arange(order.size(0)))]
        return y.view(-1, TOP, HIDDEN).sum(1).to(x.dtype)


def hide(y: Tensor, owners: Tensor, least: int = EXPERTS, value: float = 0.0) -> Tensor:
    """As transformers 5.17 hides rows of no expert."""
    return y.masked_fill((owners >= least).unsqueeze(-1), value)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "DEVICES", ("cpu",))


def records(model: nn.Module, *args: Tensor, **options: Any) -> tuple[list[Record], list[Record], Graph]:
    """What was refused and what was missed, and the graph."""
    with torch.no_grad():
        graph = make_fx(lambda *given: model(*given), select_decomp_table(), "fake", _allow_non_fake_inputs=True)(
            *args
        ).graph
    normalize(graph)
    trace = GraphTrace(0)
    recognise(graph, SPELLINGS, trace)
    mixtures.mixtures(graph, trace, **options)
    graph.lint()
    found = (trace.refused, trace.missed)
    refused, missed = ([record for record in kind if record.op == "experts"] for kind in found)
    return refused, missed, graph


def count(graph: Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=experts.overload))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "act",
    [
        lambda y: torch.nn.functional.silu(y[:, :INNER]) * y[:, INNER:],
        lambda y: torch.nn.functional.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
        lambda y: torch.nn.functional.gelu(y[:, :INNER]) * y[:, INNER:],
        lambda y: torch.nn.functional.gelu(y[:, :INNER], approximate="tanh") * y[:, INNER:],
        lambda y: torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2],
    ],
    ids=["silu", "chunks", "gelu", "gelu_tanh", "interleaved"],
)
@pytest.mark.usefixtures("on_cpu")
def test_the_same_numbers(act: Any, weights: torch.dtype) -> None:
    parts = {"hide": hide} if weights == torch.bfloat16 else {}
    model, (x, ids, given) = Experts(act=act, **parts), inputs()
    given = given.to(weights)
    expected = model(x, ids, given)
    compiled = fusionpass.compile(model, numerics="eager", cache=False)
    with torch.no_grad():
        result = compiled(x, ids, given)
    assert fusionpass.report(compiled).count("experts") == 1
    if torch.__version__ >= "2.14":
        assert torch.equal(result, expected)
    # Before, Inductor's C++ skips roundings in front of the sum, with the op and without.
    assert (result.double() - expected.double()).norm() <= 0.01 * expected.double().norm()
    assert result.stride() == expected.stride()


EXPERT_PARALLEL = {"hide": lambda y, owners: hide(y, owners), "clamp": lambda owners: owners.clamp(max=EXPERTS - 1)}


@pytest.mark.parametrize("parts", [{}, EXPERT_PARALLEL], ids=["alone", "expert_parallel"])
@pytest.mark.usefixtures("on_cpu")
def test_biases_interleaved_and_transposed(parts: dict[str, Any]) -> None:
    model, (x, ids, given) = Biased(**parts), inputs()
    if parts:
        ids[1, 0] = EXPERTS  # one that another rank has
    refused, missed, graph = records(model, x, ids, given.bfloat16(), verify=True)
    assert (count(graph), refused, missed) == (1, [], [])
    (node,) = graph.find_nodes(op="call_function", target=experts.overload)
    named = experts.bind(node.args, node.kwargs)
    assert (named["activation"], named["interleaved"], named["alpha"], named["limit"]) == (
        "clamped_swiglu", True, 1.5, 1.25,
    )  # fmt: skip
    expected = model(x, ids, given.bfloat16())
    compiled = fusionpass.compile(model, numerics="eager", cache=False)
    with torch.no_grad():
        result = compiled(x, ids, given.bfloat16())
    report = fusionpass.report(compiled)
    assert report.count("experts") == 1
    assert not report.missed
    if torch.__version__ >= "2.14":
        assert torch.equal(result, expected)
    assert (result.double() - expected.double()).norm() <= 0.01 * expected.double().norm()


def _clamp_swiglu(y: Tensor, low: int, high: int) -> Tensor:
    gate, up = y[:, low::2].clamp(max=1.25), y[:, high::2].clamp(-1.25, 1.25)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.5))


NO_BIASES: dict[str, tuple[dict[str, Any], str]] = {
    "of the unsorted": ({"add": lambda y, bias, owners: y + bias[owners.flip(0)]}, "not that of each row's expert"),
    "of another clamp": ({"clamp": lambda owners: owners.clamp(max=1)}, "not that of each row's expert"),
    "of the row": ({"add": lambda y, bias, owners: y + bias[0]}, "where the op wants a bias by expert"),
    "scaled": (
        {"add": lambda y, bias, owners: torch.add(y, bias[owners], alpha=2)},
        "a product and its bias|by expert",
    ),
    "of itself": ({"add": lambda y, bias, owners: y + y}, "a product and its bias"),
    "odd first": ({"act": lambda y: _clamp_swiglu(y, 1, 0)}, "the gate in the first half, or at even places"),
    "mixed": (
        {"act": lambda y: torch.nn.functional.silu(y[:, ::2]) * y[:, INNER:]},
        "the gate in the first half, or at even places",
    ),
}


@pytest.mark.parametrize(("parts", "reason"), NO_BIASES.values(), ids=NO_BIASES)
@pytest.mark.usefixtures("on_cpu")
def test_other_biases_stay_and_why(parts: dict[str, Any], reason: str) -> None:
    x, ids, weights = inputs()
    refused, (record,), graph = records(Biased(**parts), x, ids, weights.bfloat16())
    assert (count(graph), refused) == (0, [])
    assert re.search(reason, record.reason), record.reason


@pytest.mark.usefixtures("on_cpu")
def test_any_number_of_tokens() -> None:
    model = Experts()
    compiled = fusionpass.compile(model, numerics="eager", cache=False)
    with torch.no_grad():
        for tokens in (5, 9, 2):
            given = inputs(tokens)
            assert torch.equal(compiled(*given), model(*given))
    report = fusionpass.report(compiled)
    assert len(report.graphs) == 2, "the second is for any number"
    assert report.count("experts") == 1


@pytest.mark.usefixtures("on_cpu")
def test_verified() -> None:
    refused, missed, graph = records(Experts(), *inputs(), verify=True)
    assert (count(graph), refused, missed) == (1, [], [])


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "bias": (
        {"up": lambda *given: torch._grouped_mm(*given) + 1},
        "there is 1, where the op wants a bias by expert",
    ),
    "relu": ({"act": lambda y: torch.relu(y[:, :INNER]) * y[:, INNER:]}, "an activation that it knows"),
    "halves": ({"act": lambda y: torch.nn.functional.silu(y[:, INNER:]) * y[:, :INNER]}, "the gate in the first half"),
    "two products": (
        {"act": lambda y: torch.nn.functional.silu(y[:, :INNER]) * (y + 1)[:, INNER:]},
        "gate and up are of two products, where the op wants both of one",
    ),
    "groups": ({"ends": lambda ends: ends + 0}, "the products have other groups"),
    "permuted": (
        {"turn": lambda w: w.reshape(INNER, EXPERTS, HIDDEN).permute(1, 0, 2)},
        r"weights are permuted by \[1, 0, 2\]",
    ),
    "token": ({"token": lambda order: order % TOKENS}, "pairs divided by experts a token"),
    "upwards": (
        {"token": lambda order: torch.div(order, TOP, rounding_mode="trunc")},
        "pairs are not divided downwards",
    ),
    "owner": ({"token": lambda order: order // 3}, "pairs are of"),
    "unsorted": ({"sort": lambda ids: (ids, ids.argsort() * 1)}, "a result of sort"),
    "descending": ({"sort": lambda ids: torch.sort(ids, descending=True)}, "pairs are sorted in another way"),
    "count": (
        {"count": lambda owners: torch.histc(owners.float(), EXPERTS, 0, EXPERTS)},
        f"groups are counted with .*, where the op wants each of {EXPERTS} experts",
    ),
    "weighing": ({"weighing": lambda order: order.flip(0)}, "weights are in another order"),
    "places": ({"places": lambda order: torch.arange(order.size(0)).flip(0)}, "numbers from 0 on"),
    "from one": (
        {"places": lambda order: torch.arange(-1, order.size(0) - 1)},
        "rows are put back in another order",
    ),
    "largest": ({"sum": lambda y: y.amax(1)}, "the sum of a token's rows"),
    "other sum": ({"sum": lambda y: y.sum(2)[:, :1].expand(-1, HIDDEN)}, "rows are summed over"),
    "all kept": ({"sum": lambda y: y.sum(1, keepdim=True).squeeze(1)}, "rows are summed over"),
    "read twice": ({"read": lambda y: y + y.flip(0) * 0 if y is not None else y}, "is read 2 times"),
    "other rows hidden": ({"hide": lambda y, owners: hide(y, owners, 2)}, "rows are hidden for another reason"),
    "hidden by the unsorted": (
        {"hide": lambda y, owners: hide(y, owners.flip(0))},
        "rows are hidden for another reason",
    ),
    "hidden by ones": ({"hide": lambda y, owners: hide(y, owners, value=1.0)}, "hidden rows are not zeros"),
    "hidden by columns": (
        {"hide": lambda y, owners: torch.where(owners[: y.shape[1]][None, :1] >= EXPERTS, 0.0, y)},
        "a column that hides rows",
    ),
    "normalised": ({"read": lambda y: y.float().rsqrt()}, "weighted rows"),
}


@pytest.mark.parametrize(("parts", "reason"), OTHERS.values(), ids=OTHERS)
@pytest.mark.usefixtures("on_cpu")
def test_others_stay_and_why(parts: dict[str, Any], reason: str) -> None:
    refused, (record,), graph = records(Experts(**parts), *inputs())
    assert (count(graph), refused) == (0, [])
    assert record.rule == mixtures.RULE
    assert re.search(reason, record.reason), record.reason


class Both(nn.Module):
    """A mixture whose first product somebody else reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.experts = Experts(act=self.act)

    def act(self, y: Tensor) -> Tensor:
        self.kept.append(y)
        return torch.nn.functional.silu(y[:, :INNER]) * y[:, INNER:]

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        self.kept = []
        return self.experts(*given), self.kept[0] * 2


@pytest.mark.usefixtures("on_cpu")
def test_what_others_read_stays() -> None:
    (record,), missed, graph = records(Both(), *inputs())
    assert (count(graph), missed) == (0, [])
    assert "is also read by" in record.reason


@pytest.mark.usefixtures("on_cpu")
def test_disabled() -> None:
    for name in ("experts", mixtures.RULE):
        (record,), _, graph = records(Experts(), *inputs(), disable=Config.make(overrides={"disable": {name}}).disable)
        assert (count(graph), record.reason) == (0, f"{name} is disabled by Config.disable")


def test_a_cpu_keeps_its_products() -> None:
    refused, missed, graph = records(Experts(), *inputs())
    assert (count(graph), refused, missed) == (0, [], [])


MIXTRAL = Family("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})


@needs_cuda_build
@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V3", "Mixtral", "GPT-OSS"])
def test_models(name: str) -> None:
    (family,) = [one for one in (*FAMILIES, MIXTRAL) if one.name == name]
    model, given = family.build()
    report = fusionpass.explain(model, **given, config=Config(target=Arch("sm_90")))
    found = [record for record in report.fused if record.op == "experts"]
    assert found
    assert {(record.backend, record.rules) for record in found} == {("triton", (mixtures.RULE,))}
    assert all(record.where.endswith("mlp.experts") for record in found)
    assert not [record for record in report.missed if record.where.endswith("mlp.experts")]
    if name == "DeepSeek-V3":
        fused = {(record.op, record.where.rpartition("mlp.")[2]) for record in report.fused}
        assert {("linear_bf16_fp32", "gate"), ("silu_mul", "shared_experts")} <= fused
