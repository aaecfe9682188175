"""Caches in blocks, written by the kernel in front of attention, on a GPU: the same cells, and none beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import fusionpass
from tests.passes.test_caches import WRITES, inputs, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("mode", ["full", "off"])
@pytest.mark.parametrize(("write", "packed"), WRITES, ids=lambda value: getattr(value, "__name__", value))
def test_a_cache_in_blocks(write: Callable[..., None], packed: bool, mode: Any) -> None:
    torch.manual_seed(0)
    model, given = step(write, packed), inputs(write, packed, "cuda")
    other = tree_map(torch.clone, given)
    compiled = fusionpass.compile(model, cuda_graphs=mode, numerics="eager")
    with torch.no_grad():
        for _ in range(3):
            expected, got = model(*given), compiled(*other)
            assert torch.allclose(got.float(), expected.float(), rtol=0.02, atol=0.5), "sums in another order"
            for ours, theirs in zip(tree_leaves(other), tree_leaves(given), strict=True):
                assert torch.equal(ours, theirs)
    (record,) = fusionpass.report(compiled).fused
    assert (record.op, record.backend, record.reason) == ("qk_rope_cache", "triton", "")
