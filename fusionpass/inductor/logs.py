"""What torch's own logging says of us: TORCH_LOGS="fusionpass", and artifacts for tlparse."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch._logging._internal import log_registry, register_log, trace_structured

if TYPE_CHECKING:
    from ..report.nodes import NodeRecord
    from ..report.trace import GraphTrace, Report


def register_logs() -> None:
    """Make "fusionpass" a name that TORCH_LOGS and `torch._logging.set_logs` know, wherever the package lies."""
    if not log_registry.is_log("fusionpass"):
        register_log("fusionpass", "fusionpass")


def artifacts(report: "Report", traces: Iterable["GraphTrace"]) -> None:
    """Add the report and each graph, before and after, to the structured trace, where one is written (TORCH_TRACE)."""
    for trace in traces:
        _artifact(f"fusionpass_graph_{trace.index}_before", lambda trace=trace: _text(trace.before))  # type: ignore[misc]
        _artifact(f"fusionpass_graph_{trace.index}_after", lambda trace=trace: _text(trace.after))  # type: ignore[misc]
    _artifact("fusionpass_report", lambda: str(report))


def _artifact(name: str, payload: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)


def _text(nodes: Sequence["NodeRecord"]) -> str:
    return "\n".join(f"{n.name} = {n.text or 'input'}  # {n.type}{f', {n.where}' if n.where else ''}" for n in nodes)
