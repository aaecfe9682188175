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


def _given(node: Node) -> dict[str, Any]:
    """The arguments of a call by the names of its schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _scaled_mm(node: Node) -> dict[str, Any] | None:
    """`torch._scaled_mm` as arguments of the op, or None where it has no such meaning."""
    given = _given(node)
    if given.get("scale_result") is not None:
        return None
    return _arguments(node, given, given["scale_a"], given["scale_b"])


def _scaled_mm_v2(node: Node) -> dict[str, Any] | None:
    """`torch.nn.functional.scaled_mm`, likewise."""
    given = _given(node)
    kinds = [*given["recipe_a"], *given["recipe_b"]]
    if len(kinds) != 2 or not set(kinds) <= {_TENSOR_WISE, _ROW_WISE} or given.get("contraction_dim"):
        return None
    return _arguments(node, given, given["scale_a"][0], given["scale_b"][0])


def _arguments(node: Node, given: dict[str, Any], a_scale: Any, b_scale: Any) -> dict[str, Any] | None:
    operands = {"a": given["self"], "b": given["mat2"], "a_scale": a_scale, "b_scale": b_scale}
    name = _NAMES.get(node.meta["val"].dtype)
    if name is None or any(value(operand) is None for operand in operands.values()):
        return None
    fast = bool(given.get("use_fast_accum"))
    return {**operands, "bias": given.get("bias"), "out_dtype": name, "fast_accum": fast}


_SPELLINGS = {aten._scaled_mm.default: _scaled_mm}
if hasattr(torch.ops.aten, "_scaled_mm_v2"):  # from torch 2.10 on
    _SPELLINGS[torch.ops.aten._scaled_mm_v2.default] = _scaled_mm_v2
