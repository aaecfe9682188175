"""keep_reductions: sums in eager mode's own order, on a CPU under `numerics="eager"`."""

from typing import Any

import torch
from torch.fx import Graph

_aten = torch.ops.aten
_LIBRARY = torch.library.Library("fusionpass_exact", "DEF")
_KEPT: dict[Any, torch._ops.OpOverload] = {}


def _keep(overload: torch._ops.OpOverload, name: str) -> None:
    signature = str(overload._schema).partition("(")[2]
    # An op without a lowering of its own is called by Inductor's code, not written anew in another order.
    _LIBRARY.define(f"{name}({signature}")
    _LIBRARY.impl(name, overload, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusionpass_exact::{name}", overload, lib=_LIBRARY)
    _KEPT[overload] = getattr(torch.ops.fusionpass_exact, name).default


_keep(_aten.mean.dim, "mean")
_keep(_aten.sum.dim_IntList, "sum")
_keep(_aten.var_mean.correction, "var_mean")


def keep_reductions(graph: Graph) -> None:
    """Make every sum over floats on a CPU a call of ATen's own kernel, in place.

    Inductor's C++ adds in another order. That moves an fp32 mean by an ulp, which now and then moves a bfloat16 norm
    across a rounding boundary, and then an FP8 code; after a few layers every activation has other rounding noise.
    """
    for node in graph.nodes:
        if node.target in _KEPT:
            val = node.meta["val"]
            first = val[0] if isinstance(val, tuple | list) else val
            if first.device.type == "cpu" and first.dtype.is_floating_point:
                node.target = _KEPT[node.target]
