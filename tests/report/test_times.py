"""Times of fused ops: each distinct one, beside what it replaced, in the report, the page's data and the table."""

import json

import pytest
import torch
from rich.console import Console

import fusionpass
from fusionpass import cli
from fusionpass.commands.explain import show
from fusionpass.report import times
from fusionpass.report.html import contents
from fusionpass.report.layers import layers
from fusionpass.report.nodes import NodeRecord
from fusionpass.report.show import describe, parsed_type
from tests.report.stack import Stack, rows


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    report = fusionpass.explain(Stack(3), rows())
    report.measure("cpu")
    return report


def test_each_distinct_fused_op_has_its_times(measured):
    distinct = [(layer.graph, row.name) for layer in layers(measured) for row in layer.rows if row.kind == "fused"]
    assert list(measured.times) == distinct
    assert len(distinct) < len(measured.fused), "alike layers are measured once"
    for time in measured.times.values():
        assert (time.why, time.device) == ("", "CPU")
        assert 0 < time.us < 1e6
        assert 0 < time.replaced_us < 1e6


def test_the_page_and_the_table_tell_them(measured):
    drawn = [row for layer in contents(measured)["layers"] for row in layer["rows"] if "time" in row]
    assert [row["time"]["us"] for row in drawn] == [time.us for time in measured.times.values()]
    assert all(row["kind"] == "fused" for row in drawn)
    assert [told["us"] for told in json.loads(json.dumps(measured.to_dict()))["times"]] == [
        time.us for time in measured.times.values()
    ]
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(measured, console)
    text = console.export_text()
    for time in measured.times.values():
        assert str(time) in text


def test_both_programs_compute_the_same(monkeypatch):
    """What is timed is the op and what it replaced: on the same inputs they agree."""
    pairs = []

    def program(nodes, results, values, device):
        pairs.append(made(nodes, results, values, device))
        return pairs[-1]

    made = times._program
    monkeypatch.setattr(times, "_program", program)
    monkeypatch.setattr(times, "_median_us", lambda *_: 1.0)
    monkeypatch.setattr(times, "_traced", lambda function, inputs: torch.nn.Module())
    report = fusionpass.explain(Stack(2), rows())
    report.measure("cpu")
    assert len(pairs) == 2 * len(report.times) > 0
    for (replaced, given), (op, _) in zip(pairs[::2], pairs[1::2], strict=True):
        with torch.no_grad():
            before = replaced(*given)
            after = torch.utils._pytree.tree_leaves(op(*given))
        for value in before:
            assert any(value.dtype == one.dtype and torch.equal(value.double(), one.double()) for one in after)


def test_symbolic_sizes_are_not_measured_and_it_says_why():
    model = Stack(1)
    x = rows(6)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        fusionpass.compile(model, cuda_graphs="off")(x)
    report = fusionpass.report(model)
    report.measure("cpu")
    assert report.times
    for time in report.times.values():
        assert time.us is None
        assert "of which there are no random values" in time.why
        assert str(time).startswith("not measured: ValueError: ")


@pytest.mark.parametrize(
    "value",
    [torch.empty(3, 5).bfloat16(), torch.empty(()), torch.empty(4, 6).t(), torch.empty(1, 8).expand(4, 8),
     torch.empty(0, 3, dtype=torch.int64), torch.empty(2, dtype=torch.float8_e4m3fn),
     torch.empty(2, dtype=torch.int16)],
)  # fmt: skip
def test_a_type_is_read_as_it_was_written(value):
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = value
    assert parsed_type(describe(node)) == (tuple(value.shape), value.stride(), value.dtype)


@pytest.mark.parametrize("text", ["", "s0", "bf16[s0, 3]", "bf16[3], f32[3]"])
def test_what_is_no_tensor_of_known_size_has_none(text):
    assert parsed_type(text) is None
    with pytest.raises(ValueError, match="no random values"):
        list(times._inputs(["x"], {"x": NodeRecord("x", type=text)}))


def test_the_command_measures_this_machine_alone(capsys):
    command = ["explain", "tests.commands.factories:keyword", "--measure"]
    assert cli.main([*command, "--target", "gfx942"]) == 2
    assert "times are measured on this machine" in capsys.readouterr().err
