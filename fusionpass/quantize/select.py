"""Which linears of a model can be quantised, and why the others cannot."""

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import ShardWarning, SkipError, nearest
from .scheme import linear_scheme

MULTIPLE = 16
"""What matrix units want N to be a multiple of."""

PACKS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("to_q", "to_k", "to_v"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
"""Names of linears that read one input, side by side in one module: shards of a packed layer."""


def matches(path: str, rule: str) -> bool:
    """Whether `rule` names the module at `path`, or one that holds it.

    A rule is a run of whole segments of the path; each segment may be a glob: `mlp.gate` matches `layers.0.mlp.gate`
    and not `layers.0.mlp.gate_proj`; `layers.*.mlp` matches both. Behind `re:` it is a regular expression for the
    beginning of the path, as compressed-tensors has them.
    """
    if rule.startswith("re:"):
        return re.match(rule.removeprefix("re:"), path) is not None
    segments, wanted = path.split("."), rule.split(".")
    starts = range(len(segments) - len(wanted) + 1)
    return any(all(map(fnmatchcase, segments[i : i + len(wanted)], wanted)) for i in starts)


def config_rules(model: nn.Module) -> list[str]:
    """Modules that the quantisation config of a Hugging Face model leaves alone.

    That is `modules_to_not_convert`, and `ignore` in compressed-tensors' config.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return []
    config = config if isinstance(config, Mapping) else config.to_dict()
    return [rule for name in ("modules_to_not_convert", "ignore") for rule in config.get(name) or ()]


def packs(
    model: nn.Module, kinds: type | tuple[type, ...] = nn.Linear, known: Iterable[Sequence[str]] = PACKS
) -> Iterator[list[str]]:
    """The paths of linears that are shards of a packed layer, those of each layer together."""
    for parent, module in model.named_modules():
        for names in known:
            if all(isinstance(getattr(module, name, None), kinds) for name in names):
                yield [f"{parent}.{name}".removeprefix(".") for name in names]


def skip_rules(model: nn.Module, skip: str | Iterable[str]) -> dict[str, str]:
    """The rules for what is left alone, the model's own among them, and what is said of each.

    Raises:
        SkipError: a rule of `skip` matches no module.
    """
    rules = [skip] if isinstance(skip, str) else list(skip)
    paths = [path for path, _ in model.named_modules() if path]
    for rule in rules:
        if not any(matches(path, rule) for path in paths):
            names = {segment for path in paths for segment in path.split(".") if not segment.isdecimal()}
            raise SkipError(f"the rule {rule!r} matches no module", "skip", nearest(rule, names))
    told = {rule: f"skipped by {rule!r} in the model's quantization_config" for rule in config_rules(model)}
    return told | {rule: f"skipped by the rule {rule!r}" for rule in rules}


def select(
    model: nn.Module, told: Mapping[str, str], tied: bool, scheme: str
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linears to quantise by path, and the reason for each that is left alone; `told` as `skip_rules` gives it."""
    owners: dict[int, set[str]] = defaultdict(set)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].add(path)

    chosen, reasons = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            others = () if tied else owners[id(module.weight)] - {path}
            reason = _refuse(module, path, told, others, scheme)
            if reason is None:
                chosen[path] = module
            else:
                reasons[path] = reason
    _warn_of_parts(model, chosen)
    return chosen, reasons


def _refuse(linear: nn.Linear, path: str, rules: Mapping[str, str], tied_to: Iterable[str], scheme: str) -> str | None:
    for rule, reason in rules.items():
        if matches(path, rule):
            return reason
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of nn.Linear and may do more than one"
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return "it carries forward hooks, which a replacement would lose"
    if not path:
        return "it is the whole model, which cannot be replaced in place"
    for name in tied_to:
        return f"its weight is tied to {name}"
    if linear.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weight is {linear.weight.dtype}"
    wanted = {"in_features": linear_scheme(scheme, "quantize_").multiple, "out_features": MULTIPLE}
    for name, multiple in wanted.items():
        if (size := getattr(linear, name)) % multiple:
            return f"{name} {size} is not a multiple of {multiple}, which {scheme} needs"
    return None


def _warn_of_parts(model: nn.Module, chosen: Collection[str]) -> None:
    """A model of which a part of a packed layer is quantised runs here, but an engine that packs it refuses it."""
    parts = []
    for paths in packs(model):
        left = [path for path in paths if path not in chosen]
        if left and len(left) < len(paths):
            beside = ", ".join(path.rpartition(".")[2] for path in paths if path in chosen)
            parts.append(f"{', '.join(left)} beside {beside}")
    if parts:
        listed = "; ".join(parts[:4]) + ("; …" if len(parts) > 4 else "")
        warnings.warn(f"left alone while what reads the same input is quantised: {listed}", ShardWarning, stacklevel=4)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered; one module may hang under several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
