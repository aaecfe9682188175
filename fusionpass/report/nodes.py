"""A graph as plain values, node by node: what the HTML report draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graphs import source_line, where
from .show import describe, spell


@dataclass(frozen=True)
class NodeRecord:
    """One node of a graph.

    Attributes:
        name: its name, by which others read it.
        text: the call as the printer spells it, "aten.mm.default(view, permute)"; empty for an input of the graph.
        type: of its value, "bf16[1, 16, 64]".
        where: module path.
        source: "file:line, code" of the model.
        inputs: the names of what it reads.
        bytes: of its value, a dimension with stride 0 counted once; None where a size is symbolic.
        moves: it only views or picks a value, and no kernel runs for it.
        replaces: the nodes that rules put it in the place of, by the names that they had after normalize.
    """

    name: str
    text: str = ""
    type: str = ""
    where: str = ""
    source: str = ""
    inputs: tuple[str, ...] = ()
    bytes: int | None = 0
    moves: bool = False
    replaces: tuple[str, ...] = ()

    @staticmethod
    def of(values: Sequence[Any]) -> "NodeRecord":
        """The record of which `values` are the fields in order, read from JSON."""
        plain: list[Any] = [tuple(v) if isinstance(v, list) else v for v in values]
        return NodeRecord(*plain)


def node_records(graph: Graph) -> list[NodeRecord]:
    """Every node of `graph` but its output, in order."""
    lines: dict[str, str] = {}
    records = []
    for node in graph.nodes:
        if node.op == "output":
            continue
        # Most nodes have their stack in common with others, and reading it is the slow part.
        stack = node.meta.get("stack_trace") or ""
        if stack not in lines:
            lines[stack] = source_line(node)
        site = node.meta.get("fusionpass")
        records.append(
            NodeRecord(
                name=node.name,
                text=spell(node) if node.op == "call_function" else "",
                type=describe(node),
                where=where(node),
                source=lines[stack],
                inputs=tuple(source.name for source in node.all_input_nodes),
                bytes=_bytes(node.meta.get("val")),
                moves=_moves(node),
                replaces=getattr(site, "nodes", ()),
            )
        )
    return records


def _bytes(val: Any) -> int | None:
    if isinstance(val, list | tuple):
        sizes = [_bytes(v) for v in val]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    if not isinstance(val, torch.Tensor):
        return 0
    steps: list[tuple[Any, Any]] = list(zip(val.shape, val.stride(), strict=True))
    if not all(isinstance(number, int) for step in steps for number in step):
        return None
    count: int = math.prod((size for size, stride in steps if stride), start=val.element_size())
    return count


def _moves(node: Node) -> bool:
    if node.op != "call_function":
        return True
    target = node.target
    return target is getitem or (isinstance(target, torch._ops.OpOverload) and target.is_view)
