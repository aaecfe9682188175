"""The search: it finds the best that is right, says what failed, and goes on where it was stopped."""

import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fusionpass.tuning.families import TUNABLES
from fusionpass.tuning.files import measured
from fusionpass.tuning.run import cost, line, run
from fusionpass.tuning.schedule import arrange, simulate
from fusionpass.tuning.search import DeviceLostError, Job, candidates, label
from tests.tuning.simulated import DEVICE, H100, Make, jobs, simulated, table, task, tune, us

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
QWEN3_8B = {"N": 6144, "K": 4096, "dtype": "fp8_w8a8", "block_shape": [128, 128]}
MIXTURE = {"E": 8, "N": 256, "dtype": None, "block_shape": None, "hidden": 256, "top": 2, "down": False}


def time_of(job: Job, cut: object) -> float:
    return us(job.tunable.launch(H100, job.key, job.arguments(), cut)[0])


def test_the_fastest_wins(tmp_path: Path) -> None:
    (job,) = jobs(16)
    assert tune(tmp_path, [job]) == 1
    found = candidates(job, H100)
    best = min(found.kept, key=lambda cut: time_of(job, cut))
    assert time_of(job, best) <= 0.97 * time_of(job, found.rule), "else the rule would be kept"
    record = table(tmp_path, meta=True)["measured"]["16"]
    assert record["tried"] == len(found.kept)
    assert (record["failed"], record["not_tried"]) == ({}, 0)
    assert record["us"] == pytest.approx(time_of(job, best), abs=1e-3)
    assert record["rule_us"] == pytest.approx(time_of(job, found.rule), abs=1e-3)
    entry = " ".join(f"{name}={value}" for name, value in table(tmp_path)["16"].items())
    assert entry == label(best)


def test_what_fails_has_a_reason_and_what_is_wrong_does_not_win(tmp_path: Path) -> None:
    (job,) = jobs(64)
    tune(tmp_path, [job], bench=simulated(broken=5, wrong=2))
    record = table(tmp_path, meta=True)["measured"]["64"]
    reasons = {reason.partition(":")[0] for reason in record["failed"].values()}
    assert reasons == {"compile", "ValueError", "wrong"}
    entry = table(tmp_path)["64"]
    won = " ".join(f"{name}={value}" for name, value in entry.items())
    assert won not in record["failed"]
    bench = simulated(wrong=2)
    (cut,) = [cut for cut in candidates(job, H100).kept if label(cut) == won]
    assert bench.check(job.tunable, job.tunable.launch(H100, job.key, job.arguments(), cut)[0], {}) is None


def test_a_rule_that_is_as_good_is_kept(tmp_path: Path) -> None:
    """Of kernels whose tables only we read, by an empty entry: then the rule can still change."""
    bench = simulated()
    bench.measure = lambda launches: 10.0
    todo = [Job("rms_norm", {"width": 512, "scheme": None, "bytes": 2}, 4)]
    tune(tmp_path, todo, bench=bench)
    assert table(tmp_path / "rms_norm") == {"4": {}}
    tune(tmp_path, jobs(8), bench=bench)
    rule = candidates(jobs(8)[0], H100).rule
    assert " ".join(f"{name}={value}" for name, value in table(tmp_path)["8"].items()) == label(rule)


def test_null_where_something_else_is_faster(tmp_path: Path) -> None:
    bench = simulated()
    bench.beside = lambda job, sets: {"inductor": 1.0}
    tune(tmp_path, jobs(8), bench=bench)
    assert table(tmp_path) == {"8": None}
    assert table(tmp_path, meta=True)["measured"]["8"]["beside_us"] == {"inductor": 1.0}


def test_a_lost_device_is_told_and_its_configuration_left_out(tmp_path: Path) -> None:
    bench = simulated(broken=5)

    def gone() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    bench.alive = gone
    with pytest.raises(DeviceLostError, match=r"an illegal memory access.*--resume"):
        tune(tmp_path, jobs(64), bench=bench)
    first = table(tmp_path, meta=True)["measured"]["64"]
    assert first["not_tried"] > 0
    (lost,) = [cut for cut, reason in first["failed"].items() if reason.startswith("ValueError")]
    tune(tmp_path, jobs(64), resume=True)
    again = table(tmp_path, meta=True)["measured"]["64"]
    assert again["pruned"]["failed before"] >= 1
    assert lost not in str(table(tmp_path))


def test_a_budget_stops_and_resume_goes_on(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    tune(whole, jobs(8, 64))
    tune(part, jobs(8, 64), budget=0.0)
    assert not list(part.glob("N=*].json"))
    assert all(record["not_tried"] for record in table(part, meta=True)["measured"].values())
    tune(part, jobs(8, 64), resume=True)
    assert table(part) == table(whole)
    assert not task(part, jobs(8, 64), resume=True).queue.jobs
    assert len(task(part, jobs(8, 64)).queue.jobs) == 2


def test_killed_at_any_moment_it_ends_with_the_same_table(tmp_path: Path) -> None:
    todo, whole, killed = jobs(1, 8, 64, 512), tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    tune(whole, todo, bench=simulated(1e-4, broken=7, wrong=3))
    seconds = time.monotonic() - start
    moments, context = random.Random(7), multiprocessing.get_context("fork")
    for _ in range(20):
        child = context.Process(target=tune, args=(killed, todo, True, simulated(1e-4, broken=7, wrong=3)))
        child.start()
        child.join(moments.uniform(0, seconds))
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    tune(killed, todo, resume=True, bench=simulated(1e-4, broken=7, wrong=3))
    assert table(killed) == table(whole)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_the_last_gpu_is_done_soon_after_the_first(gpus: int) -> None:
    todo = [Job("block_scaled_mm", QWEN3_8B, m) for m in SIZES]
    costs = [cost(job, H100) for job in todo]
    before = (list(todo), list(costs))
    made = simulate(arrange(todo, costs, gpus).costs, gpus)
    assert (todo, costs) == before
    assert made.seconds <= 1.10 * made.bound
    assert sorted(position for taken in made.gpus for position in taken) == list(range(len(SIZES)))


def test_orders() -> None:
    todo = jobs(1, 2, 4, 8)
    costs = [1.0, 4.0, 4.0, 2.0]
    assert [job.m for job in arrange(todo, costs, 1).jobs] == [2, 4, 8, 1]
    drawn = [[job.m for job in arrange(todo, costs, 1, seed).jobs] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(order) for order in drawn}) > 1
    shared = arrange(todo[:1], [4.0], 3)
    assert [(job.part, job.parts) for job in shared.jobs] == [(0, 3), (1, 3), (2, 3)]
    assert shared.costs == (4 / 3,) * 3
    assert arrange([], [], 2).jobs == ()


def test_a_size_that_several_share_has_the_same_entry(tmp_path: Path) -> None:
    tune(tmp_path / "one", jobs(64))
    made = task(tmp_path / "three", jobs(64), gpus=3)
    assert len(made.queue.jobs) == 3
    from torch.distributed import HashStore

    from fusionpass.tuning.run import work

    lines: list[str] = []
    assert work(made, HashStore(), simulated(), 2, lines.append) == 3
    assert table(tmp_path / "three") == table(tmp_path / "one")
    assert len(lines) == 2
    assert re.fullmatch(r"GPU 2: 3 jobs in \d+\.\d s, the longest in \d+\.\d", lines[-1])


def test_two_workers_share_the_queue(tmp_path: Path) -> None:
    tune(tmp_path / "one", jobs(1, 2, 8, 64))
    made = task(tmp_path / "two", jobs(1, 2, 8, 64), 2)
    assert run(made, 2, Make(tmp_path)) == 0
    assert table(tmp_path / "two") == table(tmp_path / "one")
    timed = [line for note in tmp_path.glob("timed *") for line in note.read_text().splitlines()]
    assert sorted(set(timed)) == sorted(str(job) for job in jobs(1, 2, 8, 64))


def test_torchrun_hands_out_every_size_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = Path(__file__).with_name("simulated.py")
    (tmp_path / "tables").mkdir()
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "tables"), str(tmp_path)],
        cwd=script.parents[2], env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("] M=") == 4
    tune(tmp_path / "one", jobs(1, 2, 8, 64))
    assert table(tmp_path / "tables") == table(tmp_path / "one")


def test_a_line_for_people() -> None:
    (job,) = jobs(8)
    record = {"us": 2.5, "rule_us": 3.0, "failed": {"x": "y"}, "not_tried": 2}
    assert line(job, {8: {"num_warps": 4}}, record).endswith("2.50 µs (rule 3.00), num_warps=4; 1 failed, 2 not tried")
    assert line(job, {8: None}, {**record, "not_tried": 0}).endswith("null; 1 failed")
    assert "the rule" in line(job, {8: {}}, record)
    assert "nothing was found" in line(job, {}, record)


@pytest.mark.parametrize("m", [1, 8, 64, 4096])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("block_scaled_mm", QWEN3_8B),
        ("block_scaled_mm", {**QWEN3_8B, "dtype": "nvfp4", "block_shape": None}),
        ("scaled_mm", {"N": 4096, "K": 4096, "dtype": "fp8_row"}),
        ("linear", {"N": 4096, "K": 4096, "dtype": "bf16"}),
        ("experts", MIXTURE),
        ("experts", {**MIXTURE, "dtype": "fp8_w8a8"}),
        ("rms_norm", {"width": 4096, "scheme": None, "bytes": 2}),
        ("silu_mul_quantize", {"width": 4096, "scheme": "fp8_token", "bytes": 2}),
    ],
    ids=str,
)
def test_spaces_are_small_and_what_is_pruned_has_a_reason(name: str, key: dict[str, object], m: int) -> None:
    job = Job(name, key, m)
    if m > {"scaled_mm": 64, "linear": 32}.get(name, m):
        return
    found = candidates(job, H100)
    assert 2 <= len(found.kept) <= 400
    assert len({label(cut) for cut in found.kept}) == len(found.kept)
    whole = list(TUNABLES[name].space(H100, key))
    assert len(whole) + (found.rule not in whole) == len(found.kept) + sum(found.pruned.values())
    assert all(reason.isascii() and reason for reason in found.pruned)
    assert 0 < job.tunable.estimate(key, m) < math.inf
    assert candidates(job, H100, 1).kept != candidates(job, H100, 2).kept or len(found.kept) < 9


def test_records_say_where_and_with_what(tmp_path: Path) -> None:
    tune(tmp_path, jobs(8), facts={"device": DEVICE})
    (path,) = tmp_path.glob("N=*].json")
    assert measured(path)[8]["device"] == DEVICE
