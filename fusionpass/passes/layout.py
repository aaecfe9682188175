"""layout: scales lie from the start as those who read them want them: in cuBLAS's blocks, or column by column."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes

from ..arch import Arch
from ..errors import ArchError, SchemeError
from ..graphs import VIEWS, aten, erase_unused, inherit, outputs_of, value, values
from ..infer import Inference
from ..op import OPS, Op
from ..ops.gemm.blocks import block_scaled_mm, wants_columns
from ..ops.quant.layout import swizzled
from ..ops.quant.scheme import Scheme

_MOVES = (
    *VIEWS, aten.view.dtype, aten.permute.default, aten.clone.default, aten.copy.default, aten.slice.Tensor,
    aten.slice_scatter.default, aten.squeeze.dim, aten.unsqueeze.default, aten.constant_pad_nd.default,
    aten.full.default,
)  # fmt: skip
"""What moves bytes and changes none."""


def lay_out(graph: Graph) -> None:
    """Give each op whose linear scales are swizzled behind it the swizzled layout, in place.

    Any spelling of the rearrangement will do: it is run on the positions of the scales, and must put each where
    `swizzled` does. That takes sizes that are known.
    """
    infer = Inference()
    for node, op, arguments, scales in _scales(graph, "swizzled"):
        end = _rearranged(scales)
        results = infer(op, arguments) if end is not None else ""
        if end is None or isinstance(results, str):
            continue
        node.args, node.kwargs = op.call(arguments)
        node.meta["val"] = results
        scales.meta["val"] = made = results[scales.args[1]]
        with graph.inserting_before(end):
            stored, val = made.view(end.meta["val"].dtype), end.meta["val"]
            bits = graph.call_function(aten.view.dtype, (scales, val.dtype))
            bits.meta = inherit(end, stored)
            shaped = graph.call_function(aten.view.default, (bits, list(val.shape)))
            shaped.meta = inherit(end, val)
        end.replace_all_uses_with(shaped)
        erase_unused(graph, end)


def lay_out_by_column(graph: Graph, target: Arch | None = None) -> None:
    """Give each op whose linear scales are read by a product of cuBLAS's the column-major layout, in place.

    cuBLAS reads the scales of one group of all rows side by side, and would need a copy else. Our own kernel, which may
    be chosen for few of these rows, reads either. What reads them otherwise keeps them as they are.

    Args:
        graph: behind `fuse`.
        target: None: that of the values' device.
    """
    infer = Inference()
    for node, op, arguments, scales in _scales(graph, "column_major"):
        found = _products(scales)
        if found is None or not any(_by_columns(product, target) for product in found[1]):
            continue
        results = infer(op, arguments)
        if isinstance(results, str):
            continue
        views, readers = found
        moved = _viewed(scales, results[scales.args[1]], views)
        if moved is None:
            continue
        node.args, node.kwargs = op.call(arguments)
        node.meta["val"] = results
        for view, val in moved.items():
            view.meta["val"] = val
        for product in readers:
            given = block_scaled_mm.bind(product.args, product.kwargs)
            product.args, product.kwargs = block_scaled_mm.call({**given, "a_scheme": _columns_of(given)})


def _scales(graph: Graph, layout: str) -> Iterator[tuple[Node, Op, dict[str, Any], Any]]:
    """Each op whose linear scales are read: its arguments with the layout asked for, and the node of its scales."""
    for node in list(graph.nodes):
        op = OPS.get(node.target)
        arguments = op.bind(node.args, node.kwargs) if op is not None else {}
        scheme = _relaid(str(arguments.get("scheme", "")), layout)
        if op is None or scheme is None:
            continue
        scales = outputs_of(node).get(op.outputs(arguments).index("scale"))
        if scales is not None:
            yield node, op, {**arguments, "scheme": scheme}, scales


def _columns_of(given: dict[str, Any]) -> str:
    scheme = _relaid(str(given["a_scheme"]), "column_major")
    assert scheme is not None
    return scheme


def _products(scales: Node) -> tuple[list[Node], list[Node]] | None:
    """The views of `scales`, and the products whose `a_scale` these are; None where something else reads them."""
    views, products, todo = [], [], [scales]
    for source in todo:
        for reader in source.users:
            if reader.target in VIEWS:
                views.append(reader)
                todo.append(reader)
            elif reader.target is block_scaled_mm.overload and _reads_as_a(reader, source):
                products.append(reader)
            else:
                return None
    return views, products


def _reads_as_a(product: Node, scales: Node) -> bool:
    given = block_scaled_mm.bind(product.args, product.kwargs)
    linear = _relaid(str(given["a_scheme"]), "column_major") is not None
    return linear and [name for name, v in given.items() if v is scales] == ["a_scale"]


def _by_columns(product: Node, target: Arch | None) -> bool:
    given = values(block_scaled_mm.bind(product.args, product.kwargs))
    try:
        arch = target or Arch.of(given["a"].device)
    except ArchError:
        return False
    return wants_columns(arch, given) is None


def _viewed(scales: Node, val: torch.Tensor, views: Sequence[Node]) -> dict[Node, torch.Tensor] | None:
    """What `scales` and its views stand for once it is `val`; None where that cannot be viewed so."""
    moved = {scales: val}
    with val.fake_mode:  # type: ignore[attr-defined]
        for view in views:
            source, *rest = view.args
            try:
                moved[view] = aten.view.default(moved[source], *values(rest))  # type: ignore[index]
            except (RuntimeError, ValueError):  # its rows do not lie evenly
                return None
    return moved


def _relaid(text: str, layout: str) -> str | None:
    """The scheme with scales of that layout, where there is one and its scales are linear."""
    try:
        kind = Scheme.parse(text)
        return str(dataclasses.replace(kind, layout=layout)) if kind.layout == "linear" else None
    except SchemeError:
        return None


def _rearranged(scales: Node) -> Node | None:
    """The last node behind `scales` that holds them swizzled, if nothing else reads them on the way."""
    chain = [scales]
    while len(chain[-1].users) == 1 and (reader := next(iter(chain[-1].users))).target in _MOVES:
        chain.append(reader)
    val = scales.meta["val"]
    if len(chain) == 1 or not all(isinstance(size, int) for size in val.shape):
        return None
    with _disable_current_modes(), unset_fake_temporarily():
        ends = set(chain)
        positions = torch.arange(1, val.numel() + 1).view(val.shape)
        # A byte of the position at a time, since that is what the rearrangement moves; padding stays zero.
        for shift in range(0, val.numel().bit_length(), 8):
            plane = (positions >> shift & 255).to(torch.uint8)
            ends &= _equal(chain, plane, swizzled(plane).flatten())
    return max(ends, default=None)


def _equal(chain: Sequence[Node], start: torch.Tensor, expected: torch.Tensor) -> set[Node]:
    """The nodes of the chain that hold the bytes `expected` when the first holds `start`."""
    env: dict[Node, torch.Tensor | None] = {chain[0]: start}
    for node in chain[1:]:
        _run(node, env)
    return {
        node
        for node, found in env.items()
        if node in chain and found is not None and found.is_contiguous() and torch.equal(found.flatten(), expected)
    }


def _run(node: Node, env: dict[Node, torch.Tensor | None]) -> torch.Tensor | None:
    """What a node that only moves bytes holds, as uint8 on the CPU; None where it does anything else."""
    if node not in env:
        args: Any = torch.fx.map_arg(node.args, lambda n: _run(n, env))
        known = node.target in _MOVES and all(env[n] is not None for n in node.all_input_nodes)
        val = value(node)
        if not known or val is None or val.dtype.itemsize != 1:
            env[node] = None
        elif node.target is aten.view.dtype:
            env[node] = args[0]
        elif node.target is aten.full.default:
            env[node] = torch.zeros(args[0], dtype=torch.uint8) if args[1] == 0 else None
        else:
            env[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return env[node]
