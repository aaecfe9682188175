"""One meaning, one spelling. Graphs and the rules' own spellings go through the same function.

No rewrite here changes a single bit of any result.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node

from ..graphs import CAST, COMMUTATIVE, VIEWS, aten, inherit, same_shape, value

_SCALAR_FORMS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
_PROMOTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var_mean.correction)
_ALIASES = (
    *VIEWS, aten.alias.default, aten.detach.default, aten.permute.default, aten.t.default, aten.transpose.int, getitem,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.unsqueeze.default, aten.view.dtype,
)  # fmt: skip


END = 2**63 - 1
"""Where a slice ends that has no end, as it is traced."""


def normalize(graph: Graph) -> None:
    """Rewrite `graph` in place: canonical operators and dims, no-ops gone, common subexpressions merged."""
    escaping = _escaping(graph)
    seen: dict[tuple[Any, str, str], Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue

        def make(target: Any, args: tuple[Any, ...], val: torch.Tensor, node: Node = node) -> Node:
            with graph.inserting_before(node):
                new = graph.call_function(target, args)
            new.meta = inherit(node, val)
            twin = seen.setdefault(_key(new), new)
            if twin is not new:
                graph.erase_node(new)
            return twin

        _canonical(node, make)
        twin = _no_op(node) if node not in escaping else None
        if twin is None and _pure(node):
            twin = seen.setdefault(_key(node), node)
            # Two outputs that shared one buffer would change together when the caller writes to one.
            if twin is node or (node in escaping and twin in escaping):
                continue
            escaping |= {twin} if node in escaping else set()
        if twin is not None:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
    # What a rewrite left behind would count as a reader.
    graph.eliminate_dead_code()


_Make = Callable[[Any, tuple[Any, ...], torch.Tensor], Node]


def _canonical(node: Node, make: _Make) -> None:
    """Rewrite one node; `make(target, args, val)` gives a node in front of it."""
    target: Any = node.target
    args: Any = node.args
    if target in (*VIEWS, aten.expand.default):
        node.args = args = (args[0], _written_out(node), *args[2:])
    if target is getitem and args[0].target in (aten.split.Tensor, aten.split_with_sizes.default):
        _part(node)
        target, args = node.target, node.args
    if target is getitem and args[0].target is aten.unbind.int:
        source, *rest = args[0].args
        node.target, node.args = aten.select.int, (source, rest[0] if rest else 0, args[1])
        target, args = node.target, node.args
    if target is aten.slice.Tensor:
        node.args = _bounds(node)
    if target in (aten.select.int, aten.squeeze.dim) and args[1] >= 0:
        node.args = args = (args[0], args[1] - args[0].meta["val"].dim(), *args[2:])
    if target is aten.select.int and args[0].target is aten.select_scatter.default:
        _selected_beside(node)
    if target in _SCALAR_FORMS:
        node.target = _SCALAR_FORMS[target]
    if target in _REDUCTIONS and len(args) > 1 and isinstance(args[1], list | tuple):
        rank = args[0].meta["val"].dim()
        node.args = (args[0], [d - rank if d >= 0 else d for d in args[1]], *args[2:])
    elif target is aten.pow.Tensor_Scalar and args[1] == 2:
        node.args = (args[0], 2)
    elif target is aten.pow.Tensor_Scalar and args[1] == -0.5:
        node.target, node.args = aten.rsqrt.default, (args[0],)
    elif target is aten.mul.Tensor and args[0] is args[1] and _squares(node):
        node.target, node.args = aten.pow.Tensor_Scalar, (args[0], 2)
    elif target is aten.clamp.default and len(args) == 3 and None not in args:
        lower = make(aten.clamp_min.default, (args[0], args[1]), node.meta["val"])
        node.target, node.args = aten.clamp_max.default, (lower, args[2])
    elif target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        node.target, node.args, node.kwargs = CAST, (args[0], node.kwargs["dtype"]), {}
    elif target is aten.unsqueeze.default:
        node.args = (args[0], args[1] if args[1] < 0 else args[1] - node.meta["val"].dim())
        _keep_dimension(node)
    elif target is aten.view.dtype:
        _reinterpret_once(node)
    elif target in (*VIEWS, aten.squeeze.dim) and args[0].target is aten.view.dtype:
        _reinterpret_last(node, make)
    elif target is aten.lift_fresh_copy.default:
        _literal(node)
    elif target in _PROMOTING:
        node.args = tuple(_promoted(node, i, make) for i in range(len(args)))


def _written_out(node: Node) -> list[Any]:
    """The sizes that a view is given, with the number that a -1 among them stands for, where it is one."""
    given: Any = node.args[1]
    made = zip(given, node.meta["val"].shape, strict=True)
    return [size if want == -1 and isinstance(size, int) else want for want, size in made]


def _part(node: Node) -> None:
    """A part of a split as a slice."""
    source: Any = node.args[0]
    index: Any = node.args[1]
    x, _, *rest = source.args
    dim = rest[0] if rest else source.kwargs.get("dim", 0)
    parts = [val.shape[dim] for val in source.meta["val"]]
    start = sum(parts[:index])
    node.target, node.args = aten.slice.Tensor, (x, dim, start, start + parts[index])


def _selected_beside(node: Node) -> None:
    """A part of a tensor of which another part was replaced, as the part of the tensor itself."""
    source, dim, index = node.args
    base, _, where, other = source.args  # type: ignore[union-attr]
    rank = base.meta["val"].dim()  # type: ignore[union-attr]
    apart = isinstance(index, int) and isinstance(other, int) and index >= 0 and other >= 0 and index != other
    if apart and dim % rank == where % rank and _alike(base, source):
        node.args = (base, dim, index)


def _alike(a: Any, b: Any) -> bool:
    before, after = a.meta["val"], b.meta["val"]
    return same_shape(before.shape, after.shape) and same_shape(before.stride(), after.stride())


def _bounds(node: Node) -> tuple[Any, ...]:
    """The arguments of a slice, with its dimension counted from the last, and no end where it is the end."""
    x: Any = node.args[0]
    given: list[Any] = [*node.args[1:]]
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    val = x.meta["val"]
    size = val.shape[dim]
    # As `x[..., start:]` is traced.
    whole = end is None or (isinstance(end, int) and isinstance(size, int) and end >= size)
    made = (x, dim - val.dim() if dim >= 0 else dim, 0 if start is None else start, END if whole else end)
    return made if step == 1 else (*made, step)


def _squares(node: Node) -> bool:
    """Whether `pow` squares this dtype as `mul` does: it promotes booleans, and knows no 8-bit floats."""
    val = value(node)
    return val is not None and val.is_floating_point() and val.dtype.itemsize > 1


def _keep_dimension(node: Node) -> None:
    """`reduce(x, [d]).unsqueeze(d)` as `reduce(x, [d], keepdim=True)`."""
    source: Any = node.args[0]
    if source.target not in (aten.mean.dim, aten.amax.default, aten.amin.default):
        return
    dims = (source.args[1] if len(source.args) > 1 else None) or []
    kept = len(source.args) > 2 and source.args[2]
    rank = node.meta["val"].dim()
    if kept or source.kwargs or len(dims) != 1 or node.args[1] % rank != dims[0] % rank:
        return
    node.target, node.args = source.target, (source.args[0], dims, True)


def _same_width(node: Node) -> bool:
    before, after = value(node.args[0]), value(node)  # type: ignore[arg-type]
    return before is not None and after is not None and before.dtype.itemsize == after.dtype.itemsize


def _reinterpret_once(node: Node) -> None:
    """`x.view(a).view(b)` as `x.view(b)`, where all three dtypes have one width."""
    source: Any = node.args[0]
    if source.target is aten.view.dtype and _same_width(source) and _same_width(node):
        node.args = (source.args[0], node.args[1])


def _reinterpret_last(node: Node, make: _Make) -> None:
    """`x.view(dtype).view(shape)` as `x.view(shape).view(dtype)`."""
    source: Any = node.args[0]
    if not _same_width(source):
        return
    val, (inner, dtype) = node.meta["val"], source.args
    with val.fake_mode:
        shaped = make(node.target, (inner, *node.args[1:]), val.view(inner.meta["val"].dtype))
    node.target, node.args = aten.view.dtype, (shaped, dtype)


def _literal(node: Node) -> None:
    """A constant of one number, `torch.tensor(3)` in the model, as `torch.full([], 3)`."""
    source: Any = node.args[0]
    module, val = node.graph.owning_module, node.meta["val"]
    constant = getattr(module, source.target, None) if source.op == "get_attr" else None
    if not isinstance(constant, torch.Tensor) or constant.dim() != 0:
        return
    with unset_fake_temporarily():
        node.target, node.args = aten.full.default, ([], constant.item())
    node.kwargs = {"dtype": val.dtype, "layout": torch.strided, "device": val.device, "pin_memory": False}


def _promoted(node: Node, index: int, make: _Make) -> Any:
    """The operand of a binary op with the widening cast that promotion does for it."""
    operand, other = node.args[index], node.args[1 - index]
    if not isinstance(operand, Node) or not isinstance(other, Node):
        return operand
    val, partner = value(operand), value(other)
    if val is None or partner is None or not val.is_floating_point() or 0 in (val.dim(), partner.dim()):
        return operand
    wide = torch.promote_types(val.dtype, partner.dtype)
    if wide == val.dtype or not partner.is_floating_point():
        return operand
    with val.fake_mode:  # type: ignore[attr-defined]
        return make(CAST, (operand, wide), val.to(wide))


def _no_op(node: Node) -> Node | None:
    """The input of a node that changes nothing."""
    source: Any = node.args[0] if node.args else None
    if node.target is aten.select.int and source.target is aten.select_scatter.default:
        _, part, dim, index = source.args
        rank = source.meta["val"].dim()
        same = node.args[1] % rank == dim % rank and node.args[2] == index
        return part if same and _alike(part, node) else None
    if node.target not in (*VIEWS, CAST, aten.view.dtype, aten.expand.default, aten.alias.default, aten.detach.default):
        return None
    before, after = value(source), node.meta["val"]
    if before is None or before.dtype != after.dtype or not _alike(source, node):
        return None
    return source  # type: ignore[no-any-return]


def _pure(node: Node) -> bool:
    if node.target is getitem:
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.kwargs.get("is_pure") is True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # An uninitialised buffer is not a value: two of them may be written apart.
    if node.target.overloadpacket in (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.is_impure()


def _key(node: Node) -> tuple[Any, str, str]:
    args: Any = node.args
    layout = ""
    if node.target in COMMUTATIVE and all(isinstance(a, Node) for a in args):
        args = tuple(sorted(args, key=lambda a: str(a.name)))
        # The result lies as the first operand does.
        val = value(node)
        layout = str(val.stride()) if val is not None else ""
    return node.target, repr(args), repr(node.kwargs) + layout


def _escaping(graph: Graph) -> set[Node]:
    """The nodes whose memory the caller receives: outputs, and what they are views of."""
    pending = [n for out in graph.find_nodes(op="output") for n in out.all_input_nodes]
    found: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node.target in _ALIASES:
                pending += node.all_input_nodes
    return found
