"""What the CUDA graphs of a `compile` call did, for its report."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class GraphNote:
    """One captured program.

    Attributes:
        sizes: "s0=8"; empty where shapes do not change.
        bytes: by how much memory in use grew when it was captured: the pool and the driver's.
        replays: how often it ran.
    """

    sizes: str
    bytes: int = 0
    replays: int = 0

    def __str__(self) -> str:
        return f"{self.sizes or 'the only size'}: {self.bytes / 2**20:.1f} MiB, {self.replays} replays"


@dataclass
class ProgramNote:
    """What became of one program.

    Attributes:
        title: which.
        mode: "full", "piecewise" or "off".
        why: why it is not otherwise.
        steps: why each step that runs without a graph does; by name.
        padding: why a call never runs at a larger captured size; empty if it may.
        graphs: what is captured now.
        without: why calls ran without a graph, and how many.
        refused: why a size has no graph; by size.
        copied: the inputs that are copied at each call, because they move.
        recaptures: what made a captured graph stale, and how often.
        sightings: at which call of a size it is captured.
    """

    title: str
    mode: str
    why: str = ""
    steps: dict[str, str] = field(default_factory=dict)
    padding: str = ""
    graphs: list[GraphNote] = field(default_factory=list)
    without: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    recaptures: dict[str, int] = field(default_factory=dict)
    sightings: int = 2

    def add(self, why: str) -> None:
        """Say one more thing about how it runs."""
        if why not in self.why:
            self.why = "; ".join(filter(None, (self.why, why)))

    def ran_without(self, why: str) -> None:
        """Count a call without a graph."""
        self.without[why] = self.without.get(why, 0) + 1

    def captured_again(self, why: str) -> None:
        """Count a graph that was stale."""
        self.recaptures[why] = self.recaptures.get(why, 0) + 1

    def __str__(self) -> str:
        lines = [f"{self.title}: CUDA graphs {self.mode}{f' ({self.why})' if self.why else ''}"]
        for reason, count in Counter(self.steps.values()).items():
            lines.append(f"  {count} of its steps run without a graph: {reason}")
        lines += [f"  {graph}" for graph in self.graphs]
        lines += [f"  {sizes or 'the only size'} has no graph: {reason}" for sizes, reason in self.refused.items()]
        lines += [f"  {count} calls without a graph: {reason}" for reason, count in self.without.items()]
        lines += [f"  captured again {count} times: {reason}" for reason, count in self.recaptures.items()]
        lines += [f"  copied at each call: {', '.join(self.copied)}"] if self.copied else []
        lines += [f"  no padding: {self.padding}"] if self.padding else []
        if self.sightings > 2:
            lines.append(
                f"  captured at call {self.sightings} of a size: graphs were dropped before they were replayed"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Memory:
    """What all graphs of a `compile` call cost.

    Attributes:
        graphs: title of the program, its sizes, and by how many bytes memory grew when it was captured.
        total: bytes now: the pools, which graphs share, and the driver's.
        cap: the most that there may be.
    """

    graphs: tuple[tuple[str, str, int], ...]
    total: int
    cap: int | None = None

    def __str__(self) -> str:
        cap = "" if self.cap is None else f" of at most {self.cap / 2**20:.0f}"
        lines = [f"{len(self.graphs)} CUDA graphs, {self.total / 2**20:.1f}{cap} MiB"]
        lines += [f"  {title} {sizes}: {grown / 2**20:+.1f} MiB" for title, sizes, grown in self.graphs]
        return "\n".join(lines)
