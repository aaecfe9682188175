"""CUDA graphs at work: the time of a decode step by mode, beside one graph made by hand, and the memory of many sizes.

`python -m bench.replay --layers 8 --out FILE`; `--modes` takes further modes, `--only steps` leaves memory out,
`--only pdl` compares early launches with none at the sizes of `--tokens`.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusionpass
from bench.machine import require_gpu, save
from bench.start import model

MODES: dict[str, dict[str, Any]] = {
    "full": {"cuda_graphs": "full"},
    "full, no PDL": {"cuda_graphs": "full", "disable": frozenset({"pdl"})},
    "piecewise": {"cuda_graphs": "piecewise"},
    "attention eager": {
        "cuda_graphs": "piecewise",
        "boundaries": frozenset({"torch._C._nn.scaled_dot_product_attention"}),
    },
    "by hand": {"cuda_graphs": "off"},
}
"""By name, the options of `fusionpass.compile`; the graph by hand is made over what is compiled without any."""
COMPARED = ("full", "piecewise", "by hand")
"""What the bars are about: these have their pieces in common, and two of them their traces."""
FILLED = 64


def step(made: Any, batch: int, length: int) -> Callable[[], Any]:
    """A decode step of `batch` texts with a static cache of `length`, `FILLED` of which are there before."""
    from transformers import StaticCache

    cache = StaticCache(config=made.config, max_cache_len=length)
    with torch.compiler.set_stance("force_eager"):  # what fills the cache is not measured: it need not be compiled
        made(input_ids=torch.randint(0, 32768, (batch, FILLED), device="cuda"), past_key_values=cache, use_cache=True)
    ids = torch.randint(0, 32768, (batch, 1), device="cuda")
    # Each step adds a token; attention reads the whole static cache whatever is in it.
    return lambda: made(input_ids=ids, past_key_values=cache, use_cache=True).logits


def by_hand(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call in one CUDA graph that nobody checks."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: Any = call) -> None:
        """Nobody else may keep what the graph reads: the cache, the parameters."""
        graph.replay()

    return replay


def rate(calls: dict[str, Callable[[], Any]], rounds: int = 9, repeats: int = 20) -> dict[str, float]:
    """Microseconds of each call among `repeats` that nobody waits for, in turns: the median over the rounds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
            found[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def host(call: Callable[[], Any]) -> int:
    """Microseconds until a call returns that found the GPU idle: guards, checks and the launch."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return round(statistics.median(times))


def measure_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The time of a decode step per layer, for each batch: from the second on the batch is a symbol."""
    made = {mode: model(options.layers, options.width, options.scheme, "cuda") for mode in options.modes}
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for mode, compiled in made.items():
            fusionpass.compile(compiled, cache_dir=folder, **MODES[mode])
        for batch in options.batch:
            cells.append(_cell(made, batch, options))
            print(json.dumps(cells[-1]), flush=True)
    return cells


def _cell(made: dict[str, Any], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    calls = {mode: step(compiled, batch, options.length) for mode, compiled in made.items()}
    for call in calls.values():
        for _ in range(4):
            call()
    ready = time.perf_counter()
    calls["by hand"] = by_hand(calls["by hand"])
    times = rate(calls, rounds=7, repeats=50)
    cell = {"batch": batch, **{mode: round(t / options.layers, 2) for mode, t in times.items()}}
    cell |= {f"{mode} / by hand": round(t / times["by hand"], 3) for mode, t in times.items() if mode != "by hand"}
    cell |= {f"{mode}, host us a call": host(call) for mode, call in calls.items()}
    graphs = {mode: len(fusionpass.report(made[mode]).memory.graphs) for mode in calls if mode != "by hand"}
    return cell | {"graphs": graphs, "seconds to compile": round(ready - start, 1)}


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """What the graphs of all sizes cost, beside what one call without any costs at its peak."""
    sizes = (1, *range(8, options.largest + 1, 8))
    made = fusionpass.compile(
        model(options.layers, options.width, options.scheme, "cuda"), cuda_graphs="full", capture_sizes=sizes
    )

    def call(tokens: int) -> None:
        made(input_ids=torch.randint(0, 32768, (1, tokens), device="cuda"), use_cache=False)

    call(7)
    call(options.largest + 5)  # another size: from here on it is a symbol
    torch.cuda.synchronize()
    memory = fusionpass.report(made).memory
    found = {"sizes": len(sizes), "graphs": len(memory.graphs), "MiB": round(memory.total / 2**20, 1)}
    print(json.dumps(found), flush=True)
    return found


def measure_pdl(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What launching kernels early gives at each size, by graphs of the same code for any size, with and without."""
    calls: dict[str, Callable[[int], Any]] = {}
    for mode in ("full", "full, no PDL"):
        made = fusionpass.compile(model(options.layers, options.width, options.scheme, "cuda"), **MODES[mode])
        ids = torch.randint(0, 32768, (1, max(options.tokens)), device="cuda")

        def call(tokens: int, made: Any = made, ids: torch.Tensor = ids) -> Any:
            return made(input_ids=ids[:, :tokens], use_cache=False, logits_to_keep=1).logits

        for tokens in (7, 13):
            call(tokens)  # the second size makes it a symbol
        calls[mode] = call
    cells = []
    for tokens in options.tokens:
        times = rate({mode: functools.partial(call, tokens) for mode, call in calls.items()}, rounds=7, repeats=20)
        cell = {"tokens": tokens, **{mode: round(t / options.layers, 2) for mode, t in times.items()}}
        cells.append(cell | {"no PDL / PDL": round(times["full, no PDL"] / times["full"], 3)})
        print(json.dumps(cells[-1]), flush=True)
    return cells


MEASURES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "memory": measure_memory,
    "steps": measure_steps,
    "pdl": measure_pdl,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--length", type=int, default=512, help="of the static cache; the steps must fit")
    parser.add_argument("--largest", type=int, default=256, help="of the captured sizes")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(COMPARED), help="beside by hand")
    parser.add_argument("--only", choices=["memory", "steps", "pdl"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 16, 64, 256, 1024, 4096], help="of a prefill")
    parser.add_argument("--scheme", default="fp8_token")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    options.modes = list(dict.fromkeys((*options.modes, "by hand")))
    require_gpu()
    # Models of one class: before torch 2.14 Dynamo counts all their compilations together.
    torch._dynamo.config.recompile_limit = 64
    with torch.inference_mode():
        found = {
            name: measure(options)
            for name, measure in MEASURES.items()
            if name == options.only or (options.only is None and name != "pdl")
        }
    if options.out:
        save(options.out, options, **found)


if __name__ == "__main__":
    main()
