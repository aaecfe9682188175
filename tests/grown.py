"""Random PyTorch functions that have the package's patterns in them, grown over with what models put around them.

A program is source text, run line by line while it is drawn: what eager mode does not take is never part of it, and a
failing example prints as a function that can be pasted into a test.
"""

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from hypothesis import strategies as st
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.errors import FusionpassError
from fusionpass.rule import Spelling
from fusionpass.rules import SPELLINGS
from tests.growths import ADDS, DETOURS, MUTATIONS, READERS, REFUSED, VARIANTS, VIEWS, Grown, namespace

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTISERS = tuple(s for s in SPELLINGS if s.op.name == "quantize")
STATIC = tuple(s for s in QUANTISERS if "fp8_static" in s.constants["scheme"])
PRODUCERS = tuple(s for s in SPELLINGS if s not in QUANTISERS)
COMMUTATIVE = (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)

WIDTHS = (8, 33, 1, 16, 64, 256)
EPS = (1e-6, 1e-5, 0.0, 0.1, 30.0)


@st.composite
def programs(draw: st.DrawFn, first: Spelling) -> Grown:
    """Functions with `first` in them, up to two more sites before, behind or beside it, and what grows around."""
    return _Gardener(draw).grow(first)


class _Gardener:
    """Draws one program, and runs it on the way."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.grown = Grown()
        self.env: dict[str, Any] = namespace()
        self.values: list[str] = []
        self.roots: list[str] = []
        self.random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        # Many programs are clean in one respect or another: where everything is odd, nothing fuses.
        self.density = self.pick([0, 0, 0, 1, 1, 2])
        self.odd, self.mutates, self.nearly = self.chance(5), self.chance(6), self.chance(2)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.draw(st.integers(0, len(options) - 1))]

    def chance(self, tenths: int) -> bool:
        return self.draw(st.integers(0, 9)) >= 10 - tenths

    def grow(self, first: Spelling) -> Grown:
        rows = self.pick([3, 1, 4, 0])
        # 256 is a multiple of every scheme's group.
        shape = (rows, self.pick([256, 128] if first in QUANTISERS else WIDTHS))
        with torch.no_grad():
            x = torch.randn(shape if self.chance(6) else (2, *shape), generator=self.random)
            self.start = self.input("x", (x * self.pick([1, 30, 1e-3])).to(self.pick(DTYPES)))
            sites = [
                self.site(first),
                *(self.site(self.pick([*PRODUCERS, *STATIC])) for _ in range(self.pick([0, 0, 0, 1, 2]))),
            ]
            for _ in self.interleaved(sites) if self.chance(4) else itertools.chain(*sites):
                self.around()
            self.around()
        kept = [name for name in self.roots if not self.chance(1)]
        self.grown.results = [*kept, *(self.value() for _ in range(self.pick([0, 1, 3])))] or ["x"]
        return self.grown

    def site(self, spelling: Spelling) -> Iterator[None]:
        """Residual adds and a norm or an activation, perhaps twice, and up to five quantisations of what comes out."""
        value: str | None = self.pick([self.start, *self.roots])
        producers = [self.pick(PRODUCERS)] if self.chance(2) else []
        for producer in [*producers, *([spelling] if spelling not in QUANTISERS else []), None]:
            while value is not None and self.chance(4):
                added = self.emit(self.pick(ADDS).format(v=value, u=self.alike(value, "residual")))
                if added is not None:
                    value = added
                    self.roots += [added] if self.chance(7) else []
                yield
            if producer is None or value is None:
                break
            made = yield from self.spelled(producer, value)
            value = self.detour(made) if made is not None and self.density and self.chance(2) else made
        if value is None or (spelling not in QUANTISERS and self.chance(3)):
            return
        first = spelling if spelling in QUANTISERS else self.pick([*STATIC, self.pick(QUANTISERS)])
        # Only static scales fold together, and only their spellings are short.
        more = self.pick([0, 0, 0, 1, 4]) if first in STATIC else self.pick([0, 0, 0, 1])
        rules = [first, *(self.pick([first, *STATIC]) for _ in range(more))]
        yield from self.interleaved([self.spelled(rule, value) for rule in rules])

    def interleaved(self, steps: Sequence[Iterator[None]]) -> Iterator[None]:
        active = list(steps)
        while active:
            turn = self.pick(active)
            try:
                next(turn)
            except StopIteration:
                active.remove(turn)
            else:
                yield

    def spelled(self, spelling: Spelling, value: str) -> Generator[None, None, str | None]:
        """One spelling, statement by statement, reading `value`; the name of its first result, if it got so far."""
        read = self.env[value]
        if read.dtype not in DTYPES or read.dim() == 0:
            value, read = self.start, self.env[self.start]
        try:
            graph, names = self.traced(spelling, value)
        except (*REFUSED, FusionpassError):
            return None  # a width that is no multiple of the group
        waiting = [node for node in graph.nodes if node.op == "call_function"]
        # At most one detour and one mistake a pattern, or no long one would ever stay whole.
        bend = self.draw(st.integers(0, 2 * len(waiting))) if self.density else 0
        slip = self.draw(st.integers(0, len(waiting))) if self.nearly else 0
        while waiting:
            ready = [node for node in waiting if all(n in names for n in node.all_input_nodes)]
            if not ready:
                return None
            node = self.pick(ready)
            made = self.emit(self.call(node, names, nearly=len(waiting) == slip))
            if made is not None:
                names[node] = self.detour(made) if len(waiting) == bend else made
            waiting.remove(node)
            yield
        results = [names.get(node) for node in graph.find_nodes(op="output")[0].all_input_nodes]
        self.roots += [name for name in results if name is not None]
        return results[0]

    def traced(self, spelling: Spelling, value: str) -> tuple[Graph, dict[Node, str]]:
        """The aten graph of `spelling` for `value`, and what the inputs of the graph are called in the program."""
        wanted = self.arguments(spelling, self.env[value])
        _, *others = [name for name, given in wanted.items() if isinstance(given, torch.Tensor)]
        names = [value]
        for name in others:
            if wanted[name].shape == self.env[value].shape:
                names.append(self.alike(value, name))
                continue
            known = [n for n in self.values if self.env[n].shape == wanted[name].shape and self.env[n].dtype in DTYPES]
            # A scale may be computed, from what it is to scale too: then it is there late.
            source = f"{self.pick([value, self.value()])}.float().abs().amax()"
            made = self.emit(source) if name == "scale" and self.chance(2) else None
            names.append(made or (self.pick(known) if known and self.chance(4) else self.input(name, wanted[name])))
        graph = _traced(spelling, wanted)
        return graph, dict(zip(graph.find_nodes(op="placeholder"), names, strict=True))

    def arguments(self, spelling: Spelling, read: torch.Tensor) -> dict[str, Any]:
        """What the spelled function is traced with: `read` first, then the op's sample, and numbers of our own."""
        if (dim := spelling.constants.get("dim")) is not None and dim < read.dim():
            part = read.narrow(dim, 0, read.shape[dim] // 2)
            return {
                "cache": read,
                "x": torch.randn(part.shape, generator=self.random).to(read.dtype),
                "positions": torch.randperm(read.shape[dim], generator=self.random)[: part.shape[dim]],
            }
        rows, width = math.prod(read.shape[:-1]), read.shape[-1]
        sample = (spelling.sample or spelling.op.sample)(rows, width, read.dtype, "cpu", self.random)
        wanted: dict[str, Any] = {}
        for name, parameter in inspect.signature(spelling.function).parameters.items():
            if not wanted:
                wanted[name] = read
            elif parameter.annotation is float:
                wanted[name] = self.pick(EPS) if name == "eps" else sample.get(name, 1.0)
            elif parameter.annotation is int:
                wanted[name] = sample.get(name, max(1, width // 2))
            elif parameter.annotation not in (bool, str):
                given = sample.get(name)
                given = torch.randn(rows, width, generator=self.random).to(read.dtype) if given is None else given
                if given.dim() > read.dim():  # one row of angles for each token
                    given = given.flatten(0, -2)[: read.shape[-2] if read.dim() > 1 else 1]
                wanted[name] = given.reshape(read.shape) if given.shape == (rows, width) else given
        return wanted

    def call(self, node: Node, names: Mapping[Node, str], nearly: bool) -> str:
        """The statement of a traced node, its operands in either order; if `nearly`, its literals one off."""
        args, kwargs = list(node.args), node.kwargs
        # Two tensors: ATen itself rounds a number first where it stands first, which no model can write.
        pair = len(args) == 2 and all(isinstance(arg, Node) for arg in args) and not kwargs
        if pair and (self.chance(3) if node.target in COMMUTATIVE else nearly):
            args.reverse()
        if node.target is getitem:
            return f"{_text(args[0], names)}[{args[1]}]"
        if nearly:
            args, kwargs = _nearly(args), _nearly(kwargs)
        given = [_text(a, names) for a in args] + [f"{k}={_text(v, names)}" for k, v in kwargs.items()]
        return f"{node.target}({', '.join(given)})"

    def input(self, role: str, tensor: torch.Tensor) -> str:
        """A new input; in an odd program perhaps in another shape, dtype or layout, with zeros, inf or NaN."""
        name = role if role not in self.env else f"{role}{len(self.grown.inputs)}"
        if self.odd and tensor.is_floating_point() and tensor.numel() and self.chance(3):
            tensor.reshape(-1)[:: self.pick([1, 5, 7])] = self.pick([0.0, -0.0, math.inf, math.nan, 6e4])
        if self.odd and self.chance(4):
            with contextlib.suppress(*REFUSED):
                tensor = eval(self.pick(VARIANTS).format(v="v"), {**namespace(), "v": tensor})
        self.grown.inputs[name] = tensor
        self.env[name] = copy.deepcopy(tensor)
        self.values.append(name)
        return name

    def alike(self, value: str, role: str) -> str:
        """A tensor like `value`: that itself, another of the program's, or a new input, which may be an alias."""
        like = self.env[value]
        known = [n for n in self.values if self.env[n].shape == like.shape and self.env[n].dtype == like.dtype]
        if self.chance(2):
            return self.pick(known)
        inputs = [n for n in known if n in self.grown.inputs]
        if self.odd and inputs and self.chance(4):
            name, source = f"{role}{len(self.grown.inputs)}", self.pick(inputs)
            # Both copies of the inputs, the fresh and the one that the program has written to, get the alias.
            for tensors in (self.grown.inputs, self.env):
                tensors[name] = tensors[source] if len(self.values) % 2 else tensors[source][...]
            self.values.append(name)
            return name
        return self.input(role, torch.randn(like.shape, generator=self.random).to(like.dtype))

    def value(self) -> str:
        name: str = self.pick(self.values)
        return name

    def emit(self, expression: str) -> str | None:
        """One more statement; None where eager mode refuses it."""
        try:
            made = eval(expression, self.env)
        except REFUSED:
            return None
        if isinstance(made, torch.Tensor) and made.numel() > 8192:
            return None
        name = f"v{len(self.grown.lines)}"
        self.env[name] = made
        self.values += [name] if isinstance(made, torch.Tensor) else []
        self.grown.lines.append(f"{name} = {expression}")
        return name

    def detour(self, name: str) -> str:
        """The same values by another way."""
        return (self.emit(self.pick(DETOURS).format(v=name)) if name in self.values else None) or name

    def around(self) -> None:
        """What grows between two statements: readers, views, writes."""
        for _ in range(self.density):
            kind = self.pick([(), READERS, VIEWS, MUTATIONS if self.mutates else ()])
            if kind is MUTATIONS:
                value = self.value()
                statement = self.pick(MUTATIONS).format(v=value, u=self.pick([value, *self.values[-3:]]))
                with contextlib.suppress(*REFUSED):
                    exec(statement, self.env)
                    self.grown.lines.append(statement)
            elif kind:
                self.emit(self.pick(kind).format(v=self.value(), u=self.value()))


_GRAPHS: dict[Any, Graph] = {}
"""Traces take most of the time that drawing takes, and few differ."""


def _traced(spelling: Spelling, arguments: Mapping[str, Any]) -> Graph:
    tensors = {name: given for name, given in arguments.items() if isinstance(given, torch.Tensor)}
    numbers = {name: given for name, given in arguments.items() if name not in tensors}

    def call(*values: torch.Tensor) -> Any:
        return spelling.function(**numbers, **dict(zip(tensors, values, strict=True)))

    key = (spelling.name, *numbers.items(), *((t.shape, t.stride(), t.dtype) for t in tensors.values()))
    if key not in _GRAPHS:
        _GRAPHS[key] = make_fx(call)(*tensors.values()).graph
    return _GRAPHS[key]


def _nearly(value: Any) -> Any:
    """Every literal one off."""
    if isinstance(value, dict):
        return {k: _nearly(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_nearly(v) for v in value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return torch.float16 if value in (torch.bfloat16, torch.float32) else value


def _text(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(v, names) for v in value)}]"
    return repr(value)
