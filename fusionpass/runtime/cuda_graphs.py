"""Programs under CUDA graphs: the state of one `compile` call."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from .device import CudaDevice, Device
from .dispatch import Dispatcher
from .graph_cache import GraphCache, Place
from .notes import Memory, ProgramNote
from .plan import plan
from .program import Program


class Graphs:
    """The CUDA graphs of one `compile` call. Safe to use from several threads.

    Args:
        mode: "full": a program is one graph; "piecewise": each of its steps is; "auto": full, if every step can be
            captured; "off". What cannot be captured runs without a graph, and `notes` says why.
        capture_sizes: the sizes to capture at the first call of a program with one dynamic size; None: sizes as they
            come, each at its second call.
        limit: how many programs and sizes may be captured at a time.
        memory_mib: how much memory all of them may take; None: as much as there is.
        device_factory: makes a `Device` from its name, "cuda:0".

    Attributes:
        notes: one for each program.
    """

    def __init__(
        self,
        mode: str,
        capture_sizes: Sequence[int] | None = None,
        limit: int = 64,
        memory_mib: int | None = None,
        device_factory: Callable[[str], Device] = CudaDevice,
    ) -> None:
        self.notes: list[ProgramNote] = []
        self._mode, self._factory = mode, device_factory
        self._sizes = () if capture_sizes is None else tuple(sorted(set(capture_sizes), reverse=True))
        self._cache = GraphCache(limit, None if memory_mib is None else memory_mib * 2**20)
        self._dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()

    def wrap(self, program: Program, title: str) -> Callable[..., list[Any]]:
        """What runs a program: takes its inputs, returns its results, which are the caller's to keep.

        Args:
            program: any; one whose tensors are not on one accelerator runs as it is.
            title: for the report.
        """
        planned = plan(program, self._mode)
        note = ProgramNote(title, planned.mode, planned.why)
        with self._cache.lock:
            self.notes.append(note)
            if planned.mode == "off":
                return program.run
            place = self._cache.places.get(planned.device) or Place(self._factory(planned.device))
            self._cache.places[planned.device] = place
            dispatcher = Dispatcher(planned, place, note, self._cache, self._sizes)
            self._dispatchers.add(dispatcher)
        return dispatcher

    def release(self) -> None:
        """Drop all graphs and their memory, and all that was learned; later calls capture anew.

        Raises:
            RuntimeError: a step of a program calls it.
        """
        with self._cache.lock:
            if self._cache.busy:
                raise RuntimeError("graphs are released by a step that runs between them")
            self._cache.clear()
            for dispatcher in list(self._dispatchers):
                dispatcher.reset()

    @property
    def memory(self) -> Memory:
        """What all graphs cost."""
        with self._cache.lock:
            entries = [(entry, owner.note.title) for entry in self._cache.entries if (owner := entry.owner())]
            graphs = tuple((title, entry.note.sizes, entry.note.bytes) for entry, title in entries)
            return Memory(graphs, self._cache.total(), self._cache.cap)
