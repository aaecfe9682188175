"""Cut a graph of Dynamo's into pieces: alike ones are compiled once, and some operators stay out of CUDA graphs."""

import operator
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.passes.split_module import split_module

ATTENTION = re.compile(r"scaled_dot_product_\w*attention|flex_attention|flash_attn|paged_attention|_attention_forward")
"""Names of functions and operators that are attention."""
_OF_TORCH = re.compile(r"scaled_dot_product|flex_attention")
"""Attention of PyTorch's own, which a CUDA graph can hold; other libraries' may prepare each call on the host."""
_REGROUPS = frozenset({
    "view", "reshape", "expand", "transpose", "permute", "unsqueeze", "squeeze", "contiguous", "flatten", "unflatten",
    "getitem",
})  # fmt: skip
_WIDENS = frozenset({"to", "float", "bfloat16", "half", "type", "mul"})
_CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_MUTATES = re.compile(
    r"(?<!_)_$|^setitem$|_out$|^(__)?i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|[lr]shift)(__)?$"
)


@dataclass(frozen=True)
class Piece:
    """A part of a graph.

    Attributes:
        name: "piece_3".
        module: the part; it returns a tuple.
        why: why the graph was cut in front of it; empty for the first.
        boundary: it holds nothing but operators that stay out of CUDA graphs, and why.
    """

    name: str
    module: GraphModule
    why: str
    boundary: str


@dataclass(frozen=True)
class Cut:
    """A graph in pieces.

    Attributes:
        top: the graph that calls the pieces, as `call_module`.
        pieces: by the name that it calls.
    """

    top: GraphModule
    pieces: dict[str, Piece]


def qualified_name(node: Node) -> str:
    """What a node calls: "aten::mm", "torch.nn.functional.silu", "view"; empty for inputs, constants and outputs."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())
    module = getattr(target, "__module__", None) or ""
    return f"{module}.{getattr(target, '__qualname__', getattr(target, '__name__', target))}".lstrip(".")


def boundary(node: Node, boundaries: Collection[str] = ()) -> str:
    """Why a node stays out of every CUDA graph; empty if it need not."""
    name = qualified_name(node)
    if name and name in boundaries:
        return f"{name} is in Config.boundaries"
    target = node.target
    overloads = (
        [target]
        if isinstance(target, torch._ops.OpOverload)
        else [getattr(target, overload) for overload in target.overloads()]
        if isinstance(target, torch._ops.OpOverloadPacket)
        else []
    )
    if any(torch.Tag.cudagraph_unsafe in overload.tags for overload in overloads):
        return f"{name} is tagged cudagraph_unsafe"
    return ""


def is_attention(node: Node) -> bool:
    """Whether a node is an attention operator."""
    return ATTENTION.search(qualified_name(node)) is not None


def mutates(node: Node) -> bool:
    """Whether a node may write to memory that existed before it."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, overload)._schema.is_mutable for overload in target.overloads())
    name = qualified_name(node).rsplit(".", 1)[-1]
    if target in (operator.and_, operator.or_, operator.not_, operator.is_):
        return False  # named so because "and" is a word of Python's
    return bool(_MUTATES.search(name)) or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def cut(gm: GraphModule, boundaries: Collection[str] = (), attention_alone: bool = False) -> Cut:
    """Cut a graph of Dynamo's in front of attention, and around what stays out of CUDA graphs.

    Fusions that span layers (a residual sum and the next norm) stay inside a piece; so does attention with what
    follows it, unless it is alone.

    Args:
        gm: not changed.
        boundaries: further operators to cut around, "lib::op" or the name of a function.
        attention_alone: cut behind other libraries' attention too, which then stays out of CUDA graphs.
    """
    graph, groups = _ordered(gm.graph)
    parts: dict[Node, int] = {}
    starts = [("", "")]  # of each piece: why the cut, why it stays out of CUDA graphs
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        producer = _producer(node)
        if producer in parts:
            parts[node] = parts[producer]  # an output stays with its producer
            continue
        attention = groups.get(node)
        name = qualified_name(attention or node)
        alone = boundary(attention or node, boundaries)
        if attention is not None and attention_alone and not _OF_TORCH.search(name):
            alone = alone or f"{name} is attention of another library"
        before = starts[-1][1]
        begins = attention is not None and groups.get(node.prev) is not attention
        if bool(alone) != bool(before) or (begins and not alone):
            # Consecutive boundary operators are one piece; nothing in front of the first is none.
            why = alone or (f"attention: {name}" if begins else f"behind {before}")
            starts[-1 if not parts else len(starts) :] = [(why, alone)]
        parts[node] = len(starts) - 1
    with _use_lazy_graph_module(True):  # of most pieces nobody runs the code: an alike one was compiled
        gm = _make_graph_module(gm, graph)
        top = split_module(gm, gm, lambda node: parts[node], keep_original_order=True)
    pieces = {}
    for name, module in top.named_children():
        found = re.fullmatch(r"submod_(\d+)", name)
        if found and isinstance(module, GraphModule):
            index = int(found[1])
            _return_tuple(module)
            pieces[name] = Piece(f"piece_{index}", module, *starts[index])
    return Cut(top, pieces)


def _producer(node: Node) -> Any:
    """The operator with several outputs of which a node is one; None: it is none."""
    source = node.args[0] if node.target is operator.getitem else None
    several = isinstance(source, Node) and not isinstance(source.meta.get("example_value"), torch.Tensor)
    return source if several else None


def _ordered(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy where what only regroups attention's operands is right before it: nothing is repeated in memory.

    Returns:
        The copy, and for each attention and what was moved in front of it, that attention.
    """
    copied: Any = Graph()
    memo: dict[Node, Node] = {}
    copied.output(copied.graph_copy(graph, memo))
    _spell_out_shapes(copied)
    writers = [node for node in copied.nodes if mutates(node)]
    groups: dict[Node, Node] = {}
    for node in [n for n in copied.nodes if is_attention(n)]:
        moved, waiting = {node}, list(node.all_input_nodes)
        while waiting:
            near = max(waiting)
            waiting.remove(near)
            regroups = (_regroups(near) or _widens(near)) and _producer(near) is None
            if near in moved or not regroups or not moved.issuperset(near.users):
                continue
            if any(near < writer < node for writer in writers):
                continue
            min(moved).prepend(near)
            moved.add(near)
            waiting += near.all_input_nodes
        groups |= dict.fromkeys(moved, node)
    return copied, groups


def _regroups(node: Node) -> bool:
    return qualified_name(node).rsplit(".", 1)[-1] in _REGROUPS


def _widens(node: Node) -> bool:
    """Whether a node makes numbers of a cache's codes, which attention reads itself."""
    values = [source.meta.get("example_value") for source in node.all_input_nodes]
    codes = any(isinstance(val, torch.Tensor) and val.dtype in _CODES for val in values)
    known = qualified_name(node).rsplit(".", 1)[-1] in _WIDENS
    return known and (codes or any(_widens(source) for source in node.all_input_nodes))


def _spell_out_shapes(graph: Graph) -> None:
    """Replace whole shapes by their sizes, in place: a piece can be given a size, but not a shape."""
    for node in list(graph.nodes):
        shape = node.meta.get("example_value")
        if not isinstance(shape, torch.Size) or not isinstance(node.args[0], Node):
            continue
        sizes: list[Any] = list(shape)
        with graph.inserting_before(node):
            for i, size in enumerate(sizes):
                if isinstance(size, torch.SymInt):
                    sizes[i] = graph.call_method("size", (node.args[0], i))
                    sizes[i].meta = {**node.meta, "example_value": size}
        for user in list(node.users):
            picked = user.args[1] if user.target is operator.getitem else None
            if isinstance(picked, int):
                for reader in list(user.users):
                    _replace(reader, user, sizes[picked])
                graph.erase_node(user)
            else:
                _replace(user, node, tuple(sizes))
        graph.erase_node(node)


def _replace(reader: Node, old: Node, new: Any) -> None:
    """Let `reader` read `new`, a node, a number or several, in the place of `old`."""
    reader.args, reader.kwargs = torch.fx.map_arg((reader.args, reader.kwargs), lambda n: new if n is old else n)


def _return_tuple(module: GraphModule) -> None:
    output = next(iter(module.graph.find_nodes(op="output")))
    if isinstance(output.args[0], Node):
        output.args = ((output.args[0],),)
        module.recompile()
