"""A program under CUDA graphs: when it is captured, and which graph a call replays."""

import collections
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..errors import ChangedError
from .captured import UncapturableError
from .graph_cache import Entry, GraphCache, Place
from .memory import Layout, is_plain, overlap, parts
from .notes import ProgramNote
from .observe import Recipe, observe
from .plan import Plan
from .refusals import REMEMBERED, Key, Refusals

log = logging.getLogger("fusionpass")


@dataclass(eq=False)
class Sighting:
    """The calls of a key without a graph.

    Attributes:
        count: how many.
        places: where the inputs were, but for weights, at the last that looked.
        recipe: what was learned at one of them.
    """

    count: int = 0
    places: tuple[Any, ...] = ()
    recipe: Recipe | None = None


class Dispatcher:
    """What Dynamo calls in place of a program.

    Args:
        plan: of the program.
        place: where it runs.
        note: for the report.
        cache: of all graphs.
        sizes: to capture up front, largest first; empty: as they come.
    """

    def __init__(self, plan: Plan, place: Place, note: ProgramNote, cache: GraphCache, sizes: Sequence[int]) -> None:
        self.plan, self.note = plan, note
        self._place, self._cache = place, cache
        self._inputs = plan.program.inputs
        self._sizes = plan.slots("size")
        self._others = [slot for slot in plan.slots("other") if slot in plan.needs]
        self._names = [self._inputs[slot].symbol or self._inputs[slot].name for slot in (*self._sizes, *self._others)]
        self._tensors = [slot for slot in plan.reads if self._inputs[slot].kind == "tensor"]
        self._declared = tuple(sizes) if len(self._sizes) == 1 else ()
        note.steps = {unit.name: unit.eager for unit in plan.units if unit.eager}
        note.padding = plan.padding if self._declared else ""
        if sizes and not self._declared:
            note.add(f"it has {len(self._sizes)} sizes, not 1: captured as they come")
        self.reset()

    def reset(self) -> None:
        """Forget what was learned; there are no graphs any more."""
        self._entries: dict[Key, Entry] = {}
        self._ladder: list[Key] = []
        self._sightings: collections.OrderedDict[Key, Sighting] = collections.OrderedDict()
        self._refusals = Refusals(self.note, self._names, self._cache)
        self._moving: set[int] = set()
        self._begun = False
        self.note.sightings = 2

    def __call__(self, *args: Any) -> list[Any]:
        """The results of the program."""
        found: tuple[Entry, int | None] | Sighting | None = None
        if not self._place.device.capturing():
            with self._cache.lock:
                # A step that calls another program would overwrite the memory that its own is in.
                if not self._cache.busy:
                    try:
                        self._cache.busy = True
                        found = self._find(args)
                        if isinstance(found, tuple):
                            return self._replay(*found, args)
                    finally:
                        self._cache.busy = False
        if isinstance(found, Sighting):
            results, found.recipe = observe(self.plan, args)
            return results
        return self.plan.program.run(*args)

    def forget(self, entry: Entry) -> None:
        """See `Owner`."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._ladder = sorted(self._entries, key=lambda key: key.sizes)
            self.note.graphs.remove(entry.note)

    def wait_longer(self) -> None:
        """See `Owner`."""
        self.note.sightings *= 2

    def _find(self, args: Sequence[Any]) -> tuple[Entry, int | None] | Sighting | None:
        """The graph for a call and the rows to run it at, or what to learn from a run without, or None."""
        key = self._key(args)
        if key is None:
            return None
        entry, rows = self._entries.get(key), None
        if entry is None and self._declared:
            if not self._begun:
                self._capture_declared(key, args)
            entry = self._entries.get(key)
            if entry is None and (entry := self._larger(key)) is not None:
                rows = key.sizes[0]
        if entry is None:
            return self._sighted(key, args)
        if moved := entry.captured.moved(args):
            entry = self._recapture(entry, moved, args)
        if entry is None:
            return None
        if reason := entry.captured.refusal(args, rows):
            self._without(reason)
            return None
        return entry, rows

    def _replay(self, entry: Entry, rows: int | None, args: Sequence[Any]) -> list[Any]:
        self._cache.touch(entry)
        self._place.enter()
        try:
            results = entry.captured.run(args, rows)
        finally:
            self._place.leave()
        if reason := entry.captured.broken:
            self._without(reason)
            self._refusals.add(entry.key, UncapturableError(reason))
            self._cache.drop(entry)
        return results

    def _key(self, args: Sequence[Any]) -> Key | None:
        sizes = tuple([args[slot] for slot in self._sizes])
        if not self._others:
            return Key(sizes)
        others = []
        for slot in self._others:
            value = args[slot]
            if value is not None and not isinstance(value, bool | int | float | str):
                self._without(f"{self._inputs[slot].name} is a {type(value).__name__}")
                return None
            others.append((type(value), value.hex() if isinstance(value, float) else value))  # -0.0 is not 0.0
        return Key(sizes, tuple(others))

    def _without(self, reason: str) -> None:
        self.note.ran_without(reason)

    def _larger(self, key: Key) -> Entry | None:
        """The graph of the smallest declared size above, if rows may follow those of the call."""
        if self.plan.padding:
            return None
        for candidate in self._ladder:
            entry = self._entries[candidate]
            # What was captured as it came may read its rows in place.
            if entry.declared and candidate.sizes > key.sizes and candidate.others == key.others:
                self.note.padding = entry.captured.exact
                return None if entry.captured.exact else entry
        return None

    def _sighted(self, key: Key, args: Sequence[Any]) -> tuple[Entry, int | None] | Sighting | None:
        """Count a call without a graph; capture one if this is the last of them."""
        if self._declared and key.sizes[0] not in self._declared:
            self._without("there is no graph for its size")
            return None
        if reason := self._refusals.reason(key):
            self._without(reason)
            return None
        sighting = self._sightings.pop(key, None) or Sighting()
        self._sightings[key] = sighting
        if len(self._sightings) > REMEMBERED:
            self._sightings.popitem(last=False)
        sighting.count += 1
        places = tuple((parts(args[slot]), args[slot].shape, args[slot].stride()) for slot in self._tensors)
        before, sighting.places = sighting.places, places
        if sighting.recipe is None or sighting.count < self.note.sightings:
            self._without(f"a size is captured at its call {self.note.sightings}")
            return sighting if sighting.recipe is None and sighting.count >= self.note.sightings - 1 else None
        moved = [s for s, a, b in zip(self._tensors, before, places, strict=True) if a != b and s not in self._moving]
        for slot in moved:
            if self._inputs[slot].mutated:
                self._without(f"{self._inputs[slot].name}, which the program writes to, moves")
                return None
        self._moving.update(moved)
        if reason := self._unfit(args):
            self._without(reason)
            return None
        copied = {slot: Layout.of(args[slot]) for slot in sorted(self._moving)}
        entry = self._capture(key, args, replace(sighting.recipe, copied=copied))
        return None if entry is None else (entry, None)

    def _unfit(self, args: Sequence[Any], copied: Sequence[int] = ()) -> str:
        """Why arguments are not to be captured with; empty if they are."""
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return "gradients are asked for"
        for slot in self.plan.reads:
            if isinstance(args[slot], Tensor) and not parts(args[slot]):
                return f"{self._inputs[slot].name} is not a strided tensor"
        for slot in (chosen := {*self._moving, *copied}):
            if not is_plain(args[slot]):
                return f"{self._inputs[slot].name}, a {type(args[slot]).__name__}, would be copied"
        slots = [i for i, declared in enumerate(self._inputs) if i in self.plan.needs or declared.mutated]
        pair = overlap(args, slots, chosen)
        return self.plan.overlapping(*pair) if pair else ""

    def _recapture(self, entry: Entry, moved: Sequence[int], args: Sequence[Any]) -> Entry | None:
        """Capture again what reads inputs where they no longer are; None: not at this call."""
        for slot in entry.captured.changed(args, moved):
            raise ChangedError(
                "its shape, strides or dtype changed", self._inputs[slot].name, "Compile the model again"
            )
        written = [slot for slot in moved if self._inputs[slot].mutated]
        copied = [slot for slot in moved if slot in self._tensors and slot not in written]
        name = self._inputs[moved[0]].name
        if written:
            # A copy would have to be copied back. Another cache for each text stays where it is for all of its tokens:
            # the second call there is worth a capture. Two that take turns are not.
            before, entry.elsewhere = entry.elsewhere, tuple(pointer for s in written for pointer in parts(args[s]))
            if before != entry.elsewhere:
                self._without(f"{self._inputs[written[0]].name}, which the program writes to, moved")
                return None
        if reason := self._unfit(args, copied):
            self._without(reason)
            return None
        self._moving.update(copied)
        recipe = entry.captured.recipe
        recipe = replace(recipe, copied=recipe.copied | {slot: Layout.of(args[slot]) for slot in copied})
        self._cache.drop(entry)
        if not copied and not entry.declared and entry.note.replays <= 1:
            self.wait_longer()
            self._without(f"{name} moved before a graph was replayed")
            return None
        self.note.captured_again(f"{name} moved")
        return self._capture(entry.key, self._at(entry.key, args), recipe, entry.declared)

    def _at(self, key: Key, args: Sequence[Any]) -> list[Any]:
        """The arguments with the sizes of a key."""
        changed = list(args)
        for slot, size in zip(self._sizes, key.sizes, strict=True):
            changed[slot] = size
        return changed

    def _capture(self, key: Key, args: Sequence[Any], recipe: Recipe, declared: bool = False) -> Entry | None:
        try:
            entry = self._cache.capture(self, key, key.text(self._names), self._place, args, recipe)
        except Exception as error:
            self._refusals.add(key, error)
            return None
        entry.declared = declared
        self._entries[key] = entry
        self._ladder = sorted(self._entries, key=lambda key: key.sizes)
        self._sightings.pop(key, None)
        self._refusals.remove(key)
        self.note.graphs.append(entry.note)
        self.note.copied = [self._inputs[slot].name for slot in recipe.copied]
        return entry

    def _capture_declared(self, key: Key, args: Sequence[Any]) -> None:
        """Capture all sizes that were asked for, on zeros; what the program writes to is left as it is."""
        if reason := self._unfit(args):
            self._without(reason)
            return
        written: dict[int, Tensor] = {}
        for size in _progress(self._declared, self.note.title):
            wanted = Key((size,), key.others)
            if wanted in self._entries or self._refusals.reason(wanted):
                continue
            layouts = self.plan.layouts(args, size)
            if isinstance(layouts, str) or self._cache.full():
                full = f"sizes up to {size} are not captured: there are {self._cache.limit} graphs"
                self.note.add(f"captured as they come: {layouts}" if isinstance(layouts, str) else full)
                break
            given = self._at(wanted, args)
            if not self.plan.program.holds(size):
                self._refusals.add(wanted, UncapturableError("it is compiled for other sizes"))
                continue
            try:
                if not written:
                    slots = [slot for slot, declared in enumerate(self._inputs) if declared.mutated]
                    written = {slot: args[slot].clone() for slot in slots}
                zeros = {slot: layout.empty(args[slot].device).zero_() for slot, layout in layouts.items()}
                _, recipe = observe(self.plan, [(written | zeros).get(slot, arg) for slot, arg in enumerate(given)])
                del zeros
            except Exception as error:
                self._refusals.add(wanted, error)
                continue
            moving = {slot: Layout.of(args[slot]) for slot in self._moving}
            copied = {slot: layout for slot, layout in (moving | layouts).items() if slot in self.plan.needs}
            self._capture(wanted, given, replace(recipe, copied=copied), declared=True)
        self._begun = True


def _progress(sizes: Sequence[int], title: str) -> Iterator[int]:
    """The sizes, one after the other, with a progress bar on a terminal and a line in the log elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(sizes, f"CUDA graphs of {title}", console=console, transient=True)
        return
    for size in sizes:
        log.info("%s: capturing CUDA graphs for size %d", title, size)
        yield size
