"""What `quantize_` did to each linear."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class QuantizedRecord:
    """A linear, or experts, that were quantised.

    Attributes:
        where: its module path.
        shape: (out_features, in_features); of experts, those of the first product of each.
        weight_scale, input_scale: the one given scale of the weight and of the input; None where the scheme computes
            scales and takes none.
        shares: path of the first linear that holds the same input scale, since it reads the same tensor; may be its
            own, and is where there is none.
        experts: how many there are; 0: it is a linear.
    """

    where: str
    shape: tuple[int, int]
    weight_scale: float | None
    input_scale: float | None
    shares: str
    experts: int = 0


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
        given = {record.shares for record in self.quantized if record.input_scale is not None}
        between = f", with {len(given)} input scales between them" if given else ""
        mixtures = sum(q.experts > 0 for q in self.quantized)
        beside = f" and {mixtures} mixtures of experts" if mixtures else ""
        lines = [f"{self.scheme}: {len(self.quantized) - mixtures} linears{beside} quantised{between}"]
        paths = [q.where for q in self.quantized] + [s.where for s in self.skipped]
        width = max(map(len, paths), default=0)
        for q in self.quantized:
            scales = {"weight": q.weight_scale, "input": q.input_scale}
            told = [(f"{q.experts} experts of " if q.experts else "") + f"{q.shape[1]} → {q.shape[0]}"]
            told += [f"{name} scale {scale:.4g}" for name, scale in scales.items() if scale is not None]
            shared = f", shared with {q.shares}" if q.shares != q.where else ""
            lines.append(f"  {q.where:<{width}}  {', '.join(told)}{shared}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left alone")
            lines += [f"  {s.where:<{width}}  {s.reason}" for s in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class LoweredRecord:
    """A linear that was made ours.

    Attributes:
        where: its module path.
        shape: (out_features, in_features).
        source: what it was, `library.Class`.
        scheme: what it is now, as `LinearScheme.parse` takes it.
    """

    where: str
    shape: tuple[int, int]
    source: str
    scheme: str


@dataclass(frozen=True)
class LowerReport:
    """The linears of a model in their order: those that were made ours, those that were not. `str()` is readable."""

    lowered: tuple[LoweredRecord, ...]
    left: tuple[SkippedRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        paths = [r.where for r in self.lowered] + [s.where for s in self.left]
        width = max(map(len, paths), default=0)
        lines = [f"{len(self.lowered)} linears lowered"]
        lines += [f"  {r.where:<{width}}  {r.shape[1]} → {r.shape[0]}, {r.source} → {r.scheme}" for r in self.lowered]
        return "\n".join([*lines, *_left_alone(self.left, width)])


@dataclass(frozen=True)
class PackedRecord:
    """Linears that have one storage.

    Attributes:
        where: their module paths.
        shape: (the sum of out_features, in_features).
        scheme: how they are quantised, or None.
        unified: the scales that differed, and are the largest of them now.
    """

    where: tuple[str, ...]
    shape: tuple[int, int]
    scheme: str | None
    unified: tuple[str, ...]


@dataclass(frozen=True)
class PackReport:
    """The linears of a model that belong together by name. `str()` is readable."""

    packed: tuple[PackedRecord, ...]
    left: tuple[SkippedRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.packed)} packs of linears"]
        for r in self.packed:
            told = f"{r.shape[1]} → {r.shape[0]}" + (f", {r.scheme}" if r.scheme else "")
            lines.append(f"  {', '.join(r.where)}: {told}" + (f", one {' and '.join(r.unified)}" if r.unified else ""))
        return "\n".join([*lines, *_left_alone(self.left)])


@dataclass(frozen=True)
class RepackedRecord:
    """A linear whose weight lies otherwise now.

    Attributes:
        where: its module path.
        before, after: the layouts.
        rebound: the parameters that are other memory than before; the rest was copied to where it was.
    """

    where: str
    before: str
    after: str
    rebound: tuple[str, ...]


@dataclass(frozen=True)
class RepackReport:
    """The quantised linears of a model: those that lie otherwise now, those that do not. `str()` is readable."""

    layout: str
    repacked: tuple[RepackedRecord, ...]
    left: tuple[SkippedRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        paths = [r.where for r in self.repacked] + [s.where for s in self.left]
        width = max(map(len, paths), default=0)
        lines = [f"{self.layout}: {len(self.repacked)} linears repacked"]
        for r in self.repacked:
            told = f"{' and '.join(r.rebound)} rebound" if r.rebound else "copied in place"
            lines.append(f"  {r.where:<{width}}  {r.before} → {r.after}, {told}")
        return "\n".join([*lines, *_left_alone(self.left, width)])


def _left_alone(left: Sequence[SkippedRecord], width: int = 0) -> list[str]:
    """Lines about linears that stay as they are, their paths padded to `width`."""
    return [f"{len(left)} left alone", *(f"  {s.where:<{width}}  {s.reason}" for s in left)] if left else []
