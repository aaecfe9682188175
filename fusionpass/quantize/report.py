"""What `quantize_` did to each linear."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class QuantizedRecord:
    """A linear that was quantised.

    Attributes:
        where: its module path.
        shape: (out_features, in_features).
        weight_scale, input_scale: what a code is multiplied by.
        shares: path of the first linear that reads the same tensor and so holds the same scale; may be its own.
    """

    where: str
    shape: tuple[int, int]
    weight_scale: float
    input_scale: float
    shares: str


@dataclass(frozen=True)
class SkippedRecord:
    """A linear that was left alone, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class QuantizeReport:
    """The linears of a model in their order: those that were quantised, those that were not. `str()` is readable."""

    scheme: str
    quantized: tuple[QuantizedRecord, ...]
    skipped: tuple[SkippedRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        scales = len({record.shares for record in self.quantized})
        lines = [f"{self.scheme}: {len(self.quantized)} linears quantised, with {scales} input scales between them"]
        paths = [q.where for q in self.quantized] + [s.where for s in self.skipped]
        width = max(map(len, paths), default=0)
        for q in self.quantized:
            shared = f", shared with {q.shares}" if q.shares != q.where else ""
            lines.append(
                f"  {q.where:<{width}}  {q.shape[1]} → {q.shape[0]}, "
                f"weight scale {q.weight_scale:.4g}, input scale {q.input_scale:.4g}{shared}"
            )
        if self.skipped:
            lines.append(f"{len(self.skipped)} left alone")
            lines += [f"  {s.where:<{width}}  {s.reason}" for s in self.skipped]
        return "\n".join(lines)
