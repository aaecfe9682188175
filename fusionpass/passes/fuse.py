"""fuse: neighbouring ops → a larger op. No op is made whose inputs, shapes and dtypes are not proven equal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from ..graphs import (
    differs,
    erase_unused,
    inherit,
    insert_outputs,
    is_view_of_rows,
    mutated,
    same_shape,
    value,
    values,
    writers,
)
from ..infer import Inference
from ..match import Attempt, anchor_key
from ..op import OPS, Op, Refusal
from ..report.trace import GraphTrace, Record, Site
from ..rule import Beside, Fold
from ..verify import check_rewrite
from .beside import beside, named_outputs, site_of
from .recognise import disabled


def fuse(
    graph: Graph,
    folds: Iterable[Fold | Beside],
    trace: GraphTrace,
    disable: frozenset[str] = frozenset(),
    verify: bool = False,
) -> None:
    """Fold neighbouring ops into larger ones, in place, until nothing changes; record the refused."""
    folds, infer, written = list(folds), Inference(), writers(graph)
    refused: dict[tuple[str, str], Record] = {}
    changed = True
    while changed:
        changed = False
        for node in [n for n in graph.nodes if n.target in OPS]:
            for fold in folds:
                if isinstance(fold, Beside) or node._erased or node.target is not fold.consumer.overload:
                    continue
                found = _producer(fold, node)
                if found is None:
                    continue
                refusal = (
                    found
                    if isinstance(found, str)
                    else _fold(graph, fold, node, found, infer, written, disable, verify)
                )
                if refusal is None:
                    changed = True
                    # What another fold could not do with this reader does not matter any more.
                    refused = {key: record for key, record in refused.items() if key[0] != node.name}
                    break
                site = site_of(node)
                refused[node.name, fold.name] = Record(
                    fold.fused.name, fold.name, refusal, site.where, site.source, node=node.name
                )
        # Only when nothing more folds: a half of a pair folds with nothing.
        for node in [n for n in graph.nodes if n.target in OPS] if not changed else ():
            for pair in folds:
                if isinstance(pair, Beside) and not node._erased and node.target is pair.first.overload:
                    changed |= beside(graph, pair, node, infer, written, trace, disable, verify)
    trace.refused += refused.values()


@dataclass(frozen=True)
class _Found:
    """A producer in front of a consumer.

    Attributes:
        read: the producer's output that the consumer reads.
        views: between that and the consumer, in order.
        given: the producer's arguments by name.
        nodes: the nodes that the producer consists of.
        asked: the consumer's arguments by name, without what it read.
    """

    read: Node
    views: tuple[Node, ...]
    given: Mapping[str, Any]
    nodes: tuple[Node, ...]
    asked: Mapping[str, Any]


def _producer(fold: Fold, consumer: Node) -> _Found | Refusal:
    """This fold's producer in front of `consumer`; None where there is none, a reason where it is not usable."""
    arguments = fold.consumer.bind(consumer.args, consumer.kwargs)
    first, *others = fold.reads or (next(iter(arguments)),)
    reason: Refusal = None
    for name in (first, *others):
        views: list[Node] = []
        node = arguments[name]
        while isinstance(node, Node) and is_view_of_rows(node):
            views.insert(0, node)
            node = node.args[0]
        found = _made_by(fold, node) if isinstance(node, Node) else None
        if isinstance(found, str):
            reason = found
        elif found is not None:
            # What is read may stand in another place, such as either operand of a sum: then the two change places.
            asked = {**arguments, name: arguments[first]}
            del asked[first]
            return _Found(node, tuple(views), *found, asked)
    return reason


def _made_by(fold: Fold, read: Node) -> tuple[Mapping[str, Any], tuple[Node, ...]] | Refusal:
    op = fold.producer
    if isinstance(op, Op):
        node = read if op.single else read.args[0] if read.op == "call_function" and read.args else None
        if not isinstance(node, Node) or node.target is not op.overload:
            return None
        given = op.bind(node.args, node.kwargs)
        if not op.single and (read.target is not getitem or op.outputs(given)[read.args[1]] != fold.output):  # type: ignore[index]
            return None
        return given, (node,)
    val = value(read)
    reason: Refusal = None
    for pattern in fold.patterns(val.device.type) if val is not None else ():
        found = pattern.search(read) if pattern.key == anchor_key(read) else None
        if isinstance(found, Attempt) and reason is None and pattern.size == 1:
            reason = found.reason
        for match in found if isinstance(found, list) else ():
            leak = match.leak(())
            if leak is None:
                return match.arguments, tuple(sorted(match.interior()))
            reason = f"{leak[0].name} is also read by {leak[1].name}, outside; the op would compute it twice"
    return reason


def _fold(
    graph: Graph,
    fold: Fold,
    consumer: Node,
    found: _Found,
    infer: Inference,
    written: Sequence[Node],
    disable: frozenset[str],
    verify: bool,
) -> Refusal:
    if reason := disabled(fold.name, fold.fused, disable):
        return reason
    joined = fold.joined(dict(found.given), dict(found.asked))
    if isinstance(joined, str):
        return joined
    arguments, renamed = joined
    kept = _kept(fold, consumer, found)
    flags = fold.fused.options
    arguments |= {flag: output in kept or bool(found.asked.get(flag)) for output, flag in flags.items()}
    arguments = fold.fused.bind((), {k: v for k, v in arguments.items() if k in fold.fused.signature.parameters})

    # Views that others read stay, and then they read the fused op's output.
    inside = {consumer, *found.views, *found.nodes, found.read}
    leaving = {consumer} if any(u not in inside for view in found.views for u in view.users) else inside
    consumed = named_outputs(fold.consumer, consumer)
    readers = [reader for node in kept.values() for reader in node.users if reader not in leaving]
    point = min([consumer, *readers])
    inputs = [a for a in arguments.values() if isinstance(a, Node)]
    twice = [a for a in inputs if a in inside]
    if twice:
        return f"{twice[0].name} is read by {consumer.name} more than once"
    late = [a for a in inputs if not a < point]
    if late:
        return f"{late[0].name} is computed after {point.name} reads the {fold.output}"
    if reason := mutated(written, min(found.nodes), point):
        return reason
    results = infer(fold.fused, arguments)
    if isinstance(results, str):
        return results
    names = fold.fused.outputs(arguments)
    by_name = dict(zip(names, results, strict=True))
    last = {renamed.get(name, name): node for name, node in consumed.items()}
    if both := sorted(kept.keys() & last.keys()):
        return f"{both[0]} of {fold.fused} would be two results, both of which are read"
    targets = {**kept, **last}
    for output, node in targets.items():
        if output not in by_name:
            return f"{fold.fused} does not return {output}, which is read"
        viewed = by_name[output] if output in kept else _views(found.views, by_name[output], node)
        difference = viewed if isinstance(viewed, str) else differs(viewed, node.meta["val"])
        if difference is not None:
            return f"{output}: {difference}"
    if verify:
        old = sorted({*found.nodes, found.read, *found.views, consumer, *consumed.values(), *kept.values()})
        order = [targets[name] for name in names if name in targets]
        if wrong := check_rewrite(old, order, fold.fused, arguments, [n for n in names if n in targets]):
            return wrong

    with graph.inserting_before(point):
        fused = graph.call_function(fold.fused.overload, *fold.fused.call(arguments))
    own = isinstance(fold.producer, Op)
    above, below = site_of(found.nodes[-1]), site_of(consumer)
    named = above if own else below
    fused.meta = inherit(found.nodes[-1] if own else consumer, results if not fold.fused.single else results[0])
    fused.meta["fusionpass"] = Site(
        (*above.rules, *below.rules, fold.name) if own else (*below.rules, fold.name),
        named.where,
        named.source,
        "; ".join(note for note in dict.fromkeys((above.note if own else "", below.note)) if note),
        (*(above.nodes if own else (n.name for n in found.nodes)), *(v.name for v in found.views), *below.nodes),
    )
    new = dict(zip(names, [fused] if fold.fused.single else insert_outputs(graph, fused, results), strict=True))
    for output, node in kept.items():
        node.replace_all_uses_with(new[output], delete_user_cb=lambda user: user not in leaving)
    for name, node in consumed.items():
        node.replace_all_uses_with(_viewed(graph, found.views, new[renamed.get(name, name)], node))
        erase_unused(graph, node)
    for node in (*new.values(), consumer, *found.nodes[-1].users, found.nodes[-1]):
        erase_unused(graph, node)
    return None


def _kept(fold: Fold, consumer: Node, found: _Found) -> dict[str, Node]:
    """The producer's outputs that somebody besides this fold reads, by name."""
    path = {*found.views, consumer}
    readers = {user for node in (found.read, *found.views) for user in node.users}
    others = {fold.output: found.read} if readers - path else {}
    if isinstance(fold.producer, Op) and not fold.producer.single:
        items = named_outputs(fold.producer, found.nodes[-1])
        others |= {name: item for name, item in items.items() if item is not found.read and item.users}
    return others


def _views(views: tuple[Node, ...], result: torch.Tensor, old: Node) -> torch.Tensor | str:
    """`result` with the rows grouped as in `old`, itself where they are; or why there is no such view."""
    expected: torch.Tensor = old.meta["val"]
    if not views or same_shape(result.shape, expected.shape):
        return result
    mode: FakeTensorMode = result.fake_mode  # type: ignore[attr-defined]
    try:
        with mode:
            made: torch.Tensor = views[-1].target(result, values(_shape(views, old)))  # type: ignore[operator]
    except (RuntimeError, ValueError) as error:
        return f"no view of it has the shape {list(expected.shape)}: {error}"
    return made


def _shape(views: tuple[Node, ...], old: Node) -> list[Any]:
    # A scale has fewer columns than the codes have.
    rows: Any = views[-1].args[1]
    return [*rows[:-1], old.meta["val"].shape[-1]]


def _viewed(graph: Graph, views: tuple[Node, ...], new: Node, old: Node) -> Node:
    val = _views(views, new.meta["val"], old)
    if val is new.meta["val"]:
        return new
    with graph.inserting_before(old):
        view = graph.call_function(views[-1].target, (new, _shape(views, old)))  # type: ignore[arg-type]
    view.meta = inherit(views[-1], val)
    return view
