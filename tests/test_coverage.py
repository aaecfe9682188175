"""The coverage table: that it counts what a model reads, believes no report beyond that, and is not stale."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusionpass
from bench.coverage import TARGET, Outcome, document, judge, outcomes, stale, stand_ins, unknown
from bench.sites import Site, sites
from fusionpass import Config, Record, Report
from fusionpass.quantize import QuantizedLinear
from tests.families import FAMILIES
from tests.models import LlamaNorm
from tests.profiles import NIGHTLY

F = nn.functional
WIDTH = 64


class OddNorm(nn.Module):
    """A norm that no rule knows."""

    def forward(self, x):
        return x / x.abs().sum(-1, keepdim=True)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.post, self.odd = LlamaNorm(WIDTH), LlamaNorm(WIDTH), OddNorm()
        (
            self.q,
            self.k,
            self.o,
            self.gate,
            self.up,
            self.down,
            self.mixed,
            self.act,
            self.last,
            self.raw,
            self.head,
            self.out,
        ) = (nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(12))
        self.silu, self.inner, self.final = nn.SiLU(), LlamaNorm(WIDTH), LlamaNorm(WIDTH)

    def forward(self, x):
        raw = self.raw(x)
        h = self.norm(x + raw)
        q, k = self.q(h.view(-1, WIDTH)).view(x.shape), self.k(h.transpose(0, 1).contiguous()).transpose(0, 1)
        heads = F.scaled_dot_product_attention(*(t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (q, k, k)))
        x = x + self.post(self.o(heads.transpose(1, 2).flatten(2)))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x) * 2)
        modulated = self.norm(x) * (1 + q[:, :1]) + k[:, :1]
        modulated = modulated.float().bfloat16()
        x = self.last(self.act(self.silu(x)) + self.mixed(modulated)) + self.inner(self.head(self.odd(x)))
        return self.out(self.final(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x):
        return self.layer(x)


def build():
    torch.manual_seed(0)
    return Model().eval(), {"x": torch.randn(2, 6, WIDTH).bfloat16()}


@pytest.fixture
def quantised():
    model, inputs = build()
    fusionpass.quantize_(model, "fp8_static", [inputs])
    return model, inputs


def test_every_linear_reads_something_of_a_kind(quantised):
    found = sites(*quantised)
    named = {
        tuple(path.removeprefix("layer.") for path in site.linears): (site.kind, site.where, set(site.norms))
        for site in found
    }
    lines = Path(__file__).read_text().splitlines()
    read = {
        place: {lines[int(line.rpartition(":")[2]) - 1].strip() for at, line in site.places if at == place}
        for site in found
        for place in ("layer", "layer.norm")
        if "layer.mixed" in site.linears
    }
    assert read == {
        "layer": {
            "modulated = self.norm(x) * (1 + q[:, :1]) + k[:, :1]",
            "modulated = modulated.float().bfloat16()",
        },
        "layer.norm": set(),
    }
    assert named == {
        ("raw",): ("other", "", set()),
        ("q", "k"): ("norm", "layer.norm", {"layer.norm"}),
        ("o",): ("attention", "layer", set()),
        # The output of a norm was just added to the residual stream.
        ("gate", "up"): ("sum", "layer", {"layer.post"}),
        ("down",): ("activation", "layer", set()),
        ("act",): ("activation", "layer.silu", set()),
        ("mixed",): ("sum", "layer", {"layer.norm"}),
        ("last",): ("other", "layer", set()),
        ("head",): ("norm", "layer.odd", {"layer.odd"}),
        # What may run inside one op with it.
        ("out",): ("norm", "layer.final", {"layer.final", "layer.inner"}),
    }


def test_one_activation_of_one_tensor_is_one_site():
    class Twice(nn.Module):
        def __init__(self, second: nn.Module) -> None:
            super().__init__()
            self.first, self.second = nn.SiLU(), second
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            return self.a(self.first(x)) + self.b(self.second(x)) + self.c(self.first(x + 1))

    for second, expected in ((nn.SiLU(), [("a", "b"), ("c",)]), (nn.ReLU(), [("a",), ("b",), ("c",)])):
        model, inputs = Twice(second), {"x": torch.randn(3, WIDTH)}
        fusionpass.quantize_(model, "fp8_static", [inputs])
        assert [site.linears for site in sites(model, inputs)] == expected


def test_counting_leaves_the_model_as_it_was(quantised):
    model, inputs = quantised
    with torch.no_grad():
        before = model(**inputs)
        sites(model, inputs)
        assert torch.equal(model(**inputs), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_quantised_linears_count(quantised):
    model, inputs = quantised
    model.layer.head = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    assert isinstance(model.layer.q, QuantizedLinear)
    assert not [site for site in sites(model, inputs) if site.where == "layer.odd"]


def test_a_hand_made_model_end_to_end():
    made = outcomes(SimpleNamespace(name="Hand-made", skip=(), build=build), ["fp8_static"])
    norms = {o.site.where: o for o in made if o.site.kind == "norm"}
    assert norms["layer.norm"].fused
    assert norms["layer.final"].fused
    assert not norms["layer.odd"].fused
    assert [reason for reason in norms["layer.odd"].reasons if reason.startswith("quantize: no rule folds it into")]
    page = document(made)
    assert "| Norms that feed a quantised linear | 1 | 0 | 2/3, 66.7 % | 2/3, 66.7 % |" in page
    assert "| Hand-made | 2/3 |" in page


@pytest.mark.parametrize("scheme", ["fp8_token", "nvfp4"])
def test_the_stand_ins_leave_the_graph_in_front_of_the_products_alone(scheme):
    model, inputs = build()
    fusionpass.quantize_(model, scheme, [inputs] if scheme == "nvfp4" else None)
    plain = fusionpass.explain(model, **inputs, config=Config(target=TARGET))
    with stand_ins(scheme):
        short = fusionpass.explain(model, **inputs, config=Config(target=TARGET))
    sites_of = [
        [(r.op, r.rule, r.where, r.scheme) for r in made.fused if "scaled_mm" not in r.op] for made in (plain, short)
    ]
    assert sites_of[0] == sites_of[1]
    assert "coverage.product" in short.graphs[0].snapshots[0][1]


NORM = Site("norm", "layers.0.norm", "LlamaNorm", frozenset({"layers.0.norm"}), ("layers.0.q", "layers.0.k"))
SUM = Site("sum", "layers.0", "add", frozenset({"layers.0.post"}), ("layers.0.q",))
GATED = Site("activation", "layers.0.mlp", "mul", frozenset(), ("layers.0.mlp.down",))


def report(kind: str, **record: str) -> Report:
    made = Report()
    getattr(made.new_graph(), kind).append(Record(**{"op": "", "rule": "", "reason": "", "where": ""} | record))
    return made


@pytest.mark.parametrize(
    ("site", "record", "fused"),
    [
        (NORM, {"op": "rms_norm_quantize", "where": "layers.0.norm", "scheme": "fp8_token"}, True),
        (NORM, {"op": "rms_norm_quantize", "where": "layers.0.norm", "scheme": "fp8_token,rounding=divide"}, True),
        (NORM, {"op": "rms_norm_quantize", "where": "layers.0.norm", "scheme": "fp8_static"}, False),
        (NORM, {"op": "rms_norm_quantize", "where": "layers.1.norm", "scheme": "fp8_token"}, False),
        (NORM, {"op": "rms_norm_quantize", "where": "layers.0", "scheme": "fp8_token"}, False),
        (NORM, {"op": "rms_norm", "where": "layers.0.norm"}, False),
        (NORM, {"op": "silu_mul_quantize", "where": "layers.0.norm", "scheme": "fp8_token"}, False),
        (NORM, {"op": "quantize", "where": "layers.0.q", "scheme": "fp8_token"}, False),
        (NORM, {"op": "add_quantize", "where": "layers.0.q", "scheme": "fp8_token"}, False),
        (SUM, {"op": "add_quantize", "where": "layers.0.q", "scheme": "fp8_token"}, True),
        (SUM, {"op": "rms_norm_add_quantize", "where": "layers.0.post", "scheme": "fp8_token"}, True),
        (SUM, {"op": "silu_mul_quantize", "where": "layers.0", "scheme": "fp8_token"}, False),
        (GATED, {"op": "silu_mul_quantize", "where": "layers.0.mlp", "scheme": "fp8_token"}, True),
        (GATED, {"op": "silu_mul_quantize", "where": "layers.0.mlp.act", "scheme": "fp8_token"}, True),
        (GATED, {"op": "silu_mul_quantize", "where": "layers.0.mlp2", "scheme": "fp8_token"}, False),
        (GATED, {"op": "rms_norm_quantize", "where": "layers.0.mlp", "scheme": "fp8_token"}, False),
    ],
)
def test_what_counts_as_fused(site, record, fused):
    ((found, _),) = judge([site], report("fused", **record), "fp8_token")
    assert found is fused


def test_reasons_are_those_of_the_norm_and_of_its_readers():
    told = {
        "fused": {"op": "quantize", "reason": "nothing folds", "where": "layers.0.k"},
        "missed": {"rule": "norm.llama", "reason": "at getitem_4 on sm_90: no", "where": "layers.0.norm"},
        "refused": {"rule": "norm.llama", "reason": "too wide", "where": "layers.0.norm"},
    }
    expected = ["quantize: nothing folds", "norm.llama missed: at getitem on sm_90: no", "norm.llama refused: too wide"]
    for (kind, record), reason in zip(told.items(), expected, strict=True):
        assert judge([NORM], report(kind, **record), "fp8_token") == [(False, (reason,))]
        assert judge([NORM], report(kind, **record | {"where": "layers.1"}), "fp8_token") == [(False, ("nothing",))]


def test_one_op_accounts_for_one_site():
    sums = [Site("sum", "layers.0", "add", frozenset({f"layers.0.{name}"}), ()) for name in ("first", "second")]
    made = report("fused", op="rms_norm_add_quantize", where="layers.0", scheme="fp8_token")
    assert [fused for fused, _ in judge(sums, made, "fp8_token")] == [True, False]
    made.graphs[0].fused.append(Record("layer_norm_quantize", "", "", "layers.0.second", scheme="fp8_token"))
    assert [fused for fused, _ in judge(sums, made, "fp8_token")] == [True, True]
    # The same, though the first could also have taken the second's.
    both = Site("norm", "layers.0.third", "Norm", frozenset({"layers.0.third", "layers.0.second"}), ())
    assert [fused for fused, _ in judge([both, sums[1]], made, "fp8_token")] == [True, True]
    assert not unknown(sums, made)


def test_two_sites_of_one_module_are_told_apart_by_their_lines():
    where, op = "layers.0", "layer_norm_quantize"
    both = [
        Site(kind, place, "", frozenset({f"layers.0.{kind}"}), (), frozenset({(where, f"model.py:{line}")}))
        for kind, place, line in (("sum", where, 7), ("norm", "layers.0.norm", 9))
    ]
    for line, expected in ((7, [True, False]), (9, [False, True])):
        made = report("fused", op=op, where=where, scheme="fp8_token", source=f"model.py:{line}, x = f(x, y)")
        assert [fused for fused, _ in judge(both, made, "fp8_token")] == expected


def test_a_norm_that_the_count_does_not_know_is_named():
    record = {"op": "rms_norm_quantize", "where": "layers.0.norm"}
    assert not unknown([NORM], report("fused", **record))
    assert unknown([GATED], report("fused", **record))


def test_the_totals():
    made = [
        Outcome(family, scheme, NORM, fused, () if fused else ("why | not",))
        for family, scheme, fused in [("A", "s", True), ("A", "t", True), ("B", "s", True), ("B", "t", False)]
    ]
    page = document(made)
    title = "Norms that feed a quantised linear"
    assert f"| {title} | 2 | 1 | 2/2, 100.0 % | 1/2, 50.0 % | 3/4, 75.0 % |" in page
    assert "| B | 1/1 | 0/1 |" in page
    assert "| why ¦ not | 1 | t | B |" in page


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is not installed")
@pytest.mark.timeout(1800)
def test_the_page_is_not_stale():
    root = Path(__file__).parent.parent
    # By day every twelfth family; tests/report/test_dumped_families.py takes others.
    chosen = [option for family in FAMILIES[:: 1 if NIGHTLY else 12] for option in ("--family", family.name)]
    command = [sys.executable, "-m", "bench.coverage", "--check", "--sample", *chosen]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is not installed")
def test_what_is_stale_is_named():
    def of(family: str, scheme: str, *reasons: str) -> Outcome:
        return Outcome(family, scheme, NORM, not reasons, reasons)

    page = document([of("A", "s"), of("A", "t"), of("B", "s"), of("B", "t", "why | not")])
    assert not stale(page, [of("A", "s"), of("B", "t", "why | not")])
    where = "Norms that feed a quantised linear"
    assert stale(page, [of("A", "t"), of("A", "t")]) == [f"{where}, A, t: 1/1, now 2/2"]
    assert stale(page, [of("B", "t", "other")]) == [f"{where}, B, t: now other"]
    assert stale(page, [of("C", "s")]) == [f"{where}, C, s: –, now 1/1"]
    other = Outcome("A", "s", Site("sum", "", "", frozenset(), ()), True, ())
    assert stale(page, [other]) == [f"{where}, A, s: 1/1, now –", "Norms with arithmetic behind them, A, s: –, now 1/1"]
