"""products: PyTorch's products of quantised matrices, of few rows and of routers → the ops, on GPUs.

Where they mean the same. Products of 16-bit floats with more rows than a kernel of ours is for stay PyTorch's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graphs import (
    CAST,
    VIEWS,
    add_node,
    aten,
    differs,
    erase_unused,
    hint,
    inherit,
    source_line,
    value,
    values,
    where,
)
from ..infer import Inference
from ..match import HALVES
from ..op import OPS, Op
from ..ops.gemm import NAMES, request_of, scaled_mm
from ..ops.gemm.blocks import block_scaled_mm
from ..ops.gemm.blocks import request_of as blocks_request_of
from ..ops.gemm.dispatch import HALF, Request
from ..ops.gemm.linear import linear, linear_bf16_fp32, linear_request_of
from ..ops.gemm.linear import request_of as router_request_of
from ..ops.rows import known
from ..report.trace import Site

DEVICES = ("cuda",)
"""Where the op may have a kernel; elsewhere a call is best left as it is."""
_TENSOR_WISE, _ROW_WISE = 0, 1
"""Of torch.nn.functional.ScalingType: one scale, and one for each row or column."""


def products(graph: Graph, disable: frozenset[str] = frozenset()) -> None:
    """Replace such calls in `graph`, in place; a call of another kind stays as it is."""
    infer = Inference()
    for target, (op, read) in _SPELLINGS:
        for node in graph.find_nodes(op="call_function", target=target) if op.name not in disable else ():
            arguments = read(node) if node.meta["val"].device.type in DEVICES else None
            if arguments is None:
                continue
            results = infer(op, arguments)
            if isinstance(results, str) or differs(results[0], node.meta["val"]) is not None:
                continue
            old = node.all_input_nodes
            with graph.inserting_before(node):
                made = graph.call_function(op.overload, *op.call(arguments))
            site = Site((), where(node), source_line(node), nodes=(node.name,))
            made.meta = inherit(node, results[0], {"fusionpass": site})
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            for source in old:
                erase_unused(graph, source)


def choose_algorithms(graph: Graph, chosen: Mapping[str, str]) -> None:
    """Name what computes each product of a kind, in place, as `Config.gemm` says; what names one itself keeps that."""
    for node in graph.nodes if chosen else ():
        op = OPS.get(node.target)
        if op is None or op not in _REQUESTS:
            continue
        arguments = op.bind(node.args, node.kwargs)
        request = _REQUESTS[op](**values(arguments))
        algorithm = chosen.get(request.kind, "auto") if request is not None else "auto"
        if arguments["algo"] == "auto" and algorithm != "auto":
            node.args, node.kwargs = op.call({**arguments, "algo": algorithm})


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
    name = NAMES.get(node.meta["val"].dtype)
    if name is None or any(value(operand) is None for operand in operands.values()):
        return None
    fast = bool(given.get("use_fast_accum"))
    return {**operands, "bias": given.get("bias"), "out_dtype": name, "fast_accum": fast}


def _mm(node: Node) -> dict[str, Any] | None:
    """`mm` of few rows of 16 bits with the rows of a weight."""
    return _few_rows(node, *node.args)


def _addmm(node: Node) -> dict[str, Any] | None:
    """`addmm`, likewise: with a bias behind it."""
    bias, x, turned = node.args
    added = value(bias)  # type: ignore[arg-type]
    if {"beta": 1, "alpha": 1, **node.kwargs} != {"beta": 1, "alpha": 1} or added is None or added.dim() != 1:
        return None
    return _few_rows(node, x, turned, bias)


def _few_rows(node: Node, x: Any, turned: Any, bias: Any = None) -> dict[str, Any] | None:
    few, w = value(x), value(turned)
    if few is None or w is None or few.dtype not in HALVES or not known(w.stride(0) == 1):
        return None
    # Any number of rows may follow, but most are of the kind that was traced: of many a call costs more than it gives.
    rows = hint(few.shape[0])
    if rows is None or rows > HALF or not isinstance(w.shape[0], int) or w.shape[0] % 8:
        return None
    if turned.target is aten.permute.default:
        return {"x": x, "w": turned.args[0], "bias": bias}
    with node.graph.inserting_before(node):
        return {"x": x, "w": add_node(node.graph, turned, aten.permute.default, turned, [1, 0]), "bias": bias}


def _router(node: Node) -> dict[str, Any] | None:
    """`mm` of what was bfloat16 before it was made float32 for this, as routers have it."""
    found = [_widened(operand) for operand in node.args]
    if not all(found):
        return None
    with node.graph.inserting_before(node):
        x, w = (_again(*chain) for chain in found if chain is not None)
        turned = add_node(node.graph, w, aten.permute.default, w, [1, 0])
    return {"x": x, "w": turned}


def _widened(node: Any) -> tuple[Node, list[Node]] | None:
    """What a cast to float32 widens, and the views between that and `node`, the last first."""
    views: list[Node] = []
    while node.target in (*VIEWS, aten.permute.default):
        views.append(node)
        node = node.args[0]
    if node.target is not CAST or node.args[1] != torch.float32:
        return None
    source = node.args[0]
    return (source, views) if source.meta["val"].dtype == torch.bfloat16 else None


def _again(source: Node, views: list[Node]) -> Node:
    """The same views of `source`."""
    for view in reversed(views):
        source = add_node(source.graph, view, view.target, source, *view.args[1:])
    return source


_REQUESTS: dict[Op, Callable[..., Request | None]] = {
    scaled_mm: request_of,
    block_scaled_mm: blocks_request_of,
    linear: linear_request_of,
    linear_bf16_fp32: router_request_of,
}
_SPELLINGS = [
    (aten._scaled_mm.default, (scaled_mm, _scaled_mm)),
    (aten.mm.default, (linear_bf16_fp32, _router)),
    (aten.mm.default, (linear, _mm)),
    (aten.addmm.default, (linear, _addmm)),
]
if hasattr(torch.ops.aten, "_scaled_mm_v2"):  # from torch 2.10 on
    _SPELLINGS.append((torch.ops.aten._scaled_mm_v2.default, (scaled_mm, _scaled_mm_v2)))
