"""A bench without a GPU: times that follow from a configuration, with failures and wrong results among them."""

import json
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.tuning.run import Task, join, prepare, work
from fusionpass.tuning.search import Bench, Job, label

H100, DEVICE = Arch("sm_90"), "NVIDIA H100 80GB HBM3"
KEY = {"N": 512, "K": 512, "dtype": "fp8_w8a8", "block_shape": [128, 128]}


def shape(launch: Launch) -> str:
    """What tells two configurations apart."""
    numbers = {k: v for part in launch.all for k, v in part.args.items() if type(v) is int}
    return f"{sorted(numbers.items())} {[(part.num_warps, part.num_stages) for part in launch.all]}"


def us(launch: Launch) -> float:
    """Between 10 and 20 microseconds."""
    return 10 + zlib.crc32(shape(launch).encode()) % 997 / 100


def simulated(seconds: float = 0.0, broken: int = 0, wrong: int = 0) -> Bench:
    """The bench.

    Args:
        seconds: that each timing takes.
        broken: one of so many configurations raises; 0: none.
        wrong: one of so many gives a wrong result.
    """

    def measure(launches: Sequence[Launch]) -> float:
        time.sleep(seconds)
        if broken and zlib.crc32(shape(launches[0]).encode()) % broken == 0:
            raise ValueError("out of resource")
        return us(launches[0])

    def check(tunable: Any, launch: Launch, arguments: Mapping[str, Any]) -> str | None:
        return "wrong: far off" if wrong and zlib.adler32(shape(launch).encode()) % wrong == 0 else None

    def compiled(job: Job, arch: Arch, each: Sequence[tuple[Any, int]]) -> list[str | None]:
        return ["compile: too large" if "num_warps=8" in label(cut) and broken else None for cut, _ in each]

    return Bench(measure, compiled, lambda job: [job.arguments()], check)


def jobs(*sizes: int) -> list[Job]:
    """A product of these numbers of rows."""
    return [Job("block_scaled_mm", KEY, m) for m in sizes]


def task(folder: Path, todo: Sequence[Job], gpus: int = 1, resume: bool = False, **options: Any) -> Task:
    """A run."""
    queue = prepare(todo, H100, DEVICE, folder, gpus, None, resume, most=options.get("most"))
    return Task(queue, H100, DEVICE, folder, resume=resume, **options)


def tune(folder: Path, todo: Sequence[Job], resume: bool = False, bench: Bench | None = None, **options: Any) -> int:
    """Do it in this process."""
    return work(task(folder, todo, resume=resume, **options), HashStore(), bench or simulated())


def table(folder: Path, meta: bool = False) -> dict[str, Any]:
    """The one table, or how its entries were found."""
    (path,) = [path for path in folder.glob("*.json") if path.name.endswith(".meta.json") == meta]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


class Make:
    """Makes the bench of a rank, and notes what it times."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> Bench:
        made = simulated()
        surveyed, note = made.sets, self.folder / f"timed {rank}"

        def sets(job: Job) -> Sequence[Mapping[str, Any]]:
            with note.open("a") as file:
                file.write(f"{job}\n")
            return surveyed(job)

        made.sets = sets
        return made


if __name__ == "__main__":
    tables, notes = map(Path, sys.argv[1:])
    join(lambda workers: task(tables, jobs(1, 2, 8, 64), workers), Make(notes), print)
