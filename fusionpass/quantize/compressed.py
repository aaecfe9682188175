"""The format of compressed-tensors: its description of a linear, and the names and shapes of its tensors."""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import SchemeError
from ..ops.quant.scheme import Scheme
from .linear import QuantizedLinear
from .scheme import LinearScheme

_INPUTS = {
    "float8 tensor static": "fp8_static,rounding=divide",
    "float8 tensor dynamic": "fp8_tensor,amax_dtype=input,rounding=divide",
    "float8 token dynamic": "fp8_token,amax_dtype=input,rounding=divide",
    "float8 group128 dynamic": "fp8_group128,amax_dtype=input,rounding=divide",
    "float8 group32 dynamic": "mxfp8",
    "float4 tensor_group16 local": "nvfp4,rounding=divide",
    "int8 token dynamic": "int8_token,amax_dtype=input,rounding=divide,divisor=127.5",
    "int8 group128 dynamic": "int8_group128,amax_dtype=input,rounding=divide,divisor=127.5",
}
"""What is made of an input, by `_kind`: compressed-tensors divides, in the dtype of the input."""
_WEIGHTS = {
    "float8 tensor static": "fp8_static",
    "float8 channel static": "fp8_token",
    "float8 block128x128 static": "fp8_block128",
    "float8 group32 static": "mxfp8",
    "float4 tensor_group16 static": "nvfp4",
    "int8 tensor static": "int8_token",
    "int8 channel static": "int8_token",
    "int8 block128x128 static": "int8_block128",
}
_E4M3 = "torch.float8_e4m3fn"
_NUMBERS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int"},
    "float8": {"num_bits": 8, "type": "float"},
    "float4": {"num_bits": 4, "type": "float", "scale_dtype": _E4M3, "zp_dtype": _E4M3},
}
FORMATS = {
    "fp8_static": "float-quantized",
    "fp8_token": "float-quantized",
    "fp8_block128": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int8_token": "int-quantized",
    "int8_block128": "int-quantized",
}
"""How the tensors are stored, by the name of the weight's scheme."""


def _kind(arguments: Mapping[str, Any]) -> str:
    """One of the keys above, or what else the arguments of a quantisation describe."""
    strategy, dynamic = arguments.get("strategy"), arguments.get("dynamic")
    size = "x".join(map(str, arguments.get("block_structure") or [])) or arguments.get("group_size") or ""
    when = dynamic if isinstance(dynamic, str) else "dynamic" if dynamic else "static"
    return f"{arguments['type']}{arguments['num_bits']} {strategy}{size} {when}"


def read_scheme(group: Mapping[str, Any]) -> LinearScheme | str:
    """The scheme that a group of compressed-tensors' configuration describes, or why there is none."""
    if group.get("output_activations"):
        return "its output is quantised, too"
    kinds = {}
    for name, known in (("weights", _WEIGHTS), ("input_activations", _INPUTS)):
        arguments = group.get(name)
        if not arguments:
            return f"its {name.replace('_', ' ')} are not quantised"
        if not arguments.get("symmetric", True):
            return f"its {name.replace('_', ' ')} are quantised asymmetrically"
        kinds[name] = _kind(arguments)
        if kinds[name] not in known:
            return f"its {name.replace('_', ' ')} are quantised as {kinds[name]}"
    try:
        return LinearScheme.parse(f"{_INPUTS[kinds['input_activations']]}/{_WEIGHTS[kinds['weights']]}")
    except SchemeError as error:
        return error.what


def written_scheme(kind: LinearScheme) -> dict[str, Any]:
    """A group of compressed-tensors' configuration, without its targets.

    Raises:
        SchemeError: compressed-tensors cannot say it.
    """
    weights, inputs = _arguments(kind.weight, "static"), _arguments(kind.input, "dynamic")
    if weights["strategy"] == "token":
        weights["strategy"] = "channel"
    if kind.calibrated:
        inputs["dynamic"] = "local" if kind.input.packed else False
    if kind.amax_dtype is not None and kind.input.packed:
        raise SchemeError(f"compressed-tensors has no scheme {str(kind)!r}", "save_quantized")
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": FORMATS[_name(kind.weight)],
    }


def _arguments(kind: Scheme, when: str) -> dict[str, Any]:
    number = "float4" if kind.packed else "int8" if kind.dtype == torch.int8 else "float8"
    if kind.layout != "linear" and when == "static":
        raise SchemeError(
            f"compressed-tensors does not store {str(kind)!r}",
            "save_quantized",
            'Call repack_linears_(model, "linear")',
        )
    if kind.dtype == torch.float8_e4m3fnuz:
        raise SchemeError(f"compressed-tensors does not store {str(kind)!r}", "save_quantized")
    found = _NUMBERS[number] | {"symmetric": True, "dynamic": when == "dynamic", "strategy": kind.granularity}
    if kind.granularity == "block128":
        found |= {"strategy": "block", "block_structure": [128, 128]}
    elif kind.group is not None:
        found |= {"strategy": "tensor_group" if kind.packed else "group", "group_size": kind.group}
    if kind.scale_dtype == torch.float8_e8m0fnu and kind.group == 32:
        found |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return found


def _name(kind: Scheme) -> str:
    return str(kind).partition(",")[0]


def stored_names(kind: LinearScheme) -> list[str]:
    """The names of the tensors that are stored for a linear, but for its bias."""
    names = ["weight_packed", "weight_global_scale"] if kind.weight.packed else ["weight"]
    if kind.calibrated:
        names.append("input_global_scale" if kind.input.packed else "input_scale")
    return [*names, "weight_scale"]


def read_linear(
    tensors: Mapping[str, torch.Tensor], kind: LinearScheme, bias: torch.Tensor | None = None
) -> QuantizedLinear:
    """A linear of the tensors that compressed-tensors stores for one, by their own names.

    Raises:
        SchemeError, ScaleError: as `QuantizedLinear`.
        KeyError: a tensor is missing.
    """
    packed = kind.weight.packed
    weight = tensors["weight_packed" if packed else "weight"]
    scale = tensors["weight_scale"]
    if kind.weight.scale_dtype == torch.float32:
        scale = scale.float()
    if kind.weight.granularity == "token" and scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(weight.shape[0], 1).contiguous()
    whole = tensors["weight_global_scale"].float().reciprocal() if packed else None
    given = None
    if kind.calibrated:
        inverse = tensors.get("input_global_scale")
        given = tensors["input_scale"].float() if inverse is None else inverse.float().reciprocal()
    return QuantizedLinear(weight, scale, given, bias, kind, whole)


def written_linear(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The tensors that compressed-tensors stores for a linear, by their own names; the bias is not among them."""
    packed = layer.kind.weight.packed
    scale = layer.weight_scale.reshape(1) if layer.kind.weight.static else layer.weight_scale
    found = {"weight_packed" if packed else "weight": layer.weight, "weight_scale": scale}
    if layer.weight_global_scale is not None:
        found["weight_global_scale"] = layer.weight_global_scale.reshape(1).reciprocal()
    if layer.input_scale is not None:
        given = layer.input_scale.reshape(1)
        found |= {"input_global_scale": given.reciprocal()} if layer.kind.input.packed else {"input_scale": given}
    return {name: tensor.detach() for name, tensor in found.items()}
