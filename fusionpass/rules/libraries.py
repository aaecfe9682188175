"""How libraries spell the quantisation of activations, as their linears are traced."""

from typing import Any

import torch

from ..errors import ArgumentError
from ..ops.quant import quantize, quantized
from ..ops.quant.scheme import Scheme
from ..rule import Spelling

try:
    from torch._higher_order_ops.inline_asm_elementwise import inline_asm_elementwise
except ImportError:  # before torch 2.12
    inline_asm_elementwise = None  # type: ignore[assignment]

E4M3 = torch.float8_e4m3fn


def _divided(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (x.float() / step).clamp(-448.0, 448.0).to(E4M3)


def _torchao_row(x: torch.Tensor) -> Any:
    step = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return _divided(x, step), step


def _torchao_group(x: torch.Tensor) -> Any:
    rows, groups = x.shape[0], x.shape[1] // 128
    step = (x.view(rows, groups, 128).abs().amax(-1, keepdim=True) / 448.0).view(rows, groups).float()
    return _divided(x, step.repeat_interleave(128, -1)), step


def _torchao_int8(x: torch.Tensor) -> Any:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = torch.zeros_like(low)
    amax = torch.maximum(-torch.minimum(low, zero), torch.maximum(high, zero))
    step = (amax / 127.5).float().clamp(min=torch.finfo(torch.float32).eps).to(x.dtype).float()
    return ((x * (1.0 / step)).round() + zero.to(torch.int8)).clamp(-128, 127).to(torch.int8), step


def _compressed_tensors(x: torch.Tensor) -> Any:
    h = x.float()
    amax = h.abs().amax(-1)
    step = (torch.where(amax > 0, amax, torch.ones_like(amax)) / 448.0).unsqueeze(-1)
    return _divided(h, step), step


def _diffusers(x: torch.Tensor) -> Any:
    return quantized(x.float(), None, Scheme.parse("fp8_token,rounding=divide"))


def _mx(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of 32 and the scale of each before it is a power of two."""
    groups = x.view(x.shape[0], x.shape[1] // 32, 32)
    return groups.float(), groups.abs().amax(-1).unsqueeze(-1).float() / 448.0


def _mx_codes(x: torch.Tensor, groups: torch.Tensor, step: torch.Tensor, exponent: torch.Tensor) -> Any:
    inverse = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent.float()))
    inverse = torch.where(exponent == 255, step, torch.where(exponent == 254, 2.0**-127, inverse))
    return (groups * inverse).clamp(-448.0, 448.0).to(E4M3).view(x.shape), exponent.squeeze(-1)


def _torchao_mxfp8_log2(x: torch.Tensor) -> Any:
    groups, step = _mx(x)
    exponent = (step.log2().ceil().clamp(-127, 127) + 127).to(torch.uint8)
    exponent = torch.where(step.isnan(), 255, torch.where(step.isinf(), 254, exponent))
    return _mx_codes(x, groups, step, exponent)


def _torchao_mxfp8(x: torch.Tensor) -> Any:
    if not x.is_cuda:
        raise ArgumentError("PTX is for NVIDIA GPUs", "quantize")
    groups, step = _mx(x)
    exponent = inline_asm_elementwise(
        step, asm_str="cvt.rp.satfinite.ue8m0x2.f32 $0, 0.0, $1;", constraints="=h,r", dtype=torch.uint16
    )
    return _mx_codes(x, groups, step, exponent.to(torch.uint8))


def _torchao_nvfp4(x: torch.Tensor, scale: torch.Tensor) -> Any:
    groups = x.float().reshape(x.shape[0], -1, 16)
    stored = (groups.abs().amax(-1) / 6.0 / scale).clamp(2.0**-6, 448.0).to(E4M3)
    y = (groups * (1.0 / scale / stored.float()).unsqueeze(-1)).clamp(-6.0, 6.0).view(x.shape)
    code = _e2m1(y).view(-1)
    return (code[::2] | code[1::2] << 4).view(x.shape[0], x.shape[1] // 2), stored


def _e2m1(y: torch.Tensor) -> torch.Tensor:
    """Codes from the bits of float32: below 1 an addition rounds, above it half a step less an ulp and the odd bit."""
    bits = y.view(torch.int32)
    sign = bits & 0x80000000
    magnitude = (bits ^ sign).view(torch.float32)
    large = magnitude >= 6.0
    small = torch.logical_and(torch.logical_not(large), magnitude < 1)
    # float32's exponent bias less e2m1's, the mantissa bits that go, and one: 0.5 is the last bit of 2**22.
    shifter = (127 - 1 + 23 - 1 + 1) << 23
    rounded = magnitude + torch.tensor(shifter, dtype=torch.int32).view(torch.float32)
    subnormal = (rounded.view(torch.int32) - shifter).to(torch.uint8)
    whole = magnitude.view(torch.int32)
    odd = (whole >> 22) & 1
    normal = ((whole + ((1 - 127 << 23) + (1 << 21) - 1) + odd) >> 22).to(torch.uint8)
    code = torch.where(small, subnormal, torch.full_like(magnitude, 7, dtype=torch.uint8))
    code = torch.where(torch.logical_not(torch.logical_or(large, small)), normal, code)
    return code | ((sign >> 28).to(torch.uint8) & 8)


SPELLINGS = tuple(
    Spelling(f"quant.{function.__name__.removeprefix('_')}", quantize, function, {"scheme": scheme})
    for function, scheme in (
        (_torchao_row, "fp8_token,amax_dtype=input,eps=0.0,rounding=divide"),
        (_torchao_group, "fp8_group128,amax_dtype=input,eps=0.0,rounding=divide"),
        (_torchao_int8, "int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5"),
        *(((_torchao_mxfp8, "mxfp8"),) if inline_asm_elementwise is not None else ()),
        (_torchao_mxfp8_log2, "mxfp8,scale_rounding=log2_ceil"),
        (_torchao_nvfp4, "nvfp4"),
        (_compressed_tensors, "fp8_token,eps=0.0,rounding=divide,zero=one"),
        (_diffusers, "fp8_token,rounding=divide"),
    )
)
