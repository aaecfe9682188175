"""Experts of transformers with quantised weights, and how what they are is found."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from ..errors import SchemeError
from ..ops.gemm import NAMES
from ..ops.moe import ACTIVATIONS, SCHEMES, experts, gated, weight_scheme
from ..ops.quant import quantized
from ..ops.quant.scheme import Scheme
from .scheme import quantize_weight, weight_given_scale
from .select import matches

_PROBE = 64
"""Columns of what a gate is tried on."""


@dataclass(frozen=True)
class Gate:
    """What experts do between their products, by the arguments of `ops.experts`."""

    activation: str
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    @staticmethod
    def of(module: Any) -> "Gate | str":
        """What `module._apply_gate` computes, by trying it in float32; or why it is none that `ops.experts` knows."""
        generator = torch.Generator().manual_seed(0)
        # Far enough from zero that limits show.
        made = torch.randn(16, 2 * _PROBE, generator=generator) * 8
        try:
            with torch.no_grad():
                found = module._apply_gate(made.clone())
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            return f"its gate cannot be tried: {type(error).__name__}: {error}"
        named = {"alpha": ("alpha", "swiglu_alpha"), "limit": ("limit", "swiglu_limit")}
        given: dict[str, Any] = {}
        for name, spellings in named.items():
            numbers = [getattr(module, one, None) for one in spellings]
            if found_number := next((n for n in numbers if isinstance(n, int | float)), None):
                given[name] = float(found_number)
        for activation in ACTIVATIONS:
            for interleaved in (False, True):
                one = Gate(activation, interleaved, **(given if activation == "clamped_swiglu" else {}))
                if torch.allclose(gated(made, **vars(one)), found, rtol=1e-5, atol=1e-5):
                    return one
        return f"its gate computes none of {', '.join(ACTIVATIONS)}"


def refuse_experts(module: Any) -> str | None:
    """Why `module` is no mixture that `ops.experts` computes, with weights in `gate_up_proj` and `down_proj`."""
    if not getattr(module, "has_gate", False):
        return "its experts have no gate"
    if getattr(module, "has_post_expert_norm", False):
        return "there is a norm behind each expert"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "it carries forward hooks, which a replacement would lose"
    return None


def select_experts(model: nn.Module, rules: Mapping[str, str], scheme: str) -> tuple[dict[str, Gate], dict[str, str]]:
    """The experts to quantise by path, with what is between their products; and the reason for each that is left.

    Args:
        model: the model.
        rules: what is left alone, and what to say of it.
        scheme: as `quantize_` takes it.
    """
    chosen, reasons = {}, {}
    for path, module in model.named_modules():
        weights = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
        if not all(w is not None and w.dim() == 3 for w in weights) or isinstance(module, QuantizedExperts):
            continue
        found = _refuse(module, path, weights, rules, scheme) or Gate.of(module)
        if isinstance(found, str):
            reasons[path] = found
        else:
            chosen[path] = found
    return chosen, reasons


def _refuse(module: nn.Module, path: str, weights: Iterable[Any], rules: Mapping[str, str], scheme: str) -> str | None:
    for rule, said in rules.items():
        if matches(path, rule):
            return said
    if not path:
        return "it is the whole model, which cannot be replaced in place"
    if scheme.partition(",")[0] not in SCHEMES or "/" in scheme:
        return f"experts are quantised by {', '.join(SCHEMES)}, not by {scheme!r}"
    if reason := refuse_experts(module):
        return reason
    multiple = max(16, Scheme.parse(scheme).group or 1)
    for weight in weights:
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"its weights are {weight.dtype}"
        rows, columns = weight.shape[1:][:: -1 if getattr(module, "is_transposed", False) else 1]
        if rows % 16 or columns % multiple:
            return f"its weights are {rows} by {columns}, no multiple of 16 by {multiple}, which {scheme} needs"
    return None


class QuantizedExperts(nn.Module):
    """Experts whose weights are quantised, and what is multiplied by them: `ops.experts`. For inference.

    `x` is quantised by the plain arithmetic of `fusionpass.ops.quantize`, so that a pass recognises it and folds it
    into the norm in front, whose unquantised output the router still reads.

    Args:
        tensors: those of `ops.experts` by name: `up`, `down`, their scales and biases, `x_scale` and `hidden_scale`.
        gate: what is between the products.
        scheme: of the inputs; `ops.moe.weight_scheme` says that of the weights.

    Shapes: `hidden_states` [T, H] bfloat16 or float16, `top_k_index` and `top_k_weights` [T, K] → [T, H].
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor | None], gate: Gate, scheme: str) -> None:
        super().__init__()
        self.scheme, self.gate = scheme, gate
        # Dynamo cannot make them.
        self.kind = Scheme.parse(scheme)
        self.named = tuple(name for name, t in tensors.items() if t is not None)
        for name in self.named:
            given = tensors[name]
            assert given is not None
            kept = isinstance(given, nn.Parameter) and not given.requires_grad
            self.register_parameter(name, given if kept else nn.Parameter(given.detach(), requires_grad=False))  # type: ignore[arg-type]

    @classmethod
    def from_experts(
        cls, module: Any, gate: Gate, scheme: str, scales: tuple[torch.Tensor | None, torch.Tensor | None]
    ) -> Self:
        """Quantise the weights of transformers' experts, those of one expert at a time.

        Args:
            module: has `gate_up_proj` and `down_proj`, [E, out, in], or [E, in, out] where it `is_transposed`.
            gate: what is between the products.
            scheme: of the inputs.
            scales: those that the scheme takes for what each product reads.

        Raises:
            ScaleError: a weight is not finite, or is all zeros and its scheme takes a scale.
        """
        tensors: dict[str, torch.Tensor | None] = {"x_scale": scales[0], "hidden_scale": scales[1]}
        kind = weight_scheme(scheme)
        for name, source in (("up", "gate_up_proj"), ("down", "down_proj")):
            weights = getattr(module, source)
            weights = weights.transpose(1, 2) if getattr(module, "is_transposed", False) else weights
            tensors |= _quantized(weights, kind, name)
            bias = getattr(module, f"{source}_bias", None)
            tensors[f"{name}_bias"] = bias.detach() if bias is not None else None
        return cls(tensors, gate, scheme).train(module.training)

    @property
    def in_features(self) -> int:
        """Columns of the tokens."""
        return int(self.down.shape[1])  # type: ignore[index]

    @property
    def out_features(self) -> int:
        """Rows of the first weight of an expert: its gate's and its up's."""
        return int(self.up.shape[1])  # type: ignore[index]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] → [T, H], in the dtype of `hidden_states`."""
        given = {name: getattr(self, name) for name in self.named}
        codes, *scales = quantized(hidden_states, given.get("x_scale"), self.kind)
        gate = self.gate
        result: torch.Tensor = experts(
            codes, given.pop("up"), given.pop("down"), top_k_index, top_k_weights, gate.activation, self.scheme,
            **given, interleaved=gate.interleaved, alpha=gate.alpha, limit=gate.limit,
            x_scales=scales[0] if scales else None, out_dtype=NAMES[hidden_states.dtype],
        )  # fmt: skip
        return result

    def extra_repr(self) -> str:
        """The experts, their columns, and how they are quantised."""
        count = len(self.down)  # type: ignore[arg-type]
        return f"experts={count}, features={self.in_features}, inner={self.out_features // 2}, scheme={self.scheme}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        biases = {id(t) for name, t in self._parameters.items() if name.endswith("_bias")}

        def keep_dtype(t: torch.Tensor) -> torch.Tensor:
            moved: torch.Tensor = fn(t)
            # Codes and scales mean nothing in another dtype, so a cast is undone and a move is kept.
            return moved if id(t) in biases or moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("up", "down"):
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != getattr(self, name).dtype:
                raise SchemeError(
                    f"the state dict holds {given.dtype}, the model {getattr(self, name).dtype}", prefix + name,
                    "Load the checkpoint first and call quantize_ after it",
                )  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _quantized(weights: torch.Tensor, kind: Scheme, name: str) -> dict[str, torch.Tensor | None]:
    """The codes and the scales of `weights` [E, out, in], by the names of `ops.experts`."""
    made: dict[str, list[torch.Tensor]] = {}
    # Without data all are alike.
    for index, weight in enumerate(weights.detach()[:1] if weights.is_meta else weights.detach()):
        given = weight_given_scale(weight, kind, f"{name}[{index}]")
        codes, *scales = quantize_weight(weight.contiguous(), given, kind)
        found = {name: codes, f"{name}_scale": scales[0] if scales else given}
        if scales and given is not None:
            found[f"{name}_global_scale"] = given
        for key, tensor in found.items():
            assert tensor is not None
            made.setdefault(key, []).append(tensor)
    repeated = len(weights) if weights.is_meta else 1
    return {key: torch.stack(parts * repeated) for key, parts in made.items()}
