"""What a compiled graph assumes of sizes, and the strides of what it returns."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from ..graphs import aten, differs, inherit, same_shape


def guards(inputs: Sequence[Any]) -> str | None:
    """What is assumed of the sizes among `inputs`, as the expression that torch's own cache keeps; None: nothing."""
    symbols = _symbols(inputs)
    if not symbols:
        return None
    return _assumed(symbols)


def holds(guards: str | None, inputs: Sequence[Any]) -> bool:
    """Whether what was assumed of the sizes holds for `inputs` too; if so, Dynamo guards on it from now on."""
    symbols = _symbols(inputs)
    if not guards or not symbols:
        return True
    env = _env(symbols)
    hints = [symbol.node.hint for symbol in symbols]
    return bool(env.evaluate_guards_expression(guards, hints)) and bool(env.evaluate_guards_expression(guards, symbols))


def size_check(assumed: str | None) -> Callable[..., bool]:
    """Whether what `guards` found in some sizes holds for numbers in their place."""
    env = ShapeEnv()
    return lambda *numbers: assumed is None or bool(env.evaluate_guards_expression(assumed, list(numbers)))


def _assumed(sizes: Sequence[torch.SymInt]) -> str | None:
    """The part of what was assumed in this trace that concerns `sizes`, which `evaluate_guards_expression` takes."""
    env = _env(sizes)
    known = frozenset[Any]().union(*(size.node.expr.free_symbols for size in sizes))
    given = {size.node.expr for size in sizes}
    if not known <= given:
        return "False"  # a symbol that is only in a sum, say: torch has no way to write that down
    here = [guard for guard in env.guards if guard.expr.free_symbols <= known]
    expression: str | None = env.produce_guards_expression(placeholders=list(sizes), guards=here)
    return expression


def _env(symbols: Sequence[torch.SymInt]) -> ShapeEnv:
    env = symbols[0].node.shape_env
    assert env is not None
    return env


def _symbols(inputs: Sequence[Any]) -> list[torch.SymInt]:
    sizes = [s for x in inputs for s in ((*x.shape, *x.stride()) if isinstance(x, torch.Tensor) else (x,))]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


def keep_strides(graph: Graph, wanted: Sequence[Any]) -> None:
    """Give each output the strides of `wanted`, in place: a decomposition may have others than eager mode has.

    Only dense tensors can be: `torch.cat` of one tensor and an empty one is contiguous in eager mode, and keeps the
    one's strides once decomposed.
    """
    output = graph.find_nodes(op="output")[0]
    results = list(output.args[0])
    if len(results) != len(wanted):
        return
    for i, (node, want) in enumerate(zip(results, wanted, strict=True)):
        have = node.meta.get("val") if isinstance(node, Node) else None
        if not isinstance(want, torch.Tensor) or not isinstance(have, torch.Tensor) or differs(have, want) is None:
            continue
        order = _dense_order(want.shape, want.stride())
        if order is None or not same_shape(have.shape, want.shape):
            continue
        contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
        with graph.inserting_before(output):
            for target, args, kwargs in (
                (aten.permute.default, (order,), {}),
                (aten.clone.default, (), contiguous),
                (aten.permute.default, (sorted(range(want.dim()), key=order.__getitem__),), {}),
            ):
                new = graph.call_function(target, (node, *args), kwargs)
                with have.fake_mode:  # type: ignore[attr-defined]
                    new.meta = inherit(node, target(node.meta["val"], *args, **kwargs))
                node = new
        results[i] = node
        if recorded := output.meta.get("original_output_strides"):  # 2.14 writes them down before
            recorded[i] = node.meta["val"].stride()
    output.args = (type(output.args[0])(results),)


def _dense_order(shape: Sequence[Any], strides: Sequence[Any]) -> list[int] | None:
    """The dimensions from the outermost to the innermost; None where the elements do not fill their memory."""
    hints: list[Any] = [s.node.hint if isinstance(s, torch.SymInt) else s for s in strides]
    order = sorted(range(len(hints)), key=lambda d: -hints[d])
    expected: Any = 1
    for d in reversed(order):
        if not statically_known_true(strides[d] == expected) and not statically_known_true(shape[d] == 1):
            return None
        expected = expected * shape[d]
    return order
