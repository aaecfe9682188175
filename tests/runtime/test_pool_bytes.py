"""How much memory a pool has is asked without harm to its id."""

import sys
from typing import Any

import pytest
import torch

from fusionpass.runtime.device import CudaDevice, Pool

ID = (0, int("1000007"))


@pytest.fixture
def pool() -> Any:
    made = object.__new__(Pool)
    made.id = ID
    return made


def test_its_segments_are_counted(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"total_size": 1, "segment_pool_id": (0, 0)},
        {"total_size": 2, "segment_pool_id": ID},
        {"total_size": 4, "segment_pool_id": (1, ID[1])},
        {"total_size": 8, "segment_pool_id": ID},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda mempool_id=None, include_traces=True: segments)
    assert object.__new__(CudaDevice).pool_bytes(pool) == 10


@pytest.mark.skipif(not hasattr(torch._C, "_cuda_memorySnapshot"), reason="torch is built without CUDA")
def test_the_id_keeps_its_numbers(pool: Any) -> None:
    before = sys.getrefcount(pool.id[1])
    for _ in range(3):
        assert object.__new__(CudaDevice).pool_bytes(pool) == 0
    after = sys.getrefcount(pool.id[1])
    assert after == before
