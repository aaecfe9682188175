"""What of a program is not captured, and why."""

import collections
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .captured import UncapturableError
from .graph_cache import GraphCache, TooLargeError
from .notes import ProgramNote

log = logging.getLogger("fusionpass")

REMEMBERED = 1024
"""Keys of which something is known but that have no graph; the oldest are forgotten."""


class Key(NamedTuple):
    """What a graph is captured for, beyond what Dynamo guards on: sizes, and inputs that are no tensors."""

    sizes: tuple[int, ...]
    others: tuple[Any, ...] = ()

    def text(self, names: Sequence[str]) -> str:
        """For reports."""
        values = [*self.sizes, *(float.fromhex(v) if kind is float else v for kind, v in self.others)]
        return ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))


class Refusals:
    """The keys of a program that are not captured.

    Args:
        note: for the report.
        names: of what is in a key.
        cache: of all graphs.
    """

    def __init__(self, note: ProgramNote, names: Sequence[str], cache: GraphCache) -> None:
        self._note, self._names, self._cache = note, names, cache
        # The reason, and at how many evictions a key may be tried again, once.
        self._reasons: collections.OrderedDict[Key, tuple[str, int | None]] = collections.OrderedDict()
        self._too_large: list[Key] = []
        note.refused.clear()

    def add(self, key: Key, error: Exception) -> None:
        """A key could not be captured."""
        reason, retry = str(error), None
        if not isinstance(error, TooLargeError | UncapturableError):
            reason = f"{type(error).__name__} while it was captured: {next(iter(reason.splitlines()), '')}"
        if isinstance(error, TooLargeError) and error.final:
            self._too_large.append(key)
        elif isinstance(error, TooLargeError | torch.OutOfMemoryError) and key not in self._reasons:
            # What was dropped for it may have made room; an allocator without any needs something else to be dropped.
            retry = self._cache.evictions + isinstance(error, torch.OutOfMemoryError)
        self._reasons[key] = reason, retry
        self._note.refused[key.text(self._names)] = reason
        log.warning("%s: no CUDA graph for %s: %s", self._note.title, key.text(self._names) or "it", reason)
        if len(self._reasons) > REMEMBERED:
            self._note.refused.pop(self._reasons.popitem(last=False)[0].text(self._names), None)

    def remove(self, key: Key) -> None:
        """A key has been captured."""
        if key in self._reasons:
            del self._reasons[key]
            self._note.refused.pop(key.text(self._names), None)

    def reason(self, key: Key) -> str:
        """Why a key is not to be captured; empty if it is."""
        reason, retry = self._reasons.get(key, ("", None))
        if reason and (retry is None or self._cache.evictions < retry):
            return reason
        for large in self._too_large:
            if all(a >= b for a, b in zip(key.sizes, large.sizes, strict=True)):
                return f"{large.text(self._names)} already takes too much memory"
        return ""
