"""What `bench.gemm` times: arguments of products, the ways to compute each, and what bounds them."""

import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusionpass.arch import Arch
from fusionpass.launch import Launch, Plain
from fusionpass.op import Op
from fusionpass.ops import block_scaled_mm, linear, scaled_mm
from fusionpass.ops.gemm.blocks_triton import table_key
from fusionpass.ops.gemm.dispatch import KINDS
from fusionpass.ops.gemm.libraries import by_deep_gemm
from fusionpass.ops.gemm.stream import Cut
from fusionpass.tuning.families import TUNABLES
from fusionpass.tuning.timing import cold_sets, launch_call, time_calls

from .implementations import search, with_cut

SHAPES = {
    "qwen3_8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "llama3_8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama3_70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "qwen3_8b_head": [(151936, 4096)],
    "deepseek_v3": [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)],
}
"""[N, K] of a layer's products, projections that share an input packed."""
BLOCKS = {
    "fp8_group128": "fp8_block128", "int8_group128": "int8_block128", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
"""The scheme of the weight by that of the input, where scales change along K."""
SCHEMES = ("bf16", "fp8_token", "fp8_static", "int8_token", *BLOCKS)
BYTES = {"bf16": 2.0, "nvfp4": 0.5}
"""Of an element, where it is not one."""
PEAKS = {"sm_90": {"fp8": 1979.0, "int8": 1979.0, "16-bit": 989.0}}
"""Dense TFLOP/s of the H100's and H200's matrix units, by what they multiply (NVIDIA's data sheets, SXM)."""
CONFIGURE = {
    linear: "fusionpass.ops.gemm.stream.configure",
    scaled_mm: "fusionpass.ops.gemm.stream.configure",
    block_scaled_mm: "fusionpass.ops.gemm.blocks_triton.configure",
}
Way = Callable[[int], Any]


def shapes_of(names: list[str]) -> dict[tuple[int, int], list[str]]:
    """[N, K] once each, with the models that have it."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in names:
        for shape in SHAPES[name]:
            found.setdefault(shape, []).append(name)
    return found


def grid_of(rows: int, columns: int) -> list[Cut]:
    """Those that `--search` tries: tiles of 2 to 32 KiB, 48 KiB of them or more in flight on each multiprocessor."""
    if rows == 1:
        # Nothing is staged where products are made one by one.
        grid = itertools.product((2, 4, 8), (512, 1024, 2048, 4096), (1,), (1, 2, 4, 8), (1,))
        return [cut for cut in (Cut(*parts) for parts in grid) if 2048 <= cut.columns * cut.depth <= 16384]
    grid = itertools.product((32, 64, 128), (128, 256, 512), (1, 2, 3, 4), (2, 4, 8), (3, 4, 6), (1,))
    # The same tile of fewer columns, whose K is read in parts side by side: as many programs as a split gives.
    beside = ((64 // n, depth, splits, 4, stages, n) for n in (2, 4) for depth in (128, 256, 512)
              for splits in (1, 2) for stages in (3, 4, 6))  # fmt: skip
    found = (Cut(*parts) for parts in itertools.chain(grid, beside))
    return [
        cut
        for cut in found
        if 49152 <= cut.columns * cut.parts * cut.depth * cut.stages <= 131072
        and cut.warps == cut.columns * cut.parts // 16
        and (cut.splits == 1 or columns / cut.columns < 264)
        and columns / cut.columns * cut.splits >= 96
        and cut.stages * cut.parts * cut.depth * (cut.columns + max(16, rows)) <= 220 << 10
    ]


def arguments(rows: int, columns: int, k: int, scheme: str) -> dict[str, Any]:
    """Random codes whose scales make a product of about one."""
    if scheme in BLOCKS:
        key = table_key(BLOCKS[scheme], columns, k)
        made = TUNABLES["block_scaled_mm"].arguments(key, rows, torch.bfloat16, "cuda", None)
        return block_scaled_mm.bind((), made)
    if scheme == "bf16":
        key = {"N": columns, "K": k, "dtype": "bf16"}
        return linear.bind((), TUNABLES["linear"].arguments(key, rows, torch.bfloat16, "cuda", None))
    dtype = torch.int8 if scheme == "int8_token" else torch.float8_e4m3fn
    a, b = (torch.randn(n, k, device="cuda").mul(30).to(dtype) for n in (rows, columns))
    sizes: Any = [(), ()] if scheme == "fp8_static" else [(rows, 1), (1, columns)]
    scales = [torch.rand(size, device="cuda").add(0.5) / 30 / k**0.25 for size in sizes]
    return scaled_mm.bind((a, b.t(), *scales), {})


def op_of(scheme: str) -> Op:
    """What multiplies the operands of a scheme."""
    return block_scaled_mm if scheme in BLOCKS else linear if scheme == "bf16" else scaled_mm


def check(given: dict[str, Any], got: torch.Tensor) -> None:
    """Require `got` to be the product, to one rounding of bfloat16 and the order of a float32 sum.

    Raises:
        AssertionError: it is not.
    """
    if "a_scheme" in given:
        expected = block_scaled_mm.reference(**{**given, "out_dtype": "float32"})
        assert (got.float() - expected).norm() <= 3e-3 * expected.norm()
        return
    if "x" in given:
        given = {"a": given["x"], "b": given["w"].t(), "a_scale": torch.ones(()), "b_scale": torch.ones(())}
    a, b = given["a"].double(), given["b"].double()
    scales = given["a_scale"].double() * given["b_scale"].double()
    expected, terms = (a @ b) * scales, (a.abs() @ b.abs()) * scales
    assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + a.shape[1] * 2.0**-24 * terms).all()


def launch_of(rows: int, columns: int, k: int, scheme: str, cut: Cut | None) -> Launch:
    """The launch on arguments of its own."""
    op = op_of(scheme)
    return with_cut(op, arguments(rows, columns, k, scheme), CONFIGURE[op], cut)


def ways(scheme: str, given: list[dict[str, Any]], cut: Cut | None = None) -> Iterator[tuple[str, Way | str]]:
    """Each way to multiply by its name, or the reason why there is none; "auto" is what the dispatch chooses."""
    op, arch, first = op_of(scheme), Arch.of(torch.device("cuda")), given[0]
    planned, name = op.plan(arch, first)
    yield "auto", name if planned is not None else "dequantize" if op is block_scaled_mm else "cublas"
    try:
        yield "triton", launch_call([with_cut(op, one, CONFIGURE[op], cut) for one in given])
    except AssertionError:
        yield "triton", op.plan(arch, first)[1]
    if op is not block_scaled_mm:
        # As the op's reference calls it; int8 with its epilogue as a compiled model has it.
        torch._dynamo.reset()
        whole = torch.compile(op.reference, dynamic=False) if scheme == "int8_token" else op.reference
        yield "cublas", lambda i: whole(**given[i])
        return
    if scheme == "fp8_group128":
        yield "cublas", _planned(op, arch, given, "cublas")
        yield "cublas by row", _by_row(given)
        yield "deep_gemm", _deep_gemm(given)
        return
    for algorithm in KINDS[BLOCKS[scheme]]:
        if algorithm not in ("triton", "dequantize"):
            yield algorithm, _planned(op, arch, given, algorithm)


def _planned(op: Op, arch: Arch, given: list[dict[str, Any]], algorithm: str) -> Way | str:
    """A backend's own plan, on scales as a compiled model hands them over: by column where it reads columns."""
    backend = next((backend for backend in op.backends if backend.name == algorithm), None)
    sets = [_by_column(one) for one in given] if algorithm == "cublas" and "a_scheme" in given[0] else given
    planned = backend.plan(arch, **sets[0]) if backend is not None else "it has no plan"
    if not isinstance(planned, Plain):
        return str(planned) or "it is not for this"
    function = planned.function
    return lambda i: function(**sets[i])


def _by_column(given: dict[str, Any]) -> dict[str, Any]:
    rows = given["a"].shape[0]
    if given["a_scheme"] != "fp8_group128" or rows % 4:
        return given
    columns = given["a_scale"].t().contiguous().t()
    return {**given, "a_scale": columns, "a_scheme": "fp8_group128,layout=column_major"}


def _by_row(given: list[dict[str, Any]]) -> Way:
    """cuBLAS's product of the same codes with a scale for each row and column: a yardstick, of another scheme."""
    scales = [(one["a_scale"][:, :1].contiguous(), torch.ones(1, one["b"].shape[0], device="cuda")) for one in given]

    def call(i: int) -> torch.Tensor:
        one = given[i]
        return torch._scaled_mm(one["a"], one["b"].t(), *scales[i], out_dtype=torch.bfloat16)

    return call


def _deep_gemm(given: list[dict[str, Any]]) -> Way | str:
    if importlib.util.find_spec("deep_gemm") is None:
        return "the package deep_gemm is not installed"
    return lambda i: by_deep_gemm(**given[i])


def limit(scheme: str, rows: int, columns: int, k: int, copy: float) -> tuple[float, str] | None:
    """Microseconds that neither memory nor the matrix units can go below, and which of them: None where not known.

    Args:
        scheme: of the input.
        rows, columns, k: of the product.
        copy: microseconds of a copy that moves as many bytes as the weight has.
    """
    peaks = PEAKS.get(Arch.of(torch.device("cuda")).name)
    if peaks is None:
        return None
    wide = scheme in ("bf16", "mxfp8", "nvfp4")  # codes are unpacked to 16 bits
    units = peaks["16-bit" if wide else "int8" if scheme.startswith("int8") else "fp8"]
    byte = BYTES.get(scheme, 1.0)
    moved = (rows * k + columns * k) * byte + 2 * rows * columns
    by_bytes, by_units = copy * moved / (columns * k * byte), 2e-6 * rows * columns * k / units
    return (by_units, "FLOPs") if by_units > by_bytes else (by_bytes, "bytes")


def measure(rows: int, columns: int, k: int, scheme: str, cuts: list[Cut]) -> dict[str, Any]:
    """Microseconds of each way to multiply such matrices, and the best cut where some are searched."""
    size, op = torch.cuda.get_device_properties(0).L2_cache_size, op_of(scheme)
    stored = int(columns * k * BYTES.get(scheme, 1.0))
    sets = cold_sets(stored, size) or 1
    given = [arguments(rows, columns, k, scheme) for _ in range(sets)]
    source = [torch.empty(stored // 2, dtype=torch.uint8, device="cuda") for _ in range(2 * sets)]

    def copied(i: int) -> None:
        source[2 * i].copy_(source[2 * i + 1])

    def timed(call: Way) -> float:
        return statistics.median(time_calls(call, sets))

    def of(cut: Cut) -> float:
        call = launch_call([with_cut(op, one, CONFIGURE[op], cut) for one in given])
        check(given[0], call(0)[0])
        return timed(call)

    cell: dict[str, Any] = {"rows": rows, "columns": columns, "k": k, "scheme": scheme}
    cell["copy"] = timed(copied)
    times: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, way in ways(scheme, given):
        if name == "auto":
            cell["auto"] = way
        elif isinstance(way, str):
            absent[name] = way
        else:
            try:
                got = way(0)
                if name != "cublas by row":
                    check(given[0], got[0] if isinstance(got, list) else got)
                times[name] = timed(way)
            except (RuntimeError, AssertionError) as error:
                absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    cell |= {"times": {name: round(us, 3) for name, us in times.items()}, "absent": absent}
    cell |= search(of, cuts)
    if (found := limit(scheme, rows, columns, k, cell["copy"])) is not None:
        cell["limit"], cell["bound"] = found
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in cell.items()}
