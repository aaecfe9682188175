"""mixtures: transformers' experts over grouped products → the op, on GPUs, where they mean the same."""

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graphs import CAST, VIEWS, aten, erase_unused, inherit, source_line, where, writers
from ..infer import Inference
from ..match import Match
from ..ops.activation import clamped_swiglu, gelu_mul, silu_mul
from ..ops.moe import experts
from ..report.trace import GraphTrace, Record
from .recognise import disabled, replace

DEVICES = ("cuda",)
"""Where the op may have kernels; elsewhere PyTorch's products are best left as they are."""
RULE = "experts.grouped_mm"
_END = 2**63 - 1
_WHOLE: list[Any] = [0, 0, _END, 1]
"""The defaults of a slice: axis, start, end, step."""


def mixtures(graph: Graph, trace: GraphTrace, disable: frozenset[str] = frozenset(), verify: bool = False) -> None:
    """Replace each mixture by the op, in place; record the missed and the refused.

    A mixture is anchored at its second product. It has to be exactly what transformers writes: pairs sorted by expert,
    two products by group, with a bias or without, a gated activation in between, weights, and a sum over what each
    token chose.
    """
    infer, written = Inference(), writers(graph)
    for down in graph.find_nodes(op="call_function", target=aten._grouped_mm.default):
        rows = down.args[0].args[2] if _is(down.args[0], aten.where.self) else down.args[0]
        if down.meta["val"].device.type not in DEVICES or _is(rows, aten.index.Tensor):
            continue  # that is the first of the two, which reads the tokens themselves
        try:
            match = _Walk(down).match()
        except _OtherError as other:
            trace.missed.append(_record(down, f"{other.args[0]}, where the op wants {other.args[1]}"))
            continue
        refusal = disabled(RULE, experts, disable)
        if refusal is None:
            names = {node.name for node in match.interior()}
            given = {name: _turned(graph, v) if isinstance(v, _Transpose) else v for name, v in match.arguments.items()}
            arguments = experts.bind((), given)
            refusal = replace(graph, RULE, experts, arguments, match, (), infer, written, verify, "")
            for name in ("up", "down"):
                erase_unused(graph, arguments[name])
        if refusal is not None:
            trace.refused.append(_record(down, refusal))
        else:
            # What a part of it nearly was does not matter any more.
            trace.missed = [record for record in trace.missed if record.node not in names]


@dataclass(frozen=True)
class _Transpose:
    """Weights of [experts, in, out], which the op takes transposed."""

    weight: Node


def _turned(graph: Graph, given: _Transpose) -> Node:
    with graph.inserting_after(given.weight):
        node = graph.call_function(aten.permute.default, (given.weight, [0, 2, 1]))
    node.meta = inherit(given.weight, given.weight.meta["val"].permute(0, 2, 1))
    return node


def _record(down: Node, reason: str) -> Record:
    return Record(experts.name, RULE, reason, where(down), source_line(down), node=down.name)


class _OtherError(Exception):
    """What was found, and what was looked for."""


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


class _Walk:
    """The nodes of a mixture, from its second product up to its inputs and down to its result."""

    def __init__(self, down: Node) -> None:
        self.down = down
        self.seen: dict[Node, Node] = {}
        self.masks: list[tuple[Any, Any]] = []
        self.biased: list[tuple[Any, Any]] = []

    def match(self) -> Match:
        """The mixture, with the arguments of the op.

        Raises:
            _OtherError: it is none.
        """
        reader = self._reader(self.down)
        last = reader if _is(reader, aten.add.Tensor) else self.down
        hidden, down, ends, down_bias = self._product(last)
        first, activated = self._activated(hidden)
        rows, up, other, up_bias = self._product(self._unmasked(first))
        if other is not ends:
            raise _OtherError("the products have other groups", "the same in both")
        count = ends.meta["val"].shape[0]
        x, order, ids, top = self._order(self._unmasked(rows), ends, count)
        result, weights = self._result(last, order, top)
        sort = order.args[0]
        for owners, found in self.masks:
            if not _is(owners, getitem) or owners.args != (sort, 0) or found != count:
                raise _OtherError("rows are hidden for another reason", "those of no expert hidden")
        for owners, found in self.biased:
            if not _is(owners, getitem) or owners.args != (sort, 0) or found not in (None, count - 1):
                raise _OtherError("what is added is not that of each row's expert", "its bias")
        given = {"x": x, "up": up, "down": down, "ids": ids, "weights": weights, **activated}
        return Match(self.seen, (result,), {**given, "up_bias": up_bias, "down_bias": down_bias})

    def _take(self, node: Any, what: str, *targets: Any) -> Node:
        """`node`, which calls one of `targets`, as a part of the mixture."""
        if not _is(node, *targets):
            raise _OtherError(f"there is {getattr(node, 'name', node)}", what)
        self.seen[node] = node
        found: Node = node
        return found

    def _unmasked(self, node: Any) -> Any:
        """`node` before rows of no expert were made zeros in it, as some versions do; the op has none of these."""
        if not _is(node, aten.where.self):
            return node
        mask, zero, value = self._given(node, "", aten.where.self)
        column, axis = self._given(mask, "a column that hides rows", aten.unsqueeze.default)
        self.masks.append(self._given(column, "pairs of no expert", aten.ge.Scalar)[:2])
        if self._take(zero, "zeros", aten.scalar_tensor.default).args[0] != 0 or axis not in (-1, 1):
            raise _OtherError("hidden rows are not zeros", "zeros")
        return value

    def _given(self, node: Any, what: str, *targets: Any) -> tuple[Any, ...]:
        """The arguments of a part of the mixture."""
        return self._take(node, what, *targets).args

    def _product(self, node: Any) -> tuple[Node, Node | _Transpose, Node, Node | None]:
        """Rows, weights as the op has them, the ends of groups and the bias of a product."""
        bias = None
        if _is(node, aten.add.Tensor):
            parts = self._given(node, "", aten.add.Tensor)
            added = [part for part in parts if not _is(part, aten._grouped_mm.default)]
            if len(added) != 1 or node.kwargs:
                raise _OtherError(f"{node.name} adds something else", "a product and its bias")
            node = next(part for part in parts if part is not added[0])
            bias, index = self._given(added[0], "a bias by expert", aten.index.Tensor)
            owners, most = _only(index), None
            if _is(owners, aten.clamp_max.default):
                owners, most = self._given(owners, "", aten.clamp_max.default)
            elif _is(owners, aten.clamp.default) and owners.args[1] is None:
                owners, _, most = self._given(owners, "", aten.clamp.default)
            self.biased.append((owners, most))
        product = self._take(node, "a product by group", aten._grouped_mm.default)
        if len(product.args) != 3 or product.kwargs:
            raise _OtherError("a product by group has a bias or another dtype", "none")
        rows, weight, ends = product.args
        if not _is(weight, aten.permute.default):
            return rows, _Transpose(weight), ends, bias  # type: ignore[arg-type, return-value]
        source, order = self._given(weight, "", aten.permute.default)
        if list(order) != [0, 2, 1]:
            raise _OtherError(f"weights are permuted by {order}", "[0, 2, 1]")
        return rows, source, ends, bias  # type: ignore[return-value]

    def _activated(self, hidden: Any) -> tuple[Node, dict[str, Any]]:
        """The first product, and how the op calls the activation of its columns."""
        known = {op.overload: op for op in (silu_mul, gelu_mul, clamped_swiglu)}
        acted = self._take(hidden, "an activation that it knows", *known)
        op = known[acted.target]  # type: ignore[index]
        given = op.bind(acted.args, acted.kwargs)
        product, interleaved = None, None
        for position, name in enumerate(("gate", "up")):
            source, *bounds = self._given(given[name], f"half a row as {name}", aten.slice.Tensor)
            axis, start, end, step = [*bounds, *_WHOLE[len(bounds) :]]
            width = source.meta["val"].shape[-1]
            half = (0, width // 2, 1) if position == 0 else (width // 2, _END, 1)
            parts = {half: False, (position, _END, 2): True}
            found = parts.get((start, _END if end == width else end, step))
            if axis not in (-1, 1) or found is None or (interleaved is not None and found is not interleaved):
                raise _OtherError(
                    f"{name} is [{start}:{end}:{step}] of {width}", "the gate in the first half, or at even places"
                )
            if product is not None and source is not product:
                raise _OtherError("gate and up are of two products", "both of one")
            product, interleaved = source, found
        assert isinstance(product, Node)
        names = {silu_mul: "silu", clamped_swiglu: "clamped_swiglu"}
        approximate = {"none": "gelu", "tanh": "gelu_tanh"}
        activation = names.get(op) or approximate[given["approximate"]]
        more: dict[str, Any] = {name: given[name] for name in ("alpha", "limit") if name in given}
        return product, {"activation": activation, "interleaved": interleaved, **more}

    def _order(self, rows: Any, ends: Any, count: Any) -> tuple[Any, Node, Node, Any]:
        """The tokens, the order of pairs, the experts of each token, and how many these are."""
        index = self._take(rows, "rows of tokens", aten.index.Tensor)
        token = self._take(_only(index.args[1]), "pairs divided by experts a token", aten.div.Tensor_mode)
        order = self._item(token.args[0], 1)
        top = token.args[1]
        if token.kwargs.get("rounding_mode") != "floor":
            raise _OtherError("pairs are not divided downwards", "their token")
        sums = self._take(ends, "ends of groups", aten.cumsum.default)
        counts = self._take(sums.args[0], "pairs of each expert", aten.histc.default)
        if [*counts.args[1:]] != [count, 0, count - 1] or sums.args[1] != 0:
            raise _OtherError(f"groups are counted with {counts.args[1:]}", f"each of {count} experts")
        owners = self._item(self._take(counts.args[0], "experts", CAST).args[0], 0)
        sort = self._take(order.args[0], "sorted experts", aten.sort.default)
        if owners.args[0] is not sort or len(sort.args) != 1 or sort.kwargs:
            raise _OtherError("pairs are sorted in another way", "by expert")
        return index.args[0], order, self._flat(sort.args[0], top), top

    def _item(self, node: Any, position: int) -> Node:
        item = self._take(node, "a result of sort", getitem)
        if item.args[1] != position:
            raise _OtherError(f"there is result {item.args[1]} of sort", str(position))
        return item

    def _flat(self, node: Any, top: Any) -> Node:
        """What lies behind a view of pairs in a row."""
        view = self._take(node, "a row of pairs", *VIEWS)
        source: Node = view.args[0]  # type: ignore[assignment]
        shape = source.meta["val"].shape
        if len(shape) != 2 or shape[1] != top or view.meta["val"].dim() != 1:
            raise _OtherError(f"pairs are of {list(shape)}", f"{top} of each token")
        return source

    def _result(self, rows: Node, order: Node, top: Any) -> tuple[Node, Node]:
        """The weighted sum of the second product's rows, and the weights."""
        node = self._reader(rows)
        made = rows
        if _is(node, aten.where.self) and self._unmasked(node) is rows:
            rows, node = node, self._reader(node)
        if _is(node, CAST):
            rows, node = self._take(node, "a cast to float32", CAST), self._reader(node)
        product = self._take(node, "weighted rows", aten.mul.Tensor)
        (column,) = [one for one in product.args if one is not rows] or [None]
        wide = self._take(column, "a column of weights", aten.unsqueeze.default)
        weight = self._take(wide.args[0], "weights in the order of the rows", aten.index.Tensor)
        if wide.args[1] not in (-1, 1) or _only(weight.args[1]) is not order:
            raise _OtherError("weights are in another order", "that of the rows")
        weights = self._flat(weight.args[0], top)
        back = self._take(self._reader(product), "rows in the order of the pairs", aten.index.Tensor)
        places = self._take(_only(back.args[1]), "the places of pairs", aten.index_put.default)
        self._take(places.args[0], "an empty row", aten.empty.memory_format)
        count = self._take(places.args[2], "numbers from 0 on", torch.ops.prims.iota.default)
        if _only(places.args[1]) is not order or (count.kwargs.get("start"), count.kwargs.get("step")) != (0, 1):
            raise _OtherError("rows are put back in another order", "that of the pairs")
        apart = self._take(self._reader(back), "the rows of each token", *VIEWS)
        shape = apart.meta["val"].shape
        if len(shape) != 3 or shape[1] != top:
            raise _OtherError(f"rows are viewed as {list(shape)}", f"{top} of each token")
        total = self._take(self._reader(apart), "the sum of a token's rows", aten.sum.dim_IntList)
        _, axes, *more = self._given(total, "the sum of a token's rows", aten.sum.dim_IntList)
        if list(axes) not in ([-2], [1]) or more or total.kwargs:
            raise _OtherError(f"rows are summed over {axes}", "those of each token")
        if total.meta["val"].dtype != made.meta["val"].dtype:
            total = self._take(self._reader(total), "a cast of the sum", CAST)
        return total, weights

    def _reader(self, node: Node) -> Node:
        """The only one that reads `node`."""
        if len(node.users) != 1:
            raise _OtherError(f"{node.name} is read {len(node.users)} times", "one reader")
        return next(iter(node.users))


def _only(given: Any) -> Any:
    """The single index of a list."""
    return given[0] if isinstance(given, list | tuple) and len(given) == 1 else None
