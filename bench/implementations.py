"""The ways to run an op that are timed beside each other. Each makes, from sets of arguments, a call on set `i`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.op import Op
from fusionpass.ops.pdl import pdl_launch, pdl_wait
from fusionpass.ops.quant import sample_scale
from fusionpass.tuning.timing import bound, launch_call

Call = Callable[[int], list[torch.Tensor]]
Arguments = Mapping[str, Any]


def plan(op: Op, arguments: Arguments, arch: Arch) -> Launch | None:
    """Our kernel's launch as a compiled model runs it: weight and scale are its parameters."""
    launch, _ = op.plan(arch, arguments, frozenset({"cublas"}))
    return launch.reading_early().launching_early() if isinstance(launch, Launch) else None


def with_cut(op: Op, arguments: Arguments, configure: str, cut: Any) -> Launch:
    """The launch as a compiled model runs it, cut as its plan's function `configure` says, or as `cut` does."""
    with mock.patch(configure, return_value=cut) if cut else nullcontext():
        launch = plan(op, arguments, Arch.of(torch.device("cuda")))
    assert launch is not None, op
    return launch


def compile_apart(launch_of: Callable[..., Launch], each: Sequence[tuple[Any, ...]]) -> None:
    """Compile `launch_of(*arguments)` for each, in many processes: into Triton's cache on disk."""
    in_processes(functools.partial(_compile, launch_of), each)


def in_processes(work: Callable[..., object], each: Sequence[tuple[Any, ...]]) -> None:
    """`work(*arguments)` for each, in as many processes as there are cores, for what it leaves in caches on disk.

    What fails is left for who does it again.
    """
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(functools.partial(_attempt, work), each, chunksize=4))


def _attempt(work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    with suppress(Exception):
        work(*arguments)


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


def fusionpass(op: Op, sets: list[Arguments], arch: Arch) -> Call | None:
    launches = [plan(op, arguments, arch) for arguments in sets]
    return None if None in launches else launch_call([launch for launch in launches if launch is not None])


def eager(op: Op, sets: list[Arguments], arch: Arch) -> Call | None:
    # A whole cache copied for a few new rows is nobody's way to do it.
    return None if caches(sets[0]) else lambda i: _listed(op, op.reference(**sets[i]))


def inductor(op: Op, sets: list[Arguments], arch: Arch, pdl: bool = False) -> Call:
    torch._dynamo.reset()
    options = {"triton.enable_pdl": True} if pdl else {}
    names = [name for name, value in sets[0].items() if isinstance(value, torch.Tensor)]

    def reference(*tensors: torch.Tensor) -> Any:
        given = {**sets[0], **dict(zip(names, tensors, strict=True))}
        results = dict(zip(op.outputs(given), _listed(op, op.reference(**given)), strict=True))
        # As models do: the new value is copied back, and Inductor then writes in place.
        return [given[name].copy_(y) if name in caches(given) else y for name, y in results.items()]

    # As operators: the references of derived ops bind their arguments by name, which Dynamo need not understand.
    traced = make_fx(reference)(*(sets[0][name] for name in names))
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


def argument_sets(
    op: Op, tokens: int, width: int, dtype: torch.dtype, count: int, scheme: str | None = None
) -> list[Arguments]:
    """`count` sets of arguments whose activations are all their own; weights and scales are shared."""
    generator = torch.Generator("cuda").manual_seed(tokens * width)
    first = op.bind((), op.sample(tokens, width, dtype, "cuda", generator))
    if scheme is not None and "scheme" in first:
        first |= {"scheme": scheme, "scale": sample_scale(scheme, "cuda")}
    others = [{k: v.clone() if _is_activation(v) else v for k, v in first.items()} for _ in range(count - 1)]
    return [first, *others]


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
