"""attend: scaled_dot_product_attention in Dynamo's graph → the op, before AOTAutograd chooses what runs it."""

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention

from ..errors import FusionpassError
from ..graphs import CAST, VIEWS, aten, erase_unused, inherit, is_view_of_rows, same_shape, same_strides, value
from ..infer import Inference
from ..op import OPS
from ..ops.attention import attention
from ..ops.attention.decode import CODE_DTYPES
from ..ops.quant import quantize
from ..ops.rows import FLOATS

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


DEVICES = ("cuda",)
"""Where the op may have a kernel; elsewhere a call is best left as it is."""


def attend(gm: GraphModule, disable: Collection[str] = ()) -> None:
    """Replace calls on a GPU by the op, in place, where it means the same and its result lies as the call's does.

    Args:
        gm: one of Dynamo's graphs; its nodes carry fake tensors as "example_value".
        disable: as `Config.disable`.
    """
    if attention.name in disable:
        return
    for node in gm.graph.find_nodes(op="call_function", target=scaled_dot_product_attention):
        given = call_of(node)
        if given["dropout_p"] != 0.0:
            continue
        q, k, v = (given[name] for name in ("query", "key", "value"))
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "mask": given["attn_mask"],
            "causal": given["is_causal"],
            "scale": given["scale"],
            "enable_gqa": given["enable_gqa"],
        }
        wanted = node.meta.get("example_value")
        if not isinstance(wanted, torch.Tensor) or wanted.device.type not in DEVICES:
            continue
        made = _result(arguments, wanted)
        if made is None:
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(attention.overload, *attention.call(arguments))
            new.meta = {**node.meta, "example_value": made}
            if not same_strides(wanted.shape, made.stride(), wanted.stride()):
                new = gm.graph.call_method("contiguous", (new,))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.recompile()


def call_of(node: Node) -> dict[str, Any]:
    """The arguments of a call of scaled_dot_product_attention by name."""
    return {**_DEFAULTS, **dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}


def _result(arguments: dict[str, Any], wanted: torch.Tensor) -> torch.Tensor | None:
    """What the op returns, if it takes these arguments and lies as `wanted` does, or would if it were contiguous."""
    vals = torch.fx.map_arg(arguments, lambda node: node.meta["example_value"])
    if any(isinstance(v, torch.Tensor) and v.requires_grad for v in vals.values()):
        return None
    try:
        with wanted.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
            made: torch.Tensor = attention.reference(**vals)
    except FusionpassError:
        return None  # the call's own error is the user's
    alike = same_strides(wanted.shape, made.stride(), wanted.stride()) or wanted.is_contiguous()
    return made if alike and made.dtype == wanted.dtype and same_shape(made.shape, wanted.shape) else None


def join_heads(graph: Graph) -> None:
    """Let each attention in an aten graph whose heads are joined to rows, which are quantised, join them itself."""
    infer = Inference()
    for node in graph.find_nodes(op="call_function", target=attention.overload):
        arguments = attention.bind(node.args, node.kwargs)
        rows = _joined(node)
        if arguments["joined"] or rows is None or not _quantised(rows):
            continue
        arguments["joined"] = True
        results = infer(attention, arguments)
        assert not isinstance(results, str), results
        val: torch.Tensor = rows.meta["val"]
        with graph.inserting_before(node):
            new = graph.call_function(attention.overload, *attention.call(arguments))
        new.meta = {**node.meta, "val": results[0]}
        if not same_shape(val.shape, results[0].shape):
            with graph.inserting_after(new):
                view = graph.call_function(aten.view.default, (new, rows.args[1]))
            view.meta = inherit(rows, val)
            new = view
        rows.replace_all_uses_with(new)
        erase_unused(graph, rows)


def _joined(node: Node) -> Node | None:
    """The rows of `attended.transpose(1, 2).reshape(...)`, if nothing else reads what is attended."""
    chain = [node]
    while len(chain[-1].users) == 1 and chain[-1].target not in VIEWS:
        chain += chain[-1].users
    moved = [reader for reader in chain[1:] if reader.target is not aten.clone.default]
    if ["view" if reader.target in VIEWS else reader.target for reader in moved] != [aten.permute.default, "view"]:
        return None
    if list(moved[0].args[1]) != [0, 2, 1, 3]:  # type: ignore[arg-type]
        return None
    batch, heads, tokens, width = node.meta["val"].shape
    wanted = ((batch, tokens, heads * width), (batch * tokens, heads * width))
    shape = moved[-1].meta["val"].shape
    return moved[-1] if any(same_shape(shape, one) for one in wanted) else None


def _quantised(rows: Node) -> bool:
    """Whether a quantisation reads these rows, perhaps grouped otherwise."""

    def by(reader: Node) -> bool:
        target: Any = reader.target
        return OPS.get(target) is quantize or (is_view_of_rows(reader) and _quantised(reader))

    return any(map(by, rows.users))


def share_heads(graph: Graph) -> None:
    """Give each attention in an aten graph the keys and values as they were before their heads were repeated."""
    infer = Inference()
    for node in list(graph.nodes):
        if OPS.get(node.target) is not attention:
            continue
        arguments = attention.bind(node.args, node.kwargs)
        before = {name: _unrepeated(arguments[name]) for name in ("k", "v")}
        if None in before.values():
            continue
        arguments |= before
        results = infer(attention, arguments)
        assert not isinstance(results, str), results
        old = node.all_input_nodes
        node.args, node.kwargs = attention.call(arguments)
        for source in old:
            erase_unused(graph, source)


def read_codes(graph: Graph) -> None:
    """Give each attention in an aten graph the codes of a cache, and their scales, instead of their products."""
    infer = Inference()
    for node in graph.find_nodes(op="call_function", target=attention.overload):
        arguments = attention.bind(node.args, node.kwargs)
        found = {
            name: codes
            for name in ("k", "v")
            if arguments[f"{name}_scale"] is None and (codes := _codes(arguments[name], arguments["q"])) is not None
        }
        for name, (codes, scale) in found.items():
            arguments |= {name: codes, f"{name}_scale": scale}
        if not found or isinstance(infer(attention, arguments), str):
            continue
        old = node.all_input_nodes
        node.args, node.kwargs = attention.call(arguments)
        for source in old:
            erase_unused(graph, source)


def _codes(wide: Node, like: Node) -> tuple[Any, Node | None] | None:
    """The codes and the scale, None for 1, of which `wide` is the product, computed in float32 and rounded once."""
    dtype = like.meta["val"].dtype
    product = wide.args[0] if wide.target is CAST and wide.args[1] == dtype else wide
    if not isinstance(product, Node):
        return None
    if wide.target is CAST:
        # 16 bits of a float hold each code.
        exact = product.args[0] if product.target is CAST and product.args[1] in FLOATS else product
        if _holds_codes(exact):
            return exact, None
    if product.target is not aten.mul.Tensor or product.meta["val"].dtype not in (torch.float32, dtype):
        return None
    factors: Any = product.args
    for codes, scale in (factors, factors[::-1]):
        cast = isinstance(codes, Node) and codes.target is CAST and isinstance(scale, Node)
        if cast and _holds_codes(codes.args[0]) and scale.meta["val"].numel() == 1:
            return codes.args[0], scale
    return None


def _holds_codes(node: Any) -> bool:
    return isinstance(node, Node) and (val := value(node)) is not None and val.dtype in CODE_DTYPES


def _unrepeated(node: Node) -> Node | None:
    """What `x[:, :, None].expand(batch, heads, n, positions, width).reshape(...)` repeats, as `repeat_kv` spells it."""
    chain: list[Any] = [node]
    for targets in (VIEWS, (aten.clone.default,), (aten.expand.default,), (aten.unsqueeze.default,)):
        if chain[-1].target not in targets:
            return None
        chain.append(chain[-1].args[0])
    view, _, expand, unsqueeze, source = chain
    if unsqueeze.args[1] != -3:
        return None
    *batch, heads, positions, width = source.meta["val"].shape
    joined = (*batch, heads * expand.meta["val"].shape[-3], positions, width)
    return source if same_shape(view.meta["val"].shape, joined) else None
