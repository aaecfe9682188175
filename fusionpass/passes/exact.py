"""keep_reductions: sums in eager mode's own order, on a CPU under `numerics="eager"`."""

import torch
from torch.fx import Graph

_SUMS = (torch.ops.aten.mean.dim, torch.ops.aten.sum.dim_IntList, torch.ops.aten.var_mean.correction)


def keep_reductions(graph: Graph) -> None:
    """Mark every sum over floats on a CPU to be ATen's own kernel, in place.

    Inductor's C++ adds in another order. That moves an fp32 mean by an ulp, which now and then moves a bfloat16 norm
    across a rounding boundary, and then an FP8 code; after a few layers every activation has other rounding noise.
    """
    for node in graph.nodes:
        if node.target in _SUMS:
            val = node.meta["val"]
            first = val[0] if isinstance(val, tuple | list) else val
            if first.device.type == "cpu" and first.dtype.is_floating_point:
                # Inductor calls the operator instead of writing a loop.
                node.meta["should_fallback"] = True
