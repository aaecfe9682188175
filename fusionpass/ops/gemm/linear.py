"""Products of what is not quantised: of a linear, and of a router, bfloat16 in and float32 out."""

import importlib
from typing import Any

import torch

from ...arch import Arch
from ...errors import ArgumentError
from ...launch import Plain
from ...op import Backend, Tolerance, op
from ..rows import static, triton_backend
from . import NAMES
from .dispatch import PLAIN, Request, check_algorithm, named

_KIND = "bf16_fp32"


def _sample_linear(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    # One row, since not every target has a kernel of more.
    shapes = (min(1, tokens), width), (width, width)
    x, w = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    return {"x": x, "w": w * width**-0.5, "bias": x.new_ones(width)}


@op(
    outputs=("product",),
    sample=_sample_linear,
    tolerance={"product": Tolerance(ulp=1, fraction=0.05, fp32_ulp=4, floor=2**-12)},
)
def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, algo: str = "auto") -> torch.Tensor:
    """`x @ w.T + bias` in the dtype of `x`, summed in float32 and rounded once.

    Args:
        x: [M, K], bfloat16, float16 or float32.
        w: [N, K], `x.dtype`.
        bias: [N], `x.dtype`.
        algo: "triton" (at most 32 rows of 16 bits), "cublas", "reference", or "auto", the first of them that can.

    Returns:
        [M, N], `x.dtype`.

    Raises:
        ArgumentError: shapes or dtypes do not fit, there is no such algorithm, or it was named and cannot compute this.

    Source: torch.nn.functional.linear.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ArgumentError(f"x is {tuple(x.shape)}, w {tuple(w.shape)}", "linear", "Pass [M, K] and [N, K]")
    if x.dtype not in PLAIN or w.dtype != x.dtype:
        raise ArgumentError(f"x is {x.dtype}, w {w.dtype}", "linear", "Both must be of one dtype of 16 or 32 bits")
    if bias is not None and (tuple(bias.shape) != (w.shape[0],) or bias.dtype != x.dtype):
        raise ArgumentError(f"bias is {bias.dtype}, shape {tuple(bias.shape)}", "linear", f"Pass [{w.shape[0]}]")
    check_algorithm(Request(PLAIN[x.dtype], None, w.shape[0], w.shape[1]), algo, x.device)
    return torch.nn.functional.linear(x, w, bias)


def linear_request_of(x: torch.Tensor, w: torch.Tensor, **_: Any) -> Request | None:
    """As `request_of`, of `linear`."""
    columns, k = (static(size) for size in w.shape)
    if columns is None or k is None:
        return None
    return Request(PLAIN[x.dtype], static(x.shape[0]), columns, k, NAMES[x.dtype])


linear.backends.append(named(triton_backend(f"{__package__}.stream", "plan_linear"), linear_request_of))


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
            "auto", the first of them that can; `dispatch.choose` says why the others cannot.

    Returns:
        [M, N], float32: products exact, summed in float32.

    Raises:
        ArgumentError: shapes or dtypes do not fit, there is no such algorithm, or it was named and cannot compute this.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ArgumentError(f"x is {tuple(x.shape)}, w {tuple(w.shape)}", "linear_bf16_fp32", "Pass [M, K] and [N, K]")
    if x.dtype != torch.bfloat16 or w.dtype != torch.bfloat16:
        raise ArgumentError(f"x is {x.dtype}, w {w.dtype}", "linear_bf16_fp32", "Both must be bfloat16")
    check_algorithm(Request(_KIND, None, w.shape[0], w.shape[1]), algo, x.device)
    if x.is_cuda and torch.version.hip is None and algo != "upcast":
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return x.float() @ w.float().t()


def _by_deep_gemm(x: torch.Tensor, w: torch.Tensor, **_: Any) -> torch.Tensor:
    out = x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)
    importlib.import_module("deep_gemm").bf16_gemm_nt(x.contiguous(), w.contiguous(), out)
    return out


def request_of(x: torch.Tensor, w: torch.Tensor, **_: Any) -> Request | None:
    """The request that the op's arguments are; None where a size of the weight is symbolic."""
    columns, k = (static(size) for size in w.shape)
    return None if columns is None or k is None else Request(_KIND, static(x.shape[0]), columns, k, "float32")


def _plan_deep_gemm(arch: Arch, x: torch.Tensor, w: torch.Tensor) -> Plain | str:
    """DeepGEMM's call, which was named, so that `named` has asked the table of choices."""
    if request_of(x, w) is None:
        return "the size of the weight is symbolic"
    return Plain(_by_deep_gemm, traced=False)


_TRITON = triton_backend(f"{__package__}.stream", "plan_router")
linear_bf16_fp32.backends.append(named(_TRITON, request_of))
linear_bf16_fp32.backends.append(named(Backend("deep_gemm", _plan_deep_gemm), request_of, asked=False))
