"""What may compute a product on a target, and why the rest may not: pure functions, which ask no device."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...arch import Arch
from ...errors import ArgumentError, nearest
from ...launch import Late, Launch, Plain
from ...op import Backend, Refusal

FEW = 64
"""Rows that are bound by reading the weights; more are bound by their products."""

HALF = 32
"""FEW of what is not quantised."""

SINGLE = 32
"""FEW where each matrix has one scale: with those cuBLAS was as fast at 64 rows on an H100; for scales of rows it takes
large tiles whatever their number."""


@dataclass(frozen=True)
class Request:
    """A product `x @ w.T`.

    Args:
        kind: what of, a key of `KINDS`.
        rows: of `x`; None where the number is symbolic.
        columns: of the result.
        k: codes, or elements, of a row of either.
        out_dtype: of the result, by name.
        layout: of `w` and its scales, as `ops/quant/layout.py` names them.
    """

    kind: str
    rows: int | None
    columns: int
    k: int
    out_dtype: str = "bfloat16"
    layout: str = "linear"


@dataclass(frozen=True)
class Choice:
    """What computes a product.

    Args:
        algorithm: a name in the kind's table.
        rejected: those before it in the order of preference, with reasons.
    """

    algorithm: str
    rejected: Mapping[str, str]


Gate = Callable[[Arch, Request], Refusal]
"""Why an algorithm cannot compute a product on a target, or None."""


def _triton(arch: Arch, least: int = 89) -> Refusal:
    if arch.is_cpu:
        return "the cpu has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed here"
    if arch.is_cuda and arch.capability < 80:
        return f"Triton's kernels need sm_80 or newer, not {arch.name}"
    if arch.is_cuda and arch.capability < least:
        return f"{arch.name} has no float8_e4m3fn"
    return None


def _streamed(rows: int, unit: int, least: int) -> Gate:
    """The kernel of few rows, whose rows of K have to be a multiple of 16 bytes."""

    def gate(arch: Arch, request: Request) -> Refusal:
        if reason := _triton(arch, least):
            return reason
        if request.k == 0 or request.k % unit:
            return f"K is {request.k}, not a multiple of {unit}"
        if request.rows is not None and request.rows > rows:
            return f"{request.rows} rows are bound by their products (at most {rows})"
        return None

    return gate


def _blocks(least: int, e4m3fn: bool = True) -> Gate:
    """The kernel of scales along K: any number of rows. In blocks gfx942 has its own FP8, e4m3fnuz."""

    def gate(arch: Arch, request: Request) -> Refusal:
        if reason := _triton(arch, least):
            return reason
        if request.k == 0:
            return "K is 0"
        if request.layout not in ("linear", "swizzled"):
            return f"w lies as {request.layout} wants it"
        return "gfx942 has no float8_e4m3fn" if e4m3fn and arch.name == "gfx942" else None

    return gate


def _cublas(least: int, what: str) -> Gate:
    def gate(arch: Arch, request: Request) -> Refusal:
        if not arch.is_cuda:
            return f"cuBLAS is for NVIDIA GPUs, not {arch.name}"
        return None if arch.capability >= least else f"{what} needs sm_{least} or newer, not {arch.name}"

    return gate


def _cublas_blocks(arch: Arch, request: Request) -> Refusal:
    """Hopper's product of FP8 in blocks, twice as fast as ours at 2048 rows; its rows are padded to a multiple of 4."""
    if arch.name != "sm_90":
        return f"cuBLAS's product of blocks is for sm_90, not {arch.name}"
    if request.rows is None:
        return "the number of rows is symbolic"
    if request.rows <= FEW:
        return f"{request.rows} rows are bound by reading the weight"
    if request.columns % 16 or request.k % 512:
        return f"N is {request.columns} and K {request.k}, not multiples of 16 and 512"
    if request.out_dtype != "bfloat16":
        return f"it writes bfloat16, not {request.out_dtype}"
    if reason := _lies(request, "linear"):
        return reason
    version = torch.version.cuda
    if version is not None and tuple(map(int, version.split(".")[:2])) < (12, 9):
        return f"it needs CUDA 12.9, not {version}"
    return None


def _lies(request: Request, layout: str) -> Refusal:
    """Why `w` is not as a library's kernels read it."""
    told = f"w lies {request.layout}, not {layout}: repack_linears_ changes that"
    return None if request.layout == layout else told


def _cublas_scaled(what: str) -> Gate:
    """PyTorch's product with scales for short groups, `torch.nn.functional.scaled_mm`."""

    def gate(arch: Arch, request: Request) -> Refusal:
        if reason := _cublas(100, what)(arch, request):
            return reason
        if request.out_dtype != "bfloat16":
            return f"it is called for bfloat16 alone, not {request.out_dtype}"
        if request.columns % 16 or request.k % 32:
            return f"N is {request.columns} and K {request.k}, not multiples of 16 and 32"
        return _lies(request, "swizzled")

    return gate


def _few_of_16_bits(arch: Arch, request: Request) -> Refusal:
    """The same kernel of 16-bit floats, which is ahead of cuBLAS at 1 to 32 rows on an H200, level at 64."""
    if reason := _streamed(HALF, 8, 80)(arch, request):
        return reason
    if request.rows not in (None, 1) and arch.name != "sm_90":
        return f"with {request.rows} rows it was not measured on {arch.name}"
    return None


def _not_16_bits(arch: Arch, request: Request) -> Refusal:
    return "the kernels multiply 16-bit floats and codes, not float32"


def _always(arch: Arch, request: Request) -> Refusal:
    return None


def _deep_gemm(columns: int, k: int) -> Gate:
    def gate(arch: Arch, request: Request) -> Refusal:
        if arch.name not in ("sm_90", "sm_100"):
            return f"DeepGEMM is for sm_90 and sm_100, not {arch.name}"
        if request.columns % columns or request.k % k:
            return f"N is {request.columns} and K {request.k}, not multiples of {columns} and {k}"
        if request.kind != "bf16_fp32":
            if request.out_dtype != "bfloat16":
                return f"DeepGEMM writes bfloat16, not {request.out_dtype}"
            # Blackwell's kernels read exponents, four at a time.
            if reason := _lies(request, "linear" if arch.name == "sm_90" else "deepgemm"):
                return reason
        return None if importlib.util.find_spec("deep_gemm") is not None else "the package deep_gemm is not installed"

    return gate


def _flashinfer(targets: tuple[str, ...], k: int = 1, bfloat16: bool = False, layout: str = "swizzled") -> Gate:
    def gate(arch: Arch, request: Request) -> Refusal:
        if arch.name not in targets:
            return f"it is for {', '.join(targets)}, not {arch.name}"
        if request.columns < 128 or request.k < 128:
            return f"N is {request.columns} and K {request.k}, not 128 or more"
        if request.k % k:
            return f"K is {request.k}, not a multiple of {k}"
        if arch.capability in (120, 121) and (request.columns % 32 or request.k % 32):
            return f"N is {request.columns} and K {request.k}, not multiples of 32"
        if bfloat16 and request.out_dtype != "bfloat16":
            return f"it writes bfloat16, not {request.out_dtype}"
        if request.out_dtype == "float32":
            return "it writes 16 bits, not float32"
        if reason := _lies(request, layout):
            return reason
        return None if importlib.util.find_spec("flashinfer") is not None else "the package flashinfer is not installed"

    return gate


_BLACKWELL = ("sm_100", "sm_103", "sm_107")
_ALL_BLACKWELL = (*_BLACKWELL, "sm_110", "sm_120", "sm_121")
_FLASHINFER: dict[str, Gate] = {
    "flashinfer_trtllm": _flashinfer(_BLACKWELL, k=256, bfloat16=True, layout="trtllm"),
    "flashinfer_cute_dsl": _flashinfer(_BLACKWELL),
    "flashinfer_cutlass": _flashinfer(_ALL_BLACKWELL),
}
"""By the limits that FlashInfer states for MXFP8 and NVFP4. How the weight lies says which of them is meant: only one
reads shuffled rows; of the others CUTLASS is for sm_110, sm_120 and sm_121, and CuTe for the rest."""
_FP8 = {"cublas": _cublas(89, "FP8"), "reference": _always}

_HALF = {"triton": _few_of_16_bits, "cublas": _cublas(75, "16-bit floats"), "reference": _always}

KINDS: dict[str, dict[str, Gate]] = {
    "bf16": _HALF,
    "fp16": _HALF,
    "fp32": {"triton": _not_16_bits, "cublas": _cublas(50, "float32"), "reference": _always},
    "bf16_fp32": {
        "triton": _streamed(FEW, 8, 80),
        "cublas": _cublas(80, "bfloat16"),
        "upcast": _always,
        "deep_gemm": _deep_gemm(8, 8),
    },
    "fp8_tensor": {"triton": _streamed(SINGLE, 16, 89), **_FP8},
    "fp8_row": {"triton": _streamed(FEW, 16, 89), **_FP8},
    "int8_row": {"triton": _streamed(FEW, 16, 80), "cublas": _cublas(80, "INT8"), "reference": _always},
    "fp8_block128": {
        "cublas": _cublas_blocks,
        "triton": _blocks(89, e4m3fn=False),
        "dequantize": _always,
        "deep_gemm": _deep_gemm(64, 128),
    },
    "int8_block128": {"triton": _blocks(80, e4m3fn=False), "dequantize": _always},
    "mxfp8": {**_FLASHINFER, "cublas": _cublas_scaled("MXFP8"), "triton": _blocks(89), "dequantize": _always},
    "nvfp4": {**_FLASHINFER, "cublas": _cublas_scaled("NVFP4"), "triton": _blocks(89), "dequantize": _always},
}
"""By what is multiplied, why each algorithm cannot compute it, in the order in which "auto" asks. Of those behind the
one that always can it asks none: they were not measured, and are for who names them."""


def why_not(arch: Arch, request: Request, algorithm: str) -> Refusal:
    """Why `algorithm` cannot compute `request` on `arch`, or None."""
    return KINDS[request.kind][algorithm](arch, request)


def choose(arch: Arch, request: Request, algo: str = "auto") -> Choice:
    """What computes `request` on `arch`. Asks no device.

    Raises:
        ArgumentError: there is no such algorithm, or it was asked for by name and cannot.
    """
    table = KINDS[request.kind]
    if algo == "auto":
        rejected: dict[str, str] = {}
        for name in table:
            reason = why_not(arch, request, name)
            if reason is None:
                return Choice(name, rejected)
            rejected[name] = reason
    if algo not in table:
        raise ArgumentError(f"there is no algorithm {algo!r}", request.kind, nearest(algo, ("auto", *table)))
    if reason := why_not(arch, request, algo):
        raise ArgumentError(f"{algo} cannot: {reason}", request.kind, "Ask for another algorithm, or for 'auto'")
    return Choice(algo, {})


def named(backend: Backend, request_of: Callable[..., Request | None], asked: bool = True) -> Backend:
    """The backend as an op with the argument `algo` has it: left out where another is named, an error where it cannot.

    Args:
        backend: its name is that of an algorithm.
        request_of: the request that the op's arguments are; None where a size of the weight is symbolic.
        asked: whether "auto" asks it.

    Raises:
        ArgumentError: when planning an algorithm that was named and cannot be, or that there is not.
    """

    def plan(arch: Arch, algo: str = "auto", **arguments: Any) -> Launch | Late | Plain | str:
        if algo == "auto":
            return backend.plan(arch, **arguments) if asked else ""
        request = request_of(**arguments)
        if request is not None:
            choose(arch, request, algo)
        if algo != backend.name:
            return f"{algo} was asked for" if backend.name == "triton" else ""  # once is enough
        planned = backend.plan(arch, **arguments)
        if isinstance(planned, str):
            raise ArgumentError(f"{algo} cannot: {planned}", "algo", "Ask for another algorithm, or for 'auto'")
        return planned

    return Backend(backend.name, plan)


def check_algorithm(request: Request, algo: str, device: torch.device) -> None:
    """What a reference asks of the argument `algo`: that it exists, and on a CPU that it is for one.

    Raises:
        ArgumentError: it is not.
    """
    if device.type == "cpu":
        choose(Arch("cpu"), request, algo)
    elif algo != "auto" and algo not in KINDS[request.kind]:
        raise ArgumentError(
            f"there is no algorithm {algo!r}", request.kind, nearest(algo, ("auto", *KINDS[request.kind]))
        )


PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""The kind of a product of matrices that are not quantised, by their dtype, in which its result is, too."""


def kind_of_codes(a: torch.Tensor, single: bool) -> str:
    """The kind of a product of codes with a scale for each matrix (`single`), or for each row and column."""
    if a.dtype == torch.int8:
        return "int8_row"
    return "fp8_tensor" if single else "fp8_row"
