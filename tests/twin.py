"""A kernel for tests that plan launches themselves."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, N, BLOCK: tl.constexpr):
    """y = x, for N elements in one program."""
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, offsets < N), offsets < N)


@triton.jit
def write_kernel(cache, x, half, N, START: tl.constexpr, BLOCK: tl.constexpr):
    """cache[START : START + N] = x + half, in one program; `half` may be None."""
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets, offsets < N)
    if half is not None:
        value += tl.load(half + offsets, offsets < N)
    tl.store(cache + START + offsets, value, offsets < N)
