"""`pack_linears_`: linears that read one input get one storage, and are one product in a compiled model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.quant import dequantize
from .calibrate import Calibration, calibrate
from .linear import QuantizedLinear
from .report import PackedRecord, PackReport, SkippedRecord
from .scheme import quantize_weight
from .select import PACKS, packs, replace
from .shard import Pack, Shard

_LEAST = 2.0**-9
"""The least scale above zero that e4m3fn has."""
_CUT = ("weight", "weight_scale", "bias")
"""Parameters that are cut by rows."""


class PackedLinear(Shard, nn.Linear):
    """A plain linear that is a shard of a packed one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, linear.bias is not None, "meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., N], as `nn.Linear`'s."""
        packed = self.packed(input)
        return F.linear(input, self.weight, self.bias) if packed is None else packed

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.moved(fn)
        return self


@torch.no_grad()
def pack_linears_(
    model: nn.Module,
    unify_scales: bool = False,
    example: Calibration | None = None,
    names: Iterable[Sequence[str]] = PACKS,
) -> PackReport:
    """Give linears that read one input, such as q, k and v or gate and up, one storage, in place.

    Their weights, scales and biases become views of it, in the order of `names`: the state dict, its keys,
    `load_state_dict` and updates in place hold, and in eager mode each linear computes what it did. In a model that
    fusionpass compiles for inference each computes the product with the whole storage and takes its columns; these
    products are equal, so that one is left. Where nothing merges them, they would all be computed: under another
    backend, and where the columns of two go to the caller, or to attention, as they are. So pack for
    `fusionpass.compile` alone, and models that rotate or norm queries and keys.

    A parameter that is replaced by another takes its linears out of the pack, and so does pickling. A compiled model
    does not see what is put in place of `weight.data` itself (`weight.data = …`).

    Args:
        model: any module, quantised or not. Call this before `fusionpass.compile`, behind `quantize_`.
        unify_scales: requantise where static scales differ, to the largest one s. That moves an element w of a weight
            by at most `max(|w| / 16, s * 2**-10)`; the input is rounded in steps of the larger scale. Of NVFP4 the
            codes stay, and their block scales are rounded anew: by at most `max(|w| / 16, 6 * s * 2**-9)`. False: such
            linears are left alone.
        example: inputs to run the model on as `quantize_` takes calibration data, so that linears which are named
            alike but read different tensors (q and k of cross-attention) are left alone.
        names: of linears in one module that belong together.

    Returns:
        What was packed, and why the rest was not.

    Raises:
        CalibrationError: the example is unusable, or a linear never ran on it.
    """
    groups = [
        {path: model.get_submodule(path) for path in paths}
        for paths in packs(model, (nn.Linear, QuantizedLinear), names)
    ]
    linears: dict[str, Any] = {path: linear for group in groups for path, linear in group.items()}
    seen = {} if example is None or not linears else calibrate(model, linears, example, False)
    done, left = [], []
    for group in groups:
        reason = _refuse(list(group.values()), unify_scales)
        if reason is None and len({seen[path].inputs for path in group if path in seen}) > 1:
            reason = "they read different inputs"
        if reason is None:
            done.append(_pack(model, group))
        else:
            left += [SkippedRecord(path, reason) for path in group]
    return PackReport(tuple(done), tuple(left))


def _refuse(shards: list[Any], unify: bool) -> str | None:
    first = shards[0]
    if len({id(shard) for shard in shards}) < len(shards):
        return "one is registered under two names"
    for shard in shards:
        if type(shard) not in (nn.Linear, QuantizedLinear):
            return f"{type(shard).__name__} is a subclass of nn.Linear and may do more than one"
        if shard._forward_hooks or shard._forward_pre_hooks or "forward" in vars(shard):
            return "it carries forward hooks"
        if isinstance(shard, QuantizedLinear) and shard.pack is not None:
            return "they are packed already"
        if shard.weight.is_meta:
            return "its weight is not loaded"
    if len({type(shard) for shard in shards}) > 1:
        return "only some of them are quantised"
    for name, of in (
        ("inputs", lambda shard: shard.in_features),
        ("schemes", lambda shard: getattr(shard, "scheme", "")),
        ("dtypes", lambda shard: (shard.weight.dtype, shard.weight.requires_grad)),
        ("devices", lambda shard: shard.weight.device),
    ):
        if len({of(shard) for shard in shards}) > 1:
            return f"they have different {name}"
    if len({shard.bias.dtype for shard in shards if shard.bias is not None}) > 1:
        return "their biases have different dtypes"
    if isinstance(first, QuantizedLinear):
        blocks = first.kind.weight.granularity == "block128"
        if blocks and any(shard.out_features % 128 for shard in shards[:-1]):
            return "their scales are of blocks of 128 rows, and one ends within a block"
        if first.kind.weight.layout != "linear" and any(shard.out_features % 128 for shard in shards):
            return f"they lie {first.kind.weight.layout} in blocks of 128 rows, and one ends within a block"
        for name in _single(first):
            if not unify and len({getattr(shard, name).item() for shard in shards}) > 1:
                return f"they have different values of {name}; unify_scales=True requantises them"
    return None


def _single(layer: QuantizedLinear) -> list[str]:
    """The names of scales that are one for a whole tensor."""
    weight = layer.kind.weight
    wanted = {
        "input_scale": layer.kind.calibrated,
        "weight_scale": weight.static,
        "weight_global_scale": weight.takes_scale and not weight.static,
    }
    return [name for name, there in wanted.items() if there]


def _pack(model: nn.Module, group: dict[str, Any]) -> PackedRecord:
    shards = list(group.values())
    first = shards[0]
    unified: list[str] = []
    if isinstance(first, QuantizedLinear):
        unified = _unify(shards)
    bias = None
    if any(shard.bias is not None for shard in shards):
        like = next(shard.bias for shard in shards if shard.bias is not None)
        bias = torch.cat([like.new_zeros(s.out_features) if s.bias is None else s.bias.detach() for s in shards])
    weight = torch.cat([shard.weight.detach() for shard in shards])
    layer: nn.Module
    if isinstance(first, QuantizedLinear):
        cut = not first.kind.weight.static
        scale = torch.cat([s.weight_scale.detach() for s in shards]) if cut else first.weight_scale
        layer = QuantizedLinear(weight, scale, first.input_scale, bias, first.kind, first.weight_global_scale)
        # One Parameter each for all, so that a change of one is a change of all.
        for name in _single(first):
            for shard in (layer, *shards):
                setattr(shard, name, getattr(first, name))
    else:
        for i, shard in enumerate(shards):
            shards[i] = PackedLinear(shard)
            replace(model, shard, shards[i])
        layer = nn.Linear(1, 1, bias is not None, "meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
    Pack(layer, shards, _CUT).bind()
    rows = sum(shard.out_features for shard in shards)
    return PackedRecord(tuple(group), (rows, first.in_features), getattr(first, "scheme", None), tuple(unified))


def _unify(shards: list[QuantizedLinear]) -> list[str]:
    """Requantise to the largest of scales that differ; returns the names of those."""
    differ = [n for n in _single(shards[0]) if len({getattr(shard, n).item() for shard in shards}) > 1]
    for name in differ:
        largest = torch.stack([getattr(shard, name) for shard in shards]).max()
        for shard in shards:
            old = getattr(shard, name).detach().clone()
            if name == "weight_scale":
                values = dequantize(shard.weight, old, shard.kind.weight)
                shard.weight.copy_(quantize_weight(values, largest, shard.kind.weight)[0])
            elif name == "weight_global_scale":
                relative = shard.weight_scale.float() * (old / largest)
                shard.weight_scale.copy_(relative.clamp(min=_LEAST).to(shard.weight_scale.dtype))
            getattr(shard, name).copy_(largest)
    return differ
