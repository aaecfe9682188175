"""Time products of quantised matrices beside cuBLAS and a copy: `python -m bench.gemm --help`.

Weights are rotated past the L2, as those of a model's layers are. What bounds few rows is the copy of as many bytes as
the weight has; what bounds many, the matrix units, so that TFLOP/s are stated, too.
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
from fusionpass.op import Op
from fusionpass.ops import block_scaled_mm, scaled_mm
from fusionpass.ops.gemm.blocks_triton import table_key
from fusionpass.ops.gemm.stream import Cut
from fusionpass.tuning.families import TUNABLES
from fusionpass.tuning.timing import cold_sets, launch_call, time_calls, warm_up

from .implementations import compile_apart, search, with_cut
from .machine import require_gpu, results_folder, save

SHAPES = {
    "qwen3_8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "llama3_70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "deepseek_v3": [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)],
}
"""[N, K] of a layer's products, projections that share an input packed."""
BLOCKS = {
    "fp8_group128": "fp8_block128", "int8_group128": "int8_block128", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
"""The scheme of the weight by that of the input, where scales change along K."""
SCHEMES = ("fp8_token", "fp8_static", "int8_token", *BLOCKS)


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
    if scheme in BLOCKS:
        key = table_key(BLOCKS[scheme], columns, k)
        made = TUNABLES["block_scaled_mm"].arguments(key, rows, torch.bfloat16, "cuda", None)
        return block_scaled_mm.bind((), made)
    dtype = torch.int8 if scheme == "int8_token" else torch.float8_e4m3fn
    a, b = (torch.randn(n, k, device="cuda").mul(30).to(dtype) for n in (rows, columns))
    sizes: Any = [(), ()] if scheme == "fp8_static" else [(rows, 1), (1, columns)]
    scales = [torch.rand(size, device="cuda").add(0.5) / 30 / k**0.25 for size in sizes]
    return scaled_mm.bind((a, b.t(), *scales), {})


CONFIGURE = {
    scaled_mm: "fusionpass.ops.gemm.stream.configure",
    block_scaled_mm: "fusionpass.ops.gemm.blocks_triton.configure",
}


def op_of(scheme: str) -> Op:
    """What multiplies codes of a scheme."""
    return block_scaled_mm if scheme in BLOCKS else scaled_mm


def check(given: dict[str, Any], got: torch.Tensor) -> None:
    """Require `got` to be the product, to one rounding of bfloat16 and the order of a float32 sum.

    Raises:
        AssertionError: it is not.
    """
    if "a_scheme" in given:
        expected = block_scaled_mm.reference(**{**given, "out_dtype": "float32"})
        assert (got.float() - expected).norm() <= 3e-3 * expected.norm()
        return
    a, b = given["a"].double(), given["b"].double()
    scales = given["a_scale"].double() * given["b_scale"].double()
    expected, terms = (a @ b) * scales, (a.abs() @ b.abs()) * scales
    assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + a.shape[1] * 2.0**-24 * terms).all()


def launch_of(rows: int, columns: int, k: int, scheme: str, cut: Cut | None) -> Launch:
    """The launch on arguments of its own."""
    op = op_of(scheme)
    return with_cut(op, arguments(rows, columns, k, scheme), CONFIGURE[op], cut)


def cublas(given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """PyTorch's own product of these codes, or the reason why there is none."""
    if "a_scheme" not in given:
        return lambda: scaled_mm.reference(**given)
    # cuBLAS wants the scales of a group of all rows next to one another; those of blocks of the weight as they are.
    a_scale = given["a_scale"].t().contiguous().t()
    return lambda: torch._scaled_mm(given["a"], given["b"].t(), a_scale, given["b_scale"].t(), out_dtype=torch.bfloat16)


def measure(rows: int, columns: int, k: int, scheme: str, cuts: list[Cut]) -> dict[str, Any]:
    """Microseconds of each way to multiply such matrices, and the best cut where some are searched."""
    size, op = torch.cuda.get_device_properties(0).L2_cache_size, op_of(scheme)
    stored = columns * k // (2 if scheme == "nvfp4" else 1)
    sets = cold_sets(stored, size) or 1
    given = [arguments(rows, columns, k, scheme) for _ in range(sets)]
    source = [torch.empty(stored // 2, dtype=torch.uint8, device="cuda") for _ in range(2 * sets)]

    def copied(i: int) -> None:
        source[2 * i].copy_(source[2 * i + 1])

    def timed(call: Callable[[int], Any]) -> float:
        return statistics.median(time_calls(call, sets))

    def of(cut: Cut | None) -> float:
        call = launch_call([with_cut(op, one, CONFIGURE[op], cut) for one in given])
        check(given[0], call(0)[0])
        return timed(call)

    cell: dict[str, Any] = {"rows": rows, "columns": columns, "k": k, "scheme": scheme}
    cell["copy"] = timed(copied)
    calls = [cublas(one) for one in given]
    try:
        check(given[0], calls[0]())
        cell["cublas"] = timed(lambda i: calls[i]())
    except (RuntimeError, AssertionError) as error:
        cell["cublas_fails"] = f"{type(error).__name__}: {error}".splitlines()[0]
    cell["fusionpass"] = of(None)
    cell |= search(of, cuts)
    cell["tflops"] = 2e-6 * rows * columns * k / cell["fusionpass"]
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
    if options.search and set(options.scheme) & {*BLOCKS}:
        parser.error("--search is for scales of rows and of whole matrices")
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
    headings = (
        "scheme",
        "rows",
        "N × K",
        "copy",
        "cuBLAS",
        "fusionpass",
        "% of copy",
        "TFLOP/s",
        "best cut",
        "µs",
        "%",
    )
    made = Table(*headings)
    for cell in cells:
        share = [f"{100 * cell['copy'] / cell[way]:.1f}" if way in cell else "" for way in ("fusionpass", "best")]
        cut = " ".join(f"{value}" for value in cell.get("cut", {}).values())
        times = [f"{cell[way]:.2f}" if way in cell else "" for way in ("copy", "cublas", "fusionpass", "best")]
        size = f"{cell['columns']} × {cell['k']}"
        made.add_row(
            cell["scheme"],
            str(cell["rows"]),
            size,
            *times[:3],
            share[0],
            f"{cell.get('tflops', 0):.0f}",
            cut,
            times[3],
            share[1],
        )
    return made


if __name__ == "__main__":
    main()
