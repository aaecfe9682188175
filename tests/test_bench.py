import importlib
import json
import sys

import pytest
import torch

from bench.implementations import bound, bytes_moved, search
from bench.kernels import record, regimes, verdict
from fusionpass.arch import Arch
from fusionpass.ops import add_rms_norm_quantize, attention, cache_write, qk_norm_rope_cache
from fusionpass.ops.gemm.stream import Cut
from fusionpass.tuning.timing import cold_sets


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["bench.kernels", "bench.gemm", "bench.attention", "bench.moe", "bench.e2e"])
def test_without_a_gpu_it_says_so(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(SystemExit, match="needs a CUDA or ROCm GPU"):
        importlib.import_module(module).main()


def test_bytes_are_counted_once():
    arguments = add_rms_norm_quantize.sample(16, 64, torch.bfloat16, "cpu", torch.Generator())
    bound = add_rms_norm_quantize.bind((), arguments)
    assert bytes_moved(add_rms_norm_quantize, bound) == 7 * 16 * 64 + 2 * 64 + 4


def test_of_a_cache_the_new_rows_count():
    arguments = cache_write.sample(16, 256, torch.bfloat16, "cpu", torch.Generator())
    rows = arguments["x"].numel() * 2
    assert arguments["cache"].numel() * 2 > rows
    assert bytes_moved(cache_write, cache_write.bind((), arguments)) == 2 * rows + 8 * 16
    both = qk_norm_rope_cache.bind((), qk_norm_rope_cache.sample(16, 256, torch.bfloat16, "cpu", torch.Generator()))
    sizes = {name: v.numel() * v.element_size() for name, v in both.items() if isinstance(v, torch.Tensor)}
    read = sum(size for name, size in sizes.items() if "cache" not in name)
    assert bytes_moved(qk_norm_rope_cache, both) == read + sizes["q"] + sizes["k"] + sizes["v"]


def test_launches_that_share_a_buffer_are_bound_to_one():
    q, k, v = (torch.zeros(1, heads, tokens, 64).bfloat16() for heads, tokens in ((8, 1), (2, 4096), (2, 4096)))
    launch, _ = attention.plan(Arch("sm_90"), attention.bind((q, k, v), {}))
    (_, first), (_, second) = bound(launch)
    assert first["sums"] is second["sums"]
    assert first["sums"] is not first["peaks"]
    assert first["k"] is k


def test_a_search_names_the_best_and_what_failed():
    def timed(cut):
        if cut.splits == 3:
            raise ValueError("too many")
        return float(abs(cut.splits - 2)) + cut.depth

    assert search(timed, []) == {}
    found = search(timed, [Cut(8, 16, splits) for splits in (1, 2, 3, 4)])
    assert (found["best"], found["cut"]["splits"]) == (16.0, 2)
    assert list(found["failed"].values()) == ["ValueError: too many"]
    assert search(timed, [Cut(8, 16, 3)]) == {"failed": {str(Cut(8, 16, 3)): "ValueError: too many"}}


def test_cold_means_three_times_the_cache():
    assert cold_sets(10 << 20, 50 << 20) == 16
    assert cold_sets(4096, 50 << 20) is None


def test_tokens_of_a_decode_step_are_usually_warm():
    assert regimes(64, 30, "usual") == regimes(64, 30, "warm") == {"warm": 1}
    assert regimes(1024, 30, "usual") == regimes(1024, 30, "cold") == {"cold": 30}
    assert regimes(1024, None, "usual") == {}
    assert regimes(64, 30, "both") == {"warm": 1, "cold": 30}


def test_a_cell_measured_again_takes_the_place_of_the_old_one(tmp_path):
    def cell(tokens, us):
        key = {"op": "rms_norm", "scheme": None, "dtype": "bfloat16", "tokens": tokens, "hidden": 64, "regime": "warm"}
        return {**key, "results": {"fusionpass": {"us": us}}}

    record(tmp_path / "k.json", [cell(1, 1.0), cell(8, 2.0)], {"commit": "old"})
    record(tmp_path / "k.json", [cell(8, 3.0)], {"commit": "new"})
    found = json.loads((tmp_path / "k.json").read_text())["cells"]
    assert [(c["tokens"], c["results"]["fusionpass"]["us"], c["commit"]) for c in found] == [
        (1, 1.0, "old"),
        (8, 3.0, "new"),
    ]


def test_the_verdict_names_the_worst_cell():
    def cell(tokens, ours, inductor):
        results = {"fusionpass": {"us": ours}, "inductor+pdl": {"us": inductor}, "copy": {"us": ours}}
        return {"tokens": tokens, "hidden": 64, "regime": "warm", "results": results}

    text = verdict([cell(1, 1.0, 4.0), cell(8, 1.0, 1.0)])
    assert text.splitlines()[0] == "warm: 2.000 × the speed of inductor+pdl; least 1.000 at 8 × 64"


def test_the_matcher_is_timed_on_a_graph_that_fuses():
    from bench.matcher import measure, stack
    from fusionpass.passes.normalize import normalize
    from fusionpass.passes.recognise import recognise
    from fusionpass.report import GraphTrace
    from fusionpass.rules import SPELLINGS

    graph, trace = stack(200), GraphTrace(0)
    assert 200 <= len(graph.nodes) < 240
    normalize(graph)
    recognise(graph, SPELLINGS, trace)
    assert not trace.refused
    assert not trace.missed
    assert {"nodes", "normalize", "recognise", "fuse"} == measure(50).keys()
