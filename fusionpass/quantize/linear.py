"""A linear with quantised weights that quantises its input."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import nn

from ..errors import LayoutError, ScaleError, SchemeError
from ..ops.quant import quantized
from ..ops.quant.layout import laid_out, linear, refuse_layout
from .product import product
from .scheme import (
    LinearScheme,
    checked_scale,
    checked_scales,
    linear_scheme,
    linear_shape,
    quantize_weight,
    weight_given_scale,
)
from .shard import Shard


class QuantizedLinear(Shard):
    """`y = x @ w.T + bias` with `x` and `w` quantised by a `LinearScheme`. For inference.

    | scheme | `x` | `w` [N, K] | product |
    |---|---|---|---|
    | fp8_static | e4m3fn, one given scale | one scale | `torch._scaled_mm` |
    | fp8_token | e4m3fn, a scale per token | a scale per output channel | `torch._scaled_mm` |
    | fp8_group128 | e4m3fn, a scale per 128 | a scale per 128 × 128 | `ops.block_scaled_mm` |
    | mxfp8 | e4m3fn, a power of two per 32 | a power of two per 32 | `ops.block_scaled_mm` |
    | nvfp4 | e2m1, an e4m3fn scale per 16, relative to a given one | the same | `ops.block_scaled_mm` |
    | int8_token | int8, a scale per token | a scale per output channel | `torch._int_mm` |
    | int8_group128 | int8, a scale per 128 | a scale per 128 × 128 | `ops.block_scaled_mm` |

    These are the common ones. `LinearScheme.parse` says how others are written: a scale of the input that is computed
    from the whole of it ("fp8_tensor"), a weight quantised otherwise ("fp8_static/fp8_token"), another rounding. One
    scale on one side and one for each row or channel on the other is as many on both sides.

    `x` is quantised by the plain PyTorch arithmetic of `fusionpass.ops.quantize`, so that a pass recognises it.
    `torch._scaled_mm` accumulates in fp32 and `torch._int_mm` exactly; both run on every CPU, emulated where the
    hardware lacks them. `ops.block_scaled_mm` has a kernel on GPUs; elsewhere it multiplies codes and scales out, in
    float32. So does a linear whose input and weight are in groups of different lengths, which then rounds both to `x`'s
    dtype: what the schemes mean, at more than the cost of the unquantised linear.

    On a GPU, FP8 needs sm_89 or gfx942, and K and N are multiples of 16. There is no derivative: call the model under
    `torch.no_grad()`.

    Several linears that read one tensor may hold the same `input_scale` Parameter; the quantisation can then be done
    once. That survives `.to(...)`, `deepcopy` and `load_state_dict`; it does not survive `.to("meta")`.
    A change of the module's dtype (`.half()`, `.to(torch.bfloat16)`) reaches the bias alone.

    Args:
        weight: codes [N, K], contiguous, in the scheme's dtype; for nvfp4 [N, K/2] uint8.
        weight_scale: fp32 of one element; [N, 1] per channel; [⌈N/128⌉, ⌈K/128⌉]; or [N, K/32] uint8 exponents and
            [N, K/16] e4m3fn.
        input_scale: one fp32 element, where the input's scheme takes a scale and does not compute it; a Parameter is
            kept as it is, and so may be shared.
        bias: [N], or None.
        scheme: a `LinearScheme` or its string.
        weight_global_scale: for nvfp4, one fp32 element that `weight_scale` is relative to.

    Shapes: `x` [..., K] bfloat16, float16 or float32 → [..., N], same dtype.

    Raises:
        SchemeError: there is no such scheme; `weight` is not a contiguous matrix of its dtype; or `bias` does not have
            N elements.
        ScaleError: a scale is missing or too many, of another shape or dtype, or not positive and finite.
    """

    bias: nn.Parameter | None
    input_scale: nn.Parameter | None
    weight_global_scale: nn.Parameter | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor | float,
        input_scale: torch.Tensor | float | None = None,
        bias: torch.Tensor | None = None,
        scheme: str | LinearScheme = "fp8_static",
        weight_global_scale: torch.Tensor | float | None = None,
    ) -> None:
        super().__init__()
        self.describe(linear_scheme(scheme, "QuantizedLinear"))
        scheme = self.scheme
        kind = self.kind.weight
        if weight.dtype != kind.code_dtype or weight.ndim != 2 or not weight.is_contiguous():
            raise SchemeError(
                f"the weight is {weight.dtype}, shape {list(weight.shape)}, strides {list(weight.stride())}",
                "QuantizedLinear",
                f"{scheme!r} takes a contiguous [N, {'K/2' if kind.packed else 'K'}] {kind.code_dtype} matrix",
            )
        if reason := refuse_layout(weight.shape[0], kind.layout):
            raise SchemeError(f"the weight cannot be {str(kind)!r}: {reason}", "QuantizedLinear", "Leave it linear")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise SchemeError(
                f"the bias has shape {list(bias.shape)}, the weight {list(weight.shape)}",
                "QuantizedLinear",
                f"A bias has {weight.shape[0]} elements",
            )
        self.out_features, self.in_features = weight.shape[0], weight.shape[1] * (2 if kind.packed else 1)
        self.weight = _constant(weight)
        self.weight_scale = _constant(self._checked("weight_scale", weight_scale).to(weight.device))
        for name, scale, wanted in (
            ("input_scale", input_scale, self.kind.calibrated),
            ("weight_global_scale", weight_global_scale, kind.takes_scale and not kind.static),
        ):
            if (scale is not None) != wanted:
                raise ScaleError(f"{scheme!r} {'needs' if wanted else 'takes no'} {name}", f"QuantizedLinear.{name}")
            if scale is not None:
                checked = self._checked(name, scale).to(weight.device)
                kept = isinstance(scale, nn.Parameter) and scale.dtype == torch.float32 and scale.ndim == 0
                setattr(self, name, cast(nn.Parameter, scale).requires_grad_(False) if kept else _constant(checked))
            else:
                self.register_parameter(name, None)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else _constant(bias)

    def describe(self, kind: LinearScheme) -> None:
        """Say how the input is quantised, and the weight is and lies."""
        self.kind, self.scheme = kind, str(kind)
        # Dynamo cannot make them.
        self.operand_schemes = str(kind.input), str(kind.weight)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        input_scale: torch.Tensor | float | None = None,
        weight_scale: torch.Tensor | float | None = None,
        scheme: str | LinearScheme = "fp8_static",
    ) -> Self:
        """Quantise a linear's weight.

        Args:
            linear: its weight is [N, K], K a multiple of the scheme's group.
            input_scale: as the class takes it.
            weight_scale: of the whole weight, for fp8_static and nvfp4; None: from its largest magnitude.
            scheme: a `LinearScheme` or its string.

        Raises:
            SchemeError, ScaleError: as the class; also where the weight is not finite, or is all zeros and has one
                scale.
        """
        kind = linear_scheme(scheme, "QuantizedLinear").weight
        if weight_scale is not None and not kind.takes_scale:
            raise ScaleError(f"{scheme!r} computes its scales", "weight_scale", "Leave weight_scale out")
        with torch.no_grad():
            if weight_scale is None:
                given = weight_given_scale(linear.weight, kind, "weight_scale")
            else:
                given = checked_scale(weight_scale, "weight_scale").to(linear.weight.device)
            codes, *scales = quantize_weight(linear.weight, given, kind)
            if not scales:
                assert given is not None
                made = cls(codes, given, input_scale, linear.bias, scheme)
            else:
                made = cls(codes, scales[0], input_scale, linear.bias, scheme, given)
        return made.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., N], in the input's dtype."""
        if (packed := self.packed(input)) is not None:
            return packed
        given = self.input_scale if self.kind.amax_dtype is None else self.kind.input_scale(input)
        codes, *scales = quantized(input, given, self.kind.input)
        codes = codes.reshape(-1, codes.shape[-1]).contiguous()
        scales = [scale.reshape(-1, scale.shape[-1]) for scale in scales]
        return product(self, codes, scales, given, input.dtype).view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, with the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}"
        )

    def _checked(
        self, name: str, scale: torch.Tensor | float, prefix: str = "QuantizedLinear.", layout: str | None = None
    ) -> torch.Tensor:
        if name == "weight_scale":
            kind = self.kind.weight if layout is None else dataclasses.replace(self.kind.weight, layout=layout)
            return checked_scales(scale, kind, self.out_features, self.in_features, prefix + name)
        return checked_scale(scale, prefix + name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def keep_dtype(t: torch.Tensor) -> torch.Tensor:
            moved = fn(t)
            # Codes and scales mean nothing in another dtype, so a cast is undone and a move is kept.
            return moved if t is self.bias or moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self.moved(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The linear layout, whatever the linear's own: a file does not depend on who computes its products."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (layout := self.kind.weight.layout) != "linear":
            shape = linear_shape(self.kind.weight, self.out_features, self.in_features)
            names = prefix + "weight", prefix + "weight_scale"
            values = linear(self.weight.detach(), self.weight_scale.detach(), layout, shape)
            destination.update(zip(names, values, strict=True))

    def _laid_out(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state dict's own linear tensors as they lie here; both or neither, for a layout may be of both."""
        names, layout = (prefix + "weight", prefix + "weight_scale"), self.kind.weight.layout
        given = [state_dict.get(name) for name in names]
        if layout == "linear" or given == [None, None]:
            return state_dict
        if given[0] is None or given[1] is None:
            there = names[given[0] is None]
            raise LayoutError(f"the state dict holds {there} alone", self.scheme, "Load the weight with its scales")
        return {**state_dict, **dict(zip(names, laid_out(given[0], given[1], layout), strict=True))}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight_scale", "input_scale", "weight_global_scale"):
            if prefix + name in state_dict and getattr(self, name) is not None:
                self._checked(name, state_dict[prefix + name], prefix, "linear")
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != self.weight.dtype:
            raise SchemeError(
                f"the state dict holds a {weight.dtype} weight, the model a {self.weight.dtype} one",
                prefix + "weight",
                "Load the checkpoint first and call quantize_ after it",
            )
        shared = self.input_scale
        super()._load_from_state_dict(self._laid_out(state_dict, prefix), prefix, *args, **kwargs)
        # assign=True would give each linear a Parameter of its own.
        if shared is not None and self.input_scale is not shared and not shared.is_meta:
            assert self.input_scale is not None
            shared.data.copy_(self.input_scale)
            self.input_scale = shared


def share_input_scales(model: nn.Module) -> None:
    """Make one Parameter of equal input scales of linears that are side by side in one module."""
    for parent in model.modules():
        first: dict[tuple[Any, ...], nn.Parameter] = {}
        for child in parent.children():
            if isinstance(child, QuantizedLinear) and child.input_scale is not None:
                key = (child.input_scale.item(), child.input_scale.device, child.in_features)
                child.input_scale = first.setdefault(key, child.input_scale)


def _constant(t: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)
