"""A search on a GPU: what compiles, allocates, times and checks there."""

import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from ..aot import Specialised
from ..arch import Arch
from ..op import Refusal
from .search import Bench, Job, told
from .timing import cold_sets, measure, time_calls
from .tunable import shared_limit


class Compiler:
    """Compiles in other processes, into Triton's cache on disk.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: Executor | None = None

    def __call__(self, job: Job, arch: Arch, each: Sequence[tuple[Any, int]]) -> list[Refusal]:
        """See `search.Compile`. A worker that dies takes down those that it was about to do: they are done alone."""
        done: list[Refusal | Exception] = [None] * len(each)
        futures = [self._submit(job, arch, *one) for one in each]
        for position, future in enumerate(futures):
            try:
                done[position] = future.result()
            except BrokenProcessPool as error:
                done[position] = error
        for position, found in enumerate(done):
            if isinstance(found, Exception):
                self._pool = None
                try:
                    done[position] = self._submit(job, arch, *each[position]).result()
                except BrokenProcessPool:
                    self._pool = None
                    done[position] = "compile: the process that compiled it died"
        return [found for found in done if not isinstance(found, Exception)]

    def close(self) -> None:
        """End the other processes: a worker that was started as a process would wait for them for ever."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _submit(self, job: Job, arch: Arch, cut: Any, index: int) -> Any:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        try:
            return self._pool.submit(compile_one, job, arch, cut, index)
        except BrokenProcessPool:
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
            return self._pool.submit(compile_one, job, arch, cut, index)


def compile_one(job: Job, arch: Arch, cut: Any, index: int) -> Refusal:
    """Compile one launch of a plan. Why it cannot be, or cannot run: its shared memory is known then."""
    try:
        launch = job.tunable.launch(arch, job.key, job.arguments(), cut)[0]
        shared = Specialised.of(launch.all[index]).compile(arch).metadata.shared
    except Exception as error:  # whatever Triton raises is this configuration's
        return f"compile: {told(error)}"
    if shared > shared_limit(arch):
        return f"compile: it takes {shared} bytes of shared memory, and {arch.name} has {shared_limit(arch)}"
    return None


def sets(job: Job) -> list[dict[str, Any]]:
    """The arguments of as many calls as push one another out of the L2, or of one where they are found there."""
    tunable, generator = job.tunable, torch.Generator("cuda").manual_seed(job.m)
    first = tunable.arguments(job.key, job.m, getattr(torch, job.dtype), "cuda", generator)
    moved = int(tunable.work(job.key, job.m)[0])
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = 1 if job.m <= tunable.warm else cold_sets(moved, size) or 1
    return [first, *({name: _copy(v) for name, v in first.items()} for _ in range(count - 1))]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def beside(job: Job, given: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What runs where the kernel does not: the op's own reference, compiled by Inductor."""
    op = job.tunable.op
    torch._dynamo.reset()
    bound = [op.bind((), one) for one in given]
    names = [name for name, value in bound[0].items() if isinstance(value, torch.Tensor)]
    rest = {name: value for name, value in bound[0].items() if name not in names}

    def reference(*tensors: torch.Tensor) -> Any:
        return op.reference(**rest, **dict(zip(names, tensors, strict=True)))

    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    samples = time_calls(lambda i: compiled(*(bound[i][name] for name in names)), len(bound))
    return {"inductor": statistics.median(samples)}


def bench(workers: int, timed_beside: bool = False) -> Bench:
    """The bench of the current device.

    Args:
        workers: processes that compile.
        timed_beside: time what else could run, too.
    """
    compiler = Compiler(workers)
    return Bench(
        measure, compiler, sets,
        lambda tunable, launch, arguments: tunable.check(launch, arguments),
        beside if timed_beside else None, alive=torch.cuda.synchronize, close=compiler.close,
    )  # fmt: skip


def compile_workers(gpus: int) -> int:
    """Processes that compile for each of the host's GPUs."""
    return max(1, (os.cpu_count() or 1) // max(1, gpus))
