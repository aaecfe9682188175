"""A linear with FP8 weights and static per-tensor scales."""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import nn

from ..errors import ScaleError, SchemeError
from ..ops.quant import static_codes
from ..ops.quant.scheme import Scheme

SCHEME = Scheme.parse("fp8_static")
FP8 = SCHEME.dtype
FP8_MAX = SCHEME.max


def absolute_maximum(x: torch.Tensor) -> torch.Tensor:
    """`max |x|` as a 0-dim fp32 tensor; NaN if there is one in `x`. Makes no copy of `x`."""
    low, high = torch.aminmax(x.detach())
    return torch.maximum(low.abs(), high.abs()).float()


def checked_scale(scale: torch.Tensor | float, where: str) -> torch.Tensor:
    """`scale` as a 0-dim fp32 tensor.

    Raises:
        ScaleError: more than one element; or zero, negative or not finite, itself or its reciprocal.
    """
    value = torch.as_tensor(scale, dtype=torch.float32).detach()
    if value.numel() != 1:
        raise ScaleError(f"the scale has shape {list(value.shape)}", where, "A per-tensor scale has one element")
    value = value.reshape(())
    # A meta tensor has no value yet; load_state_dict checks the one that it gets.
    if not value.is_meta and not (value > 0 and torch.isfinite(value) and torch.isfinite(1 / value)):
        raise ScaleError(
            f"the scale is {value.item():g}",
            where,
            "A scale is positive and finite: an absolute maximum / 448",
        )
    return value


class QuantizedLinear(nn.Module):
    """`y = x @ w.T + bias` with `x` and `w` in FP8 e4m3fn, one static scale each. For inference.

    `x` is quantised by the plain PyTorch reference of `fusionpass.ops.quantize` (`clamp(x * (1 / input_scale))` in
    fp32, then a cast), multiplied by `torch._scaled_mm`, which accumulates in fp32, and returned in `x`'s dtype.
    `torch._scaled_mm` runs on every CPU (emulated where the hardware has no FP8) and on GPUs from sm_89 and gfx942;
    on a GPU it needs K and N to be multiples of 16. It has no derivative: call the model under `torch.no_grad()`.

    Several linears that read one tensor may hold the same `input_scale` Parameter; the quantisation can then be done
    once. That survives `.to(...)`, `deepcopy` and `load_state_dict`; it does not survive `.to("meta")`.
    A change of the module's dtype (`.half()`, `.to(torch.bfloat16)`) reaches the bias alone.

    Args:
        weight: e4m3fn [N, K], contiguous.
        weight_scale: one fp32 element: `w = weight.float() * weight_scale`.
        input_scale: one fp32 element; a Parameter is kept as it is, and so may be shared.
        bias: [N], or None.

    Shapes: `x` [..., K] bfloat16, float16 or float32 → [..., N], same dtype.

    Raises:
        SchemeError: `weight` is not a contiguous e4m3fn matrix, or `bias` does not have N elements.
        ScaleError: a scale is not one positive, finite fp32 number.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor | float,
        input_scale: torch.Tensor | float,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if weight.dtype != FP8 or weight.ndim != 2 or not weight.is_contiguous():
            raise SchemeError(
                f"the weight is {weight.dtype}, shape {list(weight.shape)}, strides {list(weight.stride())}",
                "QuantizedLinear",
                "It takes a contiguous [N, K] torch.float8_e4m3fn matrix",
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise SchemeError(
                f"the bias has shape {list(bias.shape)}, the weight {list(weight.shape)}",
                "QuantizedLinear",
                f"A bias has {weight.shape[0]} elements",
            )
        checked_scale(input_scale, "QuantizedLinear.input_scale")
        self.out_features, self.in_features = weight.shape
        self.weight = _constant(weight)
        self.weight_scale = _constant(checked_scale(weight_scale, "QuantizedLinear.weight_scale").to(weight.device))
        if isinstance(input_scale, nn.Parameter) and input_scale.dtype == torch.float32 and input_scale.ndim == 0:
            self.input_scale = input_scale.requires_grad_(False)
        else:
            self.input_scale = _constant(checked_scale(input_scale, "QuantizedLinear").to(weight.device))
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else _constant(bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, input_scale: torch.Tensor | float, weight_scale: torch.Tensor | float | None = None
    ) -> Self:
        """Quantise a linear's weight with the scale `max |weight| / 448` unless one is given.

        Raises:
            ScaleError: as the class; also where the weight is all zeros or not finite.
        """
        with torch.no_grad():
            if weight_scale is None:
                weight_scale = absolute_maximum(linear.weight) / FP8_MAX
            scale = checked_scale(weight_scale, "weight_scale").to(linear.weight.device)
            made = cls(static_codes(linear.weight, scale, SCHEME).contiguous(), scale, input_scale, linear.bias)
        return made.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., N], in the input's dtype."""
        codes = static_codes(input, self.input_scale, SCHEME).reshape(-1, self.in_features).contiguous()
        # cuBLAS has no epilogue with a bias for fp32 outputs.
        inside = None if self.bias is None or input.dtype == torch.float32 else self.bias.to(input.dtype)
        y = torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self.weight_scale,
            bias=inside,
            out_dtype=input.dtype,
        )
        if self.bias is not None and inside is None:
            y = y + self.bias
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, with the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            "scheme=fp8_static"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def keep_dtype(t: torch.Tensor) -> torch.Tensor:
            moved = fn(t)
            # Codes and scales mean nothing in another dtype, so a cast is undone and a move is kept.
            return moved if t is self.bias or moved.dtype == t.dtype else t.to(moved.device)

        return cast(Self, super()._apply(keep_dtype, recurse))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight_scale", "input_scale"):
            if prefix + name in state_dict:
                checked_scale(state_dict[prefix + name], prefix + name)
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != FP8:
            raise SchemeError(
                f"the state dict holds a {weight.dtype} weight, the model an FP8 one",
                prefix + "weight",
                "Load the checkpoint first and call quantize_ after it",
            )
        shared = self.input_scale
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # assign=True would give each linear a Parameter of its own.
        if self.input_scale is not shared and not shared.is_meta:
            shared.data.copy_(self.input_scale)
            self.input_scale = shared


def _constant(t: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)
