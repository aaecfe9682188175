"""The decode kernels through Triton's interpreter."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionpass.arch import Arch
from fusionpass.ops import attention
from fusionpass.ops.attention.decode_triton import Cut
from tests.attention import arguments_for_attention, check_attention, cuts, oracle

# No programmatic dependent launch in these: the interpreter has no grids to wait for.
ARCH = Arch("sm_89")
slow = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Any:
    """The interpreter multiplies the bits of bfloat16 numbers, as if they were integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def product(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return theirs(self, widened(a), widened(b), *others)

    theirs = interpreter.InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
        yield


@slow
@given(data=st.data())
def test_drawn_arguments(data: st.DataObject) -> None:
    check_attention(ARCH, data.draw(arguments_for_attention("cpu", 300)), data.draw(cuts()))
