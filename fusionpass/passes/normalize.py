"""One meaning, one spelling. Graphs and the rules' own spellings go through the same function.

No rewrite here changes a single bit of any result.
"""

from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graphs import CAST, COMMUTATIVE, VIEWS, aten, inherit, same_shape, value

_SCALAR_FORMS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var_mean.correction)
_ALIASES = (
    *VIEWS, aten.alias.default, aten.detach.default, aten.permute.default, aten.t.default, aten.transpose.int, getitem,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.unsqueeze.default,
)  # fmt: skip


def normalize(graph: Graph) -> None:
    """Rewrite `graph` in place: canonical operators and dims, no-ops gone, common subexpressions merged."""
    escaping = _escaping(graph)
    seen: dict[tuple[Any, str, str], Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        _canonical(graph, node)
        twin = _no_op(node) if node not in escaping else None
        if twin is None and _pure(node):
            twin = seen.setdefault(_key(node), node)
            # Two outputs that shared one buffer would change together when the caller writes to one.
            if twin is node or (node in escaping and twin in escaping):
                continue
            escaping |= {twin} if node in escaping else set()
        if twin is not None:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)


def _canonical(graph: Graph, node: Node) -> None:
    target: Any = node.target
    args: Any = node.args
    if target in _SCALAR_FORMS:
        node.target = _SCALAR_FORMS[target]
    if target in _REDUCTIONS and len(args) > 1 and isinstance(args[1], list | tuple):
        rank = args[0].meta["val"].dim()
        node.args = (args[0], [d - rank if d >= 0 else d for d in args[1]], *args[2:])
    elif target is aten.pow.Tensor_Scalar and args[1] == 2:
        node.args = (args[0], 2)
    elif target is aten.pow.Tensor_Scalar and args[1] == -0.5:
        node.target, node.args = aten.rsqrt.default, (args[0],)
    elif target is aten.mul.Tensor and args[0] is args[1]:
        node.target, node.args = aten.pow.Tensor_Scalar, (args[0], 2)
    elif target is aten.clamp.default and len(args) == 3 and None not in args:
        with graph.inserting_before(node):
            lower = graph.call_function(aten.clamp_min.default, (args[0], args[1]))
        lower.meta = inherit(node, node.meta["val"])
        node.target, node.args = aten.clamp_max.default, (lower, args[2])
    elif target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        node.target, node.args, node.kwargs = CAST, (args[0], node.kwargs["dtype"]), {}


def _no_op(node: Node) -> Node | None:
    """The input of a node that changes nothing."""
    if node.target not in (*VIEWS, CAST, aten.expand.default, aten.alias.default, aten.detach.default):
        return None
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    before, after = value(source), value(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    if not same_shape(before.shape, after.shape) or not same_shape(before.stride(), after.stride()):
        return None
    return source


def _pure(node: Node) -> bool:
    if node.target is getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    # An uninitialised buffer is not a value: two of them may be written apart.
    if node.target.overloadpacket in (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.is_impure()


def _key(node: Node) -> tuple[Any, str, str]:
    args: Any = node.args
    if node.target in COMMUTATIVE and all(isinstance(a, Node) for a in args):
        args = tuple(sorted(args, key=lambda a: str(a.name)))
    return node.target, repr(args), repr(node.kwargs)


def _escaping(graph: Graph) -> set[Node]:
    """The nodes whose memory the caller receives: outputs, and what they are views of."""
    pending = [n for out in graph.find_nodes(op="output") for n in out.all_input_nodes]
    found: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node.target in _ALIASES:
                pending += node.all_input_nodes
    return found
