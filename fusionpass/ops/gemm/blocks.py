"""Products of matrices whose scales change along K: blocks of FP8 and INT8, MXFP8, NVFP4."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from ...arch import Arch
from ...errors import ArgumentError, nearest
from ...launch import Plain
from ...op import Backend, Refusal, op
from ..quant import dequantize, quantize
from ..quant.layout import refuse_layout, stored_shape
from ..quant.scheme import Scheme
from ..rows import known, static, triton_backend
from . import OUTPUTS, SUMMED
from .dispatch import FEW, Request, check_algorithm, named, why_not


def _sample(tokens: int, width: int, dtype: torch.dtype, device: str, generator: Any) -> dict[str, object]:
    k = -(-width // 128) * 128
    x, w = (torch.randn(rows, k, generator=generator, device=device) for rows in (tokens, max(8, width // 2)))
    a, a_scale = quantize.reference(x, None, "fp8_group128")
    b, b_scale = quantize.reference(w, None, "fp8_block128")
    name = str(dtype).removeprefix("torch.")
    return {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "out_dtype": name}


@op(outputs=("product",), sample=_sample, tolerance={"product": SUMMED})
def block_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    a_scheme: str = "fp8_group128",
    b_scheme: str = "fp8_block128",
    a_global_scale: torch.Tensor | None = None,
    b_global_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: str = "bfloat16",
    algo: str = "auto",
) -> torch.Tensor:
    """`dequantize(a) @ dequantize(b).T + bias` of two matrices of codes, summed in float32 and rounded once.

    Args:
        a: codes [M, K] as `quantize` returns them; [M, K/2] uint8 for nvfp4.
        b: codes [N, K], or [N, K/2], likewise.
        a_scale: the scales of `a`: [M, ⌈K/group⌉], in the dtype and layout that `a_scheme` says.
        b_scale: the scales of `b`: [N, ⌈K/group⌉], or [⌈N/128⌉, ⌈K/128⌉] where `b_scheme` is of blocks.
        a_scheme: a `Scheme` whose scales are for groups of a row.
        b_scheme: one with groups, or blocks, as long.
        a_global_scale: what `a_scale` is relative to, one float32 element; for nvfp4.
        b_global_scale: what `b_scale` is relative to, likewise.
        bias: [N], floating point.
        out_dtype: "bfloat16", "float16" or "float32".
        algo: "triton", "cublas", "deep_gemm", "flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_cute_dsl",
            "dequantize", or "auto", the first that can; `dispatch.choose` says why the others cannot.

    Returns:
        [M, N], contiguous. MXFP8 by way of bfloat16: `code * scale` is exact there from 2**-126 to 2**127.

    Raises:
        ArgumentError: schemes, shapes, layouts or dtypes do not fit, there is no such algorithm, or it was named and
            cannot compute this.

    Source: the products of the OCP Microscaling specification 1.0 (6.2) and of DeepSeek-V3's report (arXiv:2412.19437,
        3.3.2), with float32 sums.
    """
    kinds = Scheme.parse(a_scheme), Scheme.parse(b_scheme)
    _check(a, b, a_scale, b_scale, kinds, (a_global_scale, b_global_scale), bias, out_dtype)
    check_algorithm(_request(a, b, kinds[1], out_dtype), algo, a.device)
    x = _dequantized(a, a_scale, kinds[0], a_global_scale)
    w = _dequantized(b, b_scale, kinds[1], b_global_scale)
    return F.linear(x, w, None if bias is None else bias.float()).to(OUTPUTS[out_dtype])


def _dequantized(codes: torch.Tensor, scale: torch.Tensor, kind: Scheme, given: torch.Tensor | None) -> torch.Tensor:
    """`dequantize` for a last group that need not be whole."""
    k, group = codes.shape[1], kind.group
    if group is None or kind.packed or known(k % group == 0):
        return dequantize(codes, scale, kind, given)
    padded = F.pad(codes.view(torch.uint8), (0, -k % group)).view(codes.dtype)
    return dequantize(padded, scale, kind, given)[:, :k]


def group_of(kind: Scheme) -> int | None:
    """How many codes of a row share a scale, or None: all."""
    return 128 if kind.granularity == "block128" else kind.group


def _check(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    kinds: tuple[Scheme, Scheme],
    given: tuple[torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    out_dtype: str,
) -> None:
    def wrong(what: str, fix: str) -> ArgumentError:
        return ArgumentError(what, "block_scaled_mm", fix)

    groups = [group_of(kind) for kind in kinds]
    if None in groups or groups[0] != groups[1] or kinds[0].granularity == "block128":
        raise wrong(f"the schemes are {kinds[0]} and {kinds[1]}", "Both need groups of one length; a has no blocks")
    if kinds[0].code_dtype != kinds[1].code_dtype or kinds[0].scale_dtype != kinds[1].scale_dtype:
        raise wrong(f"the schemes are {kinds[0]} and {kinds[1]}", "Use codes of one dtype, and scales of one")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise wrong(f"a is {tuple(a.shape)}, b {tuple(b.shape)}", "Pass [M, K] and [N, K]")
    named = (("a", a, a_scale, kinds[0], given[0]), ("b", b, b_scale, kinds[1], given[1]))
    for name, codes, scale, kind, relative in named:
        if codes.dtype != kind.code_dtype:
            raise wrong(f"{name} is {codes.dtype}", f"{kind} has {kind.code_dtype}")
        if isinstance(codes.shape[0], int) and (reason := refuse_layout(codes.shape[0], kind.layout)):
            raise wrong(f"{name} cannot be {kind}", f"As {reason}")
        wanted = scale_shape(codes, kind)
        if scale.dtype != kind.stored_scale_dtype or tuple(scale.shape) != wanted:
            raise wrong(
                f"{name}_scale is {scale.dtype}, shape {tuple(scale.shape)}",
                f"{kind} has {kind.stored_scale_dtype} {list(wanted)} here",
            )
        if (relative is not None) != kind.takes_scale or (relative is not None and relative.numel() != 1):
            what = "missing" if relative is None else f"of shape {tuple(relative.shape)}"
            raise wrong(f"{name}_global_scale is {what}", f"{kind} takes {'one' if kind.takes_scale else 'none'}")
    if bias is not None and (tuple(bias.shape) != (b.shape[0],) or not bias.is_floating_point()):
        raise wrong(f"bias is {bias.dtype}, shape {tuple(bias.shape)}", f"Pass [{b.shape[0]}]")
    if out_dtype not in OUTPUTS:
        raise wrong(f"out_dtype is {out_dtype!r}", nearest(out_dtype, OUTPUTS))


def scale_shape(codes: torch.Tensor, kind: Scheme) -> tuple[Any, Any]:
    """The shape of the scales of a matrix of codes."""
    rows, k = codes.shape[0], codes.shape[1] * (2 if kind.packed else 1)
    group = group_of(kind)
    assert group is not None
    shape = ((rows + 127) // 128 if kind.granularity == "block128" else rows, (k + group - 1) // group)
    return stored_shape(shape, kind.layout)  # type: ignore[return-value]


def kind_of(kind: Scheme) -> str:
    """What is multiplied, as `dispatch` has it, by the scheme of either operand."""
    if kind.packed:
        return "nvfp4"
    if group_of(kind) == 32:
        return "mxfp8"
    return "int8_block128" if kind.dtype == torch.int8 else "fp8_block128"


def _request(a: torch.Tensor, b: torch.Tensor, kind: Scheme, out_dtype: str) -> Request:
    k = b.shape[1] * (2 if kind.packed else 1)
    return Request(kind_of(kind), static(a.shape[0]), b.shape[0], k, out_dtype, kind.layout)


def request_of(
    a: torch.Tensor, b: torch.Tensor, b_scheme: str = "fp8_block128", out_dtype: str = "bfloat16", **_: Any
) -> Request | None:
    """The request that the op's arguments are; None where a size of the weight is symbolic."""
    sizes = isinstance(b.shape[0], int) and isinstance(b.shape[1], int)
    return _request(a, b, Scheme.parse(b_scheme), out_dtype) if sizes else None


def plan_cublas(
    arch: Arch,
    a: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    a_scheme: str = "fp8_group128",
    b_scheme: str = "fp8_block128",
    bias: torch.Tensor | None = None,
    out_dtype: str = "bfloat16",
    **_: Any,
) -> Plain | str:
    """PyTorch's call of cuBLAS, where it has such a product and is faster."""
    reason = _cublas_refuses(arch, static(a.shape[0]), a, b, b_scale, (a_scheme, b_scheme), bias, out_dtype)
    return Plain(_by_cublas) if reason is None else reason


def _cublas_refuses(
    arch: Arch,
    rows: int | None,
    a: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    schemes: tuple[str, str],
    bias: torch.Tensor | None,
    out_dtype: str,
) -> Refusal:
    kinds = [Scheme.parse(scheme) for scheme in schemes]
    float32 = kinds[0].scale_dtype == torch.float32
    if kinds[1].granularity != "block128" or a.dtype != torch.float8_e4m3fn or not float32:
        return "it is of float8_e4m3fn with float32 scales, weights in blocks of 128"
    k: Any = b.shape[1]
    columns: Any = b.shape[0]
    if not isinstance(k, int) or not isinstance(columns, int):
        return "the size of the weight is symbolic"
    if reason := why_not(arch, Request("fp8_block128", rows, columns, k, out_dtype), "cublas"):
        return reason
    if bias is not None:
        return "it adds no bias"
    strides = {name: t.stride() for name, t in (("a", a), ("b", b), ("b_scale", b_scale)) if t.stride(1) != 1}
    strides |= {"b_scale": b_scale.stride()} if b_scale.stride(0) != b_scale.shape[1] else {}
    return f"strides are {strides}" if strides else None


def wants_columns(arch: Arch, arguments: Mapping[str, Any]) -> Refusal:
    """Why the scales of `a` need not lie column by column; None: cuBLAS may compute this product, which reads them so.

    Args:
        arch: the target.
        arguments: of `block_scaled_mm`; where the number of rows is symbolic there may be many.
    """
    a, b, b_scale = (arguments[name] for name in ("a", "b", "b_scale"))
    schemes = str(arguments["a_scheme"]), str(arguments["b_scheme"])
    rows = FEW + 1 if static(a.shape[0]) is None else a.shape[0]
    return _cublas_refuses(arch, rows, a, b, b_scale, schemes, arguments["bias"], str(arguments["out_dtype"]))


_UNIT = 4
"""cuBLAS takes multiples of so many rows: those of a column of scales, 16 bytes."""


def _by_cublas(**arguments: Any) -> torch.Tensor:
    a, a_scale = arguments["a"], arguments["a_scale"].t()
    rows = a.shape[0]
    missing = -rows % _UNIT
    if missing:
        a = F.pad(a.view(torch.uint8), (0, 0, 0, missing)).view(a.dtype)
        a_scale = F.pad(a_scale, (0, missing))
    # The scales of a group of all rows have to lie next to one another; nothing is copied where they do.
    y = torch._scaled_mm(
        a,
        arguments["b"].t(),
        a_scale.contiguous().t(),
        arguments["b_scale"].t(),
        out_dtype=OUTPUTS[arguments["out_dtype"]],
    )
    return y[:rows] if missing else y


def _library(name: str) -> Backend:
    """The backend of an algorithm that is in `libraries.PLANS`. DeepGEMM is for who names it: it was not measured."""

    def plan(arch: Arch, **arguments: Any) -> Plain | str:
        found: Callable[..., Plain | str] = import_module(f"{__package__}.libraries").PLANS[name]
        return found(arch, **arguments)

    return named(Backend(name, plan), request_of, name != "deep_gemm")


_LIBRARIES = ("flashinfer_trtllm", "flashinfer_cute_dsl", "flashinfer_cutlass", "cublas", "deep_gemm")
_TRITON = triton_backend(f"{__package__}.blocks_triton", "plan")
block_scaled_mm.backends += [*map(_library, _LIBRARIES), named(_TRITON, request_of)]
