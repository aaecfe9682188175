"""A kernel launch as data: run eagerly, written into Inductor's wrapper, or compiled ahead of time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Empty:
    """An output buffer to allocate: contiguous unless strides are given."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    stride: tuple[Any, ...] | None = None

    def new(self, device: torch.device) -> torch.Tensor:
        """The buffer, uninitialised."""
        if self.stride is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Late:
    """A choice between kernels that depends on sizes which are symbolic still.

    The op stays a call, which plans for the sizes that it meets; a CUDA graph holds what it chose at its size.
    """

    reason: str


@dataclass(frozen=True)
class Plain:
    """A library's call, which runs an op better than its reference does.

    Args:
        function: of the op's arguments by name; returns what the op returns.
        traced: it calls PyTorch alone, whose nodes a graph has in the op's place; else the op stays a call.
    """

    function: Callable[..., Any]
    traced: bool = True


@dataclass(frozen=True)
class Launch:
    """One Triton launch.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three ints (or SymInts).
        args: every kernel parameter by name: tensors, numbers, constexprs, None, and `Empty` for what it writes.
        returns: the parameters whose buffers are returned, in the order of the op's outputs.
        pdl: launch with programmatic dependent launch (the kernel must then wait before its first dependent load). A
            constexpr PDL, where it has one, says when it lets the next one start.
        fp_fusion: the compiler may multiply and add without rounding in between. On NVIDIA GPUs that also drops a
            rounding to bfloat16 that stands between them.
        early: the parameters that the kernel may read before that wait, where its constexpr EARLY is true.
        mutates: the parameters that are inputs and written to; `returns` names them where they are outputs. The op is
            functional all the same: who runs the launch copies them first, unless nobody reads the old values.
        before: launches that run first, in order; an `Empty` of theirs that this one has too is one buffer. Two
            parameters of one launch are two buffers.
    """

    kernel: Any
    grid: tuple[Any, ...]
    args: Mapping[str, Any]
    returns: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 1
    pdl: bool = False
    fp_fusion: bool = True
    early: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    before: tuple["Launch", ...] = ()
    note: str = field(default="", compare=False)

    @property
    def device(self) -> torch.device:
        """Where the inputs live, of this launch or of those before it."""
        given = (v for launch in (self, *self.before) for v in launch.args.values())
        return next(v.device for v in given if isinstance(v, torch.Tensor))

    def options(self) -> dict[str, Any]:
        """Triton's own launch options."""
        made: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.pdl:
            made["launch_pdl"] = True
        if not self.fp_fusion:
            made["enable_fp_fusion"] = False
        return made

    def reading_early(self) -> "Launch":
        """The launch for where the kernel just before it cannot have written `early`: parameters of a model, say."""
        before = tuple(launch.reading_early() for launch in self.before)
        return replace(self, args={**self.args, "EARLY": True} if self.early else self.args, before=before)

    def launching_early(self) -> "Launch":
        """The launch for where whatever is launched early behind it waits before it writes; see `ops/pdl.py`."""
        before = tuple(launch.launching_early() for launch in self.before)
        return replace(self, args={**self.args, "PDL": 2} if self.args.get("PDL") else self.args, before=before)

    def without_pdl(self) -> "Launch":
        """The launch that begins when the kernel before it has ended."""
        before = tuple(launch.without_pdl() for launch in self.before)
        args = {**self.args, "PDL": False} if "PDL" in self.args else self.args
        return replace(self, args=args, before=before, pdl=False)

    @property
    def all(self) -> tuple["Launch", ...]:
        """This launch, behind those before it."""
        return (*self.before, self)

    def run(self) -> list[torch.Tensor]:
        """Allocate the outputs and launch on the current stream of the inputs' device."""
        earlier: dict[int, torch.Tensor] = {}
        args: dict[str, Any] = {}
        for launch in self.all:
            args = {name: launch._argument(name, earlier, self.device) for name in launch.args}
            earlier |= {id(v): args[name] for name, v in launch.args.items() if isinstance(v, Empty)}
            if 0 not in launch.grid:
                with torch.cuda.device_of(next(v for v in args.values() if isinstance(v, torch.Tensor))):
                    launch.kernel[launch.grid](**args, **launch.options())
        return [args[name] for name in self.returns]

    def _argument(self, name: str, earlier: dict[int, torch.Tensor], device: torch.device) -> Any:
        value = self.args[name]
        if isinstance(value, Empty):
            return earlier[id(value)] if id(value) in earlier else value.new(device)
        if name not in self.mutates:
            return value
        copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return copied.copy_(value)
