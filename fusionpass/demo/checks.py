"""What must hold for the demo to succeed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..quantize import QuantizedLinear, QuantizeReport
from ..report import Report
from .measure import Measured

PERPLEXITY = 1e-3
"""Largest relative difference between the perplexities of FP8 compiled and FP8 eager."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold, whether it does, and what was seen."""

    name: str
    passed: bool
    seen: str


def norms_in_front(model: nn.Module, inputs: torch.Tensor) -> set[str]:
    """Paths of the RMSNorm modules whose output is the input of a quantised linear in one eager forward."""
    # The outputs are held so that no other tensor takes an id over.
    outputs: dict[int, tuple[str, torch.Tensor]] = {}
    found: set[str] = set()

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in outputs:
            found.add(outputs[id(args[0])][0])

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            handles.append(module.register_forward_pre_hook(read))
        elif "RMSNorm" in type(module).__name__:

            def wrote(module: nn.Module, args: Any, output: torch.Tensor, path: str = path) -> None:
                outputs[id(output)] = (path, output)

            handles.append(module.register_forward_hook(wrote))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def judge(
    eager: Measured, compiled: Measured, norms: set[str], quantized: QuantizeReport, report: Report, exact: bool
) -> list[Check]:
    """Compare the compiled model with the eager one, and its report with what there was to fuse.

    Args:
        eager: the quantised model before it was compiled.
        compiled: after.
        norms: what `norms_in_front` found.
        quantized: what `quantize_` did.
        report: of the compiled model.
        exact: whether the two compute alike to the last bit, as on a CPU with `numerics="eager"`. Where they do not,
            FP8 codes that moved across a rounding boundary are noise in the losses, and a text may be too short to
            resolve `PERPLEXITY`: then a difference within two standard errors passes.
    """
    off = abs(compiled.perplexity / eager.perplexity - 1)
    apart = torch.tensor(compiled.losses, dtype=torch.float64) - torch.tensor(eager.losses, dtype=torch.float64)
    error = apart.std().item() / len(apart) ** 0.5
    checks = [
        Check(
            f"perplexity of FP8 compiled within {PERPLEXITY:.1%} of FP8 eager",
            off <= (PERPLEXITY if exact else max(PERPLEXITY, 2 * error)),
            f"{off:.4%} apart, standard error {error:.4%}",
        )
    ]
    same = eager.tokens == compiled.tokens
    if exact:
        checks.append(Check("the same text from FP8 eager and FP8 compiled", same, "equal" if same else "different"))

    fused = {r.where for r in report.fused if r.op in ("rms_norm_quantize", "add_rms_norm_quantize")}
    unexplained = norms - fused - {r.where for r in (*report.refused, *report.missed)}
    checks.append(
        Check(
            "every RMSNorm in front of quantised linears fused with its quantisation",
            norms <= fused,
            f"{len(norms & fused)} of {len(norms)}, {len(unexplained)} without a reason{_listed(norms - fused)}",
        )
    )
    scales = len({record.shares for record in quantized.quantized})
    sites = _sites_per_forward(report)
    checks.append(
        Check(
            "linears that read one tensor quantise it once",
            sites == scales,
            f"{sites} quantisations for {len(quantized.quantized)} linears with {scales} distinct inputs",
        )
    )
    return checks


def _sites_per_forward(report: Report) -> int:
    # The same site compiled for another shape is the same record.
    return sum(bool(record.scheme) for record in report.fused)


def _listed(paths: Iterable[str]) -> str:
    some = sorted(paths)[:4]
    return f"; not: {', '.join(some)}" if some else ""
