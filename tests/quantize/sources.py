"""Linears that other libraries quantised, and what each means in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.libraries import VARIANTS
from tests.quantize.test_schemes import E2M1, E4M3, nearest

WIDTH, OUT = 256, 144
INT8 = torch.arange(128, dtype=torch.float64)
PRESETS = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "INT8", "MXFP8", "NVFP4")


@dataclass(frozen=True)
class Source:
    """A quantised linear.

    Attributes:
        make: the module, with random weights.
        scheme: what it becomes.
        input: `input(module, x)`, what `x` [tokens, K] becomes, in float64.
        weight: `weight(module)`, the weight that it holds, in float64.
        exact: whether the library can run here, and computes the same in every bit; None where it cannot run.
    """

    make: Callable[[], nn.Module]
    scheme: str
    input: Callable[[Any, torch.Tensor], torch.Tensor]
    weight: Callable[[Any], torch.Tensor]
    exact: bool | None = None


def in_groups(
    x: torch.Tensor, size: int | None, codes: torch.Tensor = E4M3, divisor: float = 448.0, narrow: bool = False
) -> torch.Tensor:
    """Codes times scales for each group of a row, by dividing; scales rounded to the dtype of `x` where `narrow`."""
    groups = x.float().view(x.shape[0], -1, size or x.shape[1])
    step = groups.abs().amax(-1, keepdim=True) / divisor
    step = step.to(x.dtype).float() if narrow else step
    scaled = torch.where(step > 0, groups / step, 0.0)
    return (nearest(scaled, codes) * step.double()).view(x.shape)


def by_one(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    step = step.float().reshape(())
    return nearest(x.float() / step, E4M3) * step.double()


def by_the_largest(x: torch.Tensor) -> torch.Tensor:
    return by_one(x, (x.abs().max() / 448).to(x.dtype))


def int8_reciprocal(x: torch.Tensor) -> torch.Tensor:
    step = (x.abs().amax(-1, keepdim=True) / 127.5).float().clamp(min=2.0**-23).to(x.dtype).float()
    return (x.float() * (1 / step)).double().round().clamp(-128, 127) * step.double()


def int8_divided(x: torch.Tensor) -> torch.Tensor:
    step = (x.abs().amax(-1, keepdim=True) / 127.5).to(x.dtype).float().clamp(min=1e-12)
    return (x.float() / step).double().round().clamp(-128, 127) * step.double()


def in_powers(x: torch.Tensor, floor: bool) -> torch.Tensor:
    groups = x.double().view(x.shape[0], -1, 32)
    amax = groups.abs().amax(-1, keepdim=True)
    exponent = torch.floor(torch.log2(amax)) - 8 if floor else torch.ceil(torch.log2(amax / 448))
    step = torch.exp2(exponent)
    return torch.where(amax > 0, nearest(groups / step, E4M3) * step, 0.0).view(x.shape)


def in_sixteens(x: torch.Tensor, whole: torch.Tensor, divide: bool = False) -> torch.Tensor:
    groups, whole = x.float().view(x.shape[0], -1, 16), whole.float().reshape(())
    step = nearest((groups.abs().amax(-1, keepdim=True) / 6 / whole).clamp(2**-6, 448), E4M3).float()
    scaled = groups / (step * whole) if divide else groups * ((1 / whole) / step)
    return (nearest(scaled, E2M1) * step.double() * whole.double()).view(x.shape)


def coded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] times scales that broadcast, or one for each 128 × 128."""
    if codes.dtype == torch.uint8:
        magnitude = E2M1[torch.stack([codes & 7, codes >> 4 & 7], -1).flatten(-2).long()]
        codes = torch.where(torch.stack([codes >> 3 & 1, codes >> 7], -1).flatten(-2) == 1, -magnitude, magnitude)
    found = scale.double() if scale.dim() == 2 else scale.double().reshape(1, 1)
    rows, columns = codes.shape
    if found.shape[0] not in (1, rows):
        found = found.repeat_interleave(128, 0)[:rows]
    found = found.repeat_interleave(columns // found.shape[1], 1) if found.shape[1] > 1 else found
    return codes.double() * found


def torchao(name: str) -> nn.Module:
    torch.manual_seed(0)
    linear = VARIANTS[name].linear(WIDTH)
    linear.bias = nn.Parameter(torch.randn(linear.weight.shape[0], dtype=torch.bfloat16))
    return linear


def torchao_emulated(mode: str) -> nn.Module:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.prototype import mx_formats
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    config = mx_formats.MXDynamicActivationMXWeightConfig(
        kernel_preference=KernelPreference.EMULATED, scaling_mode=mx_formats.ScaleCalculationMode[mode]
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT, dtype=torch.bfloat16))
    quantize_(model, config)
    return model[0]


def filled(linear: nn.Module, scale: torch.Tensor) -> nn.Module:
    """A linear of transformers or diffusers with random FP8 weights and these scales."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(linear.weight.shape, generator=generator).mul(64).to(torch.float8_e4m3fn)
    linear.weight = nn.Parameter(codes, requires_grad=False)
    for name in ("weight_scale", "weight_scale_inv"):
        if hasattr(linear, name):
            getattr(linear, name).data = scale
    if linear.bias is not None:
        linear.bias.data = torch.randn(OUT, generator=generator, dtype=torch.bfloat16)
    return linear


def some(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).add(0.5).div(256)


def transformers_row() -> nn.Module:
    module = pytest.importorskip("transformers.integrations.compressed_tensors")
    return filled(module.CompressedTensorsFP8Linear(WIDTH, OUT, has_bias=True), some(1, OUT))


def finegrained(static: bool, blocks: bool, e8m0: bool = False) -> nn.Module:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    scheme = "static" if static else "dynamic"
    linear = module.FP8Linear(WIDTH, OUT, (128, 128) if blocks else None, scheme, has_bias=True)
    scale = some(2, 2) if blocks else some(1).reshape(())
    filled(linear, torch.exp2(scale.log2().round()).to(torch.float8_e8m0fnu) if e8m0 else scale)
    if static:
        linear.activation_scale.data.fill_(0.01)
    return linear


def fbgemm() -> nn.Module:
    module = pytest.importorskip("transformers.integrations.fbgemm_fp8")
    return filled(module.FbgemmFp8Linear(WIDTH, OUT, True), some(OUT, 1))


def diffusers(kind: str) -> nn.Module:
    module = pytest.importorskip("diffusers.quantizers.bfl.utils")
    torch.manual_seed(0)
    if kind == "fp8":
        return filled(module.BFLFP8RLinear(WIDTH, OUT, compute_dtype=torch.bfloat16), some(OUT))
    linear = module.BFLNVFP4Linear(WIDTH, OUT, compute_dtype=torch.bfloat16)
    linear.weight.data, linear.weight_scale, linear.weight_scale_2 = module.quantize_nvfp4(torch.randn(OUT, WIDTH))
    linear.input_scale.fill_(4 / 2688)
    return linear


def compressed(preset: str, dtype: torch.dtype, compress: bool = True) -> nn.Module:
    """A linear as compressed-tensors leaves it behind a calibration, compressed or not."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import QuantizationStatus, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

    torch.manual_seed(0)
    linear, scheme = nn.Linear(WIDTH, OUT, dtype=dtype), preset_name_to_scheme(preset, ["Linear"])
    initialize_module_for_quantization(linear, scheme)
    weight = linear.weight.detach().float()
    strategy = scheme.weights.strategy
    if strategy == "tensor":
        scale = weight.abs().max().reshape(1) / 448
    elif strategy == "channel":
        scale = weight.abs().amax(1, keepdim=True) / (448 if scheme.weights.type == "float" else 127)
    elif strategy == "block":
        tiles = nn.functional.pad(weight, (0, 0, 0, -OUT % 128)).view(-1, 128, WIDTH // 128, 128)
        scale = tiles.abs().amax((1, 3)) / 448
    elif strategy == "group":
        scale = torch.exp2((weight.view(OUT, -1, 32).abs().amax(-1) / 448).log2().ceil())
    else:
        whole = 2688 / weight.abs().max()
        linear.weight_global_scale.data = whole.reshape(1)
        scale = (weight.view(OUT, -1, 16).abs().amax(-1) / 6 * whole).clamp(2**-6, 448).to(torch.float8_e4m3fn)
    linear.weight_scale.data = scale.to(dtype)
    for name, value in (("input_scale", 4 / 448), ("input_global_scale", 2688 / 4)):
        if hasattr(linear, name):
            getattr(linear, name).data.fill_(value)
    linear.quantization_status = QuantizationStatus.FROZEN
    if compress:
        compress_module(linear)
    return linear


def _compressed_weight(linear: Any) -> torch.Tensor:
    scale = linear.weight_scale
    if hasattr(linear, "weight_packed"):
        return coded(linear.weight_packed, scale.double() / linear.weight_global_scale.double())
    return coded(linear.weight, torch.exp2(scale.double() - 127) if scale.dtype == torch.uint8 else scale)


def _torchao_weight(linear: Any) -> torch.Tensor:
    return linear.weight.dequantize(torch.float32).double()


def _of_compressed(scheme: str, quantise: Callable[[Any, torch.Tensor], torch.Tensor], preset: str) -> Source:
    return Source(partial(compressed, preset, torch.bfloat16), scheme, quantise, _compressed_weight)


def _scaled(name: str = "weight_scale") -> Callable[[Any], torch.Tensor]:
    def weight(linear: Any) -> torch.Tensor:
        scale = getattr(linear, name)
        return coded(linear.weight, scale.reshape(-1, 1) if max(scale.shape, default=1) == OUT else scale)

    return weight


_INT8 = "int8_token,amax_dtype=input"
SOURCES = {
    "torchao_row": Source(
        partial(torchao, "torchao_row"),
        "fp8_token,amax_dtype=input,eps=0.0,rounding=divide",
        lambda m, x: in_groups(x, None, narrow=True),
        _torchao_weight,
        True,
    ),
    "torchao_tensor": Source(
        partial(torchao, "torchao_tensor"),
        "fp8_tensor,amax_dtype=input,rounding=divide",
        lambda m, x: by_the_largest(x),
        _torchao_weight,
        True,
    ),
    "torchao_1x128": Source(
        partial(torchao, "torchao_1x128"),
        "fp8_group128,amax_dtype=input,eps=0.0,rounding=divide",
        lambda m, x: in_groups(x, 128, narrow=True),
        _torchao_weight,
    ),
    "torchao_static": Source(
        partial(torchao, "torchao_static"),
        "fp8_static,rounding=divide",
        lambda m, x: by_one(x, torch.tensor(0.01)),
        _torchao_weight,
        True,
    ),
    "torchao_int8": Source(
        partial(torchao, "torchao_int8"),
        f"{_INT8},eps=1.1920928955078125e-07,divisor=127.5",
        lambda m, x: int8_reciprocal(x),
        _torchao_weight,
        False,
    ),
    "torchao_mxfp8": Source(
        partial(torchao_emulated, "RCEIL"), "mxfp8", lambda m, x: in_powers(x, False), _torchao_weight, True
    ),
    "torchao_mxfp8_floor": Source(
        partial(torchao_emulated, "FLOOR"),
        "mxfp8,scale_rounding=floor",
        lambda m, x: in_powers(x, True),
        _torchao_weight,
        True,
    ),
    "torchao_nvfp4": Source(
        partial(torchao, "torchao_nvfp4"),
        "nvfp4_tensor",
        lambda m, x: in_sixteens(x, x.abs().max().float() / 2688),
        _torchao_weight,
    ),
    "torchao_nvfp4_static": Source(
        partial(torchao, "torchao_nvfp4_static"),
        "nvfp4",
        lambda m, x: in_sixteens(x, m.weight.act_per_tensor_scale),
        _torchao_weight,
    ),
    "transformers_row": Source(
        transformers_row,
        "fp8_token,eps=0.0,rounding=divide,zero=one",
        lambda m, x: in_groups(x, None),
        _scaled(),
        False,
    ),
    "finegrained": Source(
        partial(finegrained, False, True),
        "fp8_group128,rounding=divide",
        lambda m, x: in_groups(x, 128),
        _scaled("weight_scale_inv"),
    ),
    "finegrained_e8m0": Source(
        partial(finegrained, False, True, True),
        "fp8_group128,rounding=divide",
        lambda m, x: in_groups(x, 128),
        _scaled("weight_scale_inv"),
    ),
    "finegrained_static": Source(
        partial(finegrained, True, True),
        "fp8_static,rounding=divide/fp8_block128",
        lambda m, x: by_one(x, m.activation_scale),
        _scaled("weight_scale_inv"),
    ),
    "finegrained_static_tensor": Source(
        partial(finegrained, True, False),
        "fp8_static,rounding=divide",
        lambda m, x: by_one(x, m.activation_scale),
        _scaled("weight_scale_inv"),
    ),
    "fbgemm": Source(
        fbgemm,
        "fp8_token",
        lambda m, x: nearest(x.float() * (1 / (s := _steps(x))), E4M3) * s.double(),
        _scaled(),
    ),
    "diffusers": Source(
        partial(diffusers, "fp8"), "fp8_token,rounding=divide", lambda m, x: in_groups(x, None), _scaled()
    ),
    "diffusers_nvfp4": Source(
        partial(diffusers, "nvfp4"),
        "nvfp4",
        lambda m, x: in_sixteens(x, m.input_scale),
        lambda m: coded(m.weight, m.weight_scale.double() * m.weight_scale_2.double()),
    ),
    "FP8": _of_compressed("fp8_static,rounding=divide", lambda m, x: by_one(x, m.input_scale), "FP8"),
    "FP8_DYNAMIC": _of_compressed(
        "fp8_token,amax_dtype=input,rounding=divide", lambda m, x: in_groups(x, None, narrow=True), "FP8_DYNAMIC"
    ),
    "FP8_BLOCK": _of_compressed(
        "fp8_group128,amax_dtype=input,rounding=divide", lambda m, x: in_groups(x, 128, narrow=True), "FP8_BLOCK"
    ),
    "INT8": _of_compressed(f"{_INT8},rounding=divide,divisor=127.5", lambda m, x: int8_divided(x), "INT8"),
    "MXFP8": _of_compressed("mxfp8", lambda m, x: in_powers(x, False), "MXFP8"),
    "NVFP4": _of_compressed(
        "nvfp4,rounding=divide", lambda m, x: in_sixteens(x, 1 / m.input_global_scale.float(), True), "NVFP4"
    ),
}


def _steps(x: torch.Tensor) -> torch.Tensor:
    return (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
