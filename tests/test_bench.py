import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gemm, products
from bench.implementations import argument_sets, bound, bytes_moved, search
from bench.machine import facts
from fusionpass.arch import Arch
from fusionpass.ops import add_rms_norm_quantize, attention, cache_write, qk_norm_rope_cache, silu_mul_quantize
from fusionpass.ops.gemm.stream import Cut
from fusionpass.tuning.timing import cold_sets


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "module", ["bench.kernels", "bench.sample", "bench.gemm", "bench.attention", "bench.moe", "bench.e2e"]
)
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


def test_gate_and_up_are_halves_of_a_row_in_every_set():
    for arguments in argument_sets(silu_mul_quantize, 3, 64, torch.bfloat16, 2, "nvfp4", ("product",), "cpu"):
        gate, up = arguments["gate"], arguments["up"]
        assert gate.stride() == up.stride() == (128, 1)
        assert up.data_ptr() == gate.data_ptr() + 128
        assert arguments["product_out"]
        assert arguments["scheme"] == "nvfp4"
        assert bytes_moved(silu_mul_quantize, arguments) == 3 * 64 * (2 + 2 + 2) + 3 * (32 + 4) + 4


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


def test_vllms_experts_stand_beside_where_they_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = pytest.importorskip("bench.moe")
    given = {"up": "up", "down": "down"}
    monkeypatch.setattr(moe.importlib.util, "find_spec", lambda name: None)
    assert moe.vllm(given) is None
    called: list[Any] = []
    module = SimpleNamespace(fused_experts=lambda *args: called.append(args))
    monkeypatch.setattr(moe.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(moe.importlib, "import_module", lambda name: module)
    moe.vllm(given)({"x": "x", "weights": torch.ones(2, 2).bfloat16(), "ids": torch.zeros(2, 2, dtype=torch.int64)})
    ((x, up, down, weights, ids),) = called
    assert (x, up, down, weights.dtype, ids.dtype) == ("x", "up", "down", torch.float32, torch.int32)


CELL = {
    "scheme": "fp8_token", "columns": 4096, "k": 4096, "copy": 8.0, "auto": "triton", "absent": {},
    "times": {"triton": 10.0, "cublas": 15.0}, "limit": 8.5, "bound": "bytes",
}  # fmt: skip


def test_products_of_a_layer_are_added_up():
    shapes = products.SHAPES["qwen3_8b"]
    cells = [{**CELL, "rows": 8, "columns": n, "k": k} for n, k in shapes]
    made = gemm.layers(cells, ["qwen3_8b", "llama3_70b"])
    (row,) = zip(*(column.cells for column in made.columns), strict=True)
    assert row == ("fp8_token", "8", "qwen3_8b", "32.0", "40.0", "80.0", "60.0", "1.50", "")
    searched = [{**cell, "best": 9.0, "cut": {"columns": 64}} for cell in cells]
    (row,) = zip(*(column.cells for column in gemm.layers(searched, ["qwen3_8b"]).columns), strict=True)
    assert row[-1] == "88.9"
    # A layer of which a product is missing is none.
    assert not gemm.layers(cells[1:], ["qwen3_8b"]).row_count
    (row, *_) = zip(*(column.cells for column in gemm.table(cells).columns), strict=True)
    assert row == ("fp8_token", "8", "6144 × 4096", "8.00", "10.00", "15.00", "triton", "85", "bytes", "40", "", "")


def test_a_run_of_products_is_taken_up(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench.gemm", "--all", "--resume", "--commit", "abc"])
    options = gemm.parse()
    cells = gemm.cells_of(options)
    assert len(cells) == len(set(cells)) == len(gemm.ROWS) * len(products.SCHEMES) * 16
    assert [cell[1] for cell in cells] == sorted(cell[1] for cell in cells)
    file = tmp_path / "gemm.json"
    assert gemm.kept(file, options) == []
    file.write_text(json.dumps({**facts("abc"), "cells": [CELL]}))
    assert gemm.kept(file, options) == [CELL]
    file.write_text(json.dumps({**facts("another"), "cells": [CELL]}))
    assert gemm.kept(file, options) == []


@pytest.mark.parametrize(
    ("scheme", "rows", "expected", "bound"),
    [
        # Codes of both, and a result of 16 bits, at the speed of the copy.
        ("fp8_token", 1, 8.0 * (4096 + 4096**2 + 2 * 4096) / 4096**2, "bytes"),
        ("nvfp4", 1, 8.0 * ((4096 + 4096**2) / 2 + 2 * 4096) / (4096**2 / 2), "bytes"),
        ("fp8_group128", 8192, 2e-6 * 8192 * 4096**2 / 1979, "FLOPs"),
        ("int8_token", 8192, 2e-6 * 8192 * 4096**2 / 1979, "FLOPs"),
        ("mxfp8", 8192, 2e-6 * 8192 * 4096**2 / 989, "FLOPs"),
    ],
)
def test_what_bounds_a_product(scheme, rows, expected, bound, monkeypatch):
    monkeypatch.setattr(Arch, "of", lambda device: Arch("sm_90"))
    assert products.limit(scheme, rows, 4096, 4096, 8.0) == (pytest.approx(expected), bound)
    monkeypatch.setattr(Arch, "of", lambda device: Arch("sm_80"))
    assert products.limit(scheme, rows, 4096, 4096, 8.0) is None
