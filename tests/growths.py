"""What grows around a pattern, as text: `v` is the value that it grows on, `u` another; and the program as a whole."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

ADDS = (
    "{v} + {u}", "{u} + {v}", "{v} + {u} + {u}", "torch.add({v}, {u}, alpha=2)", "{v} * 0.5 + {u}", "{v} + {v}",
    "{v} + 1", "{v} + {u} * 2", "{u} * 0.22 + {v}", "({u} + {u}) + {v}",
)  # fmt: skip
"""Sums of a residual stream, and some that are none."""
READERS = (
    "{v}.square()", "{v}.float().pow(2)", "{v}.mean(-1, keepdim=True)", "{v}.float().mean(-1, keepdim=True)",
    "{v}.abs().rsqrt()", "{v}.float()", "{v}.to(torch.float16)", "{v} * {v}", "{v} * {u}", "{v} + {u}", "{v}.sum()",
    "{v}.float() + 1", "{v}.view(torch.uint8)", "{v}.amax(-1)", "torch.nn.functional.silu({v})", "{v} == {v}",
)  # fmt: skip
"""Whoever else reads a value."""
VIEWS = (
    "{v}.view(-1, {v}.shape[-1])", "{v}.reshape(-1)", "{v}.reshape(1, *{v}.shape)", "{v}.transpose(0, -1)", "{v}[:1]",
    "{v}[..., 1:]", "{v}[..., ::2]", "{v}.unsqueeze(0)", "{v}.expand(2, *{v}.shape)", "{v}.select(0, 0)", "{v}[:0]",
    "{v}.detach()", "{v}.view_as({v})", "{v}.flatten()", "{v}.unflatten(-1, (1, -1))", "{v}.t()", "{v}.squeeze()",
)  # fmt: skip
"""Other shapes of the same memory."""
DETOURS = (
    "{v}.float().to({v}.dtype)", "{v}.to(torch.bfloat16).to({v}.dtype)", "{v}.view(-1, {v}.shape[-1]).view({v}.shape)",
    "{v}.transpose(0, -1).transpose(0, -1)", "{v}.transpose(0, -1).contiguous().transpose(0, -1)", "{v}.contiguous()",
    "{v}.clone()", "{v}[...]", "{v}.expand_as({v})", "{v}.view_as({v})", "{v}.detach()", "{v} + 0", "{v} * 1",
    "{v}.reshape({v}.shape)", "{v}.unsqueeze(0).squeeze(0)",
)  # fmt: skip
"""The same values by another way."""
MUTATIONS = (
    "{v}.add_(1)", "{v}.mul_(2)", "{v}.neg_()", "{v}.copy_({u})", "{v}.add_({u})", "{v}[..., :1].copy_({v}[..., -1:])",
    "{v}[:1].zero_()", "{v}.view(-1)[:1].fill_(3)", "{v}.transpose(0, -1)[:1].mul_(-1)",
)  # fmt: skip
"""Writes into a value."""
VARIANTS = (
    "{v}.to(torch.bfloat16)", "{v}.to(torch.float16)", "{v}.to(torch.float32)", "{v}[:1]", "{v}[..., :1]", "{v}[None]",
    "torch.cat([{v}, {v}], -1)[..., :{v}.shape[-1]]", "torch.stack([{v}, {v}], -1)[..., 0]", "{v}[:1].expand_as({v})",
    "{v}.transpose(0, -1).contiguous().transpose(0, -1)", "{v}.expand(8).clone()", "{v}[0]", "{v}.to(torch.float64)",
)  # fmt: skip
"""What an input may be instead: narrower, broadcast, strided, of another dtype."""
REFUSED = (RuntimeError, IndexError, ValueError, TypeError)
"""What eager mode raises for a line that makes no sense."""


@dataclass
class Grown:
    """A function as text, and the inputs to call it with.

    Attributes:
        inputs: name → tensor; several may share memory.
        lines: its statements.
        results: the names that it returns.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The function as one would write it in a test."""
        body = [*self.lines, f"return {', '.join(self.results)},"]
        return "\n".join([f"def grown({', '.join(self.inputs)}):", *(f"    {line}" for line in body)])

    @property
    def function(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The function itself."""
        made = namespace()
        exec(self.source, made)
        function: Callable[..., tuple[torch.Tensor, ...]] = made["grown"]
        return function

    def arguments(self) -> list[torch.Tensor]:
        """Fresh inputs; those that share memory share it again."""
        return copy.deepcopy(list(self.inputs.values()))

    def __repr__(self) -> str:
        types = [f"# {k}: {v.dtype}{list(v.shape)} strides {v.stride()}" for k, v in self.inputs.items()]
        return "\n".join(["", *types, self.source])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def namespace() -> dict[str, Any]:
    """What the text may name."""
    return {"torch": torch, "aten": torch.ops.aten, "device": torch.device, "inf": float("inf"), "nan": float("nan")}
