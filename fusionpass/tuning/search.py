"""Finding the best configuration of a kernel for one number of rows, whatever the others do."""

import functools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..aot import Specialised
from ..arch import Arch
from ..errors import TuningError
from ..launch import Launch
from ..op import Refusal
from .files import Entry
from .names import to_file
from .tunable import Tunable, meta

GAIN = 0.97
"""What takes this much of the rule's time, or less, is worth an entry."""
FINALISTS = 5
"""How many of the fastest are timed again at a time: the lucky one among many has to be lucky twice."""


@dataclass(frozen=True)
class Job:
    """A number of rows of a table, or a share of its configurations.

    Args:
        table: a name in `TUNABLES`, most often that of the tables, too.
        key: what the table is for.
        m: the number of rows.
        dtype: of what is not codes, by name.
        part: which share.
        parts: of how many.
    """

    table: str
    key: Mapping[str, Any]
    m: int
    dtype: str = "bfloat16"
    part: int = 0
    parts: int = 1

    @property
    def tunable(self) -> Tunable:
        """The kernel."""
        from .families import TUNABLES

        return TUNABLES[self.table]

    def arguments(self) -> dict[str, Any]:
        """Those of a call, without data."""
        return meta(self.tunable, self.key, self.m, getattr(torch, self.dtype))

    def __str__(self) -> str:
        named = self.tunable.named(self.key)
        key = ",".join(f"{name}={value}" for name, value in named.items() if value is not None)
        return f"{self.table} {key} M={self.m}" + (f" {self.part + 1}/{self.parts}" if self.parts > 1 else "")


@dataclass(frozen=True)
class Candidates:
    """What there is to time.

    Attributes:
        rule: the kernel's own choice, which is the first of `kept`.
        kept: in the order in which they are timed.
        pruned: why the rest is not, by the first word or two of the reason, and how many each.
        left: how many more there are than were asked for.
    """

    rule: Any
    kept: tuple[Any, ...]
    pruned: Mapping[str, int]
    left: int = 0


def candidates(job: Job, arch: Arch, seed: int = 0, failed: Iterable[str] = (), most: int | None = None) -> Candidates:
    """Every configuration, the rule first and the rest in an order that `seed` draws: time may end anywhere.

    Args:
        job: what is tuned; its share does not matter.
        arch: the target.
        seed: of the order.
        failed: labels of those that failed before, and are left out.
        most: how many are kept beside the rule, those that `seed` draws; None: all.

    Raises:
        TuningError: no kernel runs this there.
    """
    tunable, arguments, before = job.tunable, job.arguments(), set(failed)
    rule = tunable.launch(arch, job.key, arguments)[1]
    kept, pruned = [], Counter[str]()
    for cut in tunable.space(arch, job.key):
        reason = tunable.prune(arch, job.key, job.m, arguments, cut)
        if reason is None and label(cut) in before:
            reason = "failed before: see the metadata"
        if reason is not None:
            pruned[reason.partition(":")[0]] += 1
        elif cut != rule:
            kept.append(cut)
    random.Random(seed).shuffle(kept)
    tried = kept if most is None else kept[:most]
    return Candidates(rule, (rule, *tried), dict(pruned), len(kept) - len(tried))


def label(cut: Any) -> str:
    """A configuration in a line."""
    return " ".join(f"{name}={value}" for name, value in to_file(cut).items())


Compile = Callable[[Job, Arch, Sequence[tuple[Any, int]]], Sequence[Refusal]]
"""Compiles, for each configuration, the launch of that number among those of its plan; says which cannot be."""


@dataclass
class Bench:
    """What a search is carried out with: on a GPU `gpu.bench()`; anything else for tests.

    Args:
        measure: microseconds of launches that differ in their buffers alone.
        compile: see `Compile`.
        sets: the arguments of as many calls as are rotated through.
        check: why what a launch gives is wrong.
        beside: microseconds of what else could run, by name; None: nothing is timed beside.
        clock: seconds.
        alive: raises where the device is lost, so that nothing more can be timed by this process.
        close: called once it is not used any more.
    """

    measure: Callable[[Sequence[Launch]], float]
    compile: Compile
    sets: Callable[[Job], Sequence[Mapping[str, Any]]]
    check: Callable[[Tunable, Launch, Mapping[str, Any]], Refusal]
    beside: Callable[[Job, Sequence[Mapping[str, Any]]], Mapping[str, float]] | None = None
    clock: Callable[[], float] = time.monotonic
    alive: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None
    compiled: dict[tuple[Specialised, Arch], Refusal] = field(default_factory=dict)

    def compile_once(self, job: Job, arch: Arch, cuts: Sequence[Any]) -> dict[str, str]:
        """Compile what has not been compiled for another configuration, or number of rows; why some cannot be."""
        tunable, arguments, needs = job.tunable, job.arguments(), {}
        new: dict[tuple[Specialised, Arch], tuple[Any, int]] = {}
        for cut in cuts:
            parts = tunable.launch(arch, job.key, arguments, cut)[0].all
            needs[label(cut)] = [(Specialised.of(part), arch) for part in parts]
            for index, kind in enumerate(needs[label(cut)]):
                if kind not in self.compiled:
                    new.setdefault(kind, (cut, index))
        self.compiled.update(zip(new, self.compile(job, arch, list(new.values())), strict=True))
        reasons = {cut: next(filter(None, map(self.compiled.get, kinds)), None) for cut, kinds in needs.items()}
        return {cut: reason for cut, reason in reasons.items() if reason is not None}


@dataclass
class Survey:
    """What one pass over a share of the configurations found, by label; plain enough for JSON.

    Attributes:
        timed: microseconds.
        failed: why others could not be timed.
        not_tried: how many there was no time for.
    """

    timed: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_tried: int = 0


def survey(
    job: Job,
    arch: Arch,
    bench: Bench,
    found: Candidates,
    until: float = math.inf,
    told: Callable[[float], object] = lambda share: None,
) -> Survey:
    """Time the job's share of the configurations, once each. What fails is noted, and the rest goes on.

    Args:
        job: the share.
        arch: the target.
        bench: what it is timed with.
        found: the candidates.
        until: the bench's clock when to stop.
        told: called with the share that is done.

    Raises:
        DeviceLostError: nothing more can be timed; `survey` is what was found until then.
    """
    made, mine = Survey(), found.kept[job.part :: job.parts]
    if bench.clock() >= until:
        made.not_tried = len(mine)
        return made
    made.failed.update(bench.compile_once(job, arch, mine))
    sets = bench.sets(job)
    for position, cut in enumerate(mine):
        if label(cut) in made.failed:
            continue
        if bench.clock() >= until:
            made.not_tried = sum(label(other) not in made.failed for other in mine[position:])
            break
        timed = _timed(job, arch, bench, sets, cut)
        if isinstance(timed, str):
            made.failed[label(cut)] = timed
            _still_there(bench, made, len(mine) - position - 1)
        else:
            made.timed[label(cut)] = timed
        told((position + 1) / len(mine))
    return made


class DeviceLostError(TuningError):
    """A configuration left the device in a state in which this process cannot use it any more."""

    survey = Survey()


def _still_there(bench: Bench, made: Survey, left: int) -> None:
    try:
        bench.alive()
    except Exception as error:
        # At least one is left to do, or what failed would be taken for all there is.
        made.not_tried = max(1, left)
        text = f"the device is lost behind {list(made.failed)[-1]}: {error}"
        lost = DeviceLostError(text, "tune", "Run it again with --resume: that configuration is left out")
        lost.survey = made
        raise lost from error


def _timed(job: Job, arch: Arch, bench: Bench, sets: Sequence[Mapping[str, Any]], cut: Any) -> float | str:
    try:
        return bench.measure([job.tunable.launch(arch, job.key, given, cut)[0] for given in sets])
    except Exception as error:  # whatever it is, it is this configuration's, and the others are still to be timed
        return told(error)


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def settle(
    job: Job, arch: Arch, bench: Bench, found: Candidates, surveys: Sequence[Survey]
) -> tuple[dict[int, Entry], dict[str, Any]]:
    """The entry of a number of rows, and its record.

    The fastest that is right wins: as fast the second time, with outputs that were checked. It has to take `GAIN` of
    the rule's time; else the rule holds. Where something else takes `GAIN` of the winner's, the entry is None.

    Returns:
        The entry by number of rows, empty where nothing could be timed; and the record, JSON.
    """
    cuts = {label(cut): cut for cut in found.kept}
    times = functools.reduce(lambda all, one: all | one.timed, surveys, dict[str, float]())
    failed = functools.reduce(lambda all, one: all | one.failed, surveys, dict[str, str]())
    record: dict[str, Any] = {
        "tried": len(times), "pruned": dict(found.pruned), "failed": failed,
        "not_tried": sum(one.not_tried for one in surveys), **({"left": found.left} if found.left else {}),
    }  # fmt: skip
    if not times:
        return {}, record
    sets, rule = bench.sets(job), label(found.rule)

    def again(cut: str, better: Callable[[float, float], float]) -> float:
        timed = _timed(job, arch, bench, sets, cuts[cut])
        reason = timed if isinstance(timed, str) else _wrong(job, arch, bench, sets[0], cuts[cut])
        if reason is not None:
            failed[cut] = reason
            return math.inf
        return better(times[cut], float(timed))

    # The rule gets the better of its times, what would replace it the worse.
    rule_us = again(rule, min) if rule in times else math.inf
    ranked = sorted((cut for cut in times if cut != rule), key=lambda cut: times[cut])
    best, us = rule, rule_us
    for first in range(0, len(ranked), FINALISTS):
        finals = {cut: again(cut, max) for cut in ranked[first : first + FINALISTS]}
        fastest = min(finals, key=lambda cut: finals[cut])
        if finals[fastest] < math.inf:
            if finals[fastest] <= GAIN * rule_us:
                best, us = fastest, finals[fastest]
            break
    if us == math.inf:
        return {}, record
    record |= {"us": round(us, 3), **({"rule_us": round(rule_us, 3)} if rule_us < math.inf else {})}
    entry: Entry = {} if best == rule and job.tunable.sparse else to_file(cuts[best])
    if bench.beside is not None:
        try:
            record["beside_us"] = {name: round(value, 3) for name, value in bench.beside(job, sets).items()}
        except Exception as error:  # what cannot run beside does not win
            failed["beside"] = told(error)
        if min(record.get("beside_us", {}).values(), default=math.inf) <= GAIN * us:
            entry = None
    return {job.m: entry}, record


def _wrong(job: Job, arch: Arch, bench: Bench, arguments: Mapping[str, Any], cut: Any) -> Refusal:
    try:
        return bench.check(job.tunable, job.tunable.launch(arch, job.key, arguments, cut)[0], arguments)
    except Exception as error:  # a check that cannot be made is not passed
        return told(error)


def plain(made: Survey) -> dict[str, Any]:
    """A survey as JSON."""
    return asdict(made)
