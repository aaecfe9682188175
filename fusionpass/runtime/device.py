"""What CUDA graphs need of a device, and the device behind torch.cuda."""

import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import Layout, laid
from .waits import NoWaits


class Device(Protocol):
    """One device, and the capture of graphs on it.

    Attributes:
        device: where its tensors are.
    """

    device: torch.device

    def capturing(self) -> bool:
        """Whether somebody captures on the current stream."""

    def stream(self) -> int:
        """The identity of the current stream."""

    def record(self, event: Any) -> Any:
        """An event (`event`, used again, or a new one for None) behind all work of the current stream."""

    def wait(self, event: Any) -> None:
        """Let the current stream wait for an event."""

    def pool(self) -> Any:
        """Memory that graphs can share, empty."""

    def usable(self, pool: Any) -> bool:
        """Whether more can be captured in a pool."""

    def give_back(self, pool: Any) -> None:
        """Free the memory of a pool, all of whose graphs are gone; it is of no use any more."""

    def prepare(self) -> None:
        """Before the captures of one program: wait for the device, and free what nobody uses."""

    def empty(self, layout: Layout, pool: Any) -> Tensor:
        """A tensor in a pool."""

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any], pool: Any) -> tuple[Any, Sequence[Any]]:
        """Capture `call(*args)`: a handle, which lives as long as its graph, and what the call returned.

        Nothing is computed before the replay. Whatever the call raises is raised, and the capture has ended.
        """

    def replay(self, handle: Any) -> None:
        """Run a graph on the current stream."""

    def alias(self, tensor: Tensor) -> Tensor:
        """A tensor over the same memory, which does not keep it."""

    def pool_bytes(self, pool: Any) -> int:
        """How much memory a pool has taken."""

    def driver_bytes(self) -> int:
        """Memory in use that the allocator of tensors knows nothing of, by whomever."""

    def synchronize(self) -> None:
        """Wait for all work of the device."""


_ONE_CAPTURE = threading.Lock()
"""Two captures at a time, of two models in two threads, would share torch's bookkeeping."""
_ABANDONED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture was invalidated: torch 2.11's allocators keep their address."""


class Pool:
    """A share of torch's caching allocator that lives as long as this object and the graphs in it.

    Attributes:
        spoiled: torch's allocator of host memory holds that a capture in it goes on, and would refuse another.
    """

    def __init__(self, index: int) -> None:
        self.spoiled = False
        self.id = torch.cuda.graph_pool_handle()
        torch._C._cuda_beginAllocateCurrentThreadToPool(index, self.id)
        torch._C._cuda_endAllocateToPool(index, self.id)
        self.close = weakref.finalize(self, torch._C._cuda_releasePool, index, self.id)
        self.close.atexit = False

    def segments(self) -> list[dict[str, Any]]:
        """The memory that it has, as torch's allocator tells it."""
        # Asked for one pool, memory_snapshot drops a reference to each of the id's numbers (torch 2.11 to 2.14): from
        # 257 on, where numbers are no longer Python's own, the second answer leaves freed objects in the id.
        found = torch.cuda.memory_snapshot(include_traces=False)
        return [segment for segment in found if tuple(segment["segment_pool_id"]) == self.id]


class CudaDevice:
    """A device of CUDA or ROCm.

    Args:
        name: "cuda:0".
    """

    def __init__(self, name: str) -> None:
        index = torch.device(name).index
        self._index = torch.cuda.current_device() if index is None else index
        self.device = torch.device("cuda", self._index)
        self._side = torch.cuda.Stream(self._index)

    def capturing(self) -> bool:
        """See `Device`."""
        if torch.cuda.current_device() == self._index:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self._index):
            return torch.cuda.is_current_stream_capturing()

    def stream(self) -> int:
        """See `Device`."""
        return torch._C._cuda_getCurrentRawStream(self._index)

    def record(self, event: Any) -> Any:
        """See `Device`."""
        event = torch.cuda.Event() if event is None else event
        event.record(torch.cuda.current_stream(self._index))
        return event

    def wait(self, event: Any) -> None:
        """See `Device`."""
        torch.cuda.current_stream(self._index).wait_event(event)

    def pool(self) -> Pool:
        """See `Device`."""
        return Pool(self._index)

    def usable(self, pool: Pool) -> bool:
        """See `Device`."""
        return not pool.spoiled

    def give_back(self, pool: Pool) -> None:
        """See `Device`."""
        self.synchronize()
        pool.close()
        torch.cuda.empty_cache()

    def prepare(self) -> None:
        """See `Device`."""
        self.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.device(self._index):
            torch.cuda.current_blas_handle()  # a thread's first product would create it, which a capture forbids

    def empty(self, layout: Layout, pool: Pool) -> Tensor:
        """See `Device`."""
        here = torch.cuda.current_stream(self._index)
        with torch.cuda.device(self._index), torch.cuda.stream(self._side), torch.inference_mode(False):
            torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, pool.id)
            try:
                made = layout.empty(self.device)
            finally:
                torch._C._cuda_endAllocateToPool(self._index, pool.id)
                torch._C._cuda_releasePool(self._index, pool.id)
        here.wait_stream(self._side)  # deterministic mode fills what is empty
        return made

    def capture(self, call: Callable[..., Sequence[Any]], args: Sequence[Any], pool: Pool) -> tuple[Any, Sequence[Any]]:
        """See `Device`."""
        graph = torch.cuda.CUDAGraph()
        with _ONE_CAPTURE, torch.cuda.device(self._index), torch.cuda.stream(self._side), _quiet(), NoWaits():  # type: ignore[no-untyped-call]
            # A workspace of cuBLAS that outlived the capture would be shared with who runs at the same time.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
                outputs = call(*args)
                graph.capture_end()
            except BaseException:
                self._abandon(graph, pool)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph, outputs

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
        """End a capture that failed, whatever state it is in."""
        try:
            graph.capture_end()
        except RuntimeError:
            pass
        else:
            graph.reset()
            return
        # A capture of torch 2.11 that does not end in order leaves allocators and the random generator in it, which
        # keep the graph's address. What allocates host memory cannot be told.
        graph.reset()
        _ABANDONED.append(graph)
        pool.spoiled = True
        with contextlib.suppress(RuntimeError):  # the end came so far, or torch is one that cleans up
            torch._C._cuda_endAllocateToPool(self._index, pool.id)
            torch._C._cuda_releasePool(self._index, pool.id)
        # An empty one that ends in order takes the generator out.
        empty = torch.cuda.CUDAGraph()
        empty.capture_begin(capture_error_mode="thread_local")
        empty.capture_end()

    def replay(self, handle: torch.cuda.CUDAGraph) -> None:
        """See `Device`."""
        handle.replay()

    def alias(self, tensor: Tensor) -> Tensor:
        """See `Device`."""
        with torch.inference_mode(False):
            if tensor.numel() == 0:
                return Layout.of(tensor).empty(self.device)
            memory = tensor.untyped_storage()
            storage: Any = torch._C._construct_storage_from_data_pointer(
                memory.data_ptr(), self.device, memory.nbytes()
            )
            return laid(storage, int(tensor.storage_offset()), tensor)

    def pool_bytes(self, pool: Pool) -> int:
        """See `Device`."""
        return sum(segment["total_size"] for segment in pool.segments())

    def driver_bytes(self) -> int:
        """See `Device`."""
        free, total = torch.cuda.mem_get_info(self._index)
        return total - free - torch.cuda.memory_reserved(self._index)

    def synchronize(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize(self._index)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection, which would free memory or graphs during a capture; no warning of empty graphs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            yield
    finally:
        if enabled:
            gc.enable()
