"""Rules: this spelling is that op (`Spelling`); these ops side by side are that op (`Fold`)."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import ArgumentError, RuleError
from .graphs import CAST, VIEWS, aten, marks_a_site
from .match import Pattern
from .op import Op, Refusal
from .passes.normalize import normalize

HALF = torch.bfloat16
"""The dtype that stands for either 16-bit float in a traced spelling."""

_UNCOMMON = (aten.erf.default, aten.tanh.default, aten.exp.default, aten.sigmoid.default, aten.relu.default)
_COMMON = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, CAST, *VIEWS)
_SHAPED = (*VIEWS, aten.expand.default, aten.full.default)
_SIZES = ((4, 256), (6, 384))
"""Rows and columns of the two traces whose difference tells which sizes depend on the input's."""
_NAMED = ((32, 64, 128), (96, 48, 24))
"""The sizes that are parameters, in either trace: they divide the columns, into another number of parts."""


@dataclass(frozen=True)
class Spelling:
    """One way in which models write an op.

    Args:
        name: "family.model", as in reports and `Config.disable`.
        op: what it means.
        function: plain PyTorch, its parameters named as the op's; tensors are matched to anything, numbers are bound:
            floats where they appear, ints where they are a size or the bound of a slice. An int that the op has no
            argument for is there for `refuse` alone. It returns what the op returns.
        constants: arguments of the op that this spelling fixes.
        refuse: `refuse(arguments)`, the reason why a match with these arguments (nodes and numbers) is none after all.
        sample: as the op's, which it replaces for tracing; it may give ints, too, that depend on the width.

    The function is traced on the op's own sample, for every combination of 16-bit and float32 parameters, through the
    same decompositions and the same `normalize` as the graphs that it is looked for in.
    """

    name: str
    op: Op
    function: Callable[..., Any]
    constants: Mapping[str, Any] = field(default_factory=dict, hash=False)
    refuse: Callable[[Mapping[str, Any]], Refusal] | None = None
    sample: Callable[..., dict[str, Any]] | None = field(default=None, hash=False)

    def patterns(self, device: str, present: AbstractSet[tuple[Any, ...]] | None = None) -> list[Pattern]:
        """The graphs of this spelling on `device` ("cpu" or "cuda"), one for each combination of dtypes.

        Args:
            device: where the graphs are.
            present: the `links` of the graph to look in: where it lacks one that the spelling has, in whatever dtypes,
                only the first combination is traced, for the sake of the reason. None: all are.

        Raises:
            RuleError: a number among the parameters does not appear in the traced graph.
        """
        first = self._some(device, 0, 1)
        if present is not None and not all(pattern.links <= present for pattern in first):
            return first
        return first + self._some(device, 1, None)

    @functools.cache  # noqa: B019  (a rule lives as long as the process)
    def _some(self, device: str, start: int, stop: int | None) -> list[Pattern]:
        where, sample = f"Spelling {self.name}", self.sample or self.op.sample
        return _patterns(where, self.function, self.op, device, _anchors, sample, start, stop)


@dataclass(frozen=True)
class Fold:
    """A producer whose output an op reads, as one op.

    Args:
        name: as in reports and `Config.disable`.
        producer: an op; or functions of plain PyTorch that are looked for in front of the consumer, in turn, their
            parameters named as the fused op's.
        consumer: the op that reads `output`.
        fused: the op that is both.
        output: the producer's output in between, by its name among the fused op's outputs; where others read it too,
            the fused op returns it as well.
        reads: the consumer's arguments that may be that output; default its first.
        join: `join(given, asked) -> (arguments, renamed)`, or the reason why not: the fused op's arguments from the
            producer's and the consumer's (`asked` without what it read), and the consumer's outputs that the fused op
            calls otherwise. Default: each argument by its own name.
    """

    name: str
    producer: Op | tuple[Callable[..., Any], ...]
    consumer: Op
    fused: Op
    output: str
    reads: tuple[str, ...] = ()
    join: Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, str]] | str] | None = None

    def __post_init__(self) -> None:
        if self.join is not None:
            return
        given = (self.producer.reference,) if isinstance(self.producer, Op) else self.producer
        wanted = {n for n, p in self.fused.signature.parameters.items() if p.default is inspect.Parameter.empty}
        for function in given:
            offered = {*inspect.signature(function).parameters, *list(self.consumer.signature.parameters)[1:]}
            if missing := wanted - offered:
                raise RuleError(f"nothing gives the arguments {sorted(missing)} of {self.fused}", f"Fold {self.name}")

    @functools.cache  # noqa: B019
    def patterns(self, device: str) -> list[Pattern]:
        """The graphs of producers that are plain PyTorch, each anchored at its output.

        Raises:
            RuleError: as `Spelling.patterns`.
        """
        assert not isinstance(self.producer, Op)
        where, fused = f"Fold {self.name}", self.fused
        found = (_patterns(where, function, fused, device, _output, fused.sample) for function in self.producer)
        return list(itertools.chain.from_iterable(found))

    def joined(self, given: dict[str, Any], asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | str:
        """The fused op's arguments and the renamed outputs, or why not; see `join`."""
        return self.join(given, asked) if self.join is not None else ({**given, **asked}, {})


@dataclass(frozen=True)
class Beside:
    """Two ops that read the same tensor, and neither the other's result, as one op.

    Args:
        name: as in reports and `Config.disable`.
        first: an op.
        second: the other op; the two that are nearest in the graph are tried first.
        fused: the op that is both.
        shared: the arguments in which both must have the same tensor.
        join: `join(first's arguments, second's) -> (arguments, renamed, renamed)`, or the reason why not: those of the
            fused op, and what it calls their outputs where that is something else.
        later: where both are one op, the one whose result this op reads counts as the second.
    """

    name: str
    first: Op
    second: Op
    fused: Op
    shared: tuple[str, ...]
    join: Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, str], dict[str, str]] | str]
    later: Op | None = None


def _patterns(
    where: str,
    function: Callable[..., Any],
    op: Op,
    device: str,
    anchors: Callable[[Graph], list[Node]],
    sample: Callable[..., dict[str, Any]],
    start: int = 0,
    stop: int | None = None,
) -> list[Pattern]:
    """The patterns of the combinations of dtypes from `start` to `stop`."""
    found: list[Pattern] = []
    with FakeTensorMode(), torch.no_grad():
        inputs, scalars = _inputs(function, op, device, sample(*_SIZES[0], HALF, "cpu", None), _NAMED[0])
        free = [k for k, v in inputs.items() if v.dtype == HALF]
        for dtypes in itertools.islice(itertools.product((HALF, torch.float32), repeat=len(free)), start, stop):
            kinds = dict(zip(free, dtypes, strict=True))
            try:
                graph = _trace(function, inputs, kinds, scalars, where)
                shapes: dict[tuple[Node, int], list[int | str | None]] = {}
                if any(node.target in (*_SHAPED, aten.slice.Tensor) for node in graph.nodes):
                    other = sample(*_SIZES[1], HALF, "cpu", None)
                    others, changed = _inputs(function, op, device, other, _NAMED[1])
                    named = {(n, changed[k]): k for k, n in scalars.items()}
                    shapes = _free_sizes(graph, _trace(function, others, kinds, changed, where), named)
            except ArgumentError:
                continue  # the op does not take this combination
            sized = {size for sizes in shapes.values() for size in sizes}
            for name, number in scalars.items():
                if isinstance(number, int) and name not in sized:
                    raise RuleError(f"{name!r} is no size in the traced graph", where)
            found += [Pattern(graph, list(inputs), scalars, HALF, anchor, shapes) for anchor in anchors(graph)]
    return found


def _inputs(
    function: Callable[..., Any], op: Op, device: str, sample: Mapping[str, Any], sizes: tuple[int, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Tensors and numbers for the function's parameters: the op's sample, and what it leaves to its defaults."""
    first = next(v for v in sample.values() if isinstance(v, torch.Tensor))
    named = iter(sizes)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, float] = {}
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if name in op.options.values() or parameter.annotation in (bool, str):
            continue
        value = sample.get(name, 1.0 if parameter.annotation is float else torch.empty_like(first))
        if parameter.annotation is int:
            scalars[name] = sample[name] if name in sample else next(named)
        elif isinstance(value, torch.Tensor):
            tensors[name] = value.to(device)
        elif isinstance(value, float):
            scalars[name] = 0.0123 + i
    return tensors, scalars


def _trace(
    function: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    scalars: Mapping[str, float],
    where: str,
) -> Graph:
    names = list(inputs)

    def call(*tensors: torch.Tensor) -> Any:
        return function(**dict(zip(names, tensors, strict=True)), **scalars)

    made = [v.to(dtypes.get(k, v.dtype)) for k, v in inputs.items()]
    graph = make_fx(call, decomposition_table=select_decomp_table())(*made).graph
    normalize(graph)
    literals = repr([n.args for n in graph.nodes])
    for name, number in scalars.items():
        if isinstance(number, float) and repr(number) not in literals:
            raise RuleError(f"the number {name!r} does not appear in the traced graph", where)
    return graph


def _free_sizes(
    graph: Graph, other: Graph, named: Mapping[tuple[float, float], str]
) -> dict[tuple[Node, int], list[int | str | None]]:
    """The sizes that are arguments, by node and position: a name, or None where the two traces differ otherwise."""
    shapes: dict[tuple[Node, int], list[int | str | None]] = {}
    for a, b in zip(graph.nodes, other.nodes, strict=True):
        for i, (here, there) in enumerate(zip(a.args, b.args, strict=True)):
            if a.target is aten.slice.Tensor and (here, there) in named:
                shapes[a, i] = [named[here, there]]
            if a.target in _SHAPED and isinstance(here, list | tuple) and isinstance(there, list | tuple):
                pairs = zip(here, there, strict=True)
                shapes[a, i] = [named.get((m, n), m if m == n else None) for m, n in pairs]
    return shapes


def _anchors(graph: Graph) -> list[Node]:
    """The nodes that a search starts from: the rarest in a model's graph.

    Several where a site is one of several rare ones: whichever comes first in a model would be taken for an op alone.
    """
    nodes: list[Node] = [n for n in graph.nodes if n.op == "call_function"]
    rare = (marks_a_site, lambda node: node.target in _UNCOMMON)
    found = [next((node for node in reversed(nodes) if is_rare(node)), None) for is_rare in rare]
    if any(found):
        return [node for node in found if node is not None]
    return [next((node for node in reversed(nodes) if node.target not in _COMMON), nodes[-1])]


def _output(graph: Graph) -> list[Node]:
    result: Any = graph.find_nodes(op="output")[0].args[0]
    return [result[0] if isinstance(result, list | tuple) else result]
