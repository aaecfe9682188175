import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.implementations import bytes_moved
from bench.kernels import verdict
from bench.timing import cold_sets
from fusionpass.ops import add_rms_norm_quantize


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["bench.kernels", "bench.gemm", "bench.tune"])
def test_without_a_gpu_it_says_so(module):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", module], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs a CUDA or ROCm GPU" in done.stderr


def test_bytes_are_counted_once():
    arguments = add_rms_norm_quantize.sample(16, 64, torch.bfloat16, "cpu", torch.Generator())
    bound = add_rms_norm_quantize.bind((), arguments)
    assert bytes_moved(add_rms_norm_quantize, bound) == 7 * 16 * 64 + 2 * 64 + 4


def test_cold_means_three_times_the_cache():
    assert cold_sets(10 << 20, 50 << 20) == 16
    assert cold_sets(4096, 50 << 20) is None


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
