"""What a search leaves out and refuses: each reason, by a configuration that has it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusionpass.arch import Arch
from fusionpass.ops.gemm.blocks_triton import Cut as Block
from fusionpass.ops.gemm.stream import Cut as Stream
from fusionpass.tuning import gpu
from fusionpass.tuning.families import TUNABLES
from fusionpass.tuning.rows import Cut as Row
from fusionpass.tuning.search import Job
from fusionpass.tuning.tunable import Footprint, meta

H100 = Arch("sm_90")
BLOCKS = {"N": 6144, "K": 4096, "dtype": "fp8_w8a8", "block_shape": [128, 128]}
STREAM = {"N": 6144, "K": 4096, "dtype": "fp8_row"}
EXPERTS = {"E": 8, "N": 256, "dtype": "fp8_w8a8", "block_shape": [128, 128], "hidden": 512, "top": 2}
WIDE = {"width": 4096, "scheme": None, "bytes": 2}


def pruned(op: str, key: dict[str, Any], m: int, cut: Any, **changed: Any) -> str | None:
    tunable = replace(TUNABLES[op], **changed)
    return tunable.prune(H100, key, m, meta(tunable, key, m, torch.bfloat16), cut)


@pytest.mark.parametrize(
    ("op", "key", "m", "cut", "reason"),
    [
        ("block_scaled_mm", BLOCKS, 8, Block(1, 8, 512, 1, 1, 8, 1), "rows: one row has its own program"),
        ("block_scaled_mm", BLOCKS, 64, Block(64, 32, 128, 2, 8, 4, 3), "splits: there are 192 programs"),
        ("block_scaled_mm", BLOCKS, 1, Block(1, 2, 256, 1, 1, 8, 1), "columns: less than 4 bytes"),
        ("block_scaled_mm", BLOCKS, 8, Block(32, 64, 128, 1, 1, 4, 3), "rows: there are 8"),
        ("block_scaled_mm", BLOCKS, 128, Block(32, 64, 128, 1, 1, 4, 3), "rows: a tile of less than half"),
        ("block_scaled_mm", {**BLOCKS, "N": 512}, 8, Block(16, 256, 128, 1, 1, 4, 3), "tile: less than a quarter"),
        ("block_scaled_mm", BLOCKS, 8, Block(16, 32, 128, 1, 1, 8, 3), "warps: less than 8 sums"),
        ("scaled_mm", STREAM, 8, Stream(64, 256, 1, 4, 1), "rows: one row has its own program"),
        ("scaled_mm", STREAM, 1, Stream(2, 512, 1, 8, 1), "tile: a program reads 2 to 16 KiB"),
        ("scaled_mm", STREAM, 8, Stream(32, 128, 1, 2, 3), "tile: 48 to 128 KiB"),
        ("scaled_mm", {**STREAM, "N": 24576}, 8, Stream(64, 256, 2, 4, 3), "splits: there are 384 programs"),
        ("scaled_mm", {**STREAM, "N": 512}, 8, Stream(64, 256, 1, 4, 3), "splits: there would be too few"),
        ("experts", EXPERTS, 4, Block(32, 64, 128, 1, 1, 4, 3), "rows: an expert has about 1"),
        ("experts", EXPERTS, 4, Block(16, 64, 128, 1, 8, 4, 3), "grouped: blocks of rows"),
        ("experts", EXPERTS, 4, Block(16, 32, 128, 1, 1, 8, 3), "warps: less than 8 sums"),
        ("rms_norm", WIDE, 8, Row(1, 4096, 1), "elements: 128 for each thread"),
        ("rms_norm", WIDE, 8, Row(4, 2048, 16), "elements: parts of rows"),
    ],
)
def test_what_is_not_worth_a_try(op: str, key: dict[str, Any], m: int, cut: Any, reason: str) -> None:
    assert (pruned(op, key, m, cut) or "").startswith(reason)


@pytest.mark.parametrize(
    ("footprint", "reason"),
    [
        (Footprint(0, 0, 64), "threads: a program has 1024 at most, not 2048"),
        (Footprint(228 << 10, 0, 4), "shared memory: about 228 KiB, and sm_90 has 227"),
        (Footprint(0, 256, 4), "registers: about 256 a thread, of 255"),
        (Footprint(0, 129, 16), "registers: about 129 a thread, of 128"),
    ],
)
def test_what_does_not_fit(footprint: Footprint, reason: str) -> None:
    assert pruned("rms_norm", WIDE, 8, Row(1, 4096, 8), footprint=lambda *_: footprint) == reason


@pytest.mark.parametrize(
    ("op", "key", "reason"),
    [
        ("rms_norm", {**WIDE, "width": 256}, "differs in 1 of 512 elements"),
        ("block_scaled_mm", {**BLOCKS, "N": 128, "K": 256}, "of what float64 gives"),
    ],
)
def test_a_wrong_output_is_told_and_a_right_one_passes(op: str, key: dict[str, Any], reason: str) -> None:
    tunable, generator = TUNABLES[op], torch.Generator().manual_seed(0)
    arguments = tunable.arguments(key, 2, torch.bfloat16, "cpu", generator)
    right = tunable.op.reference(**tunable.op.bind((), arguments))
    wrong = right.clone()
    wrong[0, 0] += 1000
    launch: Any = SimpleNamespace(run=lambda: [right])
    assert tunable.check(launch, arguments) is None
    launch.run = lambda: [wrong]
    assert reason in (tunable.check(launch, arguments) or "")


def test_what_takes_too_much_once_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = SimpleNamespace(metadata=SimpleNamespace(shared=1 << 20))
    kind = SimpleNamespace(compile=lambda arch: compiled)
    monkeypatch.setattr(gpu, "Specialised", SimpleNamespace(of=lambda part: kind))
    told = gpu.compile_one(Job("rms_norm", WIDE, 8), H100, Row(1, 4096, 8), 0)
    assert told == "compile: it takes 1048576 bytes of shared memory, and sm_90 has 232448"
