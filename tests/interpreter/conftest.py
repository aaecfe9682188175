"""Kernels in Triton's interpreter, chosen when triton is imported: tests/ops/test_kernels.py starts this folder."""

import os
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

_FLOATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
}
_BITS = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32)}


@pytest.fixture(scope="session", autouse=True)
def exact_casts() -> Any:
    """The interpreter truncates where GPUs round to nearest even, and loses carries into 8-bit exponents."""
    from triton.runtime import interpreter

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if str(source) not in _FLOATS or str(target) not in _FLOATS:
            return theirs(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(_BITS[data.itemsize][0])
        values = torch.from_numpy(bits.astype(bits.dtype)).view(_FLOATS[str(source)])
        dtype = _FLOATS[str(target)]
        unsigned, signed = _BITS[dtype.itemsize]
        return values.to(dtype).view(signed).numpy().view(unsigned).reshape(data.shape)

    theirs = interpreter._convert_float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
