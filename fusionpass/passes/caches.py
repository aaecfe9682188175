"""Caches in blocks: tensors of [blocks, size, ...], of which a token is a row of one block."""

from typing import Any

import torch
from torch.fx import Graph, Node

from ..graphs import CAST, VIEWS, add_node, aten, erase_unused, same_shape, value
from .inplace import chain_of

_NOWHERE = 2**60
"""Beyond the slots of any cache: a kernel writes nothing there, PyTorch raises, as for the offset it stands for."""
_DIVISIONS = (aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode)
_REMAINDERS = (aten.remainder.Scalar, aten.remainder.Tensor)


def slots_of_blocks(graph: Graph) -> None:
    """Rewrite writes `cache[block, offset] = x` in place as writes of rows, `cache.view(-1, ...)[slot] = x`."""
    known: dict[tuple[Node, Node, int], Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        cache, indices, x, *rest = node.args
        val, new = value(cache), value(x) if isinstance(x, Node) else None
        if any(rest) or node.kwargs or val is None or new is None or len(indices) != 2 or None in indices:
            continue
        size, *row = val.shape[1:]
        block, offset = indices
        fits = same_shape(new.shape, (block.meta["val"].shape[0], *row)) if _is_index(block) else False
        if not fits or not _is_index(offset) or not all(isinstance(number, int) for number in (size, *row)):
            continue
        if not same_shape(offset.meta["val"].shape, new.shape[:1]) or not same_shape(
            val.stride()[:1], [size * val.stride(1)]
        ):
            continue
        with graph.inserting_before(node):
            if (block, offset, size) not in known:
                known[block, offset, size] = _slot(graph, node, block, offset, size)
            rows = add_node(graph, node, aten.view.default, cache, [-1, *row])
            put = add_node(graph, node, aten.index_put.default, rows, [known[block, offset, size]], x)
            back = add_node(graph, node, aten.view.default, put, [-1, size, *row])
        node.replace_all_uses_with(back)
        erase_unused(graph, node)
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        _hoist(graph, node.args[0])


def _hoist(graph: Graph, cache: Node) -> None:
    """Move what views an input as a cache behind the inputs, in front of what one kernel is to do with two caches."""
    *views, given = chain_of(cache)
    if given.op != "placeholder" or any(len(view.all_input_nodes) > 1 for view in views):
        return
    after = graph.find_nodes(op="placeholder")[-1]
    for view in reversed(views):
        after.append(view)
        after = view


def blocks_of_slots(graph: Graph) -> None:
    """Rewrite what stayed a write of rows of a cache in blocks as a write of blocks, which Inductor does in place."""
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        rows, indices, *rest = node.args
        users = list(node.users)
        if len(indices) != 1 or rows.target not in VIEWS or len(users) != 1 or users[0].target not in VIEWS:
            continue
        cache, back = rows.args[0], users[0]
        val = value(cache)
        if cache.op != "placeholder" or val is None or not _is_index(indices[0]):
            continue
        if not _back_to(back, val, rows.meta["val"]):
            continue
        size: Any = val.shape[1]
        with graph.inserting_before(node):
            block = add_node(graph, node, aten.div.Tensor_mode, indices[0], size, rounding_mode="floor")
            offset = add_node(graph, node, aten.remainder.Scalar, indices[0], size)
            put = add_node(graph, node, aten.index_put.default, cache, [block, offset], *rest)
        back.replace_all_uses_with(put)
        for unread in (back, node, rows):
            erase_unused(graph, unread)


def _is_index(node: Any) -> bool:
    val = value(node) if isinstance(node, Node) else None
    return val is not None and val.dim() == 1 and val.dtype in (torch.int32, torch.int64)


def _slot(graph: Graph, like: Node, block: Node, offset: Node, size: int) -> Node:
    """The number of a row: `block * size + offset`, of an offset from the end too."""
    if block.target in _DIVISIONS and offset.target in _REMAINDERS and block.args[:2] == offset.args[:2]:
        mode = block.kwargs.get("rounding_mode", "floor")
        if block.args[1] == size and mode == "floor" and _is_index(block.args[0]):
            return block.args[0]  # type: ignore[return-value]

    def made(target: Any, *args: Any, **kwargs: Any) -> Node:
        return add_node(graph, like, target, *args, **kwargs)

    wide, at = (
        index if index.meta["val"].dtype == torch.int64 else made(CAST, index, torch.int64) for index in (block, offset)
    )
    at = made(aten.where.self, made(aten.lt.Scalar, at, 0), made(aten.add.Tensor, at, size), at)
    outside = made(aten.bitwise_or.Tensor, made(aten.lt.Scalar, at, 0), made(aten.ge.Scalar, at, size))
    slot = made(aten.add.Tensor, made(aten.mul.Tensor, wide, size), at)
    return made(aten.add.Tensor, slot, made(aten.mul.Tensor, made(CAST, outside, torch.int64), _NOWHERE))


def _back_to(back: Node, cache: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether `back` is of the shape of a cache in blocks, and `rows` are its rows."""
    size = cache.shape[1] if cache.dim() > 2 else None
    fits = isinstance(size, int) and same_shape(rows.shape[1:], cache.shape[2:])
    return fits and same_shape(back.meta["val"].shape, cache.shape)
