"""The product of a router: bfloat16 in, float32 out, and what may compute it."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ...arch import Arch
from ...errors import ArgumentError, nearest
from ...launch import Late, Launch
from ...op import Backend, Refusal, Tolerance, op
from ..rows import static

ROWS = 64
"""Rows that are bound by reading the weights; more are bound by their products."""


@dataclass(frozen=True)
class Request:
    """A product `x @ w.T`.

    Args:
        rows: of `x`; None where the number is symbolic.
        columns: of the result.
        k: of both.
    """

    rows: int | None
    columns: int
    k: int


@dataclass(frozen=True)
class Choice:
    """What computes a product.

    Args:
        algorithm: a name in `ALGORITHMS`.
        rejected: those before it in the order of preference, with reasons.
    """

    algorithm: str
    rejected: Mapping[str, str]


def _triton(arch: Arch, request: Request) -> Refusal:
    if arch.is_cpu:
        return "the cpu has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed here"
    if arch.is_cuda and arch.capability < 80:
        return f"bfloat16 needs sm_80 or newer, not {arch.name}"
    if request.k % 8:
        return f"K is {request.k}, not a multiple of 8"
    if request.rows is not None and request.rows > ROWS:
        return f"{request.rows} rows are bound by their products (at most {ROWS})"
    return None


def _cublas(arch: Arch, request: Request) -> Refusal:
    if not arch.is_cuda:
        return f"cuBLAS is for NVIDIA GPUs, not {arch.name}"
    if arch.capability < 80:
        return f"bfloat16 needs sm_80 or newer, not {arch.name}"
    return None


def _deep_gemm(arch: Arch, request: Request) -> Refusal:
    if arch.name not in ("sm_90", "sm_100"):
        return f"DeepGEMM is for sm_90 and sm_100, not {arch.name}"
    if request.columns % 8 or request.k % 8:
        return f"N is {request.columns} and K {request.k}, not multiples of 8"
    return None if importlib.util.find_spec("deep_gemm") is not None else "the package deep_gemm is not installed"


def _upcast(arch: Arch, request: Request) -> Refusal:
    return None


ALGORITHMS: dict[str, Callable[[Arch, Request], Refusal]] = {
    "triton": _triton,
    "cublas": _cublas,
    "upcast": _upcast,
    "deep_gemm": _deep_gemm,
}
"""Why each cannot compute a product on a target, in the order in which "auto" asks; of those behind "upcast", which can
always, it asks none: they were not measured."""


def choose(arch: Arch, request: Request, algo: str = "auto") -> Choice:
    """What computes `request` on `arch`. Asks no device.

    Raises:
        ArgumentError: there is no such algorithm, or it was asked for by name and cannot.
    """
    if algo == "auto":
        rejected: dict[str, str] = {}
        for name, why_not in ALGORITHMS.items():
            reason = why_not(arch, request)
            if reason is None:
                return Choice(name, rejected)
            rejected[name] = reason
    if algo not in ALGORITHMS:
        raise ArgumentError(f"there is no algorithm {algo!r}", "linear_bf16_fp32", nearest(algo, ("auto", *ALGORITHMS)))
    if reason := ALGORITHMS[algo](arch, request):
        raise ArgumentError(f"{algo} cannot: {reason}", "linear_bf16_fp32", "Ask for another algorithm, or for 'auto'")
    return Choice(algo, {})


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    x, w = (
        torch.randn(rows, width, generator=generator, device=device).to(torch.bfloat16)
        for rows in (tokens, max(8, width // 8))
    )
    return {"x": x, "w": w}


@op(outputs=("product",), sample=_sample, tolerance={"product": Tolerance(fp32_ulp=4, fraction=1.0, floor=2**-17)})
def linear_bf16_fp32(x: torch.Tensor, w: torch.Tensor, algo: str = "auto") -> torch.Tensor:
    """`x @ w.T` of bfloat16 in float32, as routers of mixtures of experts have it; neither is copied in float32.

    Args:
        x: [M, K], bfloat16.
        w: [N, K], bfloat16.
        algo: "triton" (at most 64 rows), "cublas", "deep_gemm" (an optional package), "upcast" (both made float32), or
            "auto", the first of them that can; `choose` says why the others cannot.

    Returns:
        [M, N], float32: products exact, summed in float32.

    Raises:
        ArgumentError: shapes or dtypes do not fit, there is no such algorithm, or it was named and cannot compute this.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ArgumentError(f"x is {tuple(x.shape)}, w {tuple(w.shape)}", "linear_bf16_fp32", "Pass [M, K] and [N, K]")
    if x.dtype != torch.bfloat16 or w.dtype != torch.bfloat16:
        raise ArgumentError(f"x is {x.dtype}, w {w.dtype}", "linear_bf16_fp32", "Both must be bfloat16")
    if algo != "auto" and algo not in ALGORITHMS:
        choose(Arch("cpu"), Request(None, 8, 8), algo)
    if x.device.type == "cpu":
        choose(Arch("cpu"), Request(None, w.shape[0], w.shape[1]), algo)
    if x.is_cuda and torch.version.hip is None and algo != "upcast":
        return _by_deep_gemm(x, w) if algo == "deep_gemm" else torch.mm(x, w.t(), out_dtype=torch.float32)
    return x.float() @ w.float().t()


def _by_deep_gemm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)
    if not isinstance(x, FakeTensor):
        importlib.import_module("deep_gemm").bf16_gemm_nt(x.contiguous(), w.contiguous(), out)
    return out


def _plan(arch: Arch, x: torch.Tensor, w: torch.Tensor, algo: str = "auto") -> Launch | Late | str:
    """The launches that run it where few rows read the weights, or why there are none.

    Raises:
        ArgumentError: `algo` was named and cannot compute this here.
    """
    columns, k = (static(size) for size in w.shape)
    if columns is None or k is None:
        return "the weight is of symbolic size, and the choice depends on it"
    chosen = choose(arch, Request(static(x.shape[0]), columns, k), algo)
    if chosen.algorithm != "triton":
        return chosen.rejected.get("triton", f"{chosen.algorithm} was asked for")
    from .stream import plan_linear

    return plan_linear(arch, x, w)


linear_bf16_fp32.backends.append(Backend("triton", _plan))
