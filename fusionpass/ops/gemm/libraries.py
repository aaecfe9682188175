"""Products with scales along K by other libraries: torch.nn.functional.scaled_mm, DeepGEMM and FlashInfer.

Packages are imported when one of their products is run. Each reads a weight that lies as it wants (`repack_linears_`);
the scales of the other operand are brought into its layout here, where what quantised it has not done so.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...arch import Arch
from ...launch import Plain
from ...op import Refusal
from ..quant.layout import exponents_packed, linear, swizzled
from ..quant.scheme import Scheme
from . import OUTPUTS
from .blocks import kind_of, plan_cublas, request_of
from .dispatch import KINDS, why_not


def _scales_of_a(arguments: Mapping[str, Any], layout: str) -> torch.Tensor:
    """The scales of `a` in a layout, made anew where they lie otherwise."""
    kind, scales = Scheme.parse(arguments["a_scheme"]), arguments["a_scale"]
    if kind.layout == layout:
        return scales  # type: ignore[no-any-return]
    a = arguments["a"]
    groups = a.shape[1] * (2 if kind.packed else 1) // kind.group
    plain = linear(a, scales, kind.layout, (a.shape[0], groups))[1]
    return swizzled(plain) if layout == "swizzled" else exponents_packed(plain)


def by_scaled_mm(**arguments: Any) -> torch.Tensor:
    """cuBLAS's products of MXFP8 and NVFP4, whose scales are swizzled on both sides."""
    packed = Scheme.parse(arguments["a_scheme"]).packed
    a, b = arguments["a"], arguments["b"].t()
    dtype = torch.float8_e4m3fn if packed else torch.float8_e8m0fnu
    scales = [t.view(dtype) for t in (_scales_of_a(arguments, "swizzled"), arguments["b_scale"])]
    kinds, order = F.ScalingType, F.SwizzleType
    recipe: Any = kinds.BlockWise1x32
    more: list[list[Any]] = [[], []]
    swizzle: Any = order.SWIZZLE_32_4_4
    if packed:
        a, b = (t.view(torch.float4_e2m1fn_x2) for t in (a, b))
        recipe, swizzle = [kinds.BlockWise1x16, kinds.TensorWise], [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]
        more = [[arguments[name].float().reshape(())] for name in ("a_global_scale", "b_global_scale")]
    return F.scaled_mm(
        a, b, [scales[0], *more[0]], recipe, [scales[1], *more[1]], recipe, swizzle, swizzle,
        output_dtype=OUTPUTS[arguments["out_dtype"]],
    )  # fmt: skip


def by_deep_gemm(**arguments: Any) -> torch.Tensor:
    """DeepGEMM's product in blocks: float32 scales on Hopper, packed exponents on Blackwell."""
    library: Any = importlib.import_module("deep_gemm")
    a, b = arguments["a"], arguments["b"]
    y: torch.Tensor = a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    if arguments["b_scale"].dtype == torch.int32:
        library.fp8_gemm_nt((a, _scales_of_a(arguments, "deepgemm")), (b, arguments["b_scale"]), y)
    else:
        # It moves the scales to where its loads want them itself, and copies none that lie there.
        operands = (a, arguments["a_scale"]), (b, arguments["b_scale"])
        library.fp8_gemm_nt(*operands, y, disable_ue8m0_cast=True)
    return y


def by_flashinfer(backend: str) -> Callable[..., torch.Tensor]:
    """FlashInfer's product of MXFP8 or NVFP4 by one of its backends: "trtllm", "cutlass" or "cute-dsl"."""

    def product(**arguments: Any) -> torch.Tensor:
        library: Any = importlib.import_module("flashinfer")
        dtype = OUTPUTS[arguments["out_dtype"]]
        a, b = arguments["a"], arguments["b"].t()
        a_scale, b_scale = _scales_of_a(arguments, "swizzled"), arguments["b_scale"]
        if not Scheme.parse(arguments["a_scheme"]).packed:
            flat = a_scale.view(-1), b_scale.view(-1)
            return library.mm_mxfp8(a, b, *flat, out_dtype=dtype, backend=backend)  # type: ignore[no-any-return]
        alpha = arguments["a_global_scale"].float() * arguments["b_global_scale"].float()
        return library.mm_fp4(  # type: ignore[no-any-return]
            a, b, a_scale.view(torch.uint8), b_scale.view(torch.uint8).t(), alpha.reshape(1), dtype,
            block_size=16, use_8x4_sf_layout=False, backend=backend,
        )  # fmt: skip

    return product


def _refuse(arch: Arch, name: str, arguments: Mapping[str, Any]) -> Refusal:
    """Why operands cannot be handed over, whatever their sizes."""
    kinds = [Scheme.parse(str(arguments[f"{side}_scheme"])) for side in "ab"]
    if arguments.get("bias") is not None:
        return "it adds no bias"
    if kinds[0].layout == "trtllm":
        return "a lies as a weight does"
    if arguments["a"].dtype == torch.float8_e4m3fnuz:
        return "it has no float8_e4m3fnuz"
    for side in "ab":
        if not arguments[side].is_contiguous():
            return f"{side} has strides {tuple(arguments[side].stride())}"
    if name == "deep_gemm":
        exponents = [kind.scale_dtype == torch.float8_e8m0fnu for kind in kinds]
        if arch.name == "sm_90" and (any(exponents) or kinds[1].granularity != "block128"):
            return "on sm_90 it reads float32 scales, those of the weight in blocks of 128"
        if arch.name != "sm_90" and not all(exponents):
            return f"on {arch.name} it reads exponents as scales"
    return None


def planner(name: str, function: Callable[..., torch.Tensor], traced: bool = False) -> Callable[..., Plain | str]:
    """The plan of one algorithm.

    Args:
        name: a key in tables of `dispatch.KINDS`.
        function: of the op's arguments by name.
        traced: it calls PyTorch alone.
    """

    def plan(arch: Arch, **arguments: Any) -> Plain | str:
        request = request_of(**arguments)
        if request is None:
            return "the size of the weight is symbolic"
        if name not in KINDS[request.kind]:
            return ""
        return why_not(arch, request, name) or _refuse(arch, name, arguments) or Plain(function, traced)

    return plan


def _cublas(arch: Arch, **arguments: Any) -> Plain | str:
    """Blocks of 128 by one call of PyTorch's, short groups by another."""
    short = kind_of(Scheme.parse(str(arguments["b_scheme"]))) in ("mxfp8", "nvfp4")
    return planner("cublas", by_scaled_mm, True)(arch, **arguments) if short else plan_cublas(arch, **arguments)


PLANS: dict[str, Callable[..., Plain | str]] = {
    "flashinfer_trtllm": planner("flashinfer_trtllm", by_flashinfer("trtllm")),
    "flashinfer_cute_dsl": planner("flashinfer_cute_dsl", by_flashinfer("cute-dsl")),
    "flashinfer_cutlass": planner("flashinfer_cutlass", by_flashinfer("cutlass")),
    "cublas": _cublas,
    "deep_gemm": planner("deep_gemm", by_deep_gemm),
}
"""By algorithm; `blocks` makes them backends of the op."""
