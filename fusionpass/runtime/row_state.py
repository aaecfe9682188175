"""How a value of a graph depends on the rows that a symbol counts, and a call of an op with what it is given."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Rows:
    """A value with rows along a dimension, alone there or flattened with others.

    Attributes:
        dim: the dimension.
        inner: how many neighbours there are of one row: element k is of row `k // inner % symbol`.
    """

    dim: int
    inner: Any = sympy.S.One

    def along(self, dim: int) -> "Rows":
        """The same along another dimension."""
        return Rows(dim, self.inner)


@dataclass(frozen=True)
class Mixed:
    """A value whose rows depend on others, or are not known not to.

    Attributes:
        reason: the node at fault, and why.
        order: of that node in its graph; -1 where a rule returns it.
        leading: where the value begins with the rows, unmixed, and goes on with something else; None: nowhere.
        length: how far the rows go there.
    """

    reason: str
    order: int = -1
    leading: Rows | None = None
    length: Any = None


State = Any
"""How a value depends on the rows: None (not at all), `Rows` or `Mixed`; for several values a tuple. A rule may return
a str too, the reason for `Mixed`."""


def symbols(leaf: Any) -> set[sympy.Symbol]:
    """The symbols in a number, or in the shape of a tensor; of a node, in what it stands for."""
    if isinstance(leaf, Node):
        leaf = leaf.meta["val"]
    if isinstance(leaf, torch.Tensor):
        return set().union(*map(symbols, leaf.shape))
    return (
        set(leaf.node.expr.free_symbols) if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) else set()
    )


def expression(size: Any) -> sympy.Expr:
    """A size as sympy has it."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def rows_of(tensor: torch.Tensor, symbol: sympy.Symbol) -> Rows | str | None:
    """The one dimension whose size is `symbol`, None if `symbol` is in no size, or why there is not one."""
    found = [i for i, size in enumerate(tensor.shape) if symbol in symbols(size)]
    if len(found) > 1:
        return f"has {symbol} in {len(found)} dimensions of {text(tensor)}"
    if found and expression(tensor.shape[found[0]]) != symbol:
        return f"has no dimension of {symbol} in {text(tensor)}"
    return Rows(found[0]) if found else None


def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """`a / b` where that is whole for every value of the symbols, as far as is seen."""
    if b == 0:
        return None
    found = sympy.cancel(a / b)
    return found if sympy.fraction(found)[1] == 1 else None


def text(tensor: torch.Tensor) -> str:
    """The shape."""
    return f"[{', '.join(map(str, tensor.shape))}]"


class Call:
    """A node that calls an op.

    Attributes:
        args: by name, with defaults.
        results: what it returns, as fake tensors.
    """

    def __init__(self, node: Node, states: Mapping[Node, State], symbol: sympy.Symbol) -> None:
        self.states, self.symbol = states, symbol
        self.target: OpOverload = node.target  # type: ignore[assignment]
        self.args: dict[str, Any] = {p.name: p.default_value for p in self.target._schema.arguments}
        self.args |= dict(zip(self.args, node.args, strict=False)) | node.kwargs
        result: Any = node.meta.get("val")
        self.is_sequence = isinstance(result, tuple | list)
        self.results: list[Any] = list(result) if self.is_sequence else [result]

    def tensor(self, name: str) -> torch.Tensor:
        """What an argument stands for."""
        return self.args[name].meta["val"]  # type: ignore[no-any-return]

    def at(self, name: str) -> State:
        """Where an argument has the rows."""
        arg = self.args.get(name)
        return self.states[arg] if isinstance(arg, Node) else None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, State]]:
        """Each tensor among the arguments: its argument's name, what it stands for, where it has the rows."""
        for name, arg in self.args.items():
            for leaf in tree_leaves(arg):
                if isinstance(leaf, Node) and isinstance(leaf.meta["val"], torch.Tensor):
                    yield name, leaf.meta["val"], self.states[leaf]

    def rows(self) -> dict[str, Rows]:
        """The arguments that have rows, and where."""
        return {name: at for name, _, at in self.tensors() if at is not None}

    def place(self, name: str) -> str:
        """The same in words."""
        return f"dimension {self.rows()[name].dim} of {name} {text(self.tensor(name))}"

    def axis(self, default: int = 0) -> int:
        """The dimension of `self` that the op is told."""
        return int(self.args.get("dim", default) % self.tensor("self").dim())

    def made(self) -> Rows | str | None:
        """Where the result has its rows if it has them from no operand: where its shape says."""
        return rows_of(self.results[0], self.symbol)

    def counts(self, leaf: Any) -> bool:
        """Whether a number among the arguments changes with the number of rows."""
        is_tensor = isinstance(leaf, Node) and isinstance(leaf.meta["val"], torch.Tensor)
        return not is_tensor and self.symbol in symbols(leaf)
