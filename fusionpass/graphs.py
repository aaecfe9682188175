"""Small questions about FX graphs that several passes ask."""

import re
from collections.abc import Mapping, Sequence
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CAST = torch.ops.prims.convert_element_type.default
COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default})


_CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.int8)


def value(node: Node) -> torch.Tensor | None:
    """The fake tensor that a node stands for, if it is one."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def values(args: Any) -> Any:
    """Arguments with each node replaced by what it stands for."""
    return torch.fx.map_arg(args, lambda node: node.meta["val"])


def hint(size: Any) -> Any:
    """The number that a symbolic size was traced with, None where it depends on data; any other size as it is."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without adding a guard."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def same_strides(shape: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether a tensor of this shape is known to lie alike with either strides, without adding a guard.

    No address depends on the stride of a dimension of size 1, nor on any stride of an empty tensor.
    """
    if any(statically_known_true(size == 0) for size in shape):
        return True
    steps = zip(shape, a, b, strict=True)
    return all(statically_known_true(x == y) or statically_known_true(size == 1) for size, x, y in steps)


def same_number(a: Any, b: Any) -> bool:
    """Equality of constants once rounded to float32, since tracing on some devices has already rounded them.

    Integers are equal or not: some are the bits of something. Where `b` is no number, they are not equal.
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if not isinstance(b, int | float):
        return False
    return a == b or _fp32(a) == _fp32(b) or (a != a and b != b)


def _fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def marks_a_site(node: Node) -> bool:
    """Whether a node by itself says that something here could be an op: a norm's root, a cast to codes."""
    if node.target is CAST:
        return node.args[1] in _CODES
    return node.target in (aten.rsqrt.default, aten.var_mean.correction)


def is_view_of_rows(node: Node) -> bool:
    """Whether a node only regroups rows: its last dimension is its input's."""
    if node.target not in VIEWS:
        return False
    before = value(node.args[0])  # type: ignore[arg-type]
    return before is not None and same_shape(before.shape[-1:], node.meta["val"].shape[-1:])


def where(node: Node) -> str:
    """The module path that a node came from, as `named_modules` spells it; empty if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    # The graph modules of torch.export read "layers.0" as `getattr(layers, '0')`.
    path = re.sub(r", '(\w+)'\)", r".\1", path.replace("getattr(", ""))
    path = re.sub(r"^L\['\w+'\]|\.__dict__\['_modules'\]|\._modules|\.__self__|\._call_impl", "", path)
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).strip(".")


_CALL = str(Path(__file__).with_name("op.py"))


def source_line(node: Node) -> str:
    """`file:line, code` of the innermost user frame of a node; empty if unknown."""
    found = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', node.meta.get("stack_trace") or "")
    # Who calls an op of ours is what tells, not how it is called.
    found = [frame for frame in found if frame[0] != _CALL]
    return f"{found[-1][0]}:{found[-1][1]}, {found[-1][2].strip()}" if found else ""


def writers(graph: Graph) -> list[Node]:
    """The nodes that write to memory, in order."""
    return [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]


def mutated(writers: Sequence[Node], first: Node, last: Node) -> str | None:
    """The reason why nothing may move from `first` to `last`: one of `writers` is in between. None: nothing is."""
    return next((f"{node.name} writes to memory in between" for node in writers if first < node < last), None)


def outputs_of(node: Node) -> dict[int, Node]:
    """The getitem readers of a node that returns a list, by index."""
    return {u.args[1]: u for u in node.users if u.target is getitem}  # type: ignore[misc]


def insert_outputs(graph: Graph, node: Node, results: Sequence[Any]) -> list[Node]:
    """Getitem nodes for every result of `node`, right behind it."""
    items = []
    with graph.inserting_after(node):
        for index in reversed(range(len(results))):
            item = graph.call_function(getitem, (node, index))
            item.meta = inherit(node, results[index])
            items.append(item)
    return items[::-1]


def erase_unused(graph: Graph, node: Node) -> None:
    """Erase a node that nobody reads, and what only it read."""
    if node._erased or node.users or node.op != "call_function":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        erase_unused(graph, source)


def inherit(node: Node, val: Any, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Metadata for a node that replaces `node`: where it came from stays, what it stands for is `val`."""
    kept: dict[str, Any] = {
        k: node.meta[k]
        for k in ("nn_module_stack", "stack_trace", "original_aten", "source_fn_stack")
        if k in node.meta
    }
    return {**kept, "val": val, **(extra or {})}


def add_node(graph: Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call where `graph` inserts, with what it stands for; it came from where `like` did."""
    made = graph.call_function(target, args, kwargs)
    with like.meta["val"].fake_mode:
        val = target(*values(args), **values(kwargs))
    made.meta = inherit(like, val)
    return made


def differs(new: torch.Tensor, old: torch.Tensor) -> str | None:
    """The reason why `new` cannot stand for `old`; None: shape, dtype and strides are the same."""
    if new.dtype != old.dtype or not same_shape(new.shape, old.shape):
        return f"the op would return {new.dtype}{list(new.shape)}, the graph has {old.dtype}{list(old.shape)}"
    if not same_strides(new.shape, new.stride(), old.stride()):
        return f"the op would return strides {tuple(new.stride())}, the graph has {tuple(old.stride())}"
    return None
