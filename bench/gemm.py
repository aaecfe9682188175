"""Time products of quantised matrices with few rows beside cuBLAS and a copy: `python -m bench.gemm --help`.

Weights are rotated past the L2, as those of a model's layers are.
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

from fusionpass.launch import Launch
from fusionpass.ops import scaled_mm
from fusionpass.ops.gemm.stream import Cut

from .implementations import compile_apart, launch_call, search, with_cut
from .machine import require_gpu, results_folder, save
from .timing import cold_sets, time_calls, warm_up

SHAPES = {
    "qwen3_8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "llama3_70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "deepseek_v3": [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)],
}
"""[N, K] of a layer's products, projections that share an input packed."""
SCHEMES = ("fp8_token", "fp8_static", "int8_token")


def grid_of(rows: int, columns: int) -> list[Cut]:
    """Those that `--search` tries: tiles of 2 to 32 KiB, 48 KiB of them or more in flight on each multiprocessor."""
    if rows == 1:
        # Nothing is staged where products are made one by one.
        grid = itertools.product((2, 4, 8), (512, 1024, 2048, 4096), (1,), (1, 2, 4, 8), (1,))
        return [cut for cut in (Cut(*parts) for parts in grid) if 2048 <= cut.columns * cut.depth <= 16384]
    grid = itertools.product((32, 64, 128), (128, 256, 512), (1, 2, 3, 4), (2, 4, 8), (3, 4, 6))
    return [
        cut
        for cut in (Cut(*parts) for parts in grid)
        if 49152 <= cut.columns * cut.depth * cut.stages <= 131072
        and cut.warps == cut.columns // 16
        and (cut.splits == 1 or columns / cut.columns < 264)
        and columns / cut.columns * cut.splits >= 96
    ]


def arguments(rows: int, columns: int, k: int, scheme: str) -> dict[str, Any]:
    """Random codes whose scales make a product of about one."""
    dtype = torch.int8 if scheme == "int8_token" else torch.float8_e4m3fn
    a, b = (torch.randn(n, k, device="cuda").mul(30).to(dtype) for n in (rows, columns))
    sizes: Any = [(), ()] if scheme == "fp8_static" else [(rows, 1), (1, columns)]
    scales = [torch.rand(size, device="cuda").add(0.5) / 30 / k**0.25 for size in sizes]
    return scaled_mm.bind((a, b.t(), *scales), {})


CONFIGURE = "fusionpass.ops.gemm.stream.configure"


def check(given: dict[str, Any], got: torch.Tensor) -> None:
    """Require `got` to be the product, to one rounding of bfloat16 and the order of a float32 sum.

    Raises:
        AssertionError: it is not.
    """
    a, b = given["a"].double(), given["b"].double()
    scales = given["a_scale"].double() * given["b_scale"].double()
    expected, terms = (a @ b) * scales, (a.abs() @ b.abs()) * scales
    assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + a.shape[1] * 2.0**-24 * terms).all()


def launch_of(rows: int, columns: int, k: int, scheme: str, cut: Cut | None) -> Launch:
    """The launch on arguments of its own."""
    return with_cut(scaled_mm, arguments(rows, columns, k, scheme), CONFIGURE, cut)


def measure(rows: int, columns: int, k: int, scheme: str, cuts: list[Cut]) -> dict[str, Any]:
    """Microseconds of each way to multiply such matrices, and the best cut where some are searched."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    sets = cold_sets(columns * k, size) or 1
    given = [arguments(rows, columns, k, scheme) for _ in range(sets)]
    source = [torch.empty(columns * k // 2, dtype=torch.uint8, device="cuda") for _ in range(2 * sets)]

    def copied(i: int) -> None:
        source[2 * i].copy_(source[2 * i + 1])

    def timed(call: Callable[[int], Any]) -> float:
        return statistics.median(time_calls(call, sets))

    def of(cut: Cut | None) -> float:
        call = launch_call([with_cut(scaled_mm, one, CONFIGURE, cut) for one in given])
        check(given[0], call(0)[0])
        return timed(call)

    cell: dict[str, Any] = {"rows": rows, "columns": columns, "k": k, "scheme": scheme}
    cell["copy"] = timed(copied)
    cell["cublas"] = timed(lambda i: scaled_mm.reference(**given[i]))
    cell["fusionpass"] = of(None)
    cell |= search(of, cuts)
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in cell.items()}


def main() -> None:
    """Parse the options, time every cell, write the JSON and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gemm", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=["fp8_token"])
    parser.add_argument("--search", action="store_true", help="try every cut, too")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/<device>")
    parser.add_argument("--commit", help="where the checkout cannot say it")
    options = parser.parse_args()
    require_gpu()
    warm_up()
    if options.search:
        first = SHAPES[options.shapes[0]][0]
        each = itertools.product(options.rows, [first], options.scheme)
        compile_apart(
            launch_of, [(rows, *first, scheme, cut) for rows, _, scheme in each for cut in grid_of(rows, 4096)]
        )
    cells = []
    for scheme, name, rows in itertools.product(options.scheme, options.shapes, options.rows):
        for columns, k in SHAPES[name]:
            cells.append(measure(rows, columns, k, scheme, grid_of(rows, columns) if options.search else []))
            torch.cuda.empty_cache()
    save(results_folder(options.out) / "gemm.json", options, cells=cells)
    Console().print(table(cells))


def table(cells: list[dict[str, Any]]) -> Table:
    """Microseconds of each way, and the shares of a copy's speed."""
    made = Table("scheme", "rows", "N × K", "copy", "cuBLAS", "fusionpass", "% of copy", "best cut", "µs", "%")
    for cell in cells:
        share = [f"{100 * cell['copy'] / cell[way]:.1f}" if way in cell else "" for way in ("fusionpass", "best")]
        cut = " ".join(f"{value}" for value in cell.get("cut", {}).values())
        times = [f"{cell[way]:.2f}" if way in cell else "" for way in ("copy", "cublas", "fusionpass", "best")]
        size = f"{cell['columns']} × {cell['k']}"
        made.add_row(cell["scheme"], str(cell["rows"]), size, *times[:3], share[0], cut, times[3], share[1])
    return made


if __name__ == "__main__":
    main()
