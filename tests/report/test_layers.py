"""Before beside after: every node once, each op beside what it replaced, equal layers folded."""

import json
from collections import Counter

import pytest
import torch

import fusionpass
from fusionpass import Arch, Config
from fusionpass.report.layers import Row, layer_of, layers, rows
from fusionpass.report.nodes import NodeRecord
from fusionpass.report.trace import GraphTrace, PieceRecord, Record, Report
from tests.models import Block
from tests.report.stack import Stack
from tests.report.stack import rows as inputs

SM90 = Config(target=Arch("sm_90"))


def _names(nodes):
    return [node.name for node in nodes]


def _calls(nodes):
    return Counter(node.name for node in nodes if node.text)


@pytest.mark.parametrize("config", [None, SM90, Config(disable=frozenset({"norm.add"}))], ids=["cpu", "sm_90", "less"])
def test_every_node_of_both_graphs_is_in_one_row(config):
    report = fusionpass.explain(Stack(4, odd=(2,)), inputs(), config=config)
    (trace,) = report.graphs
    assert Counter(name for row in rows(trace) for name in _names(row.before)) == _calls(trace.before)
    assert Counter(name for row in rows(trace) for name in _names(row.after)) == _calls(trace.after)
    # Each refused and missed site has a row as well, unless a fused op took its node.
    told = {(row.kind, row.record.node) for row in rows(trace) if row.record is not None}
    assert {(kind, record.node) for kind in ("fused", "missed") for record in getattr(trace, kind)} <= told
    assert len(trace.missed) == 1


def test_an_op_stands_beside_what_it_replaced():
    report = fusionpass.explain(Block(16), torch.randn(3, 16).bfloat16(), torch.randn(3, 16).bfloat16(), config=SM90)
    fused = [row for row in rows(report.graphs[0]) if row.kind == "fused"]
    (row,) = fused
    targets = [node.text.split("(")[0].removesuffix(".default") for node in row.before]
    assert targets == [
        "aten.add.Tensor", "prims.convert_element_type", "aten.pow.Tensor_Scalar", "aten.mean.dim", "aten.add.Tensor",
        "aten.rsqrt", "aten.mul.Tensor", "prims.convert_element_type", "aten.mul.Tensor", "prims.convert_element_type",
        "aten.reciprocal", "aten.mul.Tensor", "aten.clamp_min", "aten.clamp_max", "prims.convert_element_type",
    ]  # fmt: skip
    op, *picked = row.after
    assert op.text.startswith("torch.ops.fusionpass.add_rms_norm_quantize.default(")
    assert {node.text for node in picked} == {f"{op.name}[0]", f"{op.name}[1]"}
    assert row.record.op == "add_rms_norm_quantize"
    assert row.where == "norm"
    assert row.record.source.startswith(f"{__file__.replace('report/test_layers', 'models')}:")


def test_what_a_fused_op_moves_and_what_it_spares():
    tokens, width = 3, 16
    report = fusionpass.explain(
        Block(width), torch.randn(tokens, width).bfloat16(), torch.randn(tokens, width).bfloat16(), config=SM90
    )
    (trace,) = report.graphs
    (row,) = [row for row in rows(trace) if row.kind == "fused"]
    half, full, code, column = 2 * tokens * width, 4 * tokens * width, tokens * width, 4 * tokens
    eager = [
        half + half + half,  # the residual sum
        half + full,  # to float32
        full + full,  # squares
        full + column,  # their mean
        column + column,  # plus eps
        column + column,  # rsqrt
        full + column + full,  # normalised
        full + half,  # to bfloat16
        2 * width + half + half,  # times the weight
        half + full,  # to float32
        4 + 4,  # reciprocal of the scale
        full + 4 + full,  # times it
        full + full,  # clamp, from below
        full + full,  # and above
        full + code,  # to codes
    ]
    fused = half + half + 2 * width + 4 + half + code
    values = {node.name: node for node in (*trace.before, *trace.after)}
    assert row.traffic(values) == (len(eager), sum(eager), fused)


def test_a_symbolic_size_has_no_number_of_bytes():
    block = Block(16)
    fusionpass.compile(block, cuda_graphs="off")
    x = torch.randn(3, 16).bfloat16()
    torch._dynamo.mark_dynamic(x, 0)
    y = torch.randn(3, 16).bfloat16()
    torch._dynamo.mark_dynamic(y, 0)
    with torch.no_grad():
        block(x, y)
    (trace,) = fusionpass.report(block).graphs
    values = {node.name: node for node in (*trace.before, *trace.after)}
    (row,) = [row for row in rows(trace) if row.kind == "fused"]
    assert row.traffic(values) == (15, None, None)


def test_alike_layers_are_folded_and_the_odd_one_is_not():
    report = fusionpass.explain(Stack(6, odd=(3,)), inputs(), config=SM90)
    found = {layer.title: layer.members for layer in layers(report)}
    # The first has no residual sum in front of its norm.
    assert found == {
        "layers.0": ["layers.0"],
        "layers.1": ["layers.1", "layers.2", "layers.4", "layers.5"],
        "layers.3": ["layers.3"],
        "": [""],
    }
    (odd,) = [layer for layer in layers(report) if layer.title == "layers.3"]
    missed = [row for row in odd.rows if row.kind == "missed"]
    assert [(row.record.op, len(row.before)) for row in missed] == [("rms_norm", 1)]
    assert missed[0].before[0].text.startswith("aten.rsqrt.default(")


def test_another_line_another_dtype_or_another_scale_of_an_eps_is_another_layer():
    model = Stack(5)
    model.layers[2].norm.variance_epsilon = 1e-5
    model.layers[3].norm.weight.data = model.layers[3].norm.weight.data.float()
    report = fusionpass.explain(model, inputs(), config=SM90)
    found = {layer.title: layer.members for layer in layers(report)}
    assert found["layers.1"] == ["layers.1", "layers.4"]
    assert found["layers.2"] == ["layers.2"]
    assert found["layers.3"] == ["layers.3"]


def test_pieces_that_share_code_are_members_under_their_own_names():
    model = Stack(4)
    with torch.no_grad():
        fusionpass.compile(model)(inputs())
        names = [member for layer in layers(fusionpass.report(model)) for member in layer.members]
    assert set(names) == {"", *(f"layers.{i}" for i in range(4))}


def test_of_the_cache_come_the_same_layers(tmp_path):
    model = Stack(3, odd=(1,))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        fusionpass.compile(model, cache=True, cache_dir=tmp_path)
        with torch.no_grad():
            model(inputs())
        found.append(layers(fusionpass.report(model)))
        cached = [graph.cached for graph in fusionpass.report(model).graphs]
    assert all(cached)
    assert found[0] == found[1]
    assert [row.kind for layer in found[0] for row in layer.rows].count("missed") == 1


def test_a_trace_comes_back_from_json_as_it_was():
    report = fusionpass.explain(Stack(2, odd=(1,)), inputs(), config=SM90)
    (trace,) = report.graphs
    back = GraphTrace(0)
    back.update(json.loads(json.dumps(trace.to_dict())))
    assert (back.before, back.after) == (trace.before, trace.after)
    assert rows(back) == rows(trace)


def test_a_node_that_nothing_stands_for_any_more_is_beside_nothing():
    trace = GraphTrace(0)
    trace.before = [NodeRecord("x"), NodeRecord("a", "f(x)", inputs=("x",)), NodeRecord("b", "g(a)", inputs=("a",))]
    trace.after = [NodeRecord("x"), NodeRecord("c", "h(x)", inputs=("x",)), NodeRecord("b", "g(c)", inputs=("c",))]
    assert [(_names(row.before), _names(row.after)) for row in rows(trace)] == [
        (["a"], []),
        ([], ["c"]),
        (["b"], ["b"]),
    ]


def test_values_picked_from_an_operator_of_the_model_stay_beside_themselves():
    trace = GraphTrace(0)
    trace.before = [NodeRecord("a", "f()"), NodeRecord("g", "a[0]", inputs=("a",))]
    trace.after = [*trace.before, NodeRecord("g_1", "a[1]", inputs=("a",))]
    assert [(_names(row.before), _names(row.after)) for row in rows(trace)] == [(["a"], ["a", "g_1"]), (["g"], ["g"])]


def test_a_node_that_two_ops_replaced_is_beside_the_first():
    trace = GraphTrace(0)
    trace.before = [NodeRecord(name, f"f({name})") for name in "abc"]
    trace.after = [NodeRecord("p", "op()", replaces=("a", "b")), NodeRecord("q", "op()", replaces=("c", "b"))]
    assert [(_names(row.before), _names(row.after)) for row in rows(trace)] == [(["a", "b"], ["p"]), (["c"], ["q"])]


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.mlp", "model.layers.3"),
        ("model.layers.3", "model.layers.3"),
        ("0.norm", "0"),
        ("down_blocks.0.resnets.1", "down_blocks.0"),
        ("model.norm", ""),
        ("conv2d.weight", ""),
        ("", ""),
    ],
)
def test_layer_of(path, layer):
    assert layer_of(path) == layer


def test_renamed_pieces():
    report = Report("")
    trace = report.new_trace()
    trace.before = trace.after = [NodeRecord("a", "f()", where="layers.1.norm")]
    model = report.new_model_graph()
    model.pieces += [
        PieceRecord("piece_0", 0),
        PieceRecord("piece_1", 0, paths={"layers.1.norm": "layers.7.norm"}),
    ]
    (layer,) = layers(report)
    assert (layer.title, layer.members) == ("layers.1", ["layers.1", "layers.7"])


def test_a_row_is_where_its_record_says():
    node = NodeRecord("a", "f()", where="layers.1.mlp")
    assert Row((node,), ()).where == "layers.1.mlp"
    assert Row((node,), (), "fused", Record("op", "", "", "layers.2.norm")).where == "layers.2.norm"
    assert Row((node,), (), "fused", Record("op", "", "", "")).where == "layers.1.mlp"
