"""An op: plain PyTorch is its meaning; backends are ways to run it faster."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch

from .arch import Arch
from .errors import RuleError
from .launch import Late, Launch, Plain

Refusal = str | None
"""Nothing, or the reason why not."""

_REMEMBERED = 1024
"""Signatures of calls that an op keeps."""

_LIBRARIES: dict[str, torch.library.Library] = {}


@dataclass(frozen=True)
class Tolerance:
    """How far a kernel may be from its reference, per element.

    Args:
        ulp: largest distance in units in the last place of the output's dtype (8-bit codes: one step is one ulp).
        fraction: largest share of elements that may differ at all.
        fp32_ulp: largest distance where the output is float32, which no later rounding hides.
        floor: differences up to this share of the tensor's largest finite magnitude do not count, for functions that
            cancel: `1 + erf(x)` of a very negative `x` has no correct digits in the reference either.
        cancels: an element that differs may do so by this many steps of the tensor's largest magnitude instead: a sum
            of rounded terms cancels, and one step of a term is many of the sum. `fraction` still bounds how many do.
    """

    ulp: int = 0
    fraction: float = 0.0
    fp32_ulp: int = 0
    floor: float = 0.0
    cancels: float = 0.0


EXACT = Tolerance()


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: as in `Config.disable`, and in reports where it chose a library's call; a launch is "triton" there.
        plan: `plan(arch, **arguments)`, a pure function: the launch, or the reason why this kernel cannot run it there,
            empty where it was never meant to.
            Tensors may be fake and sizes symbolic; `Late` where it is these sizes that decide, `Plain` for a library's.
    """

    name: str
    plan: Callable[..., Launch | Late | Plain | str]


@dataclass(eq=False)
class Op:
    """A functional operator. Made by `@op`; called like its reference.

    Attributes:
        name: the operator's name; `torch.ops.<namespace>.<name>` once registered.
        reference: the plain PyTorch body: the meaning, the CPU path and the test oracle.
        outputs: the names of what it returns, in order; a callable of the bound arguments where options add outputs.
        sample: `sample(tokens, width, dtype, device, generator) -> dict`, arguments for tests and benchmarks.
        tolerance: per output name.
        options: output name → the boolean argument that asks for it.
        backends: tried in order; the first that plans a launch runs.
        parts: what runs where none does: a function of the arguments that calls smaller ops. None: the reference.
    """

    name: str
    namespace: str
    reference: Callable[..., Any]
    outputs: Callable[[Mapping[str, Any]], tuple[str, ...]]
    sample: Callable[..., dict[str, Any]]
    tolerance: Mapping[str, Tolerance]
    options: Mapping[str, str]
    backends: list[Backend] = field(default_factory=list)
    parts: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        self.signature = inspect.signature(self.reference)
        self.single = get_type_hints(self.reference)["return"] is torch.Tensor
        self.__doc__ = self.reference.__doc__
        self._taken: dict[tuple[Any, ...], bool] = {}
        library = _LIBRARIES.get(self.namespace)
        if library is None:
            library = _LIBRARIES[self.namespace] = torch.library.Library(self.namespace, "FRAGMENT")
        # Kernels are planned for the strides of the traced inputs.
        library.define(
            self.name + torch.library.infer_schema(self.reference, mutates_args=()),
            tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
        )
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self.namespace}::{self.name}", self.reference, lib=library)
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, self.namespace), self.name).default
        torch.library.register_autograd(
            f"{self.namespace}::{self.name}", self._backward, setup_context=_save, lib=library
        )

    def __repr__(self) -> str:
        return f"{self.namespace}.{self.name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op: a kernel where one is planned for the tensors' device, else the reference; one result is bare."""
        results = self.overload(*args, **kwargs)
        return results if self.single or len(results) > 1 else results[0]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def call(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by name as a call: what has no default by position, what differs from its default by keyword."""
        given, defaults = dict(arguments), self.signature.parameters
        required = [name for name, p in defaults.items() if p.default is inspect.Parameter.empty]
        args = tuple(given.pop(name) for name in required)
        changed = {k: v for k, v in given.items() if v is not defaults[k].default and v != defaults[k].default}
        return args, changed

    def plan(
        self, arch: Arch, arguments: Mapping[str, Any], disable: frozenset[str] = frozenset()
    ) -> tuple[Launch | Late | Plain | None, str]:
        """What runs this call on `arch` and the backend's name, or None and every backend's reason."""
        reasons = []
        for backend in self.backends:
            planned = "disabled" if backend.name in disable else backend.plan(arch, **arguments)
            if isinstance(planned, Launch) and "pdl" in disable:
                planned = planned.without_pdl()
            if not isinstance(planned, str):
                return planned, backend.name
            reasons += [f"{backend.name}: {planned}"] if planned else []
        return None, "; ".join(reasons) or "no kernel is registered for it"

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.bind(args, kwargs)
        device = next(v.device for v in arguments.values() if isinstance(v, torch.Tensor))
        if device.type != "cuda" or not self._takes(arguments):
            return self.reference(**arguments)
        launch, _ = self.plan(Arch.of(device), arguments)
        if not isinstance(launch, Launch):
            return (launch.function if isinstance(launch, Plain) else self.parts or self.reference)(**arguments)
        results = launch.run()
        return results[0] if self.single else results

    def _takes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the reference takes such arguments: asked once for shapes, dtypes and other values, without data."""
        key = tuple((v.shape, v.dtype) if isinstance(v, torch.Tensor) else (type(v), v) for v in arguments.values())
        known = self._taken.get(key)
        if known is None:
            try:
                with torch.no_grad():
                    self.reference(**{name: _without_data(v) for name, v in arguments.items()})
                known = True
            except Exception:  # whatever it is, the reference raises it again on the arguments themselves
                known = False
            if len(self._taken) >= _REMEMBERED:
                self._taken.clear()
            self._taken[key] = known
        return known

    def _backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        # Recomputed through the reference: fused ops serve inference, but a gradient must never be silently lost.
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).detach() if v is _SAVED else v for v in ctx.inputs]
        for v in inputs:
            if isinstance(v, torch.Tensor):
                v.requires_grad_(v.is_floating_point())
        with torch.enable_grad():
            results = self.reference(*inputs)
        outs, cotangents = ([results], grads) if self.single else (results, grads[0])
        pairs = [(r, g) for r, g in zip(outs, cotangents, strict=True) if r.requires_grad and g is not None]
        wanted = [v for v in inputs if isinstance(v, torch.Tensor) and v.requires_grad]
        found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        # Up to torch 2.13 a gradient for an argument that was left at its default is an error.
        asked = inputs[: len(ctx.needs_input_grad)]
        return tuple(next(found) if isinstance(v, torch.Tensor) and v.requires_grad else None for v in asked)


def _without_data(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


_SAVED = object()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # save_for_backward notices an input that is written to before the backward.
    ctx.save_for_backward(*(v for v in inputs if isinstance(v, torch.Tensor)))
    ctx.inputs = [_SAVED if isinstance(v, torch.Tensor) else v for v in inputs]


OPS: dict[torch._ops.OpOverload, Op] = {}
"""What exists: every registered op by its overload. A catalogue, not state: nothing is ever matched in here."""


def op(
    *,
    outputs: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]],
    sample: Callable[..., dict[str, Any]],
    tolerance: Mapping[str, Tolerance] | None = None,
    options: Mapping[str, str] | None = None,
    namespace: str = "fusionpass",
) -> Callable[[Callable[..., Any]], Op]:
    """Make the decorated reference an op.

    The reference takes tensors, floats, ints, bools and strings, is functional, and returns a Tensor or a list of them.

    Raises:
        RuleError: the op exists already, or an output has no tolerance where a backend may differ.
    """

    def register(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        if any(o.name == name and o.namespace == namespace for o in OPS.values()):
            raise RuleError(f"the op {namespace}::{name} exists already", "op", "Choose another name or namespace")
        names = outputs if callable(outputs) else lambda arguments: outputs
        made = Op(name, namespace, reference, names, sample, dict(tolerance or {}), dict(options or {}))
        OPS[made.overload] = made
        return made

    return register
