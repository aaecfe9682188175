"""Which linears of a model can be quantised, and why the others cannot."""

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import SkipError, nearest
from .scheme import SCHEMES

MULTIPLE = 16
"""What matrix units want N to be a multiple of."""


def matches(path: str, rule: str) -> bool:
    """Whether the dotted `rule` is a run of whole segments of `path`; each segment may be a glob.

    `mlp.gate` matches `layers.0.mlp.gate` and not `layers.0.mlp.gate_proj`; `layers.*.mlp` matches both.
    """
    segments, wanted = path.split("."), rule.split(".")
    starts = range(len(segments) - len(wanted) + 1)
    return any(all(map(fnmatchcase, segments[i : i + len(wanted)], wanted)) for i in starts)


def select(
    model: nn.Module, skip: Iterable[str], tied: bool, scheme: str
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linears to quantise by path, and the reason for each that is left alone.

    Raises:
        SkipError: a rule of `skip` matches no module.
    """
    rules = [skip] if isinstance(skip, str) else list(skip)
    paths = [path for path, _ in model.named_modules() if path]
    for rule in rules:
        if not any(matches(path, rule) for path in paths):
            names = {segment for path in paths for segment in path.split(".") if not segment.isdecimal()}
            raise SkipError(f"the rule {rule!r} matches no module", "skip", nearest(rule, names))

    owners: dict[int, set[str]] = defaultdict(set)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].add(path)

    chosen, reasons = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            others = () if tied else owners[id(module.weight)] - {path}
            reason = _refuse(module, path, rules, others, scheme)
            if reason is None:
                chosen[path] = module
            else:
                reasons[path] = reason
    return chosen, reasons


def _refuse(linear: nn.Linear, path: str, rules: Iterable[str], tied_to: Iterable[str], scheme: str) -> str | None:
    for rule in rules:
        if matches(path, rule):
            return f"skipped by the rule {rule!r}"
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
    wanted = {"in_features": SCHEMES[scheme].multiple, "out_features": MULTIPLE}
    for name, multiple in wanted.items():
        if (size := getattr(linear, name)) % multiple:
            return f"{name} {size} is not a multiple of {multiple}, which {scheme} needs"
    return None
