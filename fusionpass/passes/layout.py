"""layout: scales that are only rearranged into cuBLAS's blocks are written there by the op itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import SchemeError
from ..graphs import VIEWS, aten, erase_unused, inherit, outputs_of, value
from ..infer import Inference
from ..op import OPS
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
    for node in list(graph.nodes):
        op = OPS.get(node.target)
        arguments = op.bind(node.args, node.kwargs) if op is not None else {}
        scheme = _blocked(str(arguments.get("scheme", "")))
        if op is None or scheme is None:
            continue
        index = op.outputs(arguments).index("scale")
        scales = outputs_of(node).get(index)
        end = _rearranged(scales) if scales is not None else None
        results = infer(op, {**arguments, "scheme": scheme}) if end is not None else ""
        if scales is None or end is None or isinstance(results, str):
            continue
        node.args, node.kwargs = op.call({**arguments, "scheme": scheme})
        node.meta["val"], scales.meta["val"] = results, results[index]
        with graph.inserting_before(end):
            stored, val = results[index].view(end.meta["val"].dtype), end.meta["val"]
            bits = graph.call_function(aten.view.dtype, (scales, val.dtype))
            bits.meta = inherit(end, stored)
            shaped = graph.call_function(aten.view.default, (bits, list(val.shape)))
            shaped.meta = inherit(end, val)
        end.replace_all_uses_with(shaped)
        erase_unused(graph, end)


def _blocked(text: str) -> str | None:
    """The scheme with swizzled scales, where there is one and its scales are not."""
    try:
        kind = Scheme.parse(text)
        return str(dataclasses.replace(kind, layout="swizzled")) if kind.layout == "linear" else None
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
