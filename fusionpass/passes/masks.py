"""masks: attention masks of Dynamo's graph that are proven to be causal, or to hide nothing, become arguments of SDPA.

While a model is traced, transformers builds the mask that it leaves out in eager mode, and SDPA then reads it and
computes what it hides. Such a mask is computed from sizes alone. Here each value on the way is a formula in the indices
of its element (`arange` is its index, a broadcast drops one, `x[i]` puts one formula into another), also for sizes that
are symbols; the mask's own formula says what it is.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.nn.functional import scaled_dot_product_attention

from ..runtime.pieces import mutates
from .attend import call_of

NAME = "masks"
_INDEX = sympy.symbols("i:16", integer=True, nonnegative=True)


class _UnknownError(Exception):
    """Why a value has no formula."""


@dataclass(frozen=True)
class _Formula:
    """A tensor of integers or booleans.

    Args:
        sizes: of its dimensions; numbers or expressions in symbols.
        value: of the element at `_INDEX`; does not depend on the index of a dimension of size 1.
    """

    sizes: tuple[Any, ...]
    value: Any

    @staticmethod
    def of(sizes: tuple[Any, ...], value: Any) -> "_Formula":
        """The formula with what is known of the indices."""
        alone = {_INDEX[d]: sympy.Integer(0) for d, size in enumerate(sizes) if size == 1}
        return _Formula(sizes, value.xreplace(alone))


def masks(gm: GraphModule, disable: Collection[str] = ()) -> list[str]:
    """Give attention that has a causal mask `is_causal`, and none what hides nothing, in place.

    Args:
        gm: one of Dynamo's graphs; its nodes carry fake tensors as "example_value".
        disable: as `Config.disable`.

    Returns:
        What was found, a line for each kind of mask, with what keeps a mask where it is.
    """
    calls = gm.graph.find_nodes(op="call_function", target=scaled_dot_product_attention)
    if NAME in disable or not calls:
        return []
    written = _written(gm)
    formulas: dict[Node, _Formula] = {}
    found: Counter[str] = Counter()
    for node in calls:
        given = call_of(node)
        mask = given["attn_mask"]
        if not isinstance(mask, Node) or given["is_causal"]:
            continue
        try:
            kind = _kind(_formula(mask, formulas, written), given["query"], given["key"])
        except _UnknownError as reason:
            found[f"the mask stays: {reason}"] += 1
            continue
        found[f"the mask {'is causal' if kind else 'hides nothing'}, and is left out"] += 1
        node.args, node.kwargs = (), {**given, "attn_mask": None, "is_causal": kind}
    for node in reversed(gm.graph.nodes):
        if node in formulas and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return [f"{count} x attention: {line}" for line, count in found.items()]


def _written(gm: GraphModule) -> set[Node]:
    """All that a write in the graph may reach: what is written to, and what that may be a view of."""
    reached: set[Node] = set()
    waiting = [argument for node in gm.graph.nodes if mutates(node) for argument in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += node.all_input_nodes
    return reached


def _kind(mask: _Formula, query: Node, key: Node) -> bool:
    """Whether the mask is causal; False where it hides nothing."""
    if mask.value is sympy.true:
        return False
    rows, columns = (_INDEX[len(mask.sizes) - d] for d in (2, 1))
    lengths = [node.meta["example_value"].shape[-2] for node in (query, key)]
    distance = _at_most_zero(mask.value)
    if distance is not None and sympy.expand(distance - (columns - rows)) == 0:
        if _size(lengths[0]) != _size(lengths[1]):
            raise _UnknownError(f"it is causal, but there are {lengths[0]} queries and {lengths[1]} keys")
        return True
    raise _UnknownError(f"it shows {str(mask.value).replace(str(rows), 'query').replace(str(columns), 'key')}")


def _at_most_zero(value: Any) -> Any:
    """The integer expression that is at most zero where a comparison holds; None for other formulas."""
    if isinstance(value, sympy.Le):
        return value.lhs - value.rhs
    if isinstance(value, sympy.Lt):
        return value.lhs - value.rhs + 1
    if isinstance(value, sympy.Ge):
        return value.rhs - value.lhs
    if isinstance(value, sympy.Gt):
        return value.rhs - value.lhs + 1
    return None


def _formula(node: Node, known: dict[Node, _Formula], written: Collection[Node]) -> _Formula:
    """The formula of a node's value.

    Raises:
        _UnknownError: there is none.
    """
    waiting = [node]
    while waiting:
        current = waiting[-1]
        missing = [n for n in current.all_input_nodes if n not in known and _is_tensor(n)]
        if current in known or not missing:
            waiting.pop()
            if current not in known:
                known[current] = _evaluate(current, known, written)
        else:
            waiting += missing
    return known[node]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _evaluate(node: Node, known: dict[Node, _Formula], written: Collection[Node]) -> _Formula:
    if node.op not in ("call_function", "call_method"):
        raise _UnknownError(f"it depends on {node.name}, which is given")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # Up to torch 2.13 comparisons are methods: "__eq__".
    rule = _RULES.get(re.sub(r"^__(\w+)__$", r"\1", str(name)))
    if rule is None or not _is_tensor(node):
        raise _UnknownError(f"nothing is known of {name} ({node.name})")
    if node in written:
        raise _UnknownError(f"{node.name} may be written to")
    made: torch.Tensor = node.meta["example_value"]
    if made.dtype not in (torch.int64, torch.int32, torch.bool):
        raise _UnknownError(f"{node.name} is {made.dtype}")

    def formula(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        return known[value] if value in known else _number(value)

    args, kwargs = map_aggregate((node.args, node.kwargs), formula)
    return rule(tuple(_size(size) for size in made.shape), *args, **kwargs)


def _number(node: Node) -> Any:
    value = node.meta.get("example_value")
    if isinstance(value, int | float | bool | torch.SymInt):
        return value
    raise _UnknownError(f"it depends on {node.name}")


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _operand(value: Any, rank: int) -> Any:
    """The formula's value, or the number, as an element of a result of so many dimensions."""
    if isinstance(value, _Formula):
        return _moved(value, rank - len(value.sizes))
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int | torch.SymInt):
        return _size(value)
    raise _UnknownError(f"{value!r} is not a whole number")


def _moved(formula: _Formula, by: int) -> Any:
    """The value with each index that of `by` dimensions further behind."""
    return formula.value.xreplace({_INDEX[d]: _INDEX[d + by] for d in range(len(formula.sizes))})


def _elementwise(combine: Callable[..., Any], *kinds: type) -> Callable[..., _Formula]:
    def rule(sizes: tuple[Any, ...], *operands: Any, **options: Any) -> _Formula:
        if options:
            raise _UnknownError(f"nothing is known of {sorted(options)}")
        values = [_operand(value, len(sizes)) for value in operands]
        if not all(isinstance(value, kinds) for value in values):
            raise _UnknownError("booleans and numbers are mixed")
        return _Formula.of(sizes, combine(*values))

    return rule


def _arange(sizes: tuple[Any, ...], *ends: Any, **options: Any) -> _Formula:
    if options.get("dtype") not in (None, torch.int64, torch.int32) or options.get("out") is not None:
        raise _UnknownError("arange is not of integers")
    start, _, step = (0, *ends, 1) if len(ends) == 1 else (*ends, 1) if len(ends) == 2 else ends
    return _Formula.of(sizes, _operand(start, 0) + _operand(step, 0) * _INDEX[0])


def _filled(value: Any) -> Callable[..., _Formula]:
    def rule(sizes: tuple[Any, ...], *_: Any, dtype: Any = None, device: Any = None, **options: Any) -> _Formula:
        if dtype is not torch.bool or options:
            raise _UnknownError("a constant is not a boolean")
        return _Formula.of(sizes, value)

    return rule


def _same(sizes: tuple[Any, ...], x: Any, *args: Any, **options: Any) -> _Formula:
    """A move to another device, or a copy; a cast may round."""
    given = [*args, *options.values()]
    if any(isinstance(value, _Formula) for value in given):
        raise _UnknownError("it is cast")
    if any(isinstance(value, torch.dtype) and value not in (torch.int64, torch.bool) for value in given):
        raise _UnknownError("it is cast")
    is_boolean = isinstance(x.value, sympy.logic.boolalg.Boolean)
    if any(value is (torch.int64 if is_boolean else torch.bool) for value in given):
        raise _UnknownError("it is cast")
    return _Formula.of(sizes, x.value)


def _expand(sizes: tuple[Any, ...], x: _Formula, *_: Any) -> _Formula:
    return _Formula.of(sizes, _moved(x, len(sizes) - len(x.sizes)))


def _unsqueeze(sizes: tuple[Any, ...], x: _Formula, dim: int) -> _Formula:
    dim %= len(sizes)
    return _Formula.of(sizes, x.value.xreplace({_INDEX[d]: _INDEX[d + 1] for d in range(dim, len(x.sizes))}))


def _getitem(sizes: tuple[Any, ...], x: _Formula, index: Any) -> _Formula:
    """Slices with a start, new dimensions, and one tensor for each dimension."""
    items = list(index) if isinstance(index, tuple) else [index]
    if items and all(isinstance(item, _Formula) for item in items) and len(items) == len(x.sizes):
        # Negative positions count from the end; none of these may be.
        places = [_operand(item, len(sizes)) for item in items]
        if not all(place.is_nonnegative for place in places):
            raise _UnknownError("a position may be negative")
        return _Formula.of(sizes, x.value.xreplace(dict(zip(_INDEX, places, strict=False))))
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = len(x.sizes) - sum(item is not None and item is not Ellipsis for item in items)
        items[at : at + 1] = [slice(None)] * missing
    items += [slice(None)] * (len(x.sizes) - sum(item is not None for item in items))
    replaced, source, target = {}, 0, 0
    for item in items:
        if item is None:
            target += 1
            continue
        if not isinstance(item, slice) or item.step not in (None, 1) or not _is_start(item.start):
            raise _UnknownError(f"nothing is known of the index {item}")
        replaced[_INDEX[source]] = _INDEX[target] + (item.start or 0)
        source, target = source + 1, target + 1
    return _Formula.of(sizes, x.value.xreplace(replaced))


def _is_start(start: Any) -> bool:
    return start is None or (isinstance(start, int) and start >= 0)


def _cumsum(sizes: tuple[Any, ...], x: _Formula, *_: Any, **options: Any) -> _Formula:
    if x.value not in (sympy.false, sympy.Integer(0)) or options.keys() - {"dim"}:
        raise _UnknownError(f"the sum of {x.value} along a dimension")
    return _Formula.of(sizes, sympy.Integer(0))


def _diff(sizes: tuple[Any, ...], x: _Formula, *_: Any, dim: int = -1, prepend: Any = None, n: int = 1) -> _Formula:
    """Differences along the last dimension that are the same everywhere, the first to what is prepended too."""
    last = len(sizes) - 1
    if dim % len(sizes) != last or n != 1 or prepend is None or prepend.sizes[last] != 1:
        raise _UnknownError("nothing is known of these differences")
    step = sympy.expand(x.value - x.value.xreplace({_INDEX[last]: _INDEX[last] - 1}))
    first = sympy.expand(x.value.xreplace({_INDEX[last]: sympy.Integer(0)}) - prepend.value)
    if step != first or _INDEX[last] in step.free_symbols:
        raise _UnknownError("differences that are not all the same")
    return _Formula.of(sizes, step)


_NUMBER, _TRUTH = sympy.Expr, sympy.logic.boolalg.Boolean
_RULES: dict[str, Callable[..., _Formula]] = {
    "arange": _arange,
    "add": _elementwise(operator.add, _NUMBER),
    "sub": _elementwise(operator.sub, _NUMBER),
    "eq": _elementwise(sympy.Eq, _NUMBER),
    "ne": _elementwise(sympy.Ne, _NUMBER),
    "le": _elementwise(sympy.Le, _NUMBER),
    "lt": _elementwise(sympy.Lt, _NUMBER),
    "ge": _elementwise(sympy.Ge, _NUMBER),
    "gt": _elementwise(sympy.Gt, _NUMBER),
    **dict.fromkeys(("and_", "and", "bitwise_and", "logical_and"), _elementwise(sympy.And, _TRUTH)),
    **dict.fromkeys(("or_", "or", "bitwise_or", "logical_or"), _elementwise(sympy.Or, _TRUTH)),
    **dict.fromkeys(("invert", "bitwise_not", "logical_not"), _elementwise(sympy.Not, _TRUTH)),
    "new_ones": _filled(sympy.true),
    "ones": _filled(sympy.true),
    **dict.fromkeys(("to", "clone", "contiguous"), _same),
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "cumsum": _cumsum,
    "diff": _diff,
}
"""What a function or method does to formulas, by its name: the result's sizes, then the arguments."""
