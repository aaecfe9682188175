"""One fusion site, as the passes note it and as the report tells it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Site:
    """Where an op in a graph came from.

    Args:
        rules: the rules that made it, in order; empty where the model called the op itself.
        where: module path.
        source: "file:line, code".
        note: why a rule that would have taken more was refused here.
        nodes: the names of the nodes that it stands for, from the graph as `recognise` found it.
    """

    rules: tuple[str, ...] = ()
    where: str = ""
    source: str = ""
    note: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One fusion site.

    Attributes:
        op: the op that runs there, or that the nearest rule would have made.
        rule: the last rule applied, or the nearest one; empty where the model called the op itself.
        reason: fused: why this backend, and why no larger op took it in; refused and missed: why not.
        where: module path, "model.layers.0.input_layernorm".
        source: "file:line, code" of the model.
        scheme: quantisation scheme, or "".
        backend: what runs it: "triton"; "cublas"; "late", chosen for each size as it comes; or "inductor" (plain aten,
            C++ on a CPU). Fused only.
        rules: all rules applied, in order.
        graphs: the indices of the compiled graphs that have this site.
        node: the name of the op's node, or of the one at which a rule gave up, in the (first) graph.
    """

    op: str
    rule: str
    reason: str
    where: str
    source: str = ""
    scheme: str = ""
    backend: str = ""
    rules: tuple[str, ...] = ()
    graphs: tuple[int, ...] = ()
    node: str = field(default="", compare=False)

    @staticmethod
    def of(fields: Mapping[str, Any]) -> "Record":
        """The record of which `fields` are the JSON values."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return Record(**plain)

    def __str__(self) -> str:
        head = f"{self.where or '<no module>'}: {self.op}"
        details = ", ".join(part for part in (self.scheme, self.rule, self.backend) if part)
        return f"{head} [{details}] {self.reason}".rstrip()


@dataclass(frozen=True)
class Time:
    """What one fused op takes, on random inputs of the traced shapes, strides and dtypes.

    Attributes:
        us: microseconds of the op, as a compiled model runs it; None where it could not be run.
        replaced_us: microseconds of the operators that it stands for, compiled by Inductor without our passes.
        device: what it was measured on.
        why: why there are no figures; empty where there are.
    """

    us: float | None
    replaced_us: float | None
    device: str
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"not measured: {self.why}"
        return f"{self.us:.2f} µs; what it replaced, compiled by Inductor alone: {self.replaced_us:.2f} µs"
