"""fusionpass explain: a table per distinct layer, what did not fuse first, and what to change."""

import json

import pytest
from rich.console import Console

import fusionpass
from fusionpass import Arch, Config, cli
from fusionpass.commands.explain import show
from fusionpass.report.advice import advise
from fusionpass.report.trace import Record
from tests.report.stack import Stack, rows


@pytest.fixture
def printed():
    def text(report, **options):
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        show(report, console, **options)
        return console.export_text()

    return text


def _tables(text):
    """Title, and the rows as lists of cells; a cell's further lines are joined."""
    found, title = {}, ""
    for line in text.splitlines():
        if line[:1] not in "│┃┏┡└├" or not line:
            title = line.strip() or title
        elif line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[0]:
                found.setdefault(title, []).append(cells)
            else:
                last = found[title][-1]
                found[title][-1] = [f"{a} {b}".strip() for a, b in zip(last, cells, strict=True)]
    return found


def test_a_table_for_each_distinct_layer(printed):
    report = fusionpass.explain(Stack(6, odd=(3,)), rows(), config=Config(target=Arch("sm_90")))
    tables = _tables(printed(report))
    assert list(tables) == ["layers.0", "layers.1 and 3 alike", "layers.3", "outside of layers"]
    assert tables["layers.1 and 3 alike"] == [
        ["fused", "add_rms_norm_quantize fp8_static", "triton", "norm", ""],
        ["fused", "scaled_mm", "triton", "layers.1", ""],
    ]
    odd = tables["layers.3"]
    assert [row[0] for row in odd] == ["missed", "fused", "fused", "fused"]
    assert odd[0][1] == "rms_norm"
    assert "expected a cast to float32, found aten.add.Tensor" in odd[0][4]
    assert "→ Write a cast to float32 there, where the model has aten.add.Tensor, or add a spelling" in odd[0][4]
    assert "h * torch.rsqrt(" in odd[0][4], "and the line"


def test_a_table_for_every_layer(printed):
    report = fusionpass.explain(Stack(12), rows(), config=Config(target=Arch("sm_90")))
    tables = _tables(printed(report, every=True))
    assert list(tables) == [*(f"layers.{i}" for i in range(12)), "outside of layers"]
    assert sum(map(len, tables.values())) == len(report.fused)


def test_counts_and_graph_breaks(printed):
    report = fusionpass.Report("x")
    report.new_graph("call to [print]")
    text = printed(report)
    assert "0 fused, 0 refused, 0 missed" in text
    assert "graph break: call to [print]" in text, "no markup"


def test_the_command(tmp_path, capsys):
    page, plain = tmp_path / "page.html", tmp_path / "report.json"
    options = ["--target", "sm_90", "--html", str(page), "--json", str(plain)]
    assert cli.main(["explain", "tests.commands.factories:stack", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Stack for sm_90\n")
    assert "layers.2" in out
    assert "10 fused, 0 refused, 1 missed" in out
    assert page.read_text().startswith("<!doctype html>")
    assert len(json.loads(plain.read_text())["missed"]) == 1


def test_mistakes_are_told_without_a_traceback(capsys):
    assert cli.main(["explain", "nothing/here"]) == 2
    assert capsys.readouterr().err.startswith("fusionpass explain: nothing/here: there is no such folder or file.")
    assert cli.main(["explain", "tests.commands.factories:stack", "--target", "sm90"]) == 2
    assert "sm_90" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("norm.add is disabled by Config.disable", 'Take "norm.add" out of Config.disable (FUSIONPASS_DISABLE).'),
        (
            "matched 6 of 8 nodes, then at mul: expected a cast to bfloat16 to read it, found aten.relu.default",
            "Let a cast to bfloat16 follow mul directly, where the model has aten.relu.default, or add",
        ),
        (
            "matched 1 of 2 nodes, then at b: it has a second output",
            "Spell it as the rule does (it has a second output)",
        ),
        (
            "rsqrt is also read by tanh, outside; the op would compute it twice",
            "Let tanh read what the op returns, not",
        ),
        ("mul_3 is computed after add_2 reads the residual", "Compute mul_3 before add_2"),
        ("copy_ writes to memory in between", "Do the write in place (copy_) before the site"),
        ("weight has shape (4, 32), x has width 32", "Use a weight of 32 elements"),
        ("it is quantised as fp8_token already", "Quantise all that read this tensor with one scheme"),
        ("the op would return strides (1, 2), the graph has (2, 1)", "Lay the input out contiguously"),
        ("verify: on zero inputs q differs in 1 of 3 elements, by up to 1 ulp", "The rewrite gave other numbers"),
        ("anything else at all", "Change what the reason names, or add a spelling of your own"),
    ],
)
def test_advice(reason, advice):
    record = Record("rms_norm", "norm.llama", reason, "a.b")
    for kind in ("refused", "missed"):
        assert advise(kind, record).startswith(advice)


def test_what_runs_well_needs_no_advice():
    assert advise("fused", Record("rms_norm", "norm.llama", "", "a", backend="triton")) == ""
