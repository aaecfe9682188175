"""tune: find the best configuration of kernels on this machine's GPUs, and write it where plans look it up."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arch import Arch
from ..config import config_dir
from ..errors import TuningError, nearest
from .options import Commands

if TYPE_CHECKING:
    from ..tuning.search import Job

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""The numbers of rows, or of tokens, that are tuned where none are named."""
INPUT_TYPES = ("bf16", "fp8", "fp8_static", "fp8_token", "fp8_group128", "int8", "int8_token", "int8_group128", "mxfp8",
               "nvfp4")  # fmt: skip
MOST = 3e10
"""Bytes that a call may move to be tuned: with its copies it has to fit a GPU's memory."""
ALIASES = {"fp8": "fp8_group128", "int8": "int8_group128"}
"""What goes by a shorter name: scales by groups of 128, and blocks of the weight."""


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("tune", help="find the best configuration of kernels on these GPUs")
    what = parser.add_argument_group("what is tuned")
    what.add_argument("--op", action="append", help="a kernel; several times (all that the sizes fit)")
    what.add_argument("--model", metavar="CONFIG_OR_ID", help="sizes of a config.json, or of a cached Hugging Face id")
    what.add_argument("--preset", choices=("shipped", "down"), help="sizes of many models, the most valuable first")
    what.add_argument("--tp-size", type=int, default=1, metavar="GPUS", help="that share each layer (1)")
    what.add_argument("--N", type=int, dest="n", help="rows of the weight; of experts, columns between the products")
    what.add_argument("--K", type=int, dest="k", help="columns of the weight; of experts, of the tokens")
    what.add_argument("--E", type=int, dest="e", help="experts")
    what.add_argument("--top", type=int, default=8, help="experts of each token (8)")
    what.add_argument("--width", type=int, help="columns of a row, for norms, activations and quantisation")
    what.add_argument("--input-type", default="fp8", choices=INPUT_TYPES, help="how inputs are quantised (fp8)")
    what.add_argument("--out-dtype", default="bfloat16", choices=("bfloat16", "float16"), help="(bfloat16)")
    what.add_argument("--block-n", type=int, default=128, help="rows of a block of the weight (128)")
    what.add_argument("--block-k", type=int, default=128, help="columns of a block (128)")
    what.add_argument("--batch-sizes", type=int, nargs="+", default=SIZES, metavar="M", help="rows, or tokens")
    how = parser.add_argument_group("how")
    how.add_argument("--save-path", type=Path, help="folder of tables (FUSIONPASS_CONFIG_DIR)")
    how.add_argument("--resume", action="store_true", help="leave out what is done, and what failed")
    how.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="stop then, with what is found")
    how.add_argument("--most", type=int, metavar="N", help="configurations of each size, drawn by the seed (all)")
    how.add_argument("--gpus", type=int, help="of this host (all)")
    how.add_argument("--seed", type=int, default=0, help="of the order of configurations (0)")
    how.add_argument("--shuffle", action="store_true", help="sizes in an order drawn by the seed, not longest first")
    how.add_argument("--beside", action="store_true", help="time Inductor's code, too; null where it is faster")
    how.add_argument("--dry-run", action="store_true", help="print the sizes, what is pruned and the schedule")
    how.add_argument("--target", help="of --dry-run (this machine's, else sm_90)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune; 1 where a worker failed."""
    import torch
    from rich.console import Console

    from ..tuning.run import Task, facts, join, launched, prepare
    from ..tuning.run import run as run_workers

    console = Console()
    there = torch.cuda.is_available()
    if args.dry_run or not there:
        arch = Arch(args.target) if args.target else Arch.of(torch.device("cuda")) if there else Arch("sm_90")
        jobs = list(jobs_of(args, arch))
    if args.dry_run:
        _dry(console, jobs, arch, args)
        return 0
    if not there:
        raise TuningError("there is no GPU", "tune", "Run it where one is; --dry-run prints what it would do")
    folder = args.save_path or config_dir()
    if folder is None:
        raise TuningError("nobody said where tables go", "tune", "Pass --save-path, or set FUSIONPASS_CONFIG_DIR")
    arch, device = Arch.of(torch.device("cuda")), torch.cuda.get_device_name()
    jobs = list(jobs_of(args, arch))
    gpus = args.gpus or torch.cuda.device_count()
    if not 1 <= gpus <= torch.cuda.device_count():
        raise TuningError(f"there are {torch.cuda.device_count()} GPUs", f"--gpus {gpus}", "Pass as many, or fewer")

    def task(workers: int) -> Task:
        shuffle = args.seed if args.shuffle else None
        given = bool(args.preset)
        queue = prepare(jobs, arch, device, folder, workers, shuffle, args.resume, given, args.most)
        return Task(queue, arch, device, folder, args.seed, args.budget, args.resume, facts(device), args.most)

    if launched():
        join(task, Make(gpus, args.beside), console.print)
        return 0
    made = task(gpus)
    if not made.queue.jobs:
        console.print("nothing is left to do")
        return 0
    failed = run_workers(made, gpus, Make(gpus, args.beside), lambda store, count: _shown(console, made, store, count))
    console.print(f"tables are in {folder}; set FUSIONPASS_CONFIG_DIR={folder} to use them")
    return 1 if failed else 0


class Make:
    """Makes the bench of a rank in its own process.

    Args:
        gpus: of this host, which share its cores.
        beside: time what else could run, too.
    """

    def __init__(self, gpus: int, beside: bool) -> None:
        self.gpus, self.beside = gpus, beside

    def __call__(self, rank: int) -> Any:
        """The bench on GPU `rank`."""
        import torch

        from ..tuning.gpu import bench, compile_workers
        from ..tuning.timing import warm_up

        torch.cuda.set_device(rank)
        warm_up()
        return bench(compile_workers(self.gpus), self.beside)


def jobs_of(args: argparse.Namespace, arch: Arch) -> Iterator["Job"]:
    """The jobs of the options: each kernel, each of its sizes, each number of rows whose call fits a GPU's memory.

    Raises:
        TuningError: there are none, or a name or a size does not exist.
    """
    from ..tuning.families import DOWN, TUNABLES
    from ..tuning.search import Job

    for name in args.op or ():
        if name not in TUNABLES:
            raise TuningError(f"there is no kernel {name!r} to tune", "--op", nearest(name, TUNABLES))
    if (args.block_n, args.block_k) != (128, 128):
        block = f"{args.block_n} by {args.block_k}"
        raise TuningError(f"blocks of {block} have no kernel", "--block-n, --block-k", "Leave them at 128")
    if min(args.batch_sizes) < 1:
        raise TuningError(f"{min(args.batch_sizes)} rows", "--batch-sizes", "Pass numbers above zero")
    given = [args.model, args.n, args.k, args.e, args.width, args.op]
    if args.preset and any(value is not None for value in given):
        raise TuningError("a preset has its own sizes", "--preset", "Leave out --op, --model and sizes by number")
    seen: set[tuple[str, str, int]] = set()
    for name, model, scheme, rows in _asked(args):
        for what in dict(TUNABLES[name].models(model, scheme)).values():
            for m in rows:
                one = (name, json.dumps(dict(what), sort_keys=True), m)
                if one not in seen and TUNABLES[name].work(what, m)[0] <= MOST:
                    yield Job(name, _behind(what, m, arch, args.save_path) if name == DOWN else what, m, args.out_dtype)
                seen.add(one)
    if not seen:
        raise TuningError(
            f"no kernel has these sizes for inputs of {args.input_type}", "tune",
            "Pass --model; or --N and --K of a product, with --E of experts; or --width of rows",
        )  # fmt: skip


def _asked(args: argparse.Namespace) -> Iterator[tuple[str, Any, str, Sequence[int]]]:
    """Each kernel with the sizes of a model, a scheme and the numbers of rows."""
    from ..tuning.families import TUNABLES
    from ..tuning.models import read
    from ..tuning.presets import PRESETS

    if args.preset:
        for part in PRESETS[args.preset]:
            # Each number of rows for all sizes, then the next: whatever time there is, all have some.
            for m in part.rows:
                for name in part.ops:
                    for sizes in part.sizes():
                        yield name, sizes, part.scheme, (m,)
        return
    scheme = ALIASES.get(args.input_type, args.input_type)
    model = read(args.model, args.tp_size) if args.model else _sizes(args)
    for name in args.op or TUNABLES:
        yield name, model, scheme, sorted(set(args.batch_sizes))


def _behind(key: Mapping[str, Any], m: int, arch: Arch, folder: Path | None) -> dict[str, Any]:
    """The key of a second product with what the first one's table says for so many tokens."""
    from ..ops.gemm.blocks_triton import REACH
    from ..tuning.store import find

    first = {name: value for name, value in key.items() if name not in ("hidden", "top", "down")}
    found = find("experts", first, arch, m, reach=REACH, folder=folder)
    return {**key, "first": dict(found.entry) if found is not None and found.entry else None}


def _sizes(args: argparse.Namespace) -> Any:
    """What was given by number, as a model of one product, one mixture or one row."""
    from ..tuning.models import Sizes

    return Sizes(args.n or 0, args.k or 0, args.e or 0, args.top, args.width or 0)


def _dry(console: Any, jobs: list["Job"], arch: Arch, args: argparse.Namespace) -> None:
    from rich.table import Table

    from ..tuning.schedule import arrange, seconds, simulate
    from ..tuning.search import candidates

    table = Table("kernel and size", "tried", "pruned", "seconds")
    costs = []
    for job in jobs:
        found = candidates(job, arch, args.seed, most=args.most)
        costs.append(seconds(len(found.kept), job.tunable.estimate(job.key, job.m)))
        pruned = ", ".join(f"{reason} {count}" for reason, count in sorted(found.pruned.items()))
        table.add_row(str(job), str(len(found.kept)), pruned, f"{costs[-1]:.1f}")
    console.print(table)
    gpus = args.gpus or 1
    queue = arrange(jobs, costs, gpus, args.seed if args.shuffle else None, bool(args.preset))
    made = simulate(queue.costs, gpus)
    console.print(f"{gpus} GPU(s): about {made.seconds:.0f} s; no order takes less than {made.bound:.0f} s")


def _shown(console: Any, task: Any, store: Any, gpus: int) -> Iterator[None]:
    """A bar with the time left for each GPU, and a line for each size that is settled."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    total, said = sum(task.queue.costs), 0
    with Progress(*columns, console=console, transient=True) as progress:
        bars = [progress.add_task(f"GPU {rank}", total=total / gpus) for rank in range(gpus)]
        while True:
            for rank, bar in enumerate(bars):
                if store.check([f"gpu {rank}"]):
                    state = json.loads(store.get(f"gpu {rank}"))
                    progress.update(bar, completed=state["seconds"], description=f"GPU {rank}: {state['job']}")
            while said < store.add("lines", 0) and store.check([f"line {said}"]):
                progress.console.print(store.get(f"line {said}").decode(), markup=False, highlight=False)
                said += 1
            yield
