"""Tuning on every GPU: workers that take jobs from one queue, and write what each number of rows came to.

The queue is a counter of torch.distributed's store, on one host and on several. Whoever is killed leaves what was
written; what was not is done with `resume`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ..arch import Arch
from ..errors import TuningError
from .files import Name, measured, merge, read
from .schedule import Queue, arrange, seconds
from .search import Bench, Candidates, DeviceLostError, Job, Survey, candidates, plain, settle, survey, told


@dataclass(frozen=True)
class Task:
    """What all workers of a run know.

    Attributes:
        queue: the jobs in order.
        arch: the target.
        device: as torch names it.
        folder: where the tables are.
        seed: of the order of configurations.
        budget: seconds of the whole run; inf: no limit.
        resume: leave out what failed before.
        facts: what each record says of where it was measured.
        most: configurations of each size that are tried beside the rule; None: all.
    """

    queue: Queue
    arch: Arch
    device: str
    folder: Path
    seed: int = 0
    budget: float = math.inf
    resume: bool = False
    facts: Mapping[str, str] | None = None
    most: int | None = None

    def name(self, job: Job) -> Name:
        """The table that a job adds to."""
        return table_of(job, self.device)

    def found(self, job: Job) -> Candidates:
        """What there is to time, but for what failed before, where the run is a continued one."""
        path = self.folder / self.name(job).path
        before = measured(path).get(job.m, {}).get("failed", {}) if self.resume else {}
        return candidates(job, self.arch, self.seed, before, self.most)


def table_of(job: Job, device: str) -> Name:
    """The table that a job adds to."""
    return Name.of(job.tunable.table, job.tunable.named(job.key), device)


def done(folder: Path, name: Name, most: int | None = None) -> set[int]:
    """The numbers of rows that need not be tuned again: entries whose every configuration was tried, or `most`."""
    path = folder / name.path
    if not path.exists():
        return set()
    entries, records = read(path)[0], measured(path)

    def complete(record: Mapping[str, Any]) -> bool:
        tried = record.get("tried", 0) + len(record.get("failed", ()))
        return not record.get("not_tried") and (not record.get("left") or (most is not None and tried > most))

    return {m for m in entries if m in records and complete(records[m])}


def cost(job: Job, arch: Arch, most: int | None = None) -> float:
    """Seconds that a whole job takes, by estimate."""
    return seconds(len(candidates(job, arch, most=most).kept), job.tunable.estimate(job.key, job.m))


def prepare(
    jobs: Sequence[Job],
    arch: Arch,
    device: str,
    folder: Path,
    gpus: int,
    shuffle: int | None,
    resume: bool,
    as_given: bool = False,
    most: int | None = None,
) -> Queue:
    """The queue of what is left to do.

    Raises:
        TuningError: no kernel runs one of the jobs.
    """
    names = [table_of(job, device) for job in jobs]
    known = {name: done(folder, name, most) for name in names} if resume else {}
    left = [job for job, name in zip(jobs, names, strict=True) if job.m not in known.get(name, ())]
    # In the order that was given nobody asks how long each takes, which takes a while to find out.
    costs = [job.tunable.estimate(job.key, job.m) if as_given else cost(job, arch, most) for job in left]
    return arrange(left, costs, gpus, shuffle, as_given)


def work(task: Task, store: Any, bench: Bench, rank: int = 0, told: Callable[[str], object] = lambda line: None) -> int:
    """Take jobs until there are none, and write what they come to.

    Args:
        task: the run.
        store: torch.distributed's, shared by all workers.
        bench: this worker's.
        rank: this worker's number.
        told: called with a line for each job that was settled, and with one for all that this worker took.

    Returns:
        How many jobs it took.

    Raises:
        DeviceLostError: this worker can time nothing more; what it found is written.
    """
    until, spent = bench.clock() + task.budget, 0.0
    took: list[float] = []
    while (ticket := store.add("ticket", 1) - 1) < len(task.queue.jobs):
        job, estimated, start = task.queue.jobs[ticket], task.queue.costs[ticket], bench.clock()

        def progress(share: float, job: Job = job, before: float = spent, whole: float = estimated) -> None:
            store.set(f"gpu {rank}", json.dumps({"seconds": before + share * whole, "job": str(job)}))

        progress(0.0)
        found = task.found(job)
        try:
            made = survey(job, task.arch, bench, found, until, progress)
        except DeviceLostError as error:
            _write(task, job, {}, {"tried": 0, "pruned": dict(found.pruned), **plain(error.survey)})
            raise
        store.set(f"survey {_whole(job)} {job.part}", json.dumps(plain(made)))
        # Who is the last with a share has them all.
        if store.add(f"shares {_whole(job)}", 1) == job.parts:
            keys = [f"survey {_whole(job)} {part}" for part in range(job.parts)]
            surveys = [Survey(**json.loads(store.get(key))) for key in keys]
            entry, record = settle(job, task.arch, bench, found, surveys)
            _write(task, job, entry, record)
            told(line(job, entry, record))
        spent += estimated
        progress(0.0, before=spent)
        took.append(bench.clock() - start)
    if took:
        told(f"GPU {rank}: {len(took)} jobs in {sum(took):.1f} s, the longest in {max(took):.1f}")
    return len(took)


def _write(task: Task, job: Job, entry: Mapping[int, Any], record: Mapping[str, Any]) -> None:
    merge(task.folder, task.name(job), entry, {job.m: {**record, **(task.facts or {})}})


def _whole(job: Job) -> str:
    return str(job).removesuffix(f" {job.part + 1}/{job.parts}")


def line(job: Job, entry: Mapping[int, Any], record: Mapping[str, Any]) -> str:
    """What a number of rows came to, for people."""
    left = f", {record['not_tried']} not tried" if record["not_tried"] else ""
    if job.m not in entry:
        return f"{_whole(job)}: nothing was found, {len(record['failed'])} failed{left}"
    found = entry[job.m]
    told = "the rule" if found == {} else "null" if found is None else " ".join(f"{k}={v}" for k, v in found.items())
    rule = f" (rule {record['rule_us']:.2f})" if "rule_us" in record else ""
    return f"{_whole(job)}: {record['us']:.2f} µs{rule}, {told}; {len(record['failed'])} failed{left}"


def _spawned(rank: int, port: int, task: Task, make: Callable[[int], Bench]) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False)
    bench = make(rank)
    try:
        work(task, store, bench, rank, lambda line: store.set(f"line {store.add('lines', 1) - 1}", line))
    except Exception as error:  # said where it is seen; the exit code is the worker's verdict
        store.set(f"line {store.add('lines', 1) - 1}", f"worker {rank}: {told(error)}")
        raise SystemExit(1) from error
    finally:
        bench.close()


def run(
    task: Task, gpus: int, make: Callable[[int], Bench], shown: Callable[[Any, int], Iterator[None]] | None = None
) -> int:
    """A worker process for each GPU of this host.

    Args:
        task: what is tuned.
        gpus: how many.
        make: the bench of a rank; called in its process, so it must be importable.
        shown: shows the progress that is in the store, a step whenever it is advanced.

    Returns:
        How many workers failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("spawn")
    workers = [context.Process(target=_spawned, args=(rank, store.port, task, make)) for rank in range(gpus)]
    for worker in workers:
        worker.start()
    steps = shown(store, gpus) if shown is not None else iter(())
    try:
        while any(worker.is_alive() for worker in workers):
            next(steps, None)
            time.sleep(0.1)
        next(steps, None)
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join()
    return sum(worker.exitcode != 0 for worker in workers)


def launched() -> bool:
    """Whether torchrun started this process, as one worker of many."""
    return dist.is_torchelastic_launched()


def join(task: Callable[[int], Task], make: Callable[[int], Bench], told: Callable[[str], object]) -> int:
    """Be one of torchrun's workers, of any number of hosts; all must see the same folder.

    Args:
        task: makes the run, for so many workers; the same in all of them.
        make: the bench of a local rank.
        told: called with a line for each job that this worker settled.

    Returns:
        How many jobs it took.
    """
    if not launched():
        raise TuningError("torchrun did not start this process", "tune", "Run it as `torchrun -m fusionpass tune …`")
    joined, rank, world = next(rendezvous("env://"))
    store = PrefixStore("fusionpass tune", joined)
    # What was there before anybody wrote is the same for all: the queue is made before the first may start.
    made = task(world)
    store.add("ready", 1)
    _until(lambda: store.add("ready", 0) >= world)
    bench = make(int(os.environ.get("LOCAL_RANK", rank)))
    try:
        return work(made, store, bench, rank, told)
    finally:
        bench.close()
        # The host of the store leaves last.
        store.add("left", 1)
        if rank == 0:
            _until(lambda: store.add("left", 0) >= world)


def _until(true: Callable[[], bool], limit: float = 24 * 3600) -> None:
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > limit:
            raise TuningError("the other workers did not come", "tune", "Run it again with --resume")
        time.sleep(0.05)


def facts(device: str) -> dict[str, str]:
    """Where a record was measured, and with what: the commit is the package's version."""
    import triton

    from .. import __version__

    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": __version__}
