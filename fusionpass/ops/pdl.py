"""Programmatic dependent launch in kernels: where they wait for the kernel before, and let the next one start.

A kernel's PDL is 0 where it has none. Where it is 1, the next kernel starts once every program of this one has read its
inputs. Inductor's own PDL kernels count on that, for their outputs may take over the memory of those, and on everything
older than this kernel to be finished. 2 lets it start right behind the wait: for where all that is launched early waits
before it writes, as our kernels do (`Launch.launching_early`).
"""
# Triton's own language has no annotations that mypy could check.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Before the first load of what the kernel before may have written, and before the first store."""
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()


@triton.jit
def pdl_launch(PDL: tl.constexpr):
    """Behind the last load, before the first store."""
    if PDL == 1:
        gdc_launch_dependents()
