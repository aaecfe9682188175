"""The one printer: a graph as readable Python, for dumps, golden tests, errors and docs."""

import math
import re
from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

_SHORT = {
    torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool", torch.float8_e4m3fn: "e4m3",
    torch.float8_e4m3fnuz: "e4m3fnuz", torch.float8_e5m2: "e5m2",
}  # fmt: skip


def show(graph: Graph, rename: bool = False) -> str:
    """Python source of `graph`, with the type of each value in a comment.

    Args:
        graph: any FX graph; values are described by `meta["val"]` where there is one.
        rename: number the values anew, so that two graphs that differ in names alone print alike.
    """
    names = {n: f"v{i}" if rename else n.name for i, n in enumerate(graph.nodes)}
    inputs = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    rows = [(f"{names[n]},", describe(n)) for n in inputs]
    body = [(f"{names[n]} = {_call(n, names)}", describe(n)) for n in graph.nodes if n.op == "call_function"]
    head = [
        *(f"import {module}" for module in ("math", "operator") if any(f" = {module}." in text for text, _ in body)),
        "import torch",
        "",
        "aten, prims = torch.ops.aten, torch.ops.prims",
        "",
        "",
        "def forward(",
    ]
    result = [f"    return {_argument(n.args[0], names)}" for n in graph.find_nodes(op="output")]
    return "\n".join([*head, *_commented(rows), "):", *_commented(body), *result, ""])


def _commented(rows: list[tuple[str, str]]) -> list[str]:
    return [f"    {text}  # {comment}" if comment else f"    {text}" for text, comment in rows]


def describe(node: Node) -> str:
    """The type of a node's value: "bf16[3, 64]", with the strides where they are not dense."""
    return _type(node.meta.get("val"))


_DESCRIBED = re.compile(r"([\w.]+)\[([\d, ]*)\](?: strides \(([\d, ]*)\))?")


def parsed_type(text: str) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None:
    """Shape, strides and dtype of what `describe` wrote of one tensor; None of anything else, or of symbolic sizes."""
    found = _DESCRIBED.fullmatch(text)
    if found is None:
        return None
    dtypes = {name: dtype for dtype, name in _SHORT.items()}
    dtype = dtypes.get(found[1]) or getattr(torch, found[1].removeprefix("torch."))
    shape, strides = (tuple(int(n) for n in (part or "").split(",") if n.strip()) for part in (found[2], found[3]))
    if found[3] is None:
        strides = tuple(torch._prims_common.make_contiguous_strides_for(shape))
    return shape, strides, dtype


def spell(node: Node) -> str:
    """A call as Python: "aten.mul.Tensor(x, 2.0)"."""
    return _call(node, {source: source.name for source in node.all_input_nodes})


def _type(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        shape = ", ".join(map(str, val.shape))
        dense = torch._prims_common.make_contiguous_strides_for(val.shape)
        stride = ", ".join(map(str, val.stride()))
        strides = "" if stride == ", ".join(map(str, dense)) else f" strides ({stride})"
        return f"{_SHORT.get(val.dtype, str(val.dtype))}[{shape}]{strides}"
    if isinstance(val, list | tuple):
        return ", ".join(_type(v) for v in val)
    return str(val) if isinstance(val, torch.SymInt) else ""


def _call(node: Node, names: Mapping[Node, str]) -> str:
    if node.target is getitem:
        return f"{_argument(node.args[0], names)}[{_argument(node.args[1], names)}]"
    args = [_argument(a, names) for a in node.args] + [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(args)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name if name.startswith(("aten.", "prims.")) else f"torch.ops.{name}"
    name = getattr(target, "__name__", str(target))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{name}"
    module = getattr(target, "__module__", "").removeprefix("_")
    return f"{module}.{name}" if module in ("operator", "math", "torch") else name


def _argument(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, list):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(_argument(v, names) for v in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
