"""A device without a GPU whose graphs lie as real ones would: they read and write addresses, whatever is there now."""

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusionpass.runtime.memory import Layout

ALIGN = 64
ARENA = 1 << 22
SCRATCH = 512  # bytes that every graph uses while it runs
DRIVER = 1000  # bytes that every graph takes of the driver


class InvalidatedError(RuntimeError):
    """What a capture fails with that the driver gave up."""


class Pool:
    """Memory from which blocks are taken, first fit; a block is free again when nobody has a tensor in it.

    Attributes:
        begun: whether anything was captured in it.
        spoiled: whether a capture in it never ended.
    """

    def __init__(self) -> None:
        self.memory = torch.zeros(ARENA, dtype=torch.uint8)
        self.blocks: dict[int, int] = {}  # offset → size
        self.high = 0
        self.closed = self.begun = self.spoiled = False

    def take(self, size: int) -> Tensor:
        """A block, as bytes; its address is never that of an empty tensor."""
        assert not self.closed, "memory is taken from a pool that was given back"
        size = -(-max(size, 1) // ALIGN) * ALIGN
        offset = 0
        for start, taken in sorted(self.blocks.items()):
            if start - offset >= size:
                break
            offset = start + taken
        assert offset + size <= ARENA
        self.blocks[offset] = size
        self.high = max(self.high, offset + size)
        block = (ctypes.c_char * size).from_address(self.memory.data_ptr() + offset)
        weakref.finalize(block, self.blocks.pop, offset).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8)

    def free(self) -> list[tuple[int, int]]:
        """What is not taken: (from, to)."""
        found, offset = [], 0
        for start, size in sorted(self.blocks.items()):
            found += [(offset, start)] if start > offset else []
            offset = start + size
        return [*found, (offset, self.high)] if self.high > offset else found

    def poison(self, start: int, end: int) -> None:
        """Numbers that are NaN, and indices that are out of range."""
        self.memory[start:end].view(torch.int32).fill_(0x7FFFFFFF)

    def holds(self, tensor: Tensor) -> bool:
        return 0 <= tensor.untyped_storage().data_ptr() - self.memory.data_ptr() < ARENA


def over(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """A tensor that lies in `storage` as `like` does in its own."""
    made = torch.empty(0, dtype=like.dtype)
    return made.set_(storage, like.storage_offset(), like.shape, like.stride())


def plain(value: Any) -> bool:
    """Whether a value is its memory and nothing else."""
    strided = isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value) and value.layout is torch.strided
    return strided and not value.is_conj() and not value.is_neg()


@dataclass(eq=False)
class Handle:
    """A captured graph: a call on addresses, and where it writes."""

    call: Callable[..., Sequence[Any]]
    args: list[Any]
    writes: list[tuple[int, Tensor]]  # which output, and an alias of the bytes of its storage
    scratch: list[tuple[int, int]]
    pool: Pool


class FakeDevice:
    """See `fusionpass.runtime.device.Device`. A capture leaves no trace but its handle.

    Attributes:
        failures: what the capture of that number raises, counted from 0, after its call has run.
        captures, replays: how many there were; failed captures count.
        live: the handles that somebody has.
        on: the current stream of each thread.
        waits: how often a stream waited for another.
        taken: whether somebody else captures on the current stream.
        pools: all that were made.
    """

    def __init__(self, name: str = "cuda:0") -> None:
        self.device = torch.device("cpu")
        self.name = name
        self.failures: dict[int, BaseException] = {}
        self.captures = self.replays = self.waits = self.prepared = 0
        self.live: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.on = threading.local()
        self.taken = False
        self.pools: list[Pool] = []
        self.kept: list[Tensor] = []
        self._inside = threading.local()
        self._tickets = 0
        self._last: tuple[int, int] | None = None
        self._seen: dict[int, int] = {}
        self._running = threading.Lock()

    def capturing(self) -> bool:
        return self.taken or getattr(self._inside, "capture", False)

    def stream(self) -> int:
        return getattr(self.on, "stream", 0)

    def record(self, event: Any) -> Any:
        self._tickets += 1
        self._last = (self.stream(), self._tickets)
        return self._last

    def wait(self, event: Any) -> None:
        self.waits += 1
        self._seen[self.stream()] = event[1]

    def pool(self) -> Pool:
        with torch.inference_mode(False):
            self.pools.append(Pool())
        return self.pools[-1]

    def usable(self, pool: Pool) -> bool:
        return not pool.spoiled

    def give_back(self, pool: Pool) -> None:
        assert not any(handle.pool is pool for handle in self.live), "a graph outlives its memory"
        assert not pool.blocks, "somebody keeps memory of the pool"
        pool.closed = True
        pool.poison(0, pool.high)
        pool.high = 0

    def prepare(self) -> None:
        self.prepared += 1

    def synchronize(self) -> None:
        pass

    def pool_bytes(self, pool: Pool) -> int:
        return pool.high

    def driver_bytes(self) -> int:
        return DRIVER * len(self.live)

    def empty(self, layout: Layout, pool: Pool) -> Tensor:
        with torch.inference_mode(False):
            like = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)
            made = over(pool.take(like.untyped_storage().nbytes()).untyped_storage(), like)
            start = made.untyped_storage().data_ptr() - pool.memory.data_ptr()
            pool.poison(start, start + pool.blocks[start])
            return made

    def alias(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            if tensor.numel() == 0:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            storage = tensor.untyped_storage()
            memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
            return over(torch.frombuffer(memory, dtype=torch.uint8).untyped_storage(), tensor)

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any], pool: Pool) -> tuple[Any, Sequence[Any]]:
        """The call runs on copies, so that nothing is computed; what it returns is then moved to the pool."""
        assert self._running.acquire(blocking=False), "two captures at a time"
        self._inside.capture = True
        number, self.captures = self.captures, self.captures + 1
        try:
            assert not pool.spoiled, "torch 2.11: already recording to this pool"
            assert not pool.begun or any(handle.pool is pool for handle in self.live), "torch 2.11: all graphs are gone"
            pool.begun = True
            copies: dict[int, torch.UntypedStorage] = {}
            originals: dict[int, Tensor] = {}
            given = []
            for arg in args:
                if not plain(arg) or arg.numel() == 0:
                    given.append(arg)
                    continue
                storage = arg.untyped_storage()
                copy = copies.get(storage.data_ptr())
                if copy is None:
                    copy = copies[storage.data_ptr()] = storage.clone()
                    originals[copy.data_ptr()] = arg
                    if pool.holds(arg):
                        copy.fill_(0)
                    else:
                        self.kept.append(arg.detach())  # freed memory could not be read, even wrongly
                given.append(over(copy, arg))
            outputs = call(*given)
            if number in self.failures:
                pool.spoiled = isinstance(self.failures[number], InvalidatedError)
                raise self.failures.pop(number)
            made: dict[int, Tensor] = {}
            results, writes = [], []
            for index, output in enumerate(outputs):
                if not plain(output) or output.device != self.device or output.numel() == 0:
                    results.append(output)
                    continue
                storage = output.untyped_storage()
                if storage.data_ptr() in originals:
                    results.append(over(originals[storage.data_ptr()].untyped_storage(), output))
                    continue
                block = made.get(storage.data_ptr())
                if block is None:
                    block = made[storage.data_ptr()] = pool.take(storage.nbytes())
                    writes.append((index, self.alias(block)))
                results.append(over(block.untyped_storage(), output))
            temporary = pool.take(SCRATCH)
            del temporary
            handle = Handle(call, [self.alias(a) if plain(a) else a for a in args], writes, pool.free(), pool)
            self.live.add(handle)
            return handle, results
        finally:
            self._inside.capture = False
            self._running.release()

    def replay(self, handle: Handle) -> None:
        assert self._running.acquire(blocking=False), "a replay while another, or a capture, goes on"
        try:
            assert not handle.pool.closed, "a graph runs whose memory is gone"
            here = self.stream()
            if self._last is not None and self._last[0] != here:
                assert self._seen.get(here, 0) >= self._last[1], "a replay that does not wait for the one before"
            self.replays += 1
            for start, end in handle.scratch:
                handle.pool.poison(start, end)
            outputs = handle.call(*handle.args)
            for index, memory in handle.writes:
                storage = outputs[index].untyped_storage()
                memory[: storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)
        finally:
            self._running.release()
