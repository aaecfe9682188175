"""What lies between ops on heads and changes no value: the order of dimensions, a part that is not rotated."""

import dataclasses
from typing import Any

from torch.fx import Graph, Node

from ..graphs import aten, differs, erase_unused, inherit
from ..infer import Inference
from ..ops.norm import rms_norm
from ..ops.rope import rope
from .beside import site_of
from .normalize import END


def bring_together(graph: Graph) -> None:
    """Rewrite `graph` in place so that a norm and a rotation are neighbours, and a rotation has whole heads."""
    infer = Inference()
    for node in list(graph.nodes):
        if node.target is aten.cat.default:
            _widen(graph, node, infer)
    for node in list(graph.nodes):
        if node.target is aten.permute.default:
            _normalise_later(graph, node, infer)


def _widen(graph: Graph, node: Node, infer: Inference) -> None:
    """`cat([rope(x[..., :n]), x[..., n:]], -1)` as `rope(x)`, which passes the other columns through."""
    parts: Any = node.args[0]
    if len(parts) != 2 or parts[0].target is not rope.overload or len(parts[0].users) > 1:
        return
    turned, rest = parts
    arguments = rope.bind(turned.args, turned.kwargs)
    first, count = arguments["x"], turned.meta["val"].shape[-1]
    wanted = (aten.slice.Tensor, -1, 0, count), (aten.slice.Tensor, -1, count, END)
    if ((first.target, *first.args[1:]), (rest.target, *rest.args[1:])) != wanted or first.args[0] is not rest.args[0]:
        return
    arguments["x"] = first.args[0]
    results = infer(rope, arguments)
    assert not isinstance(results, str), results
    if differs(results[0], node.meta["val"]) is not None:
        return
    with graph.inserting_before(node):
        made = graph.call_function(rope.overload, *rope.call(arguments))
    site = site_of(turned)
    both = dataclasses.replace(site, nodes=(*site.nodes, node.name))
    made.meta = inherit(turned, results[0], {"fusionpass": both})
    node.replace_all_uses_with(made)
    erase_unused(graph, node)


def _normalise_later(graph: Graph, node: Node, infer: Inference) -> None:
    """`permute(rms_norm(x))` as `rms_norm(permute(x))`, where a rotation reads it: rows stay what they are."""
    norm: Any = node.args[0]
    order: Any = node.args[1]
    if norm.target is not rms_norm.overload or len(norm.users) > 1 or order[-1] not in (-1, len(order) - 1):
        return
    if any(user.target is not rope.overload for user in node.users):
        return
    arguments = rms_norm.bind(norm.args, norm.kwargs)
    if arguments["mod_scale"] is not None:
        return
    val = arguments["x"].meta["val"]
    with val.fake_mode:
        permuted = val.permute(order)
    with graph.inserting_before(node):
        moved = graph.call_function(aten.permute.default, (arguments["x"], order))
    moved.meta = inherit(node, permuted)
    results = infer(rms_norm, {**arguments, "x": moved})
    assert not isinstance(results, str), results
    if differs(results[0], node.meta["val"]) is not None:
        graph.erase_node(moved)
        return
    with graph.inserting_before(node):
        made = graph.call_function(rms_norm.overload, *rms_norm.call({**arguments, "x": moved}))
    site = site_of(norm)
    both = dataclasses.replace(site, nodes=(*site.nodes, node.name))
    made.meta = inherit(norm, results[0], {"fusionpass": both})
    node.replace_all_uses_with(made)
    erase_unused(graph, node)
