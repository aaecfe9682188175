"""The matcher: structural, commutative, starts at a rare node, and remembers how far it got."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from .graphs import CAST, COMMUTATIVE, VIEWS, aten, same_number, value

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Match:
    """A spelling found in a graph.

    Attributes:
        nodes: pattern node → graph node, inputs included.
        outputs: the graph nodes whose values the op replaces, in the order of its outputs.
        arguments: the op's arguments by name: nodes and numbers.
    """

    nodes: Mapping[Node, Node]
    outputs: tuple[Node, ...]
    arguments: Mapping[str, Any]

    @property
    def root(self) -> Node:
        """The first output."""
        return self.outputs[0]

    def interior(self) -> set[Node]:
        """The graph nodes that the op replaces."""
        return {g for p, g in self.nodes.items() if p.op == "call_function"}

    def leak(self, others: Iterable["Match"]) -> tuple[Node, Node] | None:
        """A replaced node that somebody else reads too; what costs nothing to have twice is free.

        That is the outputs, constants, single numbers, and views and casts of inputs and outputs. What `others` replace
        as well is nobody else: two norms of one tensor share all but their weights.
        """
        inside = set().union(*(match.interior() for match in others), self.interior())
        free = {*self.outputs, *(g for p, g in self.nodes.items() if p.op == "placeholder")}
        for node in sorted(self.interior() - set(self.outputs)):
            val = value(node)
            cheap = node.target in (CAST, *VIEWS, aten.unsqueeze.default) or not node.all_input_nodes
            if (cheap and free.issuperset(node.all_input_nodes)) or (val is not None and val.dim() == 0):
                free.add(node)
                continue
            for user in node.users:
                if user not in inside:
                    return node, user
        return None


@dataclass
class Attempt:
    """The furthest that a search got from one anchor."""

    matched: int = 0
    total: int = 0
    node: Node | None = None
    reason: str = ""

    def fail(self, matched: int, node: Node, reason: str) -> None:
        """Note a failure at `node` after `matched` nodes, if none got further."""
        if matched >= self.matched:
            self.matched, self.node, self.reason = matched, node, reason


@dataclass(frozen=True)
class _State:
    nodes: Mapping[Node, Node]
    scalars: Mapping[str, Any]
    half: torch.dtype | None

    def with_node(self, p: Node, g: Node) -> "_State":
        return _State({**self.nodes, p: g}, self.scalars, self.half)


_READER = -1


@dataclass(frozen=True, eq=False)
class _Path:
    """A step from where `parent` leads: to an operand (None: any, else by position) or a reader, if it is as wanted.

    Attributes:
        target: what it calls; None: any node, an input of the spelling.
        dtypes: of a cast or of an input.
    """

    parent: "_Path | None"
    step: int | None
    target: Any
    dtypes: tuple[Any, ...] | None

    def allows(self, node: Any) -> bool:
        if not isinstance(node, Node):
            return False
        if self.target is None:
            val = value(node)
            return val is not None and val.dtype in (self.dtypes or ())
        return node.target is self.target and (node.target is not CAST or node.args[1] in (self.dtypes or ()))


_path = functools.cache(_Path)
"""Equal paths are one object, over all patterns."""


Reached = dict[_Path, list[Node]]
"""Where paths lead from one anchor."""


def _reach(path: _Path, anchor: Node, reached: Reached) -> list[Node]:
    """The nodes to which `path` leads from `anchor`."""
    found = reached.get(path)
    if found is None:
        if path.parent is None:
            found = [anchor]
        else:
            near: list[Any] = []
            for node in _reach(path.parent, anchor, reached):
                if path.step == _READER:
                    near += node.users
                elif path.step is None:
                    near += node.all_input_nodes
                elif path.step < len(node.args):
                    near.append(node.args[path.step])
            found = [node for node in near if path.allows(node)]
        reached[path] = found
    return found


def anchor_key(node: Node) -> Any:
    """What a pattern's anchor and a graph's node have in common: the target, of a cast also the dtype or its kind."""
    if node.target is not CAST:
        return node.target
    return node.target, HALVES if node.args[1] in HALVES else node.args[1]


def links(graph: Graph) -> set[tuple[Any, ...]]:
    """What reads what in a graph, casts left out: the targets of each node, its operands, and theirs, as chains."""
    chains: dict[Node, set[tuple[Any, ...]]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            below = {chain for operand in node.all_input_nodes for chain in chains.get(operand, ())}
            # A cast stands for what it reads.
            longer = {(node.target, *chain)[:_LINKED] for chain in below} | {(node.target,)}
            chains[node] = below if node.target is CAST else longer
    return set().union(*chains.values())


_LINKED = 3
"""Nodes of a chain; two leave views between them."""


@dataclass(eq=False)
class Pattern:
    """A traced spelling to look for.

    Args:
        graph: normalised; its outputs are the op's.
        names: the parameter name of each placeholder, in order.
        scalars: parameter name → the number that stands for it in the graph; an int stands for a size.
        half: the dtype that stands for bfloat16 or float16.
        anchor: where a search starts.
        shapes: the arguments, by node and position, that are sizes: None where the size depends on the input's, a name
            where it is that parameter.
    """

    graph: Graph
    names: list[str]
    scalars: Mapping[str, float]
    half: torch.dtype
    anchor: Node
    shapes: Mapping[tuple[Node, int], Sequence[int | str | None]] = field(default_factory=dict)
    order: list[Node] = field(init=False)
    paths: list["_Path"] = field(init=False)

    def __post_init__(self) -> None:
        result = self.graph.find_nodes(op="output")[0].args[0]
        self.outputs: list[Node] = list(result) if isinstance(result, list | tuple) else [result]
        self.size = sum(n.op == "call_function" for n in self.graph.nodes)
        # Forward steps only: a node's operands are matched with it.
        self.order = [n for n in self.graph.nodes if n.op == "call_function"]
        self.paths = self._paths()
        self.key = anchor_key(self.anchor)
        self.links = links(self.graph)

    def plausible(self, anchor: Node, reached: Reached) -> bool:
        """Whether every path from the anchor leads somewhere: quick, needed for a match.

        Patterns have most paths in common: `reached` keeps where each leads from this anchor.
        """
        return all(_reach(path, anchor, reached) for path in self.paths)

    def search(self, anchor: Node) -> list[Match] | Attempt:
        """The matches around `anchor`, one for each that can be reached from it, or how far the search got."""
        attempt = Attempt(total=self.size)
        start = _State({}, {}, None)
        found: dict[tuple[Node, ...], Match] = {}
        for state in self._node(start, self.anchor, anchor, attempt):
            for done in self._forward(state, attempt):
                outputs = tuple(done.nodes[p] for p in self.outputs)
                inputs = zip(self.names, self._placeholders(), strict=True)
                arguments = {name: done.nodes[p] for name, p in inputs if p in done.nodes}
                found.setdefault(outputs, Match(done.nodes, outputs, {**arguments, **done.scalars}))
        return list(found.values()) or attempt

    def _paths(self) -> list["_Path"]:
        """A path from the anchor to each node: up to operands, down to readers."""
        paths = {self.anchor: _path(None, None, self.anchor.target, None)}
        waiting = [self.anchor]
        while waiting:
            node = waiting.pop()
            places = [(None if node.target in COMMUTATIVE else i, a) for i, a in enumerate(node.args)]
            listed = [(None, a) for arg in node.args if isinstance(arg, list | tuple) for a in arg]
            near = [(place, a) for place, a in (*places, *listed) if isinstance(a, Node)]
            near += [(_READER, user) for user in node.users]
            for step, other in near:
                if other in paths or other.op == "output":
                    continue
                cast = other.args[1] if other.target is CAST else None
                val = value(other) if other.op == "placeholder" else None
                dtype = cast if val is None else val.dtype
                wanted = HALVES if dtype is self.half else (dtype,)
                paths[other] = _path(paths[node], step, other.target if val is None else None, wanted)
                waiting.append(other)
        return list(paths.values())

    def _placeholders(self) -> list[Node]:
        return self.graph.find_nodes(op="placeholder")

    def _forward(self, state: _State, attempt: Attempt) -> Iterator[_State]:
        for p in self.order:
            known = [q for q in p.all_input_nodes if q in state.nodes and q.op == "call_function"]
            if p in state.nodes or not known:
                continue
            g = state.nodes[max(known)]
            readers = [u for u in g.users if u.target is p.target]
            for reader in readers:
                for deeper in self._node(state, p, reader, attempt):
                    yield from self._forward(deeper, attempt)
            if not readers:
                found = ", ".join(sorted({_name(u) for u in g.users})) or "nothing"
                attempt.fail(_count(state), g, f"expected {_name(p)} to read it, found {found}")
            return
        if all(p in state.nodes for p in self.outputs):
            yield state

    def _node(self, state: _State, p: Node, g: Node, attempt: Attempt) -> Iterator[_State]:
        if p in state.nodes:
            if state.nodes[p] is not g:
                reason = f"expected {state.nodes[p].name} here, since the spelling reads one value twice"
                attempt.fail(_count(state) - 1, g, reason)
                return
            yield state
            return
        if p.op == "placeholder":
            val = value(g)
            bound = self._literal(state, p.meta["val"].dtype, val.dtype) if val is not None else None
            if bound is None:
                attempt.fail(_count(state), g, f"expected a tensor like {_type(p)}, found {_type(g)}")
                return
            yield bound.with_node(p, g)
            return
        if g.target is not p.target:
            attempt.fail(_count(state), g, f"expected {_name(p)}, found {_name(g)}")
            return
        if len(p.args) != len(g.args) or set(p.kwargs) != set(g.kwargs):
            attempt.fail(_count(state), g, f"{_name(g)} is called with other arguments")
            return
        entered = state.with_node(p, g)
        orders = [g.args, g.args[::-1]] if p.target in COMMUTATIVE and len(g.args) == 2 else [g.args]
        for position, sizes in ((i, sizes) for (node, i), sizes in self.shapes.items() if node is p):
            given = g.args[position]
            actual: Any = given if isinstance(given, list | tuple) else [given]
            sized = _bind_sizes(entered, sizes, actual)
            if sized is None:
                attempt.fail(_count(state), g, f"expected the sizes {_sizes(sizes)}, found {_sizes(actual)}")
                return
            entered = sized
        for args in orders:
            positions = [i for i in range(len(args)) if (p, i) not in self.shapes]
            pairs = [*((p.args[i], args[i]) for i in positions), *((p.kwargs[k], g.kwargs[k]) for k in p.kwargs)]
            # Constants first: they fail sooner than a chain of operands.
            yield from self._arguments(entered, sorted(pairs, key=lambda pair: isinstance(pair[0], Node)), g, attempt)

    def _arguments(self, state: _State, pairs: list[tuple[Any, Any]], g: Node, attempt: Attempt) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        (p, actual), rest = pairs[0], pairs[1:]
        if isinstance(p, Node):
            if not isinstance(actual, Node):
                attempt.fail(_count(state) - 1, g, f"expected a tensor, found the constant {actual}")
                return
            for deeper in self._node(state, p, actual, attempt):
                yield from self._arguments(deeper, rest, g, attempt)
            return
        if isinstance(p, list | tuple) and any(isinstance(a, Node) for a in p):
            if len(p) != len(actual):
                attempt.fail(_count(state) - 1, g, f"expected {len(p)} operands of {_name(g)}")
                return
            yield from self._arguments(state, [*zip(p, actual, strict=True), *rest], g, attempt)
            return
        bound = self._literal(state, p, actual)
        if bound is None:
            attempt.fail(_count(state) - 1, g, f"expected the constant {p}, found {actual}")
            return
        yield from self._arguments(bound, rest, g, attempt)

    def _literal(self, state: _State, p: Any, actual: Any) -> _State | None:
        for name, sentinel in self.scalars.items():
            if isinstance(sentinel, float) and p == -sentinel and isinstance(actual, int | float):
                p, actual = sentinel, -actual  # the spelling has its negative
            if isinstance(p, float) and isinstance(sentinel, float) and p == sentinel:
                if not same_number(state.scalars.get(name, actual), actual):
                    return None
                return _State(state.nodes, {**state.scalars, name: float(actual)}, state.half)
        if p is self.half:
            if actual not in HALVES or state.half not in (None, actual):
                return None
            return _State(state.nodes, state.scalars, actual)
        if isinstance(p, int | float) and not isinstance(p, bool):
            return state if same_number(p, actual) else None
        if isinstance(p, list | tuple):
            if not isinstance(actual, list | tuple) or len(p) != len(actual):
                return None
            # No parameter stands in a list: sizes are bound as shapes.
            return state if all(self._literal(state, a, b) for a, b in zip(p, actual, strict=True)) else None
        if isinstance(p, torch.device) and isinstance(actual, torch.device):
            return state if p.type == actual.type else None
        return state if p == actual else None


def _bind_sizes(state: _State, wanted: Sequence[int | str | None], actual: Sequence[Any]) -> _State | None:
    """The state with the named sizes, where all agree, counted from the last dimension; None depends on the input's."""
    scalars = dict(state.scalars)
    for want, size in zip(reversed(wanted), reversed(actual), strict=False):
        if isinstance(want, str):
            if not isinstance(size, int) or scalars.setdefault(want, size) != size:
                return None
        elif want is not None and want != size:
            return None
    return _State(state.nodes, scalars, state.half)


def _sizes(sizes: Any) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"


def _count(state: _State) -> int:
    return sum(p.op == "call_function" for p in state.nodes)


def _name(node: Node) -> str:
    if node.target is CAST:
        return f"a cast to {str(node.args[1]).removeprefix('torch.')}"
    return str(node.target).removesuffix(".default") if node.op == "call_function" else f"the {node.op} {node.name}"


def _type(node: Node) -> str:
    val = value(node)
    return f"{str(val.dtype).removeprefix('torch.')}{list(val.shape)}" if val is not None else "no tensor"
