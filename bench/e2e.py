"""A transformer as users run it: decode and prefill of an unmodified Qwen3 with FP8 linears, beside torch.compile.

`python -m bench.e2e --layers 8 --out FILE`. All in one process, in turns.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fusionpass
from bench.machine import require_gpu, save
from bench.replay import FILLED, by_hand, rate
from bench.start import model
from fusionpass.testing import relative_error

DECODE = ("reduce-overhead", "default, one graph", "fusionpass")
PREFILL = ("default", "fusionpass")
FARTHER = 1.5
"""How much farther than torch.compile's logits ours may be from eager mode's: roundings of FP8 codes move with the
order of sums, in both."""


def compiled(way: str, made: Any) -> Any:
    """`made`, compiled in a way of `DECODE` or `PREFILL`."""
    if way == "fusionpass":
        return fusionpass.compile(made)
    return torch.compile(made, dynamic=False, **({"mode": way} if way == "reduce-overhead" else {}))


def step(eager: Any, made: Any, *, batch: int, length: int) -> Callable[[], torch.Tensor]:
    """A decode step of `batch` texts with a static cache of `length`; each adds a token to the first `FILLED`."""
    from transformers import StaticCache

    generator = torch.Generator("cuda").manual_seed(0)
    most = eager.config.vocab_size
    first, ids = (torch.randint(0, most, (batch, n), device="cuda", generator=generator) for n in (FILLED, 1))
    cache = StaticCache(config=eager.config, max_cache_len=length)
    eager(input_ids=first, past_key_values=cache, use_cache=True)
    return lambda: made(input_ids=ids, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]


def prefill(made: Any, *, tokens: int) -> Callable[[], torch.Tensor]:
    """A text of so many tokens, without a cache."""
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, made.config.vocab_size, (1, tokens), device="cuda", generator=generator)
    return lambda: made(input_ids=ids, use_cache=False, logits_to_keep=1).logits  # type: ignore[no-any-return]


def measure(
    eager: Any, ways: tuple[str, ...], call_of: Callable[[Any], Callable[[], torch.Tensor]], repeats: int
) -> dict[str, Any]:
    """Microseconds of each way, its first call in seconds, and how far its first result is from eager mode's."""
    torch._dynamo.reset()
    expected = call_of(eager)().double()
    calls: dict[str, Callable[[], Any]] = {}
    cell: dict[str, Any] = {}
    for way in ways:
        call = call_of(compiled(way, copy.deepcopy(eager)))
        start = time.perf_counter()
        error = relative_error(call(), expected)
        torch.cuda.synchronize()
        cell[way] = {"first_s": round(time.perf_counter() - start, 1), "error": round(error, 5)}
        for _ in range(4):
            call()
        calls[way] = by_hand(call) if "one graph" in way else call
    for way, us in rate(calls, repeats=repeats).items():
        cell[way]["us"] = round(us, 1)
    return cell


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.e2e", description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--length", type=int, default=1024, help="of the static cache")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048], help="tokens")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--scheme", default="fp8_token")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    require_gpu()
    # Several models of one class: before torch 2.14 Dynamo counts all their compilations together.
    torch._dynamo.config.recompile_limit = 64
    found: dict[str, Any] = {}
    with torch.inference_mode():
        eager = model(options.layers, options.width, options.scheme, "cuda", options.vocabulary)
        decode = {
            f"decode, batch {n}": (DECODE, partial(step, eager, batch=n, length=options.length), 10)
            for n in options.batch
        }
        texts = {f"prefill {n}": (PREFILL, partial(prefill, tokens=n), 5) for n in options.prefill}
        console, todo = Console(), [*(decode | texts).items()]
        shown = track(todo, "measuring", console=console, transient=True, disable=not console.is_terminal)
        for work, (ways, call_of, repeats) in shown:
            found[work] = measure(eager, ways, call_of, repeats)
            # What was measured is kept, whatever comes next.
            console.print(table(work, found[work]))
            if options.out:
                save(options.out, options, work=found)
    far = [work for work, cell in found.items() if not near(cell)]
    assert not far, f"{far}: farther from eager mode than torch.compile by more than {FARTHER} times"


def near(cell: dict[str, Any]) -> bool:
    """Whether our logits are about as near to eager mode's as torch.compile's."""
    farthest = max(figures["error"] for way, figures in cell.items() if way != "fusionpass")
    return bool(cell["fusionpass"]["error"] <= FARTHER * farthest)


def table(work: str, cell: dict[str, Any]) -> Table:
    """Microseconds of each way, and how many times ours."""
    made = Table(work, "µs", "its time / ours", "first call, s", "error")
    for way, figures in cell.items():
        ratio = figures["us"] / cell["fusionpass"]["us"]
        made.add_row(way, f"{figures['us']:.0f}", f"{ratio:.2f}", str(figures["first_s"]), str(figures["error"]))
    return made


if __name__ == "__main__":
    main()
