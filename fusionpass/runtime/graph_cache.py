"""All graphs of a `compile` call: the least recently used go where there are too many or they take too much memory."""

import threading
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .captured import Captured
from .device import Device
from .notes import GraphNote, ProgramNote
from .observe import Recipe
from .plan import Plan


class TooLargeError(Exception):
    """A program's graphs take more memory than all may.

    Args:
        what: how much.
        final: nothing else took any.
    """

    def __init__(self, what: str, final: bool) -> None:
        super().__init__(what)
        self.final = final


class Owner(Protocol):
    """Who has graphs in the cache."""

    plan: Plan
    note: ProgramNote

    def forget(self, entry: "Entry") -> None:
        """A graph of its is gone."""

    def wait_longer(self) -> None:
        """A graph of its made room for another before it was replayed."""


@dataclass
class Place:
    """A device with the memory that graphs share there.

    Attributes:
        pools: those that graphs are in; the last is captured into.
        event: behind the last replay.
        stream: of the last replay.
    """

    device: Device
    pools: list[Any] = field(default_factory=list)
    event: Any = None
    stream: int | None = None

    def enter(self) -> None:
        """Let what the current stream does next come after the last replay, on whatever stream that was."""
        if self.event is not None and self.device.stream() != self.stream:
            self.device.wait(self.event)

    def leave(self) -> None:
        """A replay has been started on the current stream."""
        self.event, self.stream = self.device.record(self.event), self.device.stream()


@dataclass(eq=False)
class Entry:
    """A captured program.

    Attributes:
        captured: gone when it has been dropped.
        owner: gone when nobody can call it any more.
        key: of the owner.
        driver_bytes: what the driver took for it.
        declared: captured because its size was asked for.
        used: when it ran last.
        elsewhere: where what it writes to was at the last call, if that found it moved.
    """

    captured: Captured
    owner: "weakref.ref[Owner]"
    key: Any
    place: Place
    pool: Any
    note: GraphNote
    driver_bytes: int = 0
    declared: bool = False
    used: int = 0
    elsewhere: tuple[int, ...] = ()


class GraphCache:
    """The graphs of all programs.

    Args:
        limit: the most that there may be.
        cap: the most bytes that they may take; None: as much as there is.

    Attributes:
        entries: what is captured.
        places: by name of the device.
        evictions: how many made room for others.
        lock: held while anything is captured, replayed, or copied for that.
        busy: whether its holder does so.
    """

    def __init__(self, limit: int, cap: int | None) -> None:
        self.limit, self.cap = limit, cap
        self.entries: list[Entry] = []
        self.places: dict[str, Place] = {}
        self.evictions = self._clock = 0
        self.lock = threading.RLock()
        self.busy = False

    def touch(self, entry: Entry) -> None:
        """A graph is about to run."""
        self._clock += 1
        entry.used, entry.elsewhere = self._clock, ()
        entry.note.replays += 1

    def full(self) -> bool:
        """Whether one more would be one too many."""
        return len(self.entries) >= self.limit

    def total(self) -> int:
        """How many bytes all take."""
        pools = [(place.device, pool) for place in self.places.values() for pool in place.pools]
        taken = sum(device.pool_bytes(pool) for device, pool in pools)
        return taken + sum(entry.driver_bytes for entry in self.entries)

    def capture(self, owner: Owner, key: Any, sizes: str, place: Place, args: Sequence[Any], recipe: Recipe) -> Entry:
        """Capture a program.

        Raises:
            TooLargeError: there was room for no other, and not for this one.
            Exception: whatever the capture raises.
        """
        for entry in [entry for entry in self.entries if entry.owner() is None]:
            self.drop(entry)
        while self.full():
            self._evict()
        device, fresh = place.device, not place.pools
        if fresh or not device.usable(place.pools[-1]):
            place.pools.append(device.pool())
        pool = place.pools[-1]
        device.prepare()
        taken, driver = device.pool_bytes(pool), device.driver_bytes()
        try:
            captured = Captured(owner.plan, device, pool, args, recipe)
        except BaseException as error:
            # Who keeps the exception would keep memory of the pool in the variables of its frames.
            traceback.clear_frames(error.__traceback__)
            self._tidy(place)
            raise
        entry = Entry(captured, weakref.ref(owner), key, place, pool, GraphNote(sizes))
        del captured
        entry.driver_bytes = max(0, device.driver_bytes() - driver)
        entry.note.bytes = device.pool_bytes(pool) - taken + entry.driver_bytes
        self.touch(entry)
        entry.note.replays = 0
        self.entries.append(entry)
        self._fit(entry, fresh)
        return entry

    def drop(self, entry: Entry) -> None:
        """Free a graph; with the last one of a pool, the memory too, which they share."""
        entry.place.device.synchronize()
        self.entries.remove(entry)
        del entry.captured
        if (owner := entry.owner()) is not None:
            owner.forget(entry)
        self._tidy(entry.place)

    def clear(self) -> None:
        """Free everything."""
        for entry in list(self.entries):
            self.drop(entry)

    def _tidy(self, place: Place) -> None:
        """Give pools back that no graph is left in; torch refuses captures in such a one."""
        for pool in [pool for pool in place.pools if all(entry.pool is not pool for entry in self.entries)]:
            place.pools.remove(pool)
            place.device.give_back(pool)

    def _fit(self, newest: Entry, fresh: bool) -> None:
        while self.cap is not None and (total := self.total()) > self.cap:
            if len(self.entries) > 1:
                self._evict(newest)
                continue
            self.drop(newest)
            text = f"its graphs would take {total / 2**20:.1f} MiB, where all may take {self.cap / 2**20:.1f}"
            raise TooLargeError(text, fresh)

    def _evict(self, newest: Entry | None = None) -> None:
        entry = min((entry for entry in self.entries if entry is not newest), key=lambda entry: entry.used)
        owner, wasted = entry.owner(), not entry.declared and entry.note.replays <= 1
        self.evictions += 1
        self.drop(entry)
        if owner is not None and wasted:
            owner.wait_longer()
