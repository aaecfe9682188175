"""What is tuned beside products and rows: attention, rotations, second products of mixtures; and what a preset asks."""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionpass.arch import Arch
from fusionpass.cli import _parser, main
from fusionpass.errors import TuningError
from fusionpass.op import OPS

pytest.importorskip("triton")
from fusionpass.commands.tune import jobs_of
from fusionpass.ops import experts
from fusionpass.ops.attention.decode_triton import Cut as Decode
from fusionpass.ops.gemm.blocks_triton import Cut as Block
from fusionpass.ops.rope.triton import Cut as Heads
from fusionpass.tuning import store
from fusionpass.tuning.families import TUNABLES
from fusionpass.tuning.files import Name, measured, merge, read
from fusionpass.tuning.heads import HEADS, ROTATIONS
from fusionpass.tuning.models import Model
from fusionpass.tuning.names import to_file
from fusionpass.tuning.presets import CONFIGURATIONS, PRESETS
from fusionpass.tuning.search import Job, candidates
from tests.tuning.simulated import DEVICE, H100, shape, tune
from tests.tuning.test_prune import pruned

CACHE = {"kv_heads": 8, "rows": 4, "head_dim": 128, "positions": 4096}
QK = {"heads": 32, "kv_heads": 8, "head_dim": 128}
DOWN = {"E": 8, "N": 256, "dtype": "fp8_w8a8", "block_shape": [128, 128], "hidden": 512, "top": 2, "down": True}
KEYS = {"attention": CACHE, **dict.fromkeys(ROTATIONS, QK), "experts_down": DOWN}


@pytest.mark.parametrize(("name", "key"), KEYS.items(), ids=KEYS)
@pytest.mark.parametrize("m", [1, 16])
def test_every_kernel_has_what_to_try(name: str, key: dict[str, Any], m: int) -> None:
    """And its plan asks for the table that it is tuned for: a launch that does not is an error."""
    job = Job(name, key, m)
    found = candidates(job, H100)
    assert len(found.kept) > 10
    launches = {shape(job.tunable.launch(H100, key, job.arguments(), cut)[0]) for cut in found.kept}
    assert len(launches) == len(found.kept), "each is another launch"


@pytest.mark.parametrize(("name", "key"), KEYS.items(), ids=KEYS)
def test_every_check_knows_right_from_wrong(name: str, key: dict[str, Any]) -> None:
    small = {**key, "positions": 64, "E": 4, "N": 128, "hidden": 128}
    small = {part: value for part, value in small.items() if part in key}
    tunable, generator = TUNABLES[name], torch.Generator().manual_seed(0)
    arguments = tunable.arguments(small, 2, torch.bfloat16, "cpu", generator)
    right = tunable.op.reference(**tunable.op.bind((), arguments))
    outputs = [right] if tunable.op.single else list(right)
    launch: Any = argparse.Namespace(run=lambda: outputs)
    assert tunable.check(launch, arguments) is None
    launch.run = lambda: [outputs[0].clone().add_(1000), *outputs[1:]]
    assert (tunable.check(launch, arguments) or "").startswith("wrong")


@pytest.mark.parametrize(
    ("op", "key", "m", "cut", "reason"),
    [
        ("attention", {**CACHE, "positions": 64}, 8, Decode(64, 2, 4), "splits: there are 1 blocks"),
        ("attention", CACHE, 256, Decode(32, 2, 4), "splits: there are 16 programs"),
        ("attention", {**CACHE, "kv_heads": 1}, 1, Decode(32, 4, 4), "splits: less than a quarter"),
        ("attention", {**CACHE, "head_dim": 32, "rows": 1}, 8, Decode(16, 8, 8), "warps: less than 8 numbers"),
        ("qk_rope", {**QK, "heads": 4, "kv_heads": 1}, 64, Heads(8, 1, 4), "heads: there are 4"),
        ("qk_rope", QK, 4, Heads(1, 8, 4), "tokens: there are 4"),
        ("qk_rope", QK, 64, Heads(32, 16, 1), "elements: 2048 for each thread"),
        ("experts_down", DOWN, 4, Block(32, 64, 128), "rows: the first product takes 16"),
        (
            "experts_down",
            {**DOWN, "first": {"BLOCK_SIZE_M": 32}},
            4,
            Block(16, 64, 128),
            "rows: the first product takes 32",
        ),
        ("experts_down", DOWN, 4, Block(16, 64, 128, grouped=8), "grouped: blocks of rows"),
        ("experts_down", DOWN, 4, Block(16, 32, 128, warps=8), "warps: less than 8 sums"),
    ],
)
def test_what_is_not_worth_a_try(op: str, key: dict[str, Any], m: int, cut: Any, reason: str) -> None:
    assert (pruned(op, key, m, cut) or "").startswith(reason)


def keys(name: str, model: str, tp: int = 1, scheme: str = "bf16") -> list[Any]:
    return [dict(key) for _, key in TUNABLES[name].models(Model.of(CONFIGURATIONS[model], tp), scheme)]


def test_the_sizes_of_models() -> None:
    assert [key["positions"] for key in keys("attention", "Llama-3-70B", 8)] == [1024, 4096, 32768]
    assert keys("attention", "Llama-3-70B", 8)[0] == {"kv_heads": 1, "rows": 8, "head_dim": 128, "positions": 1024}
    assert keys("qk_norm_rope", "Qwen3-8B") == [QK]
    assert keys("qk_norm_rope", "Llama-3-8B") == keys("qk_rope", "Qwen3-8B") == []
    assert keys("qk_rope_cache", "Llama-3-8B") == [QK]
    for name in HEADS:
        assert keys(name, "DeepSeek-V3") == [], "its heads are made of latents"
    (down,) = keys("experts_down", "DeepSeek-V3", 8, "fp8_group128")
    assert (down["E"], down["N"], down["down"]) == (256, 256, True)


def test_every_tunable_kernel_is_reached_by_a_model() -> None:
    reached = set()
    for scheme in ("bf16", "fp8_group128", "fp8_token", "fp8_static", "mxfp8"):
        for model in CONFIGURATIONS:
            reached |= {name for name in TUNABLES if keys(name, model, 8 if model == "DeepSeek-V3" else 1, scheme)}
    assert reached == set(TUNABLES)
    assert {one.op for one in TUNABLES.values()} <= set(OPS.values())


def asked(*options: str) -> list[Job]:
    return list(jobs_of(_parser().parse_args(["tune", *options]), H100))


def test_a_second_product_follows_the_first(folder: Path) -> None:
    first = {name: value for name, value in DOWN.items() if name not in ("hidden", "top", "down")}
    cut = Block(32, 64, 128, grouped=4, warps=4, stages=3)
    merge(folder, Name.of("experts", first, DEVICE), {40: to_file(cut)}, {})
    store.forget()
    sizes = ["--N", "256", "--K", "512", "--E", "8", "--top", "2", "--save-path", str(folder)]
    (job,) = asked("--op", "experts_down", "--batch-sizes", "40", *sizes)
    assert job.key["first"] == to_file(cut)
    for candidate in candidates(job, H100).kept:
        launch, _ = job.tunable.launch(H100, job.key, job.arguments(), candidate)
        up, down = (part.args for part in launch.before if "WIDE" in part.args)
        assert (up["ROWS"], up["COLUMNS"], down["ROWS"], down["COLUMNS"]) == (32, 64, 32, candidate.columns)
    tune(folder, [job])
    (path,) = folder.glob("*_down.json")
    entry = read(path)[0][40]
    assert measured(path)[40]["tried"] > 10
    store.forget()
    arguments = job.tunable.arguments(job.key, 40, torch.bfloat16, "cpu", torch.Generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch: Any = experts.plan(H100, experts.bind((), arguments))[0]
    up, down = (part.args for part in launch.before if "WIDE" in part.args)
    assert (up["ROWS"], down["ROWS"], down["COLUMNS"]) == (32, 32, (entry or {})["BLOCK_SIZE_N"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    jobs = asked("--preset", name)
    assert len(jobs) == len({(job.table, json.dumps(dict(job.key), sort_keys=True), job.m) for job in jobs})
    assert jobs[0].m == PRESETS[name][0].rows[0]
    assert all(job.tunable.work(job.key, job.m)[0] <= 3e10 for job in jobs)
    for part in PRESETS[name]:
        for model in part.sizes():
            for op in part.ops:
                assert list(TUNABLES[op].models(model, part.scheme)), f"{op} has nothing to tune of {model}"


def test_a_preset_has_its_own_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TuningError, match="a preset has its own sizes"):
        asked("--preset", "shipped", "--op", "experts")
    assert main(["tune", "--dry-run", "--preset", "shipped", "--width", "64"]) == 2
    assert "a preset has its own sizes" in capsys.readouterr().err


def test_no_call_that_does_not_fit() -> None:
    config = [json.dumps(CONFIGURATIONS["Llama-3-8B"])]
    assert config
    assert TUNABLES["attention"].work({**CACHE, "positions": 32768}, 4096)[0] > 3e10
    sizes = asked("--preset", "shipped")
    assert {job.m for job in sizes if job.table == "attention"} == {1, 8, 32}


def test_most_configurations_of_each_size(tmp_path: Path) -> None:
    job = Job("rms_norm", {"width": 4096, "scheme": None, "bytes": 2}, 64)
    whole = candidates(job, H100)
    some = candidates(job, H100, most=2)
    assert (some.kept, some.left) == (whole.kept[:3], len(whole.kept) - 3)
    assert candidates(job, H100, most=1000) == whole
    assert tune(tmp_path, [job], most=2) == 1
    record = measured(tmp_path / "rms_norm" / Name.of("rms_norm", job.key, DEVICE).path.name)[64]
    assert (record["tried"], record["not_tried"], record["left"]) == (3, 0, len(whole.kept) - 3)
    assert tune(tmp_path, [job], resume=True, most=2) == 0, "as many were tried"
    assert tune(tmp_path, [job], resume=True, most=4) == 1
    assert tune(tmp_path, [job], resume=True) == 1
    assert tune(tmp_path, [job], resume=True) == 0


def test_no_target_without_a_kernel() -> None:
    with pytest.raises(TuningError, match="the cpu has no Triton kernels"):
        candidates(Job("attention", CACHE, 1), Arch("cpu"))
