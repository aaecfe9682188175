"""What lies between ops on heads and changes no value: the order of dimensions, a part that is not rotated."""

import dataclasses
from typing import Any

from torch.fx import Graph, Node

from ..graphs import VIEWS, add_node, aten, differs, erase_unused, inherit, same_shape
from ..infer import Inference
from ..ops.norm import rms_norm
from ..ops.rope import norm_heads, rope
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
    for node in graph.find_nodes(op="call_function", target=rope.overload):
        _normalise_heads(graph, node, infer)


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
    with graph.inserting_before(node):
        moved = add_node(graph, node, aten.permute.default, arguments["x"], order)
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


def _normalise_heads(graph: Graph, rotation: Node, infer: Inference) -> None:
    """Tokens that are normalised whole, cut into heads, perhaps transposed, and rotated: normalised by the head."""
    moved: Any = rope.bind(rotation.args, rotation.kwargs)["x"]
    swaps = moved.target is aten.permute.default and list(moved.args[1]) == [0, 2, 1, 3]
    view: Any = moved.args[0] if swaps else moved
    norm: Any = view.args[0] if view.target in VIEWS else None
    if not isinstance(norm, Node) or norm.target is not rms_norm.overload:
        return
    if any(len(node.users) > 1 for node in (moved, view, norm)):
        return
    arguments = rms_norm.bind(norm.args, norm.kwargs)
    rows, by_head = norm.meta["val"], view.meta["val"]
    whole = by_head.dim() == rows.dim() + 1 and same_shape(by_head.shape[:-2], rows.shape[:-1])
    if arguments["mod_scale"] is not None or not whole:
        return
    x = arguments["x"]
    with graph.inserting_before(rotation):
        for node in (view, moved) if swaps else (view,):
            x = add_node(graph, node, node.target, x, node.args[1])
        given = {name: arguments[name] for name in ("weight", "eps", "weight_offset", "rounding")}
        given |= {"x": x, "heads_dim": by_head.dim() - (3 if swaps else 2)}
        results = infer(norm_heads, given)
        assert not isinstance(results, str), results
        new = graph.call_function(norm_heads.overload, *norm_heads.call(norm_heads.bind((), given)))
    site = site_of(norm)
    both = dataclasses.replace(site, nodes=(*site.nodes, *dict.fromkeys((view.name, moved.name))))
    new.meta = inherit(norm, results[0], {"fusionpass": both})
    if differs(results[0], moved.meta["val"]) is None:
        moved.replace_all_uses_with(new)
    for unread in (moved, new):
        erase_unused(graph, unread)
