"""The heads' kernel through Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops import qk_norm_rope_cache
from tests.heads import HEAD_OPS, arguments_for_heads, check_heads
from tests.profiles import share

# No programmatic dependent launch in these: the interpreter has no grids to wait for.
FN = Arch("sm_89")
slow = share(25)


@pytest.mark.parametrize("op", HEAD_OPS, ids=lambda op: op.name)
@slow
@given(data=st.data())
def test_kernel_equals_reference(op, data):
    check_heads(op, FN, data.draw(arguments_for_heads(op, "cpu")))


def test_a_position_outside_of_the_cache_is_not_written():
    arguments = qk_norm_rope_cache.bind((), qk_norm_rope_cache.sample(3, 64, torch.bfloat16, "cpu", None))
    arguments["positions"] = torch.tensor([2, 11, -1])
    launch, _ = qk_norm_rope_cache.plan(FN, arguments)
    k_cache = launch.run()[1]
    assert k_cache.shape[2] == 11
    assert k_cache.abs().amax((0, 1, 3)).nonzero().flatten().tolist() == [2, 10]
