"""The kernels that can be tuned: what tables are for, what may be tried, and what it is checked by."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton

from ..arch import Arch
from ..op import OPS, Op
from ..ops import block_scaled_mm, experts, linear, quantize, scaled_mm
from ..ops.gemm import blocks_triton, stream
from ..ops.moe import triton as moe
from ..ops.moe import weight_scheme
from ..ops.quant import sample_scale
from ..ops.quant.scheme import SCHEMES, Scheme
from . import models, rows
from .heads import HEADS
from .tunable import Footprint, Key, Tunable

INPUTS = {"fp8_w8a8": "fp8_group128", "int8_w8a8": "int8_group128", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
"""The scheme of what is multiplied, by the name that tables give it."""
ROWS = ("rms_norm", "add_rms_norm", "silu_mul", "rms_norm_quantize", "add_rms_norm_quantize", "silu_mul_quantize",
        "quantize")  # fmt: skip
"""Kernels that work by the row."""


def _normal(shape: tuple[int, ...], device: str, generator: Any) -> torch.Tensor:
    return torch.randn(shape, device=device, generator=generator)


def _quantized(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Codes, their scales, and what these are relative to or what was given."""
    kind = Scheme.parse(scheme)
    given = x.abs().amax() / (2688 if kind.packed else 448) if kind.takes_scale else None
    codes, *scales = quantize.reference(x, given, scheme)
    return codes, (scales[0] if scales else None), given


def _blocks(key: Key, m: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    scheme = INPUTS[key["dtype"]]
    made: dict[str, Any] = {"a_scheme": scheme, "b_scheme": str(weight_scheme(scheme)), "out_dtype": str(dtype)[6:]}
    for name, n, kind in (("a", m, scheme), ("b", key["N"], made["b_scheme"])):
        x = _normal((n, key["K"]), device, generator) / key["K"] ** 0.25
        made[name], made[f"{name}_scale"], made[f"{name}_global_scale"] = _quantized(x, kind)
    return made


def _block_space(arch: Arch, key: Key) -> Iterator[blocks_triton.Cut]:
    for parts in itertools.product((2, 4, 8, 16), (512, 1024, 2048), (1, 2), (1,), (1, 2, 4, 8)):
        yield blocks_triton.Cut(1, *parts, stages=1)
    deeper = (128,) if "w8a8" in key["dtype"] else (64, 128, 256)
    shapes = itertools.product((16, 32, 64, 128, 256), (32, 64, 128, 256), deeper, (1, 2, 4, 8), (4, 8))
    for tall, wide, deep, splits, warps in shapes:
        for stages in (3, 4, 6) if tall <= 64 else (2, 3, 4):
            yield blocks_triton.Cut(tall, wide, deep, splits, 1 if tall < 64 else 8, warps, stages)


def _block_footprint(arch: Arch, key: Key, m: int, cut: blocks_triton.Cut) -> Footprint | str:
    if (m == 1) != (cut.rows == 1):
        return "rows: one row has its own program"
    programs = -(-m // cut.rows) * -(-key["N"] // cut.columns)
    if cut.splits > 1 and programs > arch.multiprocessors:
        return f"splits: there are {programs} programs without any"
    if cut.rows == 1:
        held = cut.columns * cut.depth // (cut.warps * arch.warp_size)
        return Footprint(0, 32 + 3 * held, cut.warps) if held >= 4 else "columns: less than 4 bytes for each thread"
    if cut.rows > max(16, triton.next_power_of_2(m)):
        return f"rows: there are {m}"
    if cut.rows * 2 < min(128, m):
        return "rows: a tile of less than half of them reads the weight too often"
    if 4 * programs * cut.splits < arch.multiprocessors:
        return "tile: less than a quarter of the multiprocessors would have one"
    # What is scaled group by group has its sums twice.
    sums = 2 if "w8a8" in key["dtype"] else 1
    held = sums * cut.rows * cut.columns // (cut.warps * arch.warp_size)
    if held < 8:
        return "warps: less than 8 sums for each thread"
    return Footprint(cut.stages * (cut.rows + cut.columns) * cut.depth, held + 40, cut.warps)


def _block_work(key: Key, m: int) -> tuple[float, float]:
    size = 0.5 if key["dtype"] == "nvfp4" else 1.0
    return size * key["K"] * (key["N"] + m) + 2.0 * m * key["N"], 2.0 * m * key["N"] * key["K"]


def _exact_product(bound: Mapping[str, Any]) -> torch.Tensor:
    made: torch.Tensor = block_scaled_mm.reference(**{**bound, "out_dtype": "float32"})
    return made.double()


def _scaled(key: Key, m: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    kind = torch.int8 if key["dtype"].startswith("int8") else torch.float8_e4m3fn
    a, b = (_normal((n, key["K"]), device, generator).mul(30).to(kind) for n in (m, key["N"]))
    whole = key["dtype"].endswith("tensor")
    sizes: Any = [(), ()] if whole else [(m, 1), (1, key["N"])]
    scales = [torch.ones(size, device=device) / 30 / key["K"] ** 0.25 for size in sizes]
    return {"a": a, "b": b.t(), "a_scale": scales[0], "b_scale": scales[1], "out_dtype": str(dtype)[6:]}


def _plain(key: Key, m: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    kind = torch.float16 if key["dtype"] == "fp16" else torch.bfloat16
    x, w = (_normal((n, key["K"]), device, generator) for n in (m, key["N"]))
    return {"x": x.to(kind), "w": (w / key["K"] ** 0.5).to(kind)}


def _exact_linear(bound: Mapping[str, Any]) -> torch.Tensor:
    made: torch.Tensor = bound["x"].double() @ bound["w"].double().t()
    return made


def _plain_work(key: Key, m: int) -> tuple[float, float]:
    return 2.0 * (key["K"] * (key["N"] + m) + m * key["N"]), 2.0 * m * key["N"] * key["K"]


def _stream_space(arch: Arch, key: Key) -> Iterator[stream.Cut]:
    for parts in itertools.product((2, 4, 8), (512, 1024, 2048, 4096), (1,), (1, 2, 4, 8), (1,)):
        yield stream.Cut(*parts)
    for columns, depth, splits, stages in itertools.product((32, 64, 128), (128, 256, 512), (1, 2, 3, 4, 8), (3, 4, 6)):
        yield stream.Cut(columns, depth, splits, columns // 16, stages)
    for beside, depth, splits, stages in itertools.product((2, 4), (128, 256, 512), (1, 2), (3, 4, 6)):
        yield stream.Cut(64 // beside, depth, splits, 4, stages, beside)


def _stream_footprint(arch: Arch, key: Key, m: int, cut: stream.Cut) -> Footprint | str:
    if (m == 1) != (cut.stages == 1):
        return "rows: one row has its own program"
    programs = -(-key["N"] // cut.columns)
    tile = cut.columns * cut.parts * cut.depth
    if m == 1:
        return Footprint(0, 128, cut.warps) if 2048 <= tile <= 16384 else "tile: a program reads 2 to 16 KiB at once"
    if not 49152 <= tile * cut.stages <= 131072:
        return "tile: 48 to 128 KiB of weights are in flight on each multiprocessor"
    if cut.splits > 1 and programs >= 2 * arch.multiprocessors:
        return f"splits: there are {programs} programs without any"
    if programs * cut.splits < 0.7 * arch.multiprocessors:
        return "splits: there would be too few programs"
    return Footprint(cut.stages * (tile + max(16, m) * cut.parts * cut.depth), 128, cut.warps)


def _mixture(key: Key, m: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
    hidden, inner, count, top = key["hidden"], key["N"], key["E"], key["top"]
    scores = _normal((m, count), device, generator).softmax(-1).topk(top)
    made: dict[str, Any] = {"ids": scores.indices, "weights": scores.values.to(dtype)}
    made["x"] = _normal((m, hidden), device, generator).to(dtype)
    scheme = made["x_scheme"] = _mixture_scheme(key)
    for name, n, k in (("up", 2 * inner, hidden), ("down", hidden, inner)):
        if not scheme:
            made[name] = torch.stack([(_normal((n, k), device, generator) / k**0.5).to(dtype) for _ in range(count)])
            continue
        each = [
            _quantized(_normal((n, k), device, generator) / k**0.5, str(weight_scheme(scheme))) for _ in range(count)
        ]
        codes, scales, given = zip(*each, strict=True)
        made[name] = torch.stack(codes)
        made[f"{name}_scale"] = torch.stack(scales if scales[0] is not None else given)
        if scales[0] is not None and given[0] is not None:
            made[f"{name}_global_scale"] = torch.stack(given)
    if scheme and Scheme.parse(scheme).takes_scale:
        made |= {name: sample_scale(scheme, device) for name in ("x_scale", "hidden_scale")}
    return made


def _mixture_scheme(key: Key) -> str:
    if key.get("dtype") is None:
        return ""
    return "fp8_static" if key["dtype"] == "fp8_w8a8" and key.get("block_shape") is None else INPUTS[key["dtype"]]


def _mixture_space(arch: Arch, key: Key) -> Iterator[blocks_triton.Cut]:
    size = 2 if key.get("dtype") is None else 1
    shapes = itertools.product((16, 32, 64, 128), (32, 64, 128), (64 // size, 128 // size, 256 // size), (1, 8))
    for (tall, wide, deep, grouped), warps, stages in itertools.product(shapes, (4, 8), (3, 4)):
        yield blocks_triton.Cut(tall, wide, deep, 1, grouped, warps, stages)


def _mixture_footprint(arch: Arch, key: Key, m: int, cut: blocks_triton.Cut) -> Footprint | str:
    each = -(-m * key["top"] // key["E"])
    if cut.rows > max(16, 4 * triton.next_power_of_2(each)):
        return f"rows: an expert has about {each}"
    if (cut.grouped > 1) != (each > cut.rows):
        return "grouped: blocks of rows share their weight where an expert has several"
    threads, size = cut.warps * arch.warp_size, 2 if key.get("dtype") is None else 1
    by_sum = key.get("block_shape") is not None
    held = (3 if by_sum else 2) * cut.rows * cut.columns // threads
    if held < 16:
        return "warps: less than 8 sums for each thread"
    return Footprint(cut.stages * (cut.rows + 2 * cut.columns) * cut.depth * size, held + 40, cut.warps)


def _down_space(arch: Arch, key: Key) -> Iterator[blocks_triton.Cut]:
    size = 2 if key.get("dtype") is None else 1
    shapes = itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (64 // size, 128 // size, 256 // size), (1, 8))
    for (tall, wide, deep, grouped), warps, stages in itertools.product(shapes, (4, 8), (3, 4)):
        yield blocks_triton.Cut(tall, wide, deep, 1, grouped, warps, stages)


def _down_footprint(arch: Arch, key: Key, m: int, cut: blocks_triton.Cut) -> Footprint | str:
    size = 2 if key.get("dtype") is None else 1
    first = key.get("first") or {}
    tall = first.get("BLOCK_SIZE_M") or moe.configure(arch, m * key["top"], key["E"], key["N"], size).rows
    if cut.rows != tall:
        return f"rows: the first product takes {tall} a block, and both share their order"
    each = -(-m * key["top"] // key["E"])
    if (cut.grouped > 1) != (each > cut.rows):
        return "grouped: blocks of rows share their weight where an expert has several"
    sums = 2 if key.get("block_shape") is not None else 1
    held = sums * cut.rows * cut.columns // (cut.warps * arch.warp_size)
    if held < 8:
        return "warps: less than 8 sums for each thread"
    return Footprint(cut.stages * (cut.rows + cut.columns) * cut.depth * size, held + 40, cut.warps)


def _down_others(key: Key) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """The first product's table, which is followed while the second is tuned."""
    if key.get("first"):
        yield {name: v for name, v in key.items() if name not in ("hidden", "top", "first", "down")}, key["first"]


def _downs(model: models.Model | models.Sizes, scheme: str) -> Iterator[tuple[str, Key]]:
    for name, key in _mixtures(model, scheme):
        yield f"{name}, down", {**key, "down": True}


def _mixture_work(key: Key, m: int) -> tuple[float, float]:
    size = {None: 2.0, "nvfp4": 0.5}.get(key.get("dtype"), 1.0)
    each = 3.0 * key["hidden"] * key["N"]
    return size * each * min(key["E"], m * key["top"]), 2.0 * each * m * key["top"]


def _exact_mixture(bound: Mapping[str, Any]) -> torch.Tensor:
    made: torch.Tensor = experts.reference(**bound)
    return made.double()


def _by_row(op: Op) -> Tunable:
    """A kernel that works by the row."""

    def arguments(key: Key, m: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, Any]:
        made = dict(op.sample(m, int(key["width"]), dtype, device, generator))
        scheme = key.get("scheme")
        return {**made, "scheme": scheme, "scale": sample_scale(scheme, device)} if scheme else made

    def space(arch: Arch, key: Key) -> Iterator[rows.Cut]:
        width = triton.next_power_of_2(int(key["width"]))
        for columns, count, warps in itertools.product(
            sorted({256, 512, 1024, 2048, 4096, width}), (1, 2, 4), (1, 2, 4, 8, 16)
        ):
            yield rows.Cut(count, columns, warps)

    def footprint(arch: Arch, key: Key, m: int, cut: rows.Cut) -> Footprint | str:
        whole = cut.columns >= int(key["width"])
        held = cut.rows * cut.columns // (cut.warps * arch.warp_size)
        if not 8 <= held <= (64 if whole else 16):
            return f"elements: {held} for each thread"
        if not whole and cut.rows * cut.columns > 4096:
            return "elements: parts of rows are of 4096 at most"
        return Footprint(0, 40 + 2 * held, cut.warps)

    def work(key: Key, m: int) -> tuple[float, float]:
        moved = 4.0 * m * int(key["width"]) * int(key["bytes"])
        return moved, moved

    quantizes = "scheme" in op.signature.parameters

    def keys(model: models.Model | models.Sizes, scheme: str) -> Iterator[tuple[str, Key]]:
        width = model.inner if "mul" in op.name else model.width
        kinds = [None] if not quantizes else [scheme] if scheme in SCHEMES else []
        for kind in kinds if width else ():
            yield f"{op.name} of {width}", rows.row_key(kind, width, 2)

    return Tunable(op.name, op, arguments, space, footprint, work, keys, sparse=True, warm=64)


def _products(model: models.Model | models.Sizes, scheme: str) -> Iterator[tuple[str, Key]]:
    for name, columns, k in model.products():
        kind = {"fp8_group128": "fp8_block128", "int8_group128": "int8_block128"}.get(scheme, scheme)
        if kind in ("fp8_block128", "int8_block128", "mxfp8", "nvfp4"):
            yield name, blocks_triton.table_key(kind, columns, k)


def _streams(kinds: Mapping[str, str]) -> Callable[..., Iterator[tuple[str, Key]]]:
    """The keys of products of few rows, of the kinds by scheme."""

    def keys(model: models.Model | models.Sizes, scheme: str) -> Iterator[tuple[str, Key]]:
        for name, columns, k in model.products() if scheme in kinds else ():
            yield name, {"N": columns, "K": k, "dtype": kinds[scheme]}

    return keys


def _mixtures(model: models.Model | models.Sizes, scheme: str) -> Iterator[tuple[str, Key]]:
    if model.experts:
        own = {"hidden": model.hidden, "top": model.top}
        key = moe.table_key("" if scheme == "bf16" else scheme, model.experts, model.expert_inner, False)
        yield "experts", {**key, **own}


DOWN = "experts_down"
"""The second product of a mixture: a search of its own, whose tables are those of `experts` that end in `_down`."""
_OPS = {op.name: op for op in OPS.values()}
TUNABLES: dict[str, Tunable] = {
    **{name: _by_row(_OPS[name]) for name in ROWS},
    "block_scaled_mm": Tunable(
        "block_scaled_mm", block_scaled_mm, _blocks, _block_space, _block_footprint, _block_work, _products,
        exact=_exact_product,
    ),
    "scaled_mm": Tunable(
        "scaled_mm", scaled_mm, _scaled, _stream_space, _stream_footprint, _block_work,
        _streams({"fp8_token": "fp8_row", "fp8_static": "fp8_tensor", "int8_token": "int8_row"}),
    ),
    "linear": Tunable(
        "linear", linear, _plain, _stream_space, _stream_footprint, _plain_work, _streams({"bf16": "bf16"}),
        exact=_exact_linear,
    ),
    "experts": Tunable(
        "experts", experts, _mixture, _mixture_space, _mixture_footprint, _mixture_work, _mixtures,
        exact=_exact_mixture, error=0.05, unnamed=("hidden", "top", "down"),
    ),
    DOWN: Tunable(
        "experts", experts, _mixture, _down_space, _down_footprint, _mixture_work, _downs,
        exact=_exact_mixture, error=0.05, unnamed=("hidden", "top", "first"), others=_down_others,
    ),
    **HEADS,
}  # fmt: skip
"""By what `--op` calls them: the name of their tables, but for `DOWN`."""
