"""Time attention of a few tokens over a cache beside PyTorch's kernels and a copy: `python -m bench.attention --help`.

Caches are rotated past the L2, as those of a model's layers are.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from fusionpass.launch import Launch
from fusionpass.ops import attention
from fusionpass.ops.attention.decode_triton import Cut
from fusionpass.testing import exact, relative_error
from fusionpass.tuning.timing import cold_sets, launch_call, time_calls, warm_up

from .implementations import compile_apart, search, with_cut
from .machine import require_gpu, results_folder, save

CUTS = [Cut(*parts) for parts in itertools.product((32, 64, 128), (1, 2, 4, 8, 16, 33, 66), (4, 8))]
"""Those that `--search` tries."""


def arguments(batch: int, heads: tuple[int, int], width: int, slots: int, filled: int) -> dict[str, Any]:
    """One token a text, over a static cache of `slots` of which `filled` are seen, by a mask as transformers has it."""

    def drawn(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, count, tokens, width, device="cuda", dtype=torch.bfloat16)

    seen = (torch.arange(slots, device="cuda") < filled).expand(batch, 1, 1, slots)
    made = (drawn(heads[0], 1), drawn(heads[1], slots), drawn(heads[1], slots))
    return attention.bind(made, {"mask": seen, "enable_gqa": True})


CONFIGURE = "fusionpass.ops.attention.decode_triton.configure"


def ways(sets: list[dict[str, Any]], filled: int) -> dict[str, Callable[[int], Any]]:
    """PyTorch's: as models call it, with heads repeated; sharing them; and over the filled part alone."""

    def sdpa(q: Any, k: Any, v: Any, mask: Any = None, repeat: bool = False) -> torch.Tensor:
        if repeat:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=not repeat)

    def parts(i: int) -> tuple[Any, Any, Any]:
        return sets[i]["q"], sets[i]["k"], sets[i]["v"]

    def short(i: int) -> torch.Tensor:
        q, k, v = parts(i)
        return sdpa(q, k[:, :, :filled], v[:, :, :filled])

    return {
        "repeated": lambda i: sdpa(*parts(i), sets[i]["mask"], repeat=True),
        "shared": lambda i: sdpa(*parts(i), sets[i]["mask"]),
        "filled alone": short,
    }


def launch_of(batch: int, heads: tuple[int, int], width: int, slots: int, filled: int, cut: Cut) -> Launch:
    return with_cut(attention, arguments(batch, heads, width, slots, filled), CONFIGURE, cut)


def measure(batch: int, heads: tuple[int, int], width: int, slots: int, filled: int, cuts: list[Cut]) -> dict[str, Any]:
    """Microseconds of each way, and the best cut where some are searched."""
    size = 4 * batch * heads[1] * filled * width
    sets = min(cold_sets(size, torch.cuda.get_device_properties(0).L2_cache_size) or 1, 64)
    given = [arguments(batch, heads, width, slots, filled) for _ in range(sets)]
    truth = exact(attention, given[0])[0]
    halves = [torch.empty(max(size // 2, 1), dtype=torch.uint8, device="cuda") for _ in range(2 * sets)]

    def timed(call: Callable[[int], Any]) -> float:
        return statistics.median(time_calls(call, sets))

    def of(cut: Cut | None) -> float:
        call = launch_call([with_cut(attention, one, CONFIGURE, cut) for one in given])
        assert relative_error(call(0)[0], truth) < 2**-7, cut
        return timed(call)

    compile_apart(launch_of, [(batch, heads, width, slots, filled, cut) for cut in cuts])
    cell: dict[str, Any] = {"batch": batch, "heads": heads, "width": width, "slots": slots, "filled": filled}
    cell["copy"] = timed(lambda i: halves[2 * i].copy_(halves[2 * i + 1]))
    cell |= {name: timed(call) for name, call in ways(given, filled).items()}
    cell["fusionpass"] = of(None)
    cell |= search(of, cuts)
    torch.cuda.empty_cache()
    return {name: round(v, 2) if isinstance(v, float) else v for name, v in cell.items()}


def main() -> None:
    """Parse the options, time every cell, write the JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--heads", nargs=2, type=int, default=[32, 8], help="of queries, of keys")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--filled", nargs="+", type=int, default=[100, 1024, 4096])
    parser.add_argument("--search", action="store_true", help="try every cut, too")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/<device>")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    require_gpu()
    warm_up()
    heads = tuple(options.heads)
    cells = [
        measure(batch, heads, options.width, options.slots, filled, CUTS if options.search else [])
        for batch in options.batch
        for filled in options.filled
    ]
    save(results_folder(options.out) / "attention.json", options, cells=cells)
    names = [name for name in cells[0] if name not in ("heads", "width", "failed")]
    made = Table(*names)
    for cell in cells:
        made.add_row(*(" ".join(map(str, v.values())) if isinstance(v := cell[n], dict) else str(v) for n in names))
    Console().print(made)


if __name__ == "__main__":
    main()
