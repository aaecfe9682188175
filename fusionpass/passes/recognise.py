"""recognise: spelling → op. No op is made whose inputs, shapes and dtypes are not proven equal."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graphs import (
    differs,
    erase_unused,
    inherit,
    insert_outputs,
    marks_a_site,
    mutated,
    source_line,
    value,
    where,
    writers,
)
from ..infer import Inference
from ..match import Attempt, Match, Pattern, Reached, anchor_key, links
from ..op import Op, Refusal
from ..ops.quant import Scheme
from ..report.trace import GraphTrace, Record, Site
from ..rule import Spelling
from ..verify import check_rewrite


def recognise(
    graph: Graph,
    spellings: Iterable[Spelling],
    trace: GraphTrace,
    disable: frozenset[str] = frozenset(),
    verify: bool = False,
) -> None:
    """Replace each spelling by its op, in place; record the refused and the missed."""
    spellings = list(spellings)
    infer, index, written = Inference(), _index(spellings, graph), writers(graph)
    missed: dict[Node, Record] = {}
    shared: dict[Spelling, list[tuple[Match, Record]]] = {}
    for anchor in list(graph.nodes):
        if anchor.op != "call_function" or anchor._erased or anchor_key(anchor) not in index:
            continue
        near = index[anchor_key(anchor)]
        reached: Reached = {}
        candidates: list[tuple[Spelling, list[Match]]] = []
        for spelling, patterns in near.items():
            found = _search(spelling, [p for p in patterns if p.plausible(anchor, reached)], anchor)
            if isinstance(found, list):
                candidates.append((spelling, found))
        # What takes most comes first: one row has one scale, and would pass for static; a cast would pass for an input.
        candidates.sort(key=lambda pair: -max(len(match.interior()) for match in pair[1]))
        refused: list[Record] = []
        fused = False
        for spelling, matches in candidates:
            known = len(refused)
            note = "; ".join(f"not {record.rule}: {record.reason}" for record in refused)
            for match in matches:
                if any(node._erased for node in match.nodes.values()):
                    continue  # the one before it took what this one reads
                arguments = _arguments(spelling, match)
                refusal = disabled(spelling.name, spelling.op, disable) or replace(
                    graph, spelling.name, spelling.op, arguments, match, matches, infer, written, verify, note
                )
                if refusal is not None:
                    refused.append(_record(spelling, match.root, refusal))
                    shared.setdefault(spelling, []).append((match, refused[-1]))
            if len(refused) - known < len(matches):
                # What a longer spelling could not do here is the op's own note now.
                refused, fused = refused[known:], True
            if fused or disabled(spelling.name, spelling.op, disable):
                break
        if not fused:
            # The first spelling is the longest: it says best what is in the way.
            refused = [record for record in refused if record.rule == refused[0].rule]
            # A mean or an exponential alone is no candidate; half a spelling around it is.
            furthest = None if refused else _furthest(near, anchor)
            if furthest is not None:
                attempt, spelling = furthest
                if marks_a_site(anchor) or 2 * attempt.matched > attempt.total:
                    at = f" at {attempt.node.name}" if attempt.node is not None else ""
                    reason = f"matched {attempt.matched} of {attempt.total} nodes, then{at}: {attempt.reason}"
                    missed[anchor] = _record(spelling, anchor, reason)
        trace.refused += refused
    for spelling, waiting in shared.items():
        # Nor may what two of them share keep both: two static scales of one tensor have its maxima in common.
        together = [match for match, _ in waiting if not any(node._erased for node in match.nodes.values())]
        for match, record in waiting if len(together) > 1 else ():
            if match in together and record in trace.refused:
                taken = any(node._erased for node in match.nodes.values())
                refusal = disabled(spelling.name, spelling.op, disable)
                if refusal is None and not taken:
                    arguments = _arguments(spelling, match)
                    refusal = replace(
                        graph, spelling.name, spelling.op, arguments, match, together, infer, written, verify, ""
                    )
                trace.refused = [r for r in trace.refused if r is not record or refusal is not None]
    # What a later match took is no miss.
    trace.missed += [record for anchor, record in missed.items() if not anchor._erased]


def _furthest(near: Mapping[Spelling, list[Pattern]], anchor: Node) -> tuple[Attempt, Spelling] | None:
    """The attempt that got furthest from an anchor where nothing matches."""
    furthest: tuple[Attempt, Spelling] | None = None
    for spelling, patterns in near.items():
        found = _search(spelling, patterns, anchor)
        if isinstance(found, Attempt) and (furthest is None or found.matched > furthest[0].matched):
            furthest = found, spelling
    return furthest


def disabled(name: str, op: Op, disable: frozenset[str]) -> Refusal:
    """The reason why a rule or its op may not be used."""
    found = [n for n in (name, op.name) if n in disable]
    return f"{found[0]} is disabled by Config.disable" if found else None


_Index = dict[Any, dict[Spelling, list[Pattern]]]


def _index(spellings: list[Spelling], graph: Graph) -> _Index:
    """The patterns by what they are anchored at, each spelling's together, for the devices in the graph."""
    devices = {val.device.type for node in graph.nodes if (val := value(node)) is not None}
    present = links(graph)
    dtypes = {val.dtype for node in graph.nodes if node.op == "call_function" and (val := value(node)) is not None}
    index: _Index = {}
    for spelling in spellings:
        if "scheme" in spelling.constants and not _coded(spelling.constants["scheme"], dtypes):
            continue  # they start at a cast to codes; tracing them takes a while
        for device in sorted(devices):
            for pattern in spelling.patterns(device, present):
                index.setdefault(pattern.key, {}).setdefault(spelling, []).append(pattern)
    return index


def _coded(scheme: str, dtypes: Container[torch.dtype]) -> bool:
    """Whether values of these dtypes can be codes of a scheme; packed ones are bytes."""
    kind = Scheme.parse(scheme)
    return (torch.uint8 if kind.packed else kind.dtype) in dtypes


def _search(spelling: Spelling, patterns: Iterable[Pattern], anchor: Node) -> list[Match] | Attempt | None:
    furthest: Attempt | None = None
    matches: dict[tuple[Node, ...], Match] = {}
    for pattern in patterns:
        found = pattern.search(anchor)
        if isinstance(found, list) and spelling.refuse is not None:
            reasons = {match.outputs: spelling.refuse(match.arguments) for match in found}
            found = [match for match in found if reasons[match.outputs] is None] or Attempt(
                pattern.size, pattern.size, anchor, "; ".join(str(reason) for reason in reasons.values())
            )
        if isinstance(found, list):
            # The pattern with the cast comes first; the one without it would take the cast for its input.
            matches = {match.outputs: match for match in found} | matches
        elif furthest is None or found.matched > furthest.matched:
            furthest = found
    inside = {match: match.interior() for match in matches.values()}
    # With one late rounding, the pattern for float32 finds all but the casts of what the other finds.
    return [m for m, nodes in inside.items() if not any(nodes < others for others in inside.values())] or furthest


def _arguments(spelling: Spelling, match: Match) -> dict[str, Any]:
    """The op's arguments where `spelling` was found."""
    named = {k: v for k, v in match.arguments.items() if k in spelling.op.signature.parameters}
    return spelling.op.bind((), {**named, **spelling.constants})


def _record(spelling: Spelling, anchor: Node, reason: str) -> Record:
    return Record(spelling.op.name, spelling.name, reason, where(anchor), source_line(anchor), node=anchor.name)


def replace(
    graph: Graph,
    rule: str,
    op: Op,
    arguments: Mapping[str, Any],
    match: Match,
    together: Iterable[Match],
    infer: Inference,
    written: Sequence[Node],
    verify: bool,
    note: str,
) -> Refusal:
    """Put an op in the place of what was matched, in place, or say why that would not be the same.

    Args:
        graph: the graph.
        rule: the name of what found it.
        op: the op.
        arguments: of the op, all of them.
        match: what it replaces.
        together: others that are replaced as well, so that they may share nodes with this one.
        infer: of all replacements in this graph.
        written: the nodes that write.
        verify: compare the numbers.
        note: kept with the op.
    """
    leak = match.leak(together)
    if leak is not None:
        return f"{leak[0].name} is also read by {leak[1].name}, outside; the op would compute it twice"
    results = infer(op, arguments)
    if isinstance(results, str):
        return results
    if len(results) != len(match.outputs):
        return f"the op would return {len(results)} values, the spelling has {len(match.outputs)}"
    for result, output in zip(results, match.outputs, strict=True):
        difference = differs(result, output.meta["val"])
        if difference is not None:
            return difference
    interior = match.interior()
    point = _point(interior, [a for a in arguments.values() if isinstance(a, Node)], match.outputs, written)
    if isinstance(point, str):
        return point
    if verify and (wrong := check_rewrite(sorted(interior), match.outputs, op, arguments)):
        return wrong
    with graph.inserting_before(point):
        node = graph.call_function(op.overload, *op.call(arguments))
    names = tuple(n.name for n in sorted(interior))
    site = Site((rule,), where(match.root), source_line(match.root), note, names)
    node.meta = inherit(match.root, results[0] if op.single else results, {"fusionpass": site})
    new = [node] if op.single else insert_outputs(graph, node, results)
    for old, output in zip(match.outputs, new, strict=True):
        old.replace_all_uses_with(output)
    for old in match.outputs:
        erase_unused(graph, old)
    return None


def _point(interior: set[Node], inputs: list[Node], outputs: Iterable[Node], written: Sequence[Node]) -> Node | str:
    """Where an op can stand for `interior`: behind its inputs, in front of its readers, with no write in between."""
    point = min(outputs)
    late = max(inputs)
    if not late < point:
        point = late.next
        readers = [user for output in outputs for user in output.users if user not in interior and user < point]
        if readers:
            return f"{late.name} is computed after {readers[0].name} reads the result"
    return mutated(written, min(interior), point) or point
