"""What fuses in each family of models, as docs/coverage.md: `python -m bench.coverage [--check]`. Traces only."""

import argparse
import copy
import difflib
import gc
import importlib.metadata
import itertools
import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fusionpass
from bench.sites import Site, sites
from fusionpass import Arch, Config, Record, Report
from fusionpass.ops.quant import quantized
from fusionpass.quantize import SCHEMES, QuantizedLinear
from tests.families import BATCH, FAMILIES, TOKENS, Family

PATH = Path(__file__).parent.parent / "docs" / "coverage.md"
TARGET = Arch("sm_90")
CAPABILITY = (9, 0)

SECTIONS = {
    "norm": ("Norms that feed a quantised linear", "The output of a norm, viewed or copied at most."),
    "sum": (
        "Norms with arithmetic behind them",
        "A residual added to the output of a norm (post-norm models), a modulation of it (diffusion), or a multiplier.",
    ),
    "activation": ("Activations", "The output of an activation, most often multiplied by another projection."),
    "attention": ("Attention outputs", "What an attention gives, perhaps gated."),
    "other": ("Anything else", "Embeddings, residual sums with no norm in them, concatenations, outputs of linears."),
    "unknown": ("Not seen in the model", "Norms that the report has as quantised: it is wrong, or the count is."),
}


@torch.library.custom_op("coverage::product", mutates_args=())
def _product(codes: torch.Tensor, scales: list[torch.Tensor], columns: int, dtype: torch.dtype) -> torch.Tensor:
    raise NotImplementedError


@_product.register_fake
def _(codes: torch.Tensor, scales: list[torch.Tensor], columns: int, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], columns, dtype=dtype)


def _opaque_product(
    layer: QuantizedLinear,
    codes: torch.Tensor,
    scales: list[torch.Tensor],
    given: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    # Nothing in front of a product depends on how it is done.
    return torch.ops.coverage.product(codes, scales, layer.out_features, dtype)


def stand_ins(scheme: str) -> AbstractContextManager[Any]:
    """Quantised linears that trace in half the time, with the same graph in front of the products.

    Dynamo takes the arithmetic of the quantisation in one step; AOTAutograd still takes it apart.
    """
    kind = SCHEMES[scheme].input
    spelled = torch._dynamo.allow_in_graph(lambda x, scale: quantized(x, scale, kind))
    return mock.patch.multiple(
        "fusionpass.quantize.linear", product=_opaque_product, quantized=lambda x, scale, kind: spelled(x, scale)
    )


@dataclass(frozen=True)
class Outcome:
    """A site under one scheme: whether the quantisation is part of the op that computes it, and why if not."""

    family: str
    scheme: str
    site: Site
    fused: bool
    reasons: tuple[str, ...]


def judge(found: Sequence[Site], report: Report, scheme: str) -> list[tuple[bool, tuple[str, ...]]]:
    """Of each site: whether an op of `report` computes it and quantises it; else what the report says of it.

    One op accounts for one site: the one that the model computed in that module by that line, else one in that module.
    """
    free = [r for r in report.fused if r.op.endswith("_quantize") and r.scheme.split(",")[0] == scheme]
    fused: set[int] = set()
    for about in (_at, _about):
        for i, site in enumerate(found):
            op = next((r for r in free if i not in fused and _computes(r, site.kind) and about(site, r)), None)
            if op is not None:
                free.remove(op)
                fused.add(i)
    return [(True, ()) if i in fused else (False, _reasons_of(site, report)) for i, site in enumerate(found)]


def _computes(record: Record, kind: str) -> bool:
    """Whether the op, by its name, gives what sites of that kind are."""
    if "norm" in record.op:
        return kind in ("norm", "sum")
    return kind in (("sum", "other") if record.op.startswith("add") else ("activation", "attention"))


def _at(site: Site, record: Record) -> bool:
    return (record.where, record.source.split(", ")[0]) in site.places


def _about(site: Site, record: Record) -> bool:
    # An activation may be a module of its own inside the one that multiplies it; so are the linears there.
    inside = site.kind == "activation" and record.where.startswith(f"{site.where}.") and record.op != "quantize"
    return record.where in {site.where, *site.norms, *site.linears} or inside


def _reasons_of(site: Site, report: Report) -> tuple[str, ...]:
    def told(records: Iterable[Record]) -> list[Record]:
        return [r for r in records if r.reason and _about(site, r)]

    reasons = [f"{r.op}: {r.reason}" for r in told(report.fused)]
    reasons += [f"{r.rule} missed: {r.reason}" for r in told(report.missed)]
    reasons += [f"{r.rule} refused: {r.reason}" for r in told(report.refused)]
    return tuple(dict.fromkeys(map(_without_numbers, reasons))) or ("nothing",)


def _without_numbers(reason: str) -> str:
    """A reason without the numbers that fx gives to nodes, so that those of two layers are one."""
    return re.sub(r"\b(?!sm_)([a-z][a-z_]*)_\d+\b", r"\1", reason)


def unknown(found: Iterable[Site], report: Report) -> list[Record]:
    """The norms that the report has with a quantisation and `found` does not have."""
    known = {path for site in found if site.norms for path in (site.where, *site.norms, *(p for p, _ in site.places))}
    return [r for r in report.fused if "norm" in r.op and r.op.endswith("_quantize") and r.where not in known]


def outcomes(family: Family, schemes: Iterable[str]) -> list[Outcome]:
    """Every site of a family under each of the schemes."""
    built, inputs = family.build()
    made = []
    for scheme in schemes:
        model = copy.deepcopy(built)
        calibration = [inputs] if SCHEMES[scheme].calibrated else None
        packed = [path for path, module in model.named_modules() if hasattr(module, "gate_up_proj")]
        experts = [path for path in packed if not isinstance(model.get_submodule(path).gate_up_proj, torch.nn.Linear)]
        fusionpass.quantize_(model, scheme, calibration, [*family.skip, *experts], progress=False)
        found = sites(model, inputs)
        with stand_ins(scheme):
            report = fusionpass.explain(model, **inputs, config=Config(target=TARGET))
        judged = judge(found, report, scheme)
        made += [Outcome(family.name, scheme, site, *verdict) for site, verdict in zip(found, judged, strict=True)]
        for record in unknown(found, report):
            site = Site("unknown", record.where, record.op, frozenset(), ())
            made.append(Outcome(family.name, scheme, site, False, (f"{record.op} at {record.where}",)))
    torch._dynamo.reset()
    gc.collect()
    return made


def versions() -> str:
    """What the table depends on besides this repository."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "diffusers"))


def document(made: Sequence[Outcome]) -> str:
    """The page."""
    schemes = list(dict.fromkeys(o.scheme for o in made))
    lines = [
        "# Coverage",
        "",
        "How much of what real models quantise is fused with what computes it, by family and scheme, and why the rest",
        "is not. Every linear that can be quantised is; the count of what it reads comes from running the model, not",
        "from the rules. A cell is fused / all.",
        "",
        f"Made by `python -m bench.coverage` with {versions()}.",
        f"Random weights, two layers, bfloat16, {BATCH} × {TOKENS} tokens at once, traced for {TARGET.name}. MoE",
        "experts that are packed parameters rather than linears are not quantised. The configurations are those of",
        "`tests/families.py`.",
        "",
        *_summary(made, schemes),
    ]
    for kind, (title, explained) in SECTIONS.items():
        of_kind = [o for o in made if o.site.kind == kind]
        if of_kind:
            lines += ["", f"## {title}", "", explained, "", *_table(of_kind, schemes), *_reasons(of_kind, schemes)]
    return "\n".join(lines) + "\n"


def _summary(made: Sequence[Outcome], schemes: Sequence[str]) -> list[str]:
    lines = ["| what a linear reads | families | all of it fused | " + " | ".join(schemes) + " | all |"]
    lines.append("|" + "---|" * (len(schemes) + 4))
    for kind, (title, _) in SECTIONS.items():
        of_kind = [o for o in made if o.site.kind == kind]
        families = {o.family for o in of_kind}
        full = families - {o.family for o in of_kind if not o.fused}
        shares = [_share([o for o in of_kind if o.scheme == scheme]) for scheme in schemes]
        lines.append(f"| {title} | {len(families)} | {len(full)} | {' | '.join(shares)} | {_share(of_kind)} |")
    return lines


def _share(of: Sequence[Outcome]) -> str:
    fused = sum(o.fused for o in of)
    return f"{fused}/{len(of)}, {100 * fused / len(of):.1f} %" if of else "–"


def _table(of_kind: Sequence[Outcome], schemes: Sequence[str]) -> list[str]:
    lines = ["| family | " + " | ".join(schemes) + " |", "|" + "---|" * (len(schemes) + 1)]
    for family in dict.fromkeys(o.family for o in of_kind):
        cells = []
        for scheme in schemes:
            these = [o.fused for o in of_kind if (o.family, o.scheme) == (family, scheme)]
            cells.append(f"{sum(these)}/{len(these)}" if these else "–")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return lines


def _reasons(of_kind: Sequence[Outcome], schemes: Sequence[str]) -> list[str]:
    grouped: dict[str, list[Outcome]] = defaultdict(list)
    for o in of_kind:
        for reason in o.reasons:
            grouped[reason].append(o)
    if not grouped:
        return []
    lines = ["", "Why not:", "", "| the report says | sites | schemes | families |", "|---|---|---|---|"]
    for reason, of in sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0])):
        named = [scheme for scheme in schemes if any(o.scheme == scheme for o in of)]
        families = list(dict.fromkeys(o.family for o in of))
        listed = ", ".join(families[:6]) + (f" and {len(families) - 6} more" if len(families) > 6 else "")
        which = "all" if named == list(schemes) else ", ".join(named)
        lines.append(f"| {reason.replace('|', '¦')} | {len(of)} | {which} | {listed} |")
    return lines


def stale(page: str, made: Sequence[Outcome]) -> list[str]:
    """What `page` has otherwise: the cells of these outcomes, and the reasons."""
    found = []
    sections = {part.partition("\n")[0]: part.splitlines() for part in page.split("\n## ")}
    for kind, (title, _) in SECTIONS.items():
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sections.get(title, ()) if line[:1] == "|"]
        header, by_name = (rows or [[]])[0], {row[0]: row for row in rows}
        for family, scheme in dict.fromkeys((o.family, o.scheme) for o in made):
            these = [o for o in made if (o.family, o.scheme, o.site.kind) == (family, scheme, kind)]
            now = f"{sum(o.fused for o in these)}/{len(these)}" if these else "–"
            before = by_name[family][header.index(scheme)] if family in by_name else "–"
            found += [f"{title}, {family}, {scheme}: {before}, now {now}"] if before != now else []
            reasons = {reason.replace("|", "¦") for o in these for reason in o.reasons}
            found += [f"{title}, {family}, {scheme}: now {reason}" for reason in sorted(reasons - by_name.keys())]
    return found


def _prepare() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # Tracing makes many objects and little garbage: a fifth of the time.
    gc.disable()
    # MoE layers ask it which kernel to call; there may be no GPU, and the answer must not depend on which.
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY


def _work(job: tuple[Family, tuple[str, ...]]) -> list[Outcome]:
    return outcomes(*job)


def measure(jobs: Sequence[tuple[Family, tuple[str, ...]]]) -> list[Outcome]:
    """The outcomes of families under schemes, in the order of the arguments."""
    processes = min(len(os.sched_getaffinity(0)), len(jobs))
    made: list[Outcome] = []
    with multiprocessing.get_context("spawn").Pool(processes, _prepare) as pool:
        for (family, _), found in zip(jobs, pool.imap(_work, jobs), strict=True):
            print(family.name, file=sys.stderr)
            made += found
    return made


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 with a diff where the page is stale")
    parser.add_argument("--sample", action="store_true", help="with --check: each family under one scheme, in turn")
    parser.add_argument("--family", action="append", help="only print this family")
    parser.add_argument("--scheme", action="append", choices=list(SCHEMES), help="only print this scheme")
    options = parser.parse_args()
    names = options.family or [family.name for family in FAMILIES]
    if missing := set(names) - {family.name for family in FAMILIES}:
        parser.error(f"there is no family {', '.join(sorted(missing))}: {', '.join(f.name for f in FAMILIES)}")
    before = PATH.read_text() if PATH.exists() else ""
    if options.check and before and versions() not in before:
        print(f"skipped: {PATH.name} was made with other versions than {versions()}")
        return 0
    chosen = [family for family in FAMILIES if family.name in names]
    if options.check and options.sample:
        wrong = stale(before, measure(list(zip(chosen, itertools.cycle((name,) for name in SCHEMES)))))
        print("\n".join(wrong) or f"{PATH.name} is as it should be, where looked at")
        return int(bool(wrong))
    page = document(measure([(family, tuple(options.scheme or SCHEMES)) for family in chosen]))
    if options.family or options.scheme:
        print(page)
    elif options.check:
        diff = list(difflib.unified_diff(before.splitlines(), page.splitlines(), PATH.name, "now", lineterm=""))
        print("\n".join(diff) or f"{PATH.name} is as it should be")
        return int(bool(diff))
    else:
        PATH.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
