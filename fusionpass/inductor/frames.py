"""Where Dynamo takes a frame to compile: what another process made of one like it comes first."""

import gc
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

from torch._dynamo import convert_frame
from torch._dynamo.types import GuardedCode, wrap_guarded_code

from .traces import Rebuilt, Recorded, recording

_PATCHING = threading.Lock()


class Store(Protocol):
    """Who knows traces of other processes."""

    def find(self, frame: Any, filter_guards: Any) -> Rebuilt | None:
        """The trace for a frame; None: Dynamo is to trace it."""

    def keep(self, frame: Any, recorded: Recorded, code: types.CodeType) -> None:
        """Dynamo made `code` of a frame."""


class _Frames(convert_frame.ConvertFrame):
    """Dynamo's own converter, with a store in front."""

    store: Store

    def __call__(self, frame: Any, cache_entry: Any, hooks: Any, frame_state: Any, skip: int = 0) -> Any:
        if frame.f_code.co_name.startswith("torch_dynamo_resume_in"):
            return super().__call__(frame, cache_entry, hooks, frame_state, skip=skip + 1)
        found = self.store.find(frame, getattr(hooks, "guard_filter_fn", None))
        if found is not None:
            compile_id = convert_frame.get_compile_id(frame_state)
            made = GuardedCode(found.code, found.guards, compile_id, f"Torch-Compiled Region: {compile_id}")
            return wrap_guarded_code(made)
        with recording() as recorded, _uncollected():
            result = super().__call__(frame, cache_entry, hooks, frame_state, skip=skip + 1)
        guarded = getattr(result, "guarded_code", None)
        if guarded is not None and recorded.manager is not None:
            self.store.keep(frame, recorded, guarded.code)
        return result


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: all that a trace makes lives as long as it does, and is walked again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def traces_of(store: Store | None) -> Iterator[None]:
    """What `torch.compile` is called for meanwhile, in this thread, asks `store` first; None: it does not."""
    if store is None:
        yield
        return
    ours, original = threading.get_ident(), convert_frame.convert_frame

    def converter(backend: Callable[..., Any], hooks: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != ours:
            return original(backend, hooks, *args, **kwargs)
        made = _Frames(backend, hooks, *args, **kwargs)
        made.store = store
        return made

    with _PATCHING, mock.patch.object(convert_frame, "convert_frame", converter):
        yield
