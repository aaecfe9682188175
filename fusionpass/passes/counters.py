"""counters: what each layer counts for its own cache is read and advanced at once, where the first layer does.

In a static cache `arange(n) + counter` says where a layer writes, and `counter.add_(n)` that it did: a kernel of a few
integers in every layer, between a product and what waits for it. As two lists of tensors they are one for all layers.
"""

import operator
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_iter

from ..runtime.pieces import mutates

NAME = "counters"


@dataclass(frozen=True)
class _Counter:
    """A number among the graph's inputs that the graph adds to.

    Args:
        reads: the sums of it and an `arange`.
        write: adds to it, behind all that reads it.
        needs: what has to come before, if the reads and the write are made earlier.
    """

    reads: list[Node]
    write: Node
    needs: list[Node]


def counters(gm: GraphModule, disable: Collection[str] = ()) -> list[str]:
    """Read and advance at once what several layers count, in place.

    Args:
        gm: one of Dynamo's graphs; its nodes carry fake tensors as "example_value".
        disable: as `Config.disable`.

    Returns:
        What was done, a line; nothing where there was nothing to do.
    """
    found = [] if NAME in disable else [*_counters(gm)]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    point = min((one.write for one in found), key=order.__getitem__, default=None)
    kept = [one for one in found if all(order[node] < order[point] for node in one.needs)]
    if len(kept) < 2:
        return []
    reads: dict[Any, list[Node]] = defaultdict(list)
    writes: dict[Any, list[Node]] = defaultdict(list)
    for one in kept:
        writes[one.write.args[1]].append(one.write)
        for read in one.reads:
            start, _ = _terms(read)
            if all(order[point] < order[user] for user in read.users):
                reads[start.args, tuple(start.kwargs.items())].append(read)
    graph = gm.graph
    with graph.inserting_before(point):
        for group in reads.values():
            starts, numbers = zip(*map(_terms, group), strict=True)
            both = graph.call_function(torch._foreach_add, ([graph.node_copy(starts[0])] * len(group), list(numbers)))
            both.meta = {**group[0].meta, "example_value": [read.meta["example_value"] for read in group]}
            for i, read in enumerate(group):
                item = graph.call_function(operator.getitem, (both, i))
                item.meta = dict(read.meta)
                read.replace_all_uses_with(item)
                graph.erase_node(read)
            for start in dict.fromkeys(starts):
                if not start.users:
                    graph.erase_node(start)
        for amount, group in writes.items():
            graph.call_function(torch._foreach_add_, ([write.args[0] for write in group], amount)).meta = group[0].meta
    for one in kept:
        graph.erase_node(one.write)
    gm.recompile()
    return [f"{len(kept)} layers' counters are read and advanced at once"]


def _counters(gm: GraphModule) -> Iterator[_Counter]:
    """All that could be read and advanced elsewhere, were it only for the graph's inputs."""
    reached: dict[int, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        for memory in _memories(node):
            reached[memory].append(node)
    for tensor in gm.graph.find_nodes(op="placeholder"):
        value = tensor.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or value.dim():
            continue
        # All that has the counter's memory, by whatever name, and all that is made of it.
        names = [node for memory in _memories(tensor) for node in reached[memory]]
        users = dict.fromkeys(user for name in names for user in name.users)
        written = [user for user in users if mutates(user)]
        if len(written) != 1 or not _advances(written[0]):
            continue
        (write,) = written
        reads = [user for user in tensor.users if _is_read(user)]
        others = [node for node in (*names, *users) if node not in (*reads, write)]
        behind = [node for node in (*reads, *others) if write < node]
        if not behind:
            needs = [*others, *write.all_input_nodes, *(n for read in reads for n in _terms(read)[0].all_input_nodes)]
            yield _Counter(reads, write, needs)


def _memories(node: Node) -> set[int]:
    values = tree_iter(node.meta.get("example_value"))
    return {value.untyped_storage()._cdata for value in values if isinstance(value, torch.Tensor)}


def _advances(node: Node) -> bool:
    """Whether a node is `counter.add_(number)`."""
    if (node.op, node.target, len(node.args), node.kwargs) != ("call_method", "add_", 2, {}):
        return False
    amount = node.args[1]
    return isinstance(amount.meta.get("example_value") if isinstance(amount, Node) else amount, int | torch.SymInt)


def _is_read(node: Node) -> bool:
    """Whether a node adds an `arange` to something."""
    added = node.op == "call_function" and node.target in (operator.add, torch.add) and not node.kwargs
    return added and len(node.args) == 2 and any(_is_arange(term) for term in node.args)


def _is_arange(term: object) -> bool:
    return isinstance(term, Node) and term.target is torch.arange


def _terms(read: Node) -> tuple[Node, Node]:
    """The `arange` of a read, and what it is added to."""
    first, second = read.args
    return (first, second) if _is_arange(first) else (second, first)  # type: ignore[return-value]
