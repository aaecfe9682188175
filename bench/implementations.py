"""The ways to run an op that are timed beside each other. Each makes, from sets of arguments, a call on set `i`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch._inductor import config as inductor_config
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.op import OPS, Op
from fusionpass.ops.gemm.libraries import PLANS
from fusionpass.ops.pdl import pdl_launch, pdl_wait
from fusionpass.ops.quant import sample_scale
from fusionpass.tuning.timing import bound, launch_call

Call = Callable[[int], list[torch.Tensor]]
OTHERS = frozenset(PLANS)
"""Other libraries' products: what is timed as ours is our kernel."""
Arguments = Mapping[str, Any]


def plan(op: Op, arguments: Arguments, arch: Arch) -> Launch | None:
    """Our kernel's launch as a compiled model runs it: weight and scale are its parameters."""
    launch, _ = op.plan(arch, arguments, OTHERS)
    return launch.reading_early().launching_early() if isinstance(launch, Launch) else None


def left_to_inductor(op: Op, arguments: Arguments, arch: Arch) -> str | None:
    """Why a compiled model has Inductor's code in the place of our kernel; None where it has the kernel."""
    launch, reason = op.plan(arch, arguments, OTHERS)
    return None if isinstance(launch, Launch) else reason


def with_cut(op: Op, arguments: Arguments, configure: str, cut: Any) -> Launch:
    """The launch as a compiled model runs it, cut as its plan's function `configure` says, or as `cut` does."""
    with mock.patch(configure, return_value=cut) if cut else nullcontext():
        launch = plan(op, arguments, Arch.of(torch.device("cuda")))
    assert launch is not None, op
    return launch


def compile_apart(launch_of: Callable[..., Launch], each: Sequence[tuple[Any, ...]]) -> None:
    """Compile `launch_of(*arguments)` for each, in many processes: into Triton's cache on disk."""
    in_processes(functools.partial(_compile, launch_of), each)


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """As many processes as there are cores, each of which compiles alone."""
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=compile_here)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def compile_here() -> None:
    """Inductor starts no processes of its own: here, there are enough."""
    inductor_config.compile_threads = 1


def in_processes(
    work: Callable[..., object],
    each: Sequence[tuple[Any, ...]],
    pool: ProcessPoolExecutor | None = None,
    seconds: float | None = None,
) -> None:
    """`work(*arguments)` for each, in processes, for what it leaves in caches on disk; what takes longer is given up.

    What fails is left for who does it again.
    """
    with nullcontext(pool) if pool else workers() as used, suppress(TimeoutError, BrokenProcessPool):
        list(used.map(functools.partial(_attempt, work), each, timeout=seconds))


def _attempt(work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    with suppress(Exception):
        work(*arguments)


def compile_one(way: str, name: str, tokens: int, hidden: int, dtype: torch.dtype, scheme: str | None) -> None:
    """Leave what one implementation of one cell compiles to in the caches on disk.

    Nothing runs: Inductor chooses between its configurations where nothing else is on the GPU, when it is timed.
    """
    op, also = named(name)
    arguments, arch = without_data(op, tokens, hidden, dtype, scheme, also), Arch.of(torch.device("cuda"))
    launch = plan(op, arguments, arch) if way == "fusionpass" else None
    if launch is not None:
        _compile(lambda: launch)
    else:
        torch._dynamo.reset()
        with mock.patch.object(CachingAutotuner, "run", return_value=None):
            inductor(op, [arguments], arch, pdl=way == "inductor+pdl")(0)
    torch.cuda.empty_cache()


def _compile(launch_of: Callable[..., Launch], *arguments: Any) -> None:
    for part, given in bound(launch_of(*arguments)):
        part.kernel.warmup(**given, grid=part.grid, **part.options())


def search(timed: Callable[[Any], float], cuts: Sequence[Any]) -> dict[str, Any]:
    """The best of the cuts and its microseconds, and why others failed; empty where there are none."""
    times: dict[Any, float] = {}
    failed: dict[str, str] = {}
    for cut in cuts:
        try:
            times[cut] = timed(cut)
        except Exception as error:  # a search goes on behind a cut that this device cannot run, and says so
            failed[str(cut)] = f"{type(error).__name__}: {error}"[:200]
    if not times:
        return {"failed": failed} if failed else {}
    # Once more, so that the lucky one among many has to be lucky twice.
    again = {cut: max(times[cut], timed(cut)) for cut in sorted(times, key=lambda cut: times[cut])[:5]}
    best = min(again, key=lambda cut: again[cut])
    tried = {
        " ".join(map(str, vars(cut).values())): round(times[cut], 2)
        for cut in sorted(times, key=lambda cut: times[cut])
    }
    return {"best": again[best], "cut": vars(best), "failed": failed, "tried": tried}


def fusionpass(op: Op, sets: list[Arguments], arch: Arch) -> Call:
    """Our kernel; or Inductor's code, where that is what a compiled model has."""
    launches = [plan(op, arguments, arch) for arguments in sets]
    if None in launches:
        return inductor(op, sets, arch)
    return launch_call([launch for launch in launches if launch is not None])


def eager(op: Op, sets: list[Arguments], arch: Arch) -> Call | None:
    # A whole cache copied for a few new rows is nobody's way to do it.
    return None if caches(sets[0]) else lambda i: _listed(op, op.reference(**sets[i]))


def inductor(op: Op, sets: list[Arguments], arch: Arch, pdl: bool = False) -> Call:
    options = {"triton.enable_pdl": True} if pdl else {}
    names = [name for name, value in sets[0].items() if isinstance(value, torch.Tensor)]

    def reference(*tensors: torch.Tensor) -> Any:
        given = {**sets[0], **dict(zip(names, tensors, strict=True))}
        results = dict(zip(op.outputs(given), _listed(op, op.reference(**given)), strict=True))
        # As models do: the new value is copied back, and Inductor then writes in place.
        return [given[name].copy_(y) if name in caches(given) else y for name, y in results.items()]

    # As operators: the references of derived ops bind their arguments by name, which Dynamo need not understand.
    traced = make_fx(reference, tracing_mode="fake")(*(sets[0][name] for name in names))
    compiled = torch.compile(traced, fullgraph=True, dynamic=False, options=options)
    return lambda i: compiled(*(sets[i][name] for name in names))


def copy(op: Op, sets: list[Arguments], arch: Arch) -> Call:
    """The yardstick: half of the bytes read, half of them written."""
    # A whole number of pages: copies of other lengths take a quarter longer, which would flatter the kernels.
    half = -(-bytes_moved(op, sets[0]) // 8192) * 4096
    sources = [torch.randint(0, 255, (half,), dtype=torch.uint8, device="cuda") for _ in sets]
    targets = [torch.empty_like(source) for source in sources]
    return lambda i: [targets[i].copy_(sources[i])]


@triton.jit
def _one_element(out, like, PDL: tl.constexpr):
    pdl_wait(PDL)
    value = tl.load(like)
    pdl_launch(PDL)
    tl.store(out, value)


def one_element(op: Op, sets: list[Arguments], arch: Arch) -> Call:
    """The floor: a kernel of one program that reads and writes one element, launched as ours are."""
    out, like = (torch.zeros(1, device="cuda") for _ in range(2))
    arguments = {"out": out, "like": like, "PDL": arch.has_pdl}
    launch = Launch(_one_element, (1,), arguments, returns=("out",), num_warps=1, pdl=arch.has_pdl)
    return launch_call([launch] * len(sets))


COMPILED = ("fusionpass", "inductor+pdl", "inductor")
YARDSTICKS = ("one element", "copy")
IMPLEMENTATIONS: dict[str, Callable[[Op, list[Arguments], Arch], Call | None]] = {
    "one element": one_element,
    "copy": copy,
    "fusionpass": fusionpass,
    "inductor+pdl": functools.partial(inductor, pdl=True),
    "inductor": inductor,
    "eager": eager,
}


def caches(arguments: Arguments) -> set[str]:
    """The arguments that the op writes some rows of."""
    return {name for name in arguments if name.endswith("cache") and arguments[name] is not None}


def bytes_moved(op: Op, arguments: Arguments) -> int:
    """Each input read once and each output written once; of a cache, the rows that are new."""
    written = caches(arguments)
    meta = {k: _meta(v) for k, v in arguments.items()}
    outputs = dict(zip(op.outputs(meta), _listed(op, op.reference(**meta)), strict=True))
    # What is written to "k_cache" is as large as "k".
    outputs |= {name: arguments[name.removesuffix("cache").removesuffix("_") or "x"] for name in written}
    inputs = {name: v for name, v in arguments.items() if name not in written}
    tensors = [v for v in (*inputs.values(), *outputs.values()) if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def named(text: str) -> tuple[Op, tuple[str, ...]]:
    """The op and its further outputs: "rms_norm_quantize+norm" returns the norm too."""
    name, *also = text.split("+")
    return next(op for op in OPS.values() if op.name == name), tuple(also)


def argument_sets(
    op: Op,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    count: int,
    scheme: str | None = None,
    also: tuple[str, ...] = (),
    device: str = "cuda",
) -> list[Arguments]:
    """`count` sets of arguments whose activations are all their own; weights and scales are shared."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(tokens * width)
    first = op.bind((), op.sample(tokens, width, dtype, device, generator))
    first |= {op.options[name]: True for name in also}
    if scheme is not None and "scheme" in first:
        first |= {"scheme": scheme, "scale": sample_scale(scheme, device)}
    # The modulation of diffusion transformers is in the samples for the tests' sake.
    first |= {name: None for name in ("mod_scale", "mod_shift") if name in first}
    others = [{k: v.clone() if _is_activation(v) else v for k, v in first.items()} for _ in range(count - 1)]
    return [_packed(arguments) for arguments in (first, *others)]


def without_data(
    op: Op, tokens: int, width: int, dtype: torch.dtype, scheme: str | None, also: tuple[str, ...]
) -> Arguments:
    """The same arguments in every respect but their values, which are whatever memory holds."""
    (given,) = argument_sets(op, tokens, width, dtype, 1, scheme, also, "meta")
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    made = {k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda") for k, v in tensors.items()}
    return _packed({**given, **made})


def _packed(arguments: Arguments) -> Arguments:
    """Gate and up as halves of one row, as one product of both weights leaves them."""
    if not {"gate", "up"} <= arguments.keys():
        return arguments
    gate, up = torch.cat((arguments["gate"], arguments["up"]), -1).chunk(2, -1)
    return {**arguments, "gate": gate, "up": up}


def variant(launch: Launch, rows: int, warps: int) -> Launch:
    """The norm kernel's launch, cut otherwise."""
    grid = (-(-launch.args["rows"] // rows),)
    return dataclasses.replace(launch, args={**launch.args, "ROWS": rows}, grid=grid, num_warps=warps)


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _listed(op: Op, results: Any) -> list[torch.Tensor]:
    return [results] if op.single else list(results)
