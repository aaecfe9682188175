"""What a kernel must say of itself to be tuned."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..arch import Arch
from ..errors import ArgumentError, TuningError
from ..launch import Launch
from ..op import Op, Refusal
from ..testing import disagreement, relative_error
from . import store

Key = Mapping[str, Any]
"""What a table is for, beside the number of rows, in the order of its file's name."""

BANDWIDTH, ARITHMETIC, LEAST = 2.5e6, 6e8, 2.0
"""Bytes and operations a microsecond, and microseconds of any launch: for schedules, of no GPU in particular."""
REGISTERS = 65536
"""Of a multiprocessor, or of a compute unit's SIMD; a thread has 255 of them at most."""


@dataclass(frozen=True)
class Footprint:
    """What a program takes, by estimate.

    Attributes:
        shared: bytes of shared memory.
        registers: per thread.
        warps: of as many threads as the target's have.
    """

    shared: int
    registers: int
    warps: int


@dataclass(frozen=True)
class Tunable:
    """A kernel that can be tuned.

    Args:
        table: the name of its tables: what its plan passes to `store.choose` as `op`.
        op: what is planned, and whose reference checks winners.
        arguments: `arguments(key, m, dtype, device, generator)`: those of one call; the generator is None on "meta".
        space: `space(arch, key)`: every configuration worth a thought, in an order that is always the same.
        footprint: `footprint(arch, key, m, cut)`: what it would take of a multiprocessor; or why it is not worth a
            try, "what: why".
        work: `work(key, m)`: bytes that have to be moved, and operations.
        models: `models(model, scheme)`: the keys that a model of a `Model`'s sizes asks for, by what they are.
        sparse: tables hold `{}` where nothing beats the rule enough, so that the rule can still change; else the rule's
            own configuration, which other systems can read.
        warm: numbers of rows up to which inputs are timed in the L2, where the kernel before has just left them.
        exact: `exact(arguments)`: the first output in float64, where the reference is no float64 oracle by itself.
        error: how far from `exact` an output may be: the norm of the difference to the norm.
        unnamed: parts of a key that arguments are made from, and that its tables do not tell apart.
        others: `others(key)`: keys of tables by the same name that the plan asks for, too, and entries that it follows.
    """

    table: str
    op: Op
    arguments: Callable[[Key, int, torch.dtype, str, Any], dict[str, Any]]
    space: Callable[[Arch, Key], Iterator[Any]]
    footprint: Callable[[Arch, Key, int, Any], Footprint | str]
    work: Callable[[Key, int], tuple[float, float]]
    models: Callable[[Any, str], Iterator[tuple[str, Key]]]
    sparse: bool = False
    warm: int = 0
    exact: Callable[[Mapping[str, Any]], torch.Tensor] | None = None
    error: float = 4e-3
    unnamed: tuple[str, ...] = ()
    others: Callable[[Key], Iterable[tuple[Key, Mapping[str, Any]]]] = lambda key: ()

    def named(self, key: Key) -> Key:
        """What its table is named by."""
        return {name: value for name, value in key.items() if name not in self.unnamed}

    def launch(self, arch: Arch, key: Key, arguments: Mapping[str, Any], cut: Any = None) -> tuple[Launch, Any]:
        """The launch as a compiled model runs it, and the configuration that the plan would have chosen.

        Args:
            arch: the target.
            key: the table that the plan asks for with such arguments.
            arguments: of the op.
            cut: the configuration; None: the plan's own.

        Raises:
            TuningError: no kernel runs this, or none so cut; or its plan asks for another table.
        """
        with store.imposing(self.table, self.named(key), cut, self.others(key)) as given:
            others = frozenset(backend.name for backend in self.op.backends) - {"triton"}
            launch, reason = self.op.plan(arch, self.op.bind((), arguments), others)
            if not isinstance(launch, Launch):
                raise TuningError(getattr(launch, "reason", reason), self.table, "Choose another size or configuration")
        return launch.reading_early().launching_early(), given.rule

    def prune(self, arch: Arch, key: Key, m: int, arguments: Mapping[str, Any], cut: Any) -> Refusal:
        """Why `cut` cannot, or need not, be tried: "what: why"; by the estimate first, then by the plan itself."""
        found = self.footprint(arch, key, m, cut)
        if isinstance(found, str):
            return found
        threads = found.warps * arch.warp_size
        if threads > 1024:
            return f"threads: a program has 1024 at most, not {threads}"
        limit = shared_limit(arch)
        if found.shared > limit:
            return f"shared memory: about {found.shared >> 10} KiB, and {arch.name} has {limit >> 10}"
        most = min(255 if arch.is_cuda else 512, REGISTERS * (4 if arch.is_rocm else 1) // threads)
        if found.registers > most:
            return f"registers: about {found.registers} a thread, of {most}"
        try:
            self.launch(arch, key, arguments, cut)
        except TuningError as error:
            return f"plan: {error.what.removeprefix('triton: ')}"
        return None

    def estimate(self, key: Key, m: int) -> float:
        """Microseconds of a launch, by its bytes and operations alone."""
        moved, operations = self.work(key, m)
        return max(LEAST, moved / BANDWIDTH, operations / ARITHMETIC)

    def check(self, launch: Launch, arguments: Mapping[str, Any]) -> Refusal:
        """Why what the launch gives is not what the op gives, to its tolerance. Runs both."""
        bound = self.op.bind((), arguments)
        with torch.no_grad():
            results = launch.run()
            if self.exact is not None:
                wrong = relative_error(results[0].double(), self.exact(bound))
                # A NaN is no number below the limit.
                return None if wrong <= self.error else f"wrong: its error is {wrong:.2g} of what float64 gives"
            expected = self.op.reference(**bound)
        wrong_output = disagreement(self.op, bound, results, [expected] if self.op.single else expected)
        return f"wrong: {wrong_output}" if wrong_output else None


def shared_limit(arch: Arch) -> int:
    """Bytes of shared memory that a program may have on a target; 99 KiB where it is not known."""
    known = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "gfx942": 64, "gfx950": 160}
    return known.get(arch.name, 99) * 1024


def meta(tunable: Tunable, key: Key, m: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments without data.

    Raises:
        TuningError: there are none of such sizes.
    """
    try:
        return tunable.arguments(key, m, dtype, "meta", None)
    except (ArgumentError, KeyError, ValueError) as error:
        missing = isinstance(error, KeyError)
        text = f"the key has no {error}" if missing else str(error)
        raise TuningError(text, tunable.table, "Pass --key name=value,…, or other sizes") from error
