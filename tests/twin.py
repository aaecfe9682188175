"""A kernel for tests that plan launches themselves."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, N, BLOCK: tl.constexpr):
    """y = x, for N elements in one program."""
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, offsets < N), offsets < N)
