import dataclasses
import json
import threading

import pytest

from fusionpass import Record, Report
from fusionpass.runtime.notes import ProgramNote

NORM = Record(
    op="add_rms_norm_quantize",
    rule="norm.add_quantize",
    reason="",
    where="model.layers.0.input_layernorm",
    source="llama.py:60, return self.weight * hidden_states",
    scheme="fp8_static",
    backend="triton",
    rules=("norm.llama", "norm.add", "quant.fp8_static", "norm.add_quantize"),
)
OTHER = dataclasses.replace(NORM, where="model.layers.1.input_layernorm")
PLAIN = Record("rms_norm", "norm.llama", "", "model.norm", backend="inductor", rules=("norm.llama",))
REFUSED = Record("add_rms_norm", "norm.add", "x is also read by others", "model.layers.1", "llama.py:311, x = x + y")
MISSED = Record("quantize", "quant.fp8_static", "expected a cast to e4m3", "mlp.down_proj", "mlp.py:7, q = x * s")


def _report(*graphs):
    """A report over graphs, each given by its records: (fused, refused, missed)."""
    report = Report("Tiny")
    for fused, refused, missed in graphs:
        trace = report.new_graph()
        trace.fused += fused
        trace.refused += refused
        trace.missed += missed
    return report


def test_nothing_yet():
    report = Report()
    assert (report.fused, report.refused, report.missed, report.kernels, report.graph_breaks) == ([], [], [], 0, [])
    assert str(report).startswith("fusionpass: nothing compiled yet")


def test_a_site_compiled_again_is_one_record():
    report = _report(([NORM, PLAIN], [], []), ([], [], []), ([NORM, OTHER], [], []))
    assert [(r.where, r.graphs) for r in report.fused] == [
        ("model.layers.0.input_layernorm", (0, 2)),
        ("model.norm", (0,)),
        ("model.layers.1.input_layernorm", (2,)),
    ]
    assert report.count("add_rms_norm_quantize") == 2


def test_equal_sites_of_one_graph_are_several():
    # A module that is called twice, or norms of a function that has no module path.
    report = _report(([NORM, NORM], [], []), ([NORM, NORM, NORM], [], []))
    assert [r.graphs for r in report.fused] == [(0, 1), (0, 1), (1,)]
    assert report.count("add_rms_norm_quantize") == 3


@pytest.mark.parametrize("field", ["op", "rules", "where", "source", "scheme"], ids=lambda name: f"other {name}")
def test_what_differs_is_another_site(field):
    report = _report(([NORM], [], []), ([dataclasses.replace(NORM, **{field: "another"})], [], []))
    assert [r.graphs for r in report.fused] == [(0,), (1,)]


@pytest.mark.parametrize("kind", ["refused", "missed"])
def test_refused_and_missed_are_merged_too(kind):
    report = Report()
    for _ in range(2):
        getattr(report.new_graph(), kind).append(REFUSED)
    assert getattr(report, kind) == [dataclasses.replace(REFUSED, graphs=(0, 1))]


def test_reading_a_report_changes_nothing():
    report = _report(([NORM], [REFUSED], [MISSED]))
    assert report.to_dict() == report.to_dict()
    assert report.graphs[0].fused == [NORM]


def test_count():
    token = dataclasses.replace(NORM, scheme="fp8_token", where="b", rules=("norm.llama", "norm.quantize"))
    report = _report(([NORM, OTHER, token, PLAIN], [REFUSED], [MISSED]))
    assert report.count("add_rms_norm_quantize") == 3
    assert report.count("add_rms_norm_quantize", scheme="fp8_static") == 2
    assert report.count("add_rms_norm_quantize", scheme="fp8_token") == 1
    assert report.count("add_rms_norm_quantize", scheme="int8_token") == 0
    assert report.count("add_rms_norm_quantize", rule="norm.llama") == 3
    assert report.count("add_rms_norm_quantize", rule="norm.add") == 2
    assert report.count("add_rms_norm_quantize", scheme="fp8_token", rule="norm.add") == 0
    assert report.count("rms_norm", scheme="") == 1
    assert report.count("add_rms_norm") == report.count("quantize") == 0, "refused and missed run no op"


def test_to_dict_is_json():
    report = _report(([NORM], [REFUSED], []), ([NORM], [], [MISSED]))
    report.graphs[0].kernels = 3
    report.model_graphs[1].graph_break = "print"
    report.graphs[1].skipped = "it has a backward"
    report.model_graphs[0].replay = ProgramNote("graph 0", "full", without={"w moved": 2}, recaptures={"w moved": 1})
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(report.to_dict()))
    assert plain["title"] == "Tiny"
    assert plain["model_graphs"][0]["replay"]["without"] == {"w moved": 2}
    assert plain["kernels"] == 3
    assert plain["graphs"][1] == {"index": 1, "kernels": 0, "skipped": "it has a backward", "cached": False}
    assert plain["model_graphs"][1]["graph_break"] == "print"
    assert [piece["graph"] for piece in plain["model_graphs"][1]["pieces"]] == [1]
    (fused,) = json.loads(json.dumps(plain))["fused"]
    assert fused == {
        "op": "add_rms_norm_quantize",
        "rule": "norm.add_quantize",
        "reason": "",
        "where": "model.layers.0.input_layernorm",
        "source": "llama.py:60, return self.weight * hidden_states",
        "scheme": "fp8_static",
        "backend": "triton",
        "rules": ["norm.llama", "norm.add", "quant.fp8_static", "norm.add_quantize"],
        "graphs": [0, 1],
        "node": "",
    }
    assert [r["reason"] for kind in ("refused", "missed") for r in plain[kind]] == [REFUSED.reason, MISSED.reason]


def test_text_counts_what_fused_and_names_what_did_not():
    report = _report(([NORM, OTHER, PLAIN], [REFUSED], [MISSED]))
    report.graphs[0].kernels = 5
    report.new_graph("call to print")
    report.new_graph().skipped = "it has a backward"
    assert str(report).splitlines() == [
        "Tiny: 3 fused, 1 refused, 1 missed; 3 graphs, 5 kernels",
        "     2 x add_rms_norm_quantize fp8_static (triton)",
        "     1 x rms_norm (inductor)",
        "  graph break: call to print",
        "  graph 2 left alone: it has a backward",
        "refused:",
        "  model.layers.1: add_rms_norm [norm.add] x is also read by others",
        "      at llama.py:311, x = x + y",
        "missed:",
        "  mlp.down_proj: quantize [quant.fp8_static] expected a cast to e4m3",
        "      at mlp.py:7, q = x * s",
    ]


def test_text_of_a_record():
    assert str(PLAIN) == "model.norm: rms_norm [norm.llama, inductor]"
    assert str(dataclasses.replace(MISSED, where="")) == (
        "<no module>: quantize [quant.fp8_static] expected a cast to e4m3"
    )


def test_graphs_of_several_threads_have_their_own_numbers():
    report, barrier = Report(), threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(200):
            report.new_graph()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [graph.index for graph in report.graphs] == list(range(1600))


def test_a_site_that_another_backend_runs_elsewhere_is_one_record():
    other = dataclasses.replace(NORM, backend="other", reason="because")
    report = _report(([NORM], [], []), ([other], [], []))
    (record,) = report.fused
    assert record.graphs == (0, 1)
    assert record.backend == f"{NORM.backend}, other"
    assert record.reason == f"graph 0: {NORM.reason}; graph 1: because"
    assert report.count(NORM.op) == 1
