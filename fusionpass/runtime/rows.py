"""Whether rows of padding may follow the rows of a graph's inputs: proven from the graph, or the reason why not."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.symbol import SymT, symbol_is_type

from ..graphs import aten
from ..op import OPS
from .row_rules import MADE, RULES, SIZES, UNKNOWN, aligned
from .row_state import Call, Mixed, Rows, State, expression, quotient, rows_of, symbols, text

Dims = tuple[int | None, ...]
"""For each output the dimension that counts the rows; None: it does not depend on them."""


def row_dims(graph: Graph, symbol: sympy.Symbol) -> Dims | str:
    """Where the outputs of `graph` have the rows that `symbol` counts, if no row depends on another.

    What is proven: on inputs of m rows, the first n rows of each output are what the graph gives for the first n rows
    of the inputs, whatever the other rows hold, NaN too; an output with no rows is the same; and nothing that depends
    on rows is written to memory that outlives the call. Both sizes satisfy the guards of the graph, and no row raises
    an error: an index in the padding is in range too. Nothing is said of bits: a library may add the terms of a
    product in another order for another m. Nor of strides: where the rows are not the outermost dimension in memory,
    the first n of m rows do not lie as n rows would.

    An input has its rows in the one dimension whose size is `symbol`; if none has it, it has no rows.

    Args:
        graph: functional, of ops of aten and of `fusionpass`; `meta["val"]` holds fake tensors and symbolic numbers.
        symbol: a size.

    Returns:
        One entry for each output, in order; or why nothing is proven: the first node at fault, its op, and what about
        it mixes rows.
    """
    return _proven(graph, symbol, {})


def row_dims_by_symbol(graph: Graph) -> dict[str, Dims | str]:
    """`row_dims` for each symbolic size of the inputs of `graph`, by name."""
    sizes = sorted((s for s in _shape_symbols(graph) if symbol_is_type(s, SymT.SIZE)), key=str)
    bodies: _Bodies = {}
    return {str(symbol): _proven(graph, symbol, bodies) for symbol in sizes}


_Bodies = dict[str, Graph | None]
"""What ops are made of, by op and arguments; None: nobody knows."""
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_COUNTED = (aten.sym_size, aten.sym_numel, aten.sym_stride, aten.sym_storage_offset)


def _shape_symbols(graph: Graph) -> set[sympy.Symbol]:
    """Those in the shapes of the inputs."""
    vals = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    return set().union(*(symbols(val) for val in vals if isinstance(val, torch.Tensor)))


def _known_symbols(graph: Graph) -> set[sympy.Symbol]:
    """Those and the inputs that are numbers, but for strides: padding changes a stride too."""
    vals = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    strides = set().union(*(symbols(step) for val in vals if isinstance(val, torch.Tensor) for step in val.stride()))
    return set().union(*map(symbols, vals)) - (strides - _shape_symbols(graph))


def _proven(graph: Graph, symbol: sympy.Symbol, bodies: _Bodies) -> Dims | str:
    proof = _Proof(symbol, _known_symbols(graph), bodies)
    states = proof.run(graph)
    mixed = [state for state in (*proof.effects, *states) if isinstance(state, Mixed)]
    if mixed:
        return min(mixed, key=_order).reason
    for node, state in zip(tree_leaves(list(graph.output_node().args)), states, strict=True):
        if state is not None and expression(node.meta["val"].shape[state.dim]) != symbol:
            shape = text(node.meta["val"])
            return f"{node.name}: {node.target} returns {shape}, where the {symbol} rows are no dimension of their own"
    return tuple(None if state is None else state.dim for state in states)


class _Proof:
    """Goes through the nodes of a graph in order, and says of each how its value depends on the rows.

    Attributes:
        known: what sizes and numbers may be made of; another symbol stands for something that was computed.
        effects: the nodes that do something other than to return a value, where rows take part.
    """

    def __init__(self, symbol: sympy.Symbol, known: set[sympy.Symbol], bodies: _Bodies) -> None:
        self.symbol, self.known, self.bodies = symbol, known, bodies
        self.effects: list[Mixed] = []

    def run(self, graph: Graph, inputs: Sequence[State] | None = None) -> list[State]:
        """The states of the outputs; `inputs` are those of the placeholders, where their shapes are not to say it."""
        states: dict[Node, State] = {}
        given = iter(inputs or ())
        for order, node in enumerate(graph.nodes):
            if node.op == "output":
                return [self._returned(leaf, order, states) for leaf in tree_leaves(list(node.args))]
            if node.op == "placeholder":
                states[node] = self._input(node, order) if inputs is None else next(given)
            else:
                states[node] = None if node.op == "get_attr" else _noted(node, order, self._state(node, states))
                if _acts(node) and isinstance(states[node], Mixed):
                    self.effects.append(states[node])
        return []

    def _input(self, node: Node, order: int) -> State:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            return _noted(node, order, rows_of(val, self.symbol))
        return _noted(node, order, "is a stride, and padding changes it" if symbols(val) - self.known else None)

    def _returned(self, leaf: Any, order: int, states: dict[Node, State]) -> State:
        if not isinstance(leaf, Node):
            return None
        if isinstance(leaf.meta.get("val"), _NUMBERS) and self.symbol in symbols(leaf):
            return Mixed(f"{leaf.name}: the number {leaf.meta['val']} is returned, and padding changes it", order)
        return states[leaf]

    def _state(self, node: Node, states: dict[Node, State]) -> State:
        """The state of what a node returns, or why it is mixed."""
        target, val, inputs = node.target, node.meta.get("val"), node.all_input_nodes
        packet = target.overloadpacket if isinstance(target, OpOverload) else None
        if target is getitem and isinstance(states[inputs[0]], tuple):
            return states[inputs[0]][node.args[1]]
        computed = set().union(*map(symbols, tree_leaves(val))) - self.known
        counted = packet in _COUNTED or all(isinstance(n.meta.get("val"), _NUMBERS) for n in inputs)
        if isinstance(val, _NUMBERS) and counted and not computed:
            return None
        first = min((s for s in map(states.get, inputs) if isinstance(s, Mixed)), key=_order, default=None)
        if packet is None or any("val" not in n.meta for n in inputs):
            return first or "is an op of which nothing is known"
        if computed:
            return first or "gives sizes or numbers that the sizes of the inputs do not determine"
        call = Call(node, states, self.symbol)
        if packet in MADE:
            return self._agreed(call, _number(call) or call.made())
        if first is not None:
            # A slice may leave out what follows the rows.
            left = RULES[packet](call) if packet is aten.slice and first.leading is not None else first
            return left if isinstance(left, Rows) else first
        return self._agreed(call, self._ruled(node, call))

    def _ruled(self, node: Node, call: Call) -> State:
        target, rows = call.target, call.rows()
        packet, schema = target.overloadpacket, target._schema
        free = not rows and not any(map(call.counts, tree_leaves(list(call.args.values()))))
        if _acts(node):
            if free or packet is aten._assert_tensor_metadata or not (rows or schema.is_mutable):
                return None
            written = [p.name for p in schema.arguments if p.alias_info is not None and p.alias_info.is_write]
            names = ", ".join(str(call.args[name]) for name in written)
            return f"writes rows of padding into {names}" if written else "checks rows of padding"
        if not call.results:
            return None
        rule = RULES.get(packet)
        if torch.Tag.nondeterministic_seeded in target.tags and (rule is None or call.args.get("dropout_p")):
            return "draws random numbers"
        if free and (target.namespace in ("aten", "prims") or target in OPS):
            return None
        if rule is None and torch.Tag.pointwise in target.tags and isinstance(call.results[0], torch.Tensor):
            rule = aligned
        return self._by_body(node, call) if rule is None else _number(call) or rule(call)

    def _agreed(self, call: Call, state: State) -> State:
        """The state of each result, where its shape agrees."""
        states = state if isinstance(state, tuple) else (state,) * len(call.results)
        agreed = tuple(self._checked(result, one) for result, one in zip(call.results, states, strict=True))
        return agreed if call.is_sequence else agreed[0]

    def _checked(self, result: Any, state: State) -> State:
        if isinstance(state, str | Mixed) or result is None:
            return state
        if not isinstance(result, torch.Tensor):
            return UNKNOWN
        counting = [i for i, size in enumerate(result.shape) if self.symbol in symbols(size)]
        if counting != ([] if state is None else [state.dim]):
            found = rows_of(result, self.symbol)
            return found if isinstance(found, str) else UNKNOWN
        outer = None if state is None else quotient(expression(result.shape[state.dim]), self.symbol * state.inner)
        return state if state is None or (outer is not None and self.symbol not in outer.free_symbols) else UNKNOWN

    def _by_body(self, node: Node, call: Call) -> State:
        """What the op is made of: the reference of one of ours, the decomposition of one of torch's."""
        names = {source: i for i, source in enumerate(node.all_input_nodes)}
        key = f"{node.target}{torch.fx.map_arg((node.args, node.kwargs), lambda n: (names[n], _layout(n.meta['val'])))}"
        if key not in self.bodies:
            self.bodies[key] = _body(node)
        body = self.bodies[key]
        if body is None:
            return "is an op of which nothing is known"
        inner = _Proof(self.symbol, self.known, self.bodies)
        states = inner.run(body, [call.states[source] for source in names])
        if inner.effects:
            states = [inner.effects[0]] * len(states)
        if len(states) != len(call.results):
            return UNKNOWN
        return tuple(f"is made of {s.reason}" if isinstance(s, Mixed) else s for s in states)


def _body(node: Node) -> Graph | None:
    inputs = node.all_input_nodes
    op = OPS.get(node.target)  # type: ignore[call-overload]
    function: Callable[..., Any] = op.reference if op is not None else node.target  # type: ignore[assignment]

    def call(*given: Any) -> Any:
        values = dict(zip(inputs, given, strict=True))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return function(*args, **kwargs)

    vals = [source.meta["val"] for source in inputs]
    mode = next((val.fake_mode for val in vals if isinstance(val, FakeTensor)), None)
    if mode is None:
        return None
    decompositions = dict(select_decomp_table())
    if op is None and node.target in _core():
        decompositions[node.target] = _core()[node.target]
    try:
        with mode, torch.no_grad(), enable_python_dispatcher():
            graph = make_fx(call, decomposition_table=decompositions)(*vals).graph
    except Exception:  # whatever an op may raise that does not trace: then nobody knows
        return None
    return None if any(inner.target is node.target for inner in graph.nodes) else graph


_core = functools.cache(core_aten_decompositions)


def _acts(node: Node) -> bool:
    """Whether a node may do something other than to return a value."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable or not node.target._schema.returns
    return node.target is not getitem


def _number(call: Call) -> str | None:
    """Why a number among the arguments is no size of the result, but changes with the number of rows."""
    for name, arg in call.args.items():
        found = [leaf for leaf in tree_leaves(arg) if name not in SIZES and call.counts(leaf)]
        if found:
            number = found[0].meta["val"] if isinstance(found[0], Node) else found[0]
            return f"takes the number {number} as {name!r}, and padding changes it"
    return None


def _noted(node: Node, order: int, state: State) -> State:
    """The state, with its reasons made those of `node` if they are not another's."""
    if isinstance(state, tuple):
        return tuple(_noted(node, order, one) for one in state)
    if isinstance(state, str):
        state = Mixed(state)
    if isinstance(state, Mixed) and state.order < 0:
        op = "the input" if node.op == "placeholder" else str(node.target)
        return dataclasses.replace(state, order=order, reason=f"{node.name}: {op} {state.reason}")
    return state


def _order(state: Mixed) -> int:
    return state.order


def _layout(val: Any) -> Any:
    return (val.shape, val.stride(), val.dtype, val.device) if isinstance(val, torch.Tensor) else val
