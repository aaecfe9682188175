"""Linears that other libraries quantised → ours: a converter for each kind, found by its class without an import.

A converter takes the module and returns a `QuantizedLinear` or `QuantizedExperts` with the same codes and scales, or
the reason why it cannot. It reads the module only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.quant.layout import swizzled_shape, unswizzled
from .compressed import read_linear, read_scheme
from .experts import Gate, QuantizedExperts, refuse_experts
from .linear import QuantizedLinear
from .select import MULTIPLE

Converter = Callable[[Any], QuantizedLinear | QuantizedExperts | str]
E4M3 = torch.float8_e4m3fn
CONVERTERS: dict[str, Converter] = {}
"""By `source`."""


def source(module: nn.Module) -> str | None:
    """What quantised a module, `library.Class`: a key of `CONVERTERS`, or None for what no converter is for."""
    parts = (getattr(module, "quantization_scheme", None), getattr(module, "weight", None))
    classes = [*type(module).__mro__, *(cls for part in parts for cls in type(part).__mro__)]
    names = (f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}" for cls in classes)
    return next((name for name in names if name in CONVERTERS), None)


def _converts(*names: str) -> Callable[[Converter], Converter]:
    def register(converter: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(names, converter))
        return converter

    return register


@_converts("compressed_tensors.QuantizationScheme")
def _compressed_tensors(module: Any) -> QuantizedLinear | str:
    kind = read_scheme(module.quantization_scheme.model_dump(mode="json"))
    if isinstance(kind, str):
        return kind
    tensors = {name: t.data for name, t in module.named_parameters(recurse=False)} | dict(module._buffers)
    if module.quantization_status.value != "compressed":
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format

        scheme = module.quantization_scheme
        name = scheme.format or infer_module_format(nn.Linear, scheme)
        tensors = BaseCompressor.get_value_from_registry(getattr(name, "value", name)).compress(tensors, scheme)
    return read_linear(tensors, kind, module.bias)


@_converts("transformers.CompressedTensorsFP8Linear")
def _transformers_row(module: Any) -> QuantizedLinear:
    return _per_row(module, module.weight_scale.t(), "fp8_token,eps=0.0,rounding=divide,zero=one")


@_converts("transformers.FbgemmFp8Linear")
def _fbgemm(module: Any) -> QuantizedLinear:
    return _per_row(module, module.weight_scale, "fp8_token")


@_converts("diffusers.BFLFP8RLinear")
def _diffusers(module: Any) -> QuantizedLinear:
    return _per_row(module, module.weight_scale, "fp8_token,rounding=divide")


def _per_row(module: Any, scale: torch.Tensor, scheme: str) -> QuantizedLinear:
    return QuantizedLinear(module.weight, _column(scale), None, module.bias, scheme)


def _column(scale: torch.Tensor) -> torch.Tensor:
    return scale.detach().float().reshape(-1, 1).contiguous()


@_converts("diffusers.BFLNVFP4Linear")
def _diffusers_nvfp4(module: Any) -> QuantizedLinear:
    whole = module.weight_scale_2
    return QuantizedLinear(module.weight, module.weight_scale, module.input_scale, module.bias, "nvfp4", whole)


@_converts("transformers.FP8Linear")
def _finegrained(module: Any) -> QuantizedLinear | str:
    if module.weight.dtype != E4M3:
        return f"its weight is {module.weight.dtype}"
    if module.block_size is not None and list(module.block_size) != [128, 128]:
        return f"its blocks are {' × '.join(map(str, module.block_size))}"
    static, blocks = module.activation_scheme == "static", module.block_size is not None
    if not static and not blocks:
        return "its weight has one scale, and how its input is quantised is up to a kernel"
    scheme = "fp8_static,rounding=divide" if static else "fp8_group128,rounding=divide"
    weight = "fp8_block128" if blocks else "fp8_static"
    # float8_e8m0fnu scales are powers of two, exact in float32.
    scale = module.weight_scale_inv.detach().float()
    return QuantizedLinear(module.weight, scale, module.activation_scale, module.bias, f"{scheme}/{weight}")


@_converts("transformers.FP8Experts")
def _finegrained_experts(module: Any) -> QuantizedExperts | str:
    if reason := refuse_experts(module):
        return reason
    if module.gate_up_proj.dtype != E4M3:
        return f"its weights are {module.gate_up_proj.dtype}"
    if module.activation_scheme == "static":
        return "each of its experts has scales of its own for what it reads"
    if module.block_size is None or list(module.block_size) != [128, 128]:
        return "its weights have one scale each" if module.block_size is None else (
            f"its blocks are {' × '.join(map(str, module.block_size))}"
        )  # fmt: skip
    gate = Gate.of(module)
    if isinstance(gate, str):
        return gate
    tensors: dict[str, torch.Tensor | None] = {}
    for name, source in (("up", "gate_up_proj"), ("down", "down_proj")):
        weight, scale = getattr(module, source), getattr(module, f"{source}_scale_inv")
        count, rows, columns = weight.shape
        if columns % 128 or rows % MULTIPLE:
            return f"{source} is {rows} by {columns}, no multiple of {MULTIPLE} by 128"
        if tuple(scale.shape) != (count, -(-rows // 128), columns // 128):
            return f"{source} has scales of {list(scale.shape)} for {list(weight.shape)}"
        # float8_e8m0fnu scales are powers of two, exact in float32.
        tensors |= {name: weight, f"{name}_scale": scale.detach().float()}
    return QuantizedExperts(tensors, gate, "fp8_group128,rounding=divide")


@_converts("torchao.Float8Tensor", "torchao.PrototypeFloat8Tensor")
def _torchao_fp8(module: Any) -> QuantizedLinear | str:
    weight = module.weight
    if (reason := _torchao_input(weight)) is not None:
        return reason
    act = weight.act_quant_kwargs
    if weight.qdata.dtype != E4M3 or act.float8_dtype != E4M3:
        return f"its codes are {weight.qdata.dtype}, those of its input {act.float8_dtype}"
    if act.hp_value_lb is not None or act.hp_value_ub is not None:
        return "the range of its input is bounded"
    if getattr(weight, "output_act_quant_scale", None) is not None:
        return "its output is quantised, too"
    given = getattr(weight, "act_quant_scale", None)
    granularity = type(act.granularity).__name__
    if given is not None:
        if given.numel() != 1:
            return f"the scales of its input are given, shape {list(given.shape)}"
        scheme = "fp8_static,rounding=divide"
    elif granularity == "PerTensor":
        scheme = "fp8_tensor,amax_dtype=input,rounding=divide"
    elif granularity == "PerRow":
        scheme = "fp8_token,amax_dtype=input,eps=0.0,rounding=divide"
    elif list(act.granularity.block_size) == [1, 128]:
        scheme = "fp8_group128,amax_dtype=input,eps=0.0,rounding=divide"
    else:
        return f"its input is quantised by {act.granularity}"
    rows, columns = weight.shape
    scale = weight.scale.detach()
    block = [size if size != -1 else all_of for size, all_of in zip(weight.block_size, weight.shape, strict=True)]
    # One scale for as many rows, where the input has one for each.
    if block == [1, columns] or (block == [rows, columns] and granularity == "PerRow"):
        kind, scale = "fp8_token", _column(scale.reshape(-1, 1).expand(rows, 1))
    elif block in ([rows, columns], [128, 128]):
        kind = "fp8_static" if scale.numel() == 1 and block != [128, 128] else "fp8_block128"
    else:
        return f"its weight has a scale for each {' × '.join(map(str, block))}"
    return QuantizedLinear(weight.qdata, scale, given, module.bias, f"{scheme}/{kind}")


@_converts("torchao.Int8Tensor")
def _torchao_int8(module: Any) -> QuantizedLinear | str:
    weight = module.weight
    if (reason := _torchao_input(weight)) is not None:
        return reason
    act = weight.act_quant_kwargs
    if weight.act_quant_scale is not None:
        return "its input is quantised to INT8 by a scale that is given"
    if weight.act_pre_scale is not None:
        return "its input is multiplied by another scale first"
    asymmetric = weight.zero_point is not None and bool(weight.zero_point.any())
    if act.mapping_type.name != "SYMMETRIC" or asymmetric:
        return "it is quantised asymmetrically"
    if act.reduce_range:
        return "its input is quantised to 7 bits"
    if type(act.granularity).__name__ != "PerRow":
        return f"its input is quantised by {act.granularity}"
    rows, columns = weight.shape
    if list(weight.block_size) not in ([1, columns], [rows, columns]):
        return f"its weight has a scale for each {' × '.join(map(str, weight.block_size))}"
    scheme = "int8_token,amax_dtype=input,eps=1.1920928955078125e-07,divisor=127.5"
    return QuantizedLinear(
        weight.qdata, _column(weight.scale.reshape(-1, 1).expand(rows, 1)), None, module.bias, scheme
    )


@_converts("torchao.MXTensor")
def _torchao_mx(module: Any) -> QuantizedLinear | str:
    weight = module.weight
    if (reason := _torchao_input(weight)) is not None:
        return reason
    act = weight.act_quant_kwargs
    if weight.elem_dtype != E4M3 or act.elem_dtype != E4M3 or weight.block_size != 32 or act.block_size != 32:
        return f"its codes are {weight.elem_dtype} in groups of {weight.block_size}"
    schemes = {"RCEIL": "mxfp8", "FLOOR": "mxfp8,scale_rounding=floor"}
    if act.scaling_mode.name not in schemes:
        return f"the scales of its input are rounded by {act.scaling_mode.name}"
    scale = _linear_scales(weight, 32).view(torch.uint8)
    return QuantizedLinear(weight.qdata, scale, None, module.bias, schemes[act.scaling_mode.name])


@_converts("torchao.NVFP4Tensor")
def _torchao_nvfp4(module: Any) -> QuantizedLinear | str:
    weight = module.weight
    if (reason := _torchao_input(weight)) is not None:
        return reason
    one = torch.ones((), device=weight.device)
    whole = one if weight.per_tensor_scale is None else weight.per_tensor_scale
    given = None
    if not weight.act_quant_kwargs.use_dynamic_per_tensor_scale:
        given = one if weight.act_per_tensor_scale is None else weight.act_per_tensor_scale
    scheme = "nvfp4_tensor" if given is None else "nvfp4"
    scale = _linear_scales(weight, 16)
    return QuantizedLinear(weight.qdata.view(torch.uint8), scale, given, module.bias, scheme, whole)


def _torchao_input(weight: Any) -> str | None:
    """Why no linear of ours has this weight, whatever its numbers are."""
    return "its weight alone is quantised" if weight.act_quant_kwargs is None else None


def _linear_scales(weight: Any, group: int) -> torch.Tensor:
    shape = (weight.shape[0], weight.shape[1] // group)
    scale: torch.Tensor = weight.scale.detach()
    if not weight.is_swizzled_scales:
        return scale.view(shape)
    return unswizzled(scale.view(swizzled_shape(*shape)), shape)
