"""The product of a router: bfloat16 in, float32 out."""

import importlib
from typing import Any

import torch

from ...arch import Arch
from ...errors import ArgumentError
from ...launch import Plain
from ...op import Backend, Tolerance, op
from ..rows import static, triton_backend
from .dispatch import Request, check_algorithm, named

_KIND = "bf16_fp32"


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


_TRITON = triton_backend(f"{__package__}.stream", "plan_linear")
linear_bf16_fp32.backends.append(named(_TRITON, request_of))
linear_bf16_fp32.backends.append(named(Backend("deep_gemm", _plan_deep_gemm), request_of, asked=False))
