"""Rules: this spelling is that op (`Spelling`); these ops side by side are that op (`Fold`)."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
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
from .op import Op
from .passes.normalize import normalize

HALF = torch.bfloat16
"""The dtype that stands for either 16-bit float in a traced spelling."""

_UNCOMMON = (aten.erf.default, aten.tanh.default, aten.exp.default)
_COMMON = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, CAST, *VIEWS)


@dataclass(frozen=True)
class Spelling:
    """One way in which models write an op.

    Args:
        name: "family.model", as in reports and `Config.disable`.
        op: what it means.
        function: plain PyTorch, its parameters named as the op's; tensors are matched to anything, numbers are bound.
        constants: arguments of the op that this spelling fixes.

    The function is traced on the op's own sample, for every combination of 16-bit and float32 parameters, through the
    same decompositions and the same `normalize` as the graphs that it is looked for in.
    """

    name: str
    op: Op
    function: Callable[..., Any]
    constants: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @functools.cache  # noqa: B019  (a rule lives as long as the process)
    def patterns(self, device: str) -> list[Pattern]:
        """The graphs of this spelling on `device` ("cpu" or "cuda").

        Raises:
            RuleError: a number among the parameters does not appear in the traced graph.
        """
        with FakeTensorMode(), torch.no_grad():
            sample = self.op.sample(4, 8, HALF, "cpu", None)
            wanted = inspect.signature(self.function).parameters
            scalars = {k: 0.0123 + i for i, (k, v) in enumerate(sample.items()) if k in wanted and isinstance(v, float)}
            tensors = {k: v.to(device) for k, v in sample.items() if k in wanted and isinstance(v, torch.Tensor)}
            free = [k for k, v in tensors.items() if v.dtype == HALF]
            found: list[Pattern] = []
            for dtypes in itertools.product((HALF, torch.float32), repeat=len(free)):
                inputs = {**tensors, **{k: tensors[k].to(d) for k, d in zip(free, dtypes, strict=True)}}
                try:
                    graph = self._trace(inputs, scalars)
                except ArgumentError:
                    continue  # the op does not take this combination
                found.append(Pattern(graph, list(inputs), scalars, HALF, _anchor(graph)))
        return found

    def _trace(self, inputs: dict[str, torch.Tensor], scalars: dict[str, float]) -> Graph:
        names = list(inputs)

        def call(*tensors: torch.Tensor) -> Any:
            return self.function(**dict(zip(names, tensors, strict=True)), **scalars)

        graph = make_fx(call, decomposition_table=select_decomp_table())(*inputs.values()).graph
        normalize(graph)
        graph.eliminate_dead_code()
        literals = repr([n.args for n in graph.nodes])
        for name, number in scalars.items():
            if repr(number) not in literals:
                raise RuleError(f"the number {name!r} does not appear in the traced graph", f"Spelling {self.name}")
        return graph


def _anchor(graph: Graph) -> Node:
    """The node that a search starts from: the rarest in a model's graph."""
    nodes: list[Node] = [n for n in graph.nodes if n.op == "call_function"]
    for rare in (marks_a_site, lambda node: node.target in _UNCOMMON, lambda node: node.target not in _COMMON):
        for node in reversed(nodes):
            if rare(node):
                return node
    return nodes[-1]


@dataclass(frozen=True)
class Fold:
    """A producer whose output an op reads first, as one op.

    Args:
        name: as in reports and `Config.disable`.
        producer: an op, or an aten overload.
        consumer: the op that reads `output` as its first argument.
        fused: the op that is both; its arguments are theirs, by name.
        output: the producer's output in between, by its name among the fused op's outputs; where others read it too,
            the fused op returns it as well.
        names: the fused op's names for the arguments of an aten producer.
    """

    name: str
    producer: Op | torch._ops.OpOverload
    consumer: Op
    fused: Op
    output: str
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        offered = set(self.names) if self.names else set(self.producer.signature.parameters)  # type: ignore[union-attr]
        offered |= set(list(self.consumer.signature.parameters)[1:])
        missing = set(self.fused.signature.parameters) - offered - set(self.fused.options.values())
        if missing:
            raise RuleError(f"nothing gives the arguments {sorted(missing)} of {self.fused}", f"Fold {self.name}")

    @property
    def target(self) -> torch._ops.OpOverload:
        """What the producer looks like in a graph."""
        return self.producer.overload if isinstance(self.producer, Op) else self.producer
