"""One of Dynamo's graphs → a `Program`: cut, alike pieces compiled once, the rest as data."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from ..graphs import where
from ..report.trace import ModelGraph, PieceRecord
from .fingerprint import Fingerprint, fingerprint
from .pieces import Piece, cut
from .program import Input, Program, Step, is_weight


class Code(Protocol):
    """A compiled piece: what `compile_piece` returns. Shared by alike pieces."""

    @property
    def call(self) -> Callable[..., Any]:
        """Takes the piece's inputs, returns its outputs."""

    @property
    def mutated(self) -> tuple[int, ...]:
        """The inputs that it writes to, by position."""

    @property
    def uncapturable(self) -> str:
        """As `Step.uncapturable`."""

    @property
    def rows(self) -> dict[str, tuple[int | None, ...] | str]:
        """As `Step.rows`."""

    @property
    def key(self) -> str | None:
        """As `Step.key`."""


@dataclass(frozen=True)
class Request:
    """A piece to compile.

    Attributes:
        module: its graph; its inputs carry fake tensors.
        inputs: those, in order.
        weights: which of them are parameters or buffers, by position.
        outputs: what it returns, as fake tensors.
        fingerprint: equal for alike pieces.
    """

    module: GraphModule
    inputs: Sequence[Any]
    weights: frozenset[int]
    outputs: Sequence[Any]
    fingerprint: Fingerprint


@dataclass
class Builder:
    """Builds programs.

    Args:
        compile_piece: compiles a piece, or finds what an alike one was compiled to; before that it tells its second
            argument the index of the `GraphTrace`, so that a report of what failed exists.
        boundaries: operators to cut around, as `Config.boundaries`.
        attention_alone: other libraries' attention stays out of the pieces, for one CUDA graph a piece.
        paths: by index of a `GraphTrace`, the modules of each node of the piece that it was compiled for.
    """

    compile_piece: Callable[[Request, Callable[[int], None]], Code]
    boundaries: Collection[str] = ()
    attention_alone: bool = False
    paths: dict[int, list[str]] = field(default_factory=dict)

    def build(self, gm: GraphModule, inputs: Sequence[Any], record: ModelGraph, whole: bool = False) -> Program:
        """The program of a graph; `record` is told of its pieces.

        Args:
            gm: Dynamo's graph.
            inputs: its example inputs.
            record: of the report.
            whole: do not cut.
        """
        parts = None if whole else cut(gm, self.boundaries, self.attention_alone)
        known: dict[str, Fingerprint] = {}
        if parts is not None:
            known = {name: fingerprint(p.module) for name, p in parts.pieces.items() if not p.boundary}
            if len(known) == len(parts.pieces) and len({f.text for f in known.values()}) == len(known):
                parts = None  # no two are alike: a cut would only cost
        if parts is None:
            return self._program(_uncut(gm), {"whole": Piece("piece_0", gm, "", "")}, {}, record, inputs)
        return self._program(parts.top, parts.pieces, known, record, None)

    def _program(
        self,
        top: GraphModule,
        pieces: Mapping[str, Piece],
        known: Mapping[str, Fingerprint],
        record: ModelGraph,
        inputs: Sequence[Any] | None,
    ) -> Program:
        placeholders = top.graph.find_nodes(op="placeholder")
        slots: dict[Node, Any] = {node: slot for slot, node in enumerate(placeholders)}
        count = len(slots)
        steps: list[Step] = []
        mutated: set[int] = set()
        for node in top.graph.nodes:
            if node.op == "get_attr":
                constant = functools.reduce(getattr, node.target.split("."), top)
                steps.append(Step(node.target, Constant(constant), (), (count,), constant=True))
                slots[node], count = count, count + 1
            elif node.op == "call_module":
                piece = pieces[node.target]
                given = tuple(slots[argument] for argument in node.args)
                outputs = tuple(range(count, count + len(_results(piece.module))))
                count += len(outputs)
                slots[node] = outputs[0] if len(outputs) == 1 and node.target != "whole" else outputs
                if piece.boundary:
                    record.pieces.append(PieceRecord(piece.name, None, piece.why, piece.boundary, _span(piece.module)))
                    steps.append(Step(piece.name, piece.module, given, outputs, (), piece.boundary))
                    continue
                request = _request(piece.module, known.get(node.target), inputs)
                code = self.compile_piece(request, functools.partial(self._note, record, piece))
                mutated.update(given[i] for i in code.mutated)
                steps.append(
                    Step(piece.name, code.call, given, outputs, (), code.uncapturable, code.rows, key=code.key)
                )
            elif node.target is getitem:
                slots[node] = slots[node.args[0]][node.args[1]]
        results = tuple(slots[value] for value in _results(top))
        declared = tuple(_input(node, slot in mutated) for slot, node in enumerate(placeholders))
        return Program(declared, _with_last_uses(steps, results), results, count)

    def _note(self, record: ModelGraph, piece: Piece, index: int) -> None:
        here = [where(node) for node in piece.module.graph.nodes]
        there = self.paths.setdefault(index, here)
        renamed = {a: b for a, b in zip(there, here, strict=True) if a != b}
        record.pieces.append(PieceRecord(piece.name, index, piece.why, piece.boundary, _span(piece.module), renamed))


@dataclass(frozen=True)
class Constant:
    """A step that returns one value."""

    value: Any

    def __call__(self) -> tuple[Any]:
        """The value."""
        return (self.value,)


def _uncut(gm: GraphModule) -> GraphModule:
    """A graph that calls `gm`."""
    graph = Graph()
    given = []
    for node in gm.graph.find_nodes(op="placeholder"):
        given.append(graph.placeholder(node.name))
        given[-1].meta = node.meta
    called = graph.call_module("whole", tuple(given))
    graph.output(tuple(graph.call_function(getitem, (called, i)) for i in range(len(_results(gm)))))
    return GraphModule({"whole": gm}, graph)


def _results(module: GraphModule) -> Sequence[Any]:
    result: Any = module.graph.find_nodes(op="output")[0].args[0]
    return result if isinstance(result, tuple | list) else (result,)


def _request(module: GraphModule, known: Fingerprint | None, inputs: Sequence[Any] | None) -> Request:
    placeholders = module.graph.find_nodes(op="placeholder")
    values = inputs if inputs is not None else [node.meta["example_value"] for node in placeholders]
    weights = frozenset(i for i, node in enumerate(placeholders) if is_weight(node))
    outputs = [value.meta.get("example_value") if isinstance(value, Node) else value for value in _results(module)]
    return Request(module, values, weights, outputs, known or fingerprint(module))


def _span(module: GraphModule) -> tuple[str, str]:
    paths = [path for node in module.graph.nodes if node.op != "placeholder" and (path := where(node))]
    return (paths[0], paths[-1]) if paths else ("", "")


def _with_last_uses(steps: Sequence[Step], results: Sequence[int]) -> tuple[Step, ...]:
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        last |= dict.fromkeys((*step.outputs, *step.inputs), index)
    dead: dict[int, list[int]] = {}
    for slot, index in last.items():
        if slot not in results:
            dead.setdefault(index, []).append(slot)
    return tuple(replace(step, dead=tuple(sorted(dead.get(index, ())))) for index, step in enumerate(steps))


def _input(node: Node, mutated: bool) -> Input:
    value = node.meta.get("example_value")
    name = str(node.target)
    if isinstance(value, torch.Tensor):
        shape = tuple(size if isinstance(size, int) else str(size.node.expr) for size in value.shape)
        kind = "weight" if is_weight(node) else "tensor"
        return Input(kind, name, shape, mutated=mutated, device=str(value.device))
    if isinstance(value, torch.SymInt):
        return Input("size", name, symbol=str(value.node.expr))
    return Input("other", name)
