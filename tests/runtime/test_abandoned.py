"""How a capture that failed is ended, with a torch that says what it was asked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusionpass.runtime import device

POOL = (0, 7)


class Asked:
    """What was called, in order; names in `failing` raise."""

    def __init__(self, failing: tuple[str, ...]) -> None:
        self.failing, self.calls = failing, []

    def __call__(self, name: str) -> Any:
        def call(*args: Any, **_: Any) -> None:
            self.calls.append(name)
            if name in self.failing:
                self.failing = tuple(other for other in self.failing if other != name)
                raise RuntimeError(name)

        return call


@pytest.fixture
def abandon(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*failing: str) -> tuple[list[str], Any, bool]:
        asked, abandoned = Asked(failing), []
        graph = SimpleNamespace(**{name: asked(name) for name in ("capture_begin", "capture_end", "reset")})
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(torch._C, f"_cuda_{name}", asked(name), raising=False)
        monkeypatch.setattr(device, "_ABANDONED", abandoned)
        pool = SimpleNamespace(id=POOL, spoiled=False)
        made = object.__new__(device.CudaDevice)
        made._index = 0
        made._abandon(graph, pool)
        return asked.calls, abandoned, pool.spoiled

    return run


def test_one_that_ends_in_order_is_dropped(abandon: Any) -> None:
    assert abandon() == (["capture_end", "reset"], [], False)


def test_one_that_does_not_is_kept_and_the_generator_is_taken_out_of_it(abandon: Any) -> None:
    calls, kept, spoiled = abandon("capture_end")
    assert calls == [
        "capture_end", "reset", "endAllocateToPool", "releasePool", "capture_begin", "capture_end",
    ]  # fmt: skip
    assert len(kept) == 1
    assert spoiled


def test_a_pool_that_the_end_left_is_not_released_twice(abandon: Any) -> None:
    calls, kept, spoiled = abandon("capture_end", "endAllocateToPool")
    assert calls == ["capture_end", "reset", "endAllocateToPool", "capture_begin", "capture_end"]
    assert len(kept) == 1
    assert spoiled
