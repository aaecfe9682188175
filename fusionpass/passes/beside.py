"""Two ops side by side → one. No op is made whose inputs, shapes and dtypes are not proven equal."""

from collections.abc import Sequence

from torch.fx import Graph, Node

from ..graphs import (
    VIEWS,
    aten,
    differs,
    erase_unused,
    inherit,
    insert_outputs,
    mutated,
    outputs_of,
    source_line,
    where,
)
from ..infer import Inference
from ..op import Op, Refusal
from ..report.trace import GraphTrace, Record, Site
from ..rule import Beside
from ..verify import check_rewrite
from .recognise import disabled

_VIEWS = (*VIEWS, aten.permute.default, aten.t.default, aten.transpose.int)


def site_of(node: Node) -> Site:
    """Where an op's node came from."""
    site = node.meta.get("fusionpass")
    return site if isinstance(site, Site) else Site((), where(node), source_line(node), nodes=(node.name,))


def named_outputs(op: Op, node: Node) -> dict[str, Node]:
    """The nodes that stand for each of an op's outputs, by name; those that nobody reads are left out."""
    names = op.outputs(op.bind(node.args, node.kwargs))
    return {names[0]: node} if op.single else {names[i]: item for i, item in outputs_of(node).items()}


def beside(
    graph: Graph,
    rule: Beside,
    node: Node,
    infer: Inference,
    written: Sequence[Node],
    trace: GraphTrace,
    disable: frozenset[str],
    verify: bool,
) -> bool:
    """Make `node` and the nearest op that it can be one with that op, in place; record why the nearest was refused."""
    given = rule.first.bind(node.args, node.kwargs)
    order = {other: i for i, other in enumerate(graph.nodes)}
    near = [other for other in graph.find_nodes(op="call_function", target=rule.second.overload) if other is not node]
    refusal: Refusal = None
    for other in sorted(near, key=lambda one: abs(order[one] - order[node])):
        asked = rule.second.bind(other.args, other.kwargs)
        if any(given[name] is not asked[name] for name in rule.shared):
            continue
        first, second = node, other
        if rule.first is rule.second:
            first, second = sorted((node, other))
            if rule.later is not None and _read_by(first, rule.later) and not _read_by(second, rule.later):
                first, second = second, first
        found = disabled(rule.name, rule.fused, disable) or _join(graph, rule, first, second, infer, written, verify)
        if found is None:
            return True
        refusal = refusal or found
        if order[other] > order[node]:
            break  # what comes later still reads this one's result
    site = site_of(node)
    known = [(record.rule, record.where, record.reason) for record in trace.refused]
    if refusal is not None and (rule.name, site.where, refusal) not in known:
        trace.refused.append(Record(rule.fused.name, rule.name, refusal, site.where, site.source, node=node.name))
    return False


def _read_by(node: Node, op: Op) -> bool:
    return any(user.target is op.overload for user in node.users)


def _before(node: Node, point: Node, moved: list[Node]) -> bool:
    """Whether `node` is there before `point`, or would be if the views in `moved`, in order, were made earlier."""
    if node < point or node in moved:
        return True
    if node.target not in _VIEWS or not all(_before(source, point, moved) for source in node.all_input_nodes):
        return False
    moved.append(node)
    return True


def _join(
    graph: Graph, rule: Beside, first: Node, second: Node, infer: Inference, written: Sequence[Node], verify: bool
) -> Refusal:
    joined = rule.join(rule.first.bind(first.args, first.kwargs), rule.second.bind(second.args, second.kwargs))
    if isinstance(joined, str):
        return joined
    arguments, *renamed = joined
    arguments = rule.fused.bind((), arguments)
    inputs = [a for a in arguments.values() if isinstance(a, Node)]
    targets: dict[str, Node] = {}
    for op, node, names in zip((rule.first, rule.second), (first, second), renamed, strict=True):
        targets |= {names.get(name, name): output for name, output in named_outputs(op, node).items()}
    # No later than where both are there: what reads them may be a write at the graph's end, behind other writes.
    readers = [user for output in targets.values() for user in output.users]
    point = min([*readers, max(first, second).next])
    moved: list[Node] = []
    for a in inputs:
        if not _before(a, point, moved):
            return f"{a.name} is computed after {point.name} reads a result of the other"
    begin, *_, end = sorted((first, second, point))
    if reason := mutated(written, begin, end):
        return reason
    results = infer(rule.fused, arguments)
    if isinstance(results, str):
        return results
    by_name = dict(zip(rule.fused.outputs(arguments), results, strict=True))
    for name, node in targets.items():
        if (difference := differs(by_name[name], node.meta["val"])) is not None:
            return f"{name}: {difference}"
    if verify:
        old = sorted({first, second, *targets.values()})
        if wrong := check_rewrite(old, list(targets.values()), rule.fused, arguments, list(targets)):
            return wrong
    for view in moved:
        point.prepend(view)
    with graph.inserting_before(point):
        fused = graph.call_function(rule.fused.overload, *rule.fused.call(arguments))
    fused.meta = inherit(first, results)
    above, below = site_of(first), site_of(second)
    notes = "; ".join(note for note in dict.fromkeys((above.note, below.note)) if note)
    rules, nodes = (*above.rules, *below.rules, rule.name), (*above.nodes, *below.nodes)
    fused.meta["fusionpass"] = Site(rules, above.where, above.source, notes, nodes)
    new = dict(zip(by_name, insert_outputs(graph, fused, results), strict=True))
    for name, node in targets.items():
        node.replace_all_uses_with(new[name])
    for node in (*targets.values(), first, second, *new.values()):
        erase_unused(graph, node)
    return None
