"""products: PyTorch's products of quantised matrices → the op, on GPUs, where it means the same."""

from typing import Any

import torch
from torch.fx import Graph, Node

from ..graphs import aten, differs, inherit, source_line, value, where
from ..infer import Inference
from ..ops.gemm import OUTPUTS, scaled_mm
from ..report.trace import Site

DEVICES = ("cuda",)
"""Where the op may have a kernel; elsewhere a call is best left as it is."""
_NAMES = {dtype: name for name, dtype in OUTPUTS.items()}
_TENSOR_WISE, _ROW_WISE = 0, 1
"""Of torch.nn.functional.ScalingType: one scale, and one for each row or column."""


def products(graph: Graph, disable: frozenset[str] = frozenset()) -> None:
    """Replace such calls in `graph`, in place; a call of another kind stays as it is."""
    if scaled_mm.name in disable:
        return
    infer = Inference()
    for target, read in _SPELLINGS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            arguments = read(node)
            if arguments is None or node.meta["val"].device.type not in DEVICES:
                continue
            results = infer(scaled_mm, arguments)
            if isinstance(results, str) or differs(results[0], node.meta["val"]) is not None:
                continue
            with graph.inserting_before(node):
                made = graph.call_function(scaled_mm.overload, *scaled_mm.call(arguments))
            made.meta = inherit(node, results[0], {"fusionpass": Site((), where(node), source_line(node))})
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _scaled_mm(node: Node) -> dict[str, Any] | None:
    """`torch._scaled_mm` as arguments of the op, or None where it has no such meaning."""
    names = ("a", "b", "a_scale", "b_scale", "bias", "scale_result", "out_dtype", "use_fast_accum")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("scale_result") is not None:
        return None
    return _arguments(node, given["a"], given["b"], given["a_scale"], given["b_scale"], given)


def _scaled_mm_v2(node: Node) -> dict[str, Any] | None:
    """`torch.nn.functional.scaled_mm`, likewise."""
    names = (
        "a", "b", "a_scale", "a_kind", "a_swizzle", "b_scale", "b_kind", "b_swizzle", "bias", "out_dtype",
        "contraction_dim", "use_fast_accum",
    )  # fmt: skip
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    kinds = [*given["a_kind"], *given["b_kind"]]
    if len(kinds) != 2 or not set(kinds) <= {_TENSOR_WISE, _ROW_WISE} or given.get("contraction_dim"):
        return None
    return _arguments(node, given["a"], given["b"], given["a_scale"][0], given["b_scale"][0], given)


def _arguments(node: Node, a: Any, b: Any, a_scale: Any, b_scale: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    if any(value(t) is None for t in (a, b, a_scale, b_scale)):
        return None
    name = _NAMES.get(node.meta["val"].dtype)
    if name is None:
        return None
    fast = bool(given.get("use_fast_accum"))
    operands = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "bias": given.get("bias")}
    return {**operands, "out_dtype": name, "fast_accum": fast}


_SPELLINGS = {aten._scaled_mm.default: _scaled_mm}
if hasattr(torch.ops.aten, "_scaled_mm_v2"):  # from torch 2.10 on
    _SPELLINGS[torch.ops.aten._scaled_mm_v2.default] = _scaled_mm_v2
