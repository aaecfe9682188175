"""recognise: spelling → op. fuse: ops → op. Neither adds an op whose inputs, shapes and dtypes are not proven equal."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from ..graphs import (
    erase_unused,
    inherit,
    insert_outputs,
    is_view_of_rows,
    marks_a_site,
    outputs_of,
    same_shape,
    source_line,
    value,
    values,
    where,
)
from ..infer import Inference
from ..match import Attempt, Match
from ..op import OPS, Op, Refusal
from ..report.trace import GraphTrace, Record, Site
from ..rule import Fold, Spelling


def recognise(
    graph: Graph, spellings: Iterable[Spelling], trace: GraphTrace, disable: frozenset[str] = frozenset()
) -> None:
    """Replace each spelling by its op, in place; record the refused and the missed."""
    spellings, infer = list(spellings), Inference()
    for anchor in list(graph.nodes):
        if anchor.op != "call_function" or anchor._erased:
            continue
        furthest: tuple[Attempt, Spelling] | None = None
        for spelling in spellings:
            found = _search(spelling, anchor)
            if isinstance(found, list):
                for match in found:
                    refusal = _replace(graph, spelling, match, found, infer, disable)
                    if refusal is not None:
                        trace.refused.append(_record(spelling, match.root, refusal))
                break
            if found is not None and (furthest is None or found.matched > furthest[0].matched):
                furthest = found, spelling
        else:
            # A mean or an exponential alone is no candidate; half a spelling around it is.
            if furthest is not None and (marks_a_site(anchor) or 2 * furthest[0].matched >= furthest[0].total):
                attempt, spelling = furthest
                at = f" at {attempt.node.name}" if attempt.node is not None else ""
                reason = f"matched {attempt.matched} of {attempt.total} nodes, then{at}: {attempt.reason}"
                trace.missed.append(_record(spelling, anchor, reason))


def _search(spelling: Spelling, anchor: Node) -> list[Match] | Attempt | None:
    val = value(anchor)
    if val is None:
        return None
    furthest: Attempt | None = None
    matches: dict[Node, Match] = {}
    for pattern in spelling.patterns(val.device.type):
        if not pattern.fits(anchor):
            continue
        found = pattern.search(anchor)
        if isinstance(found, list):
            # The pattern with the cast comes first; the one without it would take the cast for its input.
            matches = {match.root: match for match in found} | matches
        elif furthest is None or found.matched > furthest.matched:
            furthest = found
    return list(matches.values()) or furthest


def _record(spelling: Spelling, anchor: Node, reason: str) -> Record:
    return Record(spelling.op.name, spelling.name, reason, where(anchor), source_line(anchor))


def _replace(
    graph: Graph, spelling: Spelling, match: Match, together: Iterable[Match], infer: Inference, disable: frozenset[str]
) -> Refusal:
    for name in (spelling.name, spelling.op.name):
        if name in disable:
            return f"{name} is disabled by Config.disable"
    leak = match.leak(together)
    if leak is not None:
        return f"{leak[0].name} is also read by {leak[1].name}, outside; the op would compute it twice"
    arguments = spelling.op.bind((), {**match.arguments, **spelling.constants})
    results = infer(spelling.op, arguments)
    if isinstance(results, str):
        return results
    difference = _differs(results[0], value(match.root))
    if difference is not None:
        return difference
    with graph.inserting_before(match.root):
        node = graph.call_function(spelling.op.overload, tuple(arguments.values()))
    site = Site((spelling.name,), where(match.root), source_line(match.root))
    node.meta = inherit(match.root, results[0] if spelling.op.single else results, {"fusionpass": site})
    output = node if spelling.op.single else insert_outputs(graph, node, results)[0]
    match.root.replace_all_uses_with(output)
    erase_unused(graph, match.root)
    return None


def _differs(new: torch.Tensor, old: torch.Tensor | None) -> Refusal:
    if old is None or new.dtype != old.dtype or not same_shape(new.shape, old.shape):
        expected = f"{old.dtype}{list(old.shape)}" if old is not None else "no tensor"
        return f"the op would return {new.dtype}{list(new.shape)}, the graph has {expected}"
    return None


def fuse(graph: Graph, folds: Iterable[Fold], trace: GraphTrace, disable: frozenset[str] = frozenset()) -> None:
    """Fold neighbouring ops into larger ones, in place, until nothing changes; record the refused."""
    folds, infer = list(folds), Inference()
    refused: dict[tuple[str, str], Record] = {}
    changed = True
    while changed:
        changed = False
        for node in [n for n in graph.nodes if n.target in OPS]:
            for fold in folds:
                path = None if node._erased or node.target is not fold.consumer.overload else _path(fold, node)
                if path is None:
                    continue
                refusal = _fold(graph, fold, path, infer, disable)
                if refusal is None:
                    changed = True
                    # What another fold could not do with this reader does not matter any more.
                    refused = {key: record for key, record in refused.items() if key[0] != node.name}
                    break
                site = _site(node)
                refused[node.name, fold.name] = Record(fold.fused.name, fold.name, refusal, site.where, site.source)
    trace.refused += refused.values()


def _site(node: Node) -> Site:
    site = node.meta.get("fusionpass")
    return site if isinstance(site, Site) else Site((), where(node), source_line(node))


def _path(fold: Fold, consumer: Node) -> list[Node] | None:
    """The nodes from the producer's output down to the consumer, if this fold's producer is there."""
    path = [consumer]
    node = consumer.args[0]
    while isinstance(node, Node) and is_view_of_rows(node):
        path.insert(0, node)
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    path.insert(0, node)
    if isinstance(fold.producer, Op):
        producer = node if fold.producer.single else node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(producer, Node) or producer.target is not fold.target:
            return None
        if fold.producer.single:
            return path
        names = fold.producer.outputs(fold.producer.bind(producer.args, producer.kwargs))
        index = node.args[1] if node is not producer else 0
        return path if isinstance(index, int) and names[index] == fold.output else None
    return path if node.target is fold.target else None


def _fold(graph: Graph, fold: Fold, path: list[Node], infer: Inference, disable: frozenset[str]) -> Refusal:
    for name in (fold.name, fold.fused.name):
        if name in disable:
            return f"{name} is disabled by Config.disable"
    read, *views, consumer = path
    own = isinstance(fold.producer, Op)
    producer = read if not own or fold.producer.single else read.args[0]  # type: ignore[union-attr]
    assert isinstance(producer, Node)
    given = _producer_arguments(fold, producer)
    if isinstance(given, str):
        return given
    kept = _kept(fold, producer, path)
    arguments = {**given, **dict(list(fold.consumer.bind(consumer.args, consumer.kwargs).items())[1:])}
    for output in kept:
        if output not in fold.fused.options:
            return f"{output} is also read by others, and {fold.fused} cannot return it"
    arguments |= {flag: output in kept for output, flag in fold.fused.options.items()}
    arguments = {name: arguments[name] for name in fold.fused.signature.parameters}

    inputs = [a for a in arguments.values() if isinstance(a, Node)]
    # Views that others read stay, and then they read the fused op's output.
    leaving = {consumer} if any(user not in path for view in views for user in view.users) else set(path)
    point = min([consumer, *(reader for node in kept.values() for reader in node.users if reader not in leaving)])
    late = [a for a in inputs if not a < point]
    if late:
        return f"{late[0].name} is computed after {point.name} reads the {fold.output}"
    results = infer(fold.fused, arguments)
    if isinstance(results, str):
        return results
    names = fold.fused.outputs(arguments)
    for output, node in kept.items():
        difference = _differs(results[names.index(output)], value(node))
        if difference is not None:
            return f"{output}: {difference}"

    with graph.inserting_before(point):
        fused = graph.call_function(fold.fused.overload, tuple(arguments.values()))
    above, below = _site(producer), _site(consumer)
    named = above if own else below
    fused.meta = inherit(producer if own else consumer, results if not fold.fused.single else results[0])
    fused.meta["fusionpass"] = Site(
        (*above.rules, *below.rules, fold.name) if own else (*below.rules, fold.name), named.where, named.source
    )
    by_name = dict(zip(names, insert_outputs(graph, fused, results), strict=True))
    for output, node in kept.items():
        node.replace_all_uses_with(by_name[output], delete_user_cb=lambda user: user not in leaving)
    _replace_consumer(graph, fold, consumer, views, by_name)
    for node in (*by_name.values(), consumer, *producer.users, producer):
        erase_unused(graph, node)
    return None


def _producer_arguments(fold: Fold, producer: Node) -> dict[str, Any] | str:
    if isinstance(fold.producer, Op):
        return fold.producer.bind(producer.args, producer.kwargs)
    if producer.kwargs:
        return f"{producer.name} is called with {dict(producer.kwargs)}"
    if not all(isinstance(a, Node) for a in producer.args):
        return f"{producer.name} adds a number, not a tensor"
    return dict(zip(fold.names, producer.args, strict=True))


def _kept(fold: Fold, producer: Node, path: list[Node]) -> dict[str, Node]:
    """The producer's outputs that somebody besides this fold reads, by name."""
    read, *rest = path
    others = {fold.output: read} if any(u not in path for node in [read, *rest[:-1]] for u in node.users) else {}
    if isinstance(fold.producer, Op) and not fold.producer.single:
        names = fold.producer.outputs(fold.producer.bind(producer.args, producer.kwargs))
        others |= {names[i]: item for i, item in outputs_of(producer).items() if item is not read and item.users}
    return others


def _replace_consumer(graph: Graph, fold: Fold, consumer: Node, views: list[Node], by_name: Mapping[str, Node]) -> None:
    names = fold.consumer.outputs(fold.consumer.bind(consumer.args, consumer.kwargs))
    old = {0: consumer} if fold.consumer.single else outputs_of(consumer)
    for index, node in old.items():
        new = by_name[names[index]]
        with graph.inserting_before(node):
            for view in views:
                # A scale has one column where the codes have a row.
                shape = list(view.args[1])  # type: ignore[arg-type]
                if names[index] == "scale":
                    shape[-1] = 1
                viewed = graph.call_function(view.target, (new, shape))  # type: ignore[arg-type]
                viewed.meta = inherit(view, _viewed(view, new, values(shape)))
                new = viewed
        node.replace_all_uses_with(new)
        erase_unused(graph, node)


def _viewed(view: Node, new: Node, shape: Any) -> torch.Tensor:
    val = new.meta["val"]
    mode: FakeTensorMode = val.fake_mode
    with mode:
        result: torch.Tensor = view.target(val, shape)  # type: ignore[operator]
    return result
