"""verify=True: each rewrite is run beside what it replaces, on random and on awkward numbers, before it is made."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from .arch import Arch
from .graphs import hint
from .launch import Launch
from .op import OPS, Op, Refusal
from .testing import disagreement


def check_rewrite(
    old: Sequence[Node],
    outputs: Sequence[Node],
    op: Op,
    arguments: Mapping[str, Any],
    names: Sequence[str] = (),
) -> Refusal:
    """Whether `op` gives, within its tolerance, what the nodes `old` give; the reason with the first difference if not.

    Args:
        old: the nodes to be replaced, in order.
        outputs: those whose values stay in use.
        op: what replaces them.
        arguments: the op's arguments, nodes among them.
        names: which of the op's outputs the values are, in order; default: all of them.
    """
    produced = op.outputs(arguments)
    inputs = dict.fromkeys(a for a in arguments.values() if isinstance(a, Node))
    outside = dict.fromkeys(n for node in old for n in node.all_input_nodes if n not in set(old))
    # A view that was made for the op: of what the old nodes read themselves.
    views = [n for n in inputs if n not in outside and n.all_input_nodes]
    inputs = {n: None for n in inputs if n not in views}
    missing = [n for n in outside if n not in inputs]
    roles = {value: name for name, value in arguments.items() if isinstance(value, Node)}

    def before(values: Mapping[Node, Any]) -> list[torch.Tensor]:
        env = dict(values)
        for node in old:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            known = OPS.get(node.target)  # type: ignore[call-overload]
            env[node] = known.reference(*args, **kwargs) if known is not None else node.target(*args, **kwargs)  # type: ignore[operator]
        return [env[node] for node in outputs]

    def after(values: Mapping[Node, Any]) -> list[torch.Tensor]:
        env = dict(values)
        for node in views:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        results = op.reference(**{k: env[v] if isinstance(v, Node) else v for k, v in arguments.items()})
        chosen = _chosen(produced, [results] if op.single else results, names)
        # A fold over a view of the rows has its view behind the op.
        grouped = [[hint(size) for size in node.meta["val"].shape] for node in outputs]
        return [result.reshape(shape) for result, shape in zip(chosen, grouped, strict=True)]

    shapes = {node: node.meta["val"] for node in (*inputs, *missing)}
    return _compare(before, after, {n: (roles.get(n, n.name), v) for n, v in shapes.items()}, op, names or produced)


def check_launch(op: Op, arguments: Mapping[str, Any], arch: Arch, disable: frozenset[str] = frozenset()) -> Refusal:
    """Whether the kernel that is planned for these (fake) arguments gives what the op's reference gives."""
    tensors = {name: (name, v) for name, v in arguments.items() if isinstance(v, torch.Tensor)}
    names = op.outputs(arguments)

    def before(values: Mapping[str, Any]) -> list[torch.Tensor]:
        results = op.reference(**{**arguments, **values})
        return [results] if op.single else list(results)

    def after(values: Mapping[str, Any]) -> list[torch.Tensor]:
        launch, reason = op.plan(arch, {**arguments, **values}, disable)
        assert isinstance(launch, Launch), reason
        return launch.run()

    return _compare(before, after, tensors, op, names)


def _compare(
    before: Callable[[Any], list[torch.Tensor]],
    after: Callable[[Any], list[torch.Tensor]],
    inputs: Mapping[Any, tuple[str, Any]],
    op: Op,
    names: Sequence[str],
) -> Refusal:
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        for kind, values in _draws(inputs):
            if wrong := disagreement(op, dict(inputs.values()), after(values), before(values), names):
                return f"verify: on {kind} inputs {wrong}"
    return None


def _chosen(produced: Sequence[str], results: Sequence[torch.Tensor], names: Sequence[str]) -> list[torch.Tensor]:
    by_name = dict(zip(produced, results, strict=True))
    return [by_name[name] for name in names or produced]


def _draws(inputs: Mapping[Any, tuple[str, Any]]) -> Iterator[tuple[str, dict[Any, Any]]]:
    for seed, (kind, fill) in enumerate(_FILLS.items()):
        generator = torch.Generator().manual_seed(seed)
        yield kind, {key: _real(name, fake, fill, generator) for key, (name, fake) in inputs.items()}


def _real(name: str, fake: Any, fill: Callable[..., torch.Tensor], generator: torch.Generator) -> Any:
    """A tensor like `fake`, strides included; scales are positive and weights ordinary whatever the activations are."""
    if not isinstance(fake, torch.Tensor):
        return hint(fake) if isinstance(fake, torch.SymInt) else fake
    shape, stride = [hint(s) for s in fake.shape], [hint(s) for s in fake.stride()]
    device = fake.device if fake.device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    if not fake.is_floating_point():
        values = torch.randint(0, 2, shape, generator=generator)
    elif name.startswith("scale") or fake.numel() == 1:
        values = torch.rand(shape, generator=generator).mul(0.1).add(1e-3)
    elif name in ("x", "residual", "second", "gate", "up"):
        values = fill(shape, generator)
    else:
        values = _random(shape, generator)
    real = torch.empty_strided(shape, stride, dtype=fake.dtype, device=device)
    largest = torch.finfo(fake.dtype).max if fake.is_floating_point() else None
    return real.copy_(values if largest is None else values.clamp(-largest, largest))


def _random(shape: list[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _one_hot(shape: list[int], generator: torch.Generator) -> torch.Tensor:
    values = torch.zeros(shape)
    if values.numel():
        rows = values.view(-1, shape[-1])
        rows[torch.arange(len(rows)), torch.randint(0, shape[-1], (len(rows),), generator=generator)] = 3.0
    return values


_FILLS: dict[str, Callable[[list[int], torch.Generator], torch.Tensor]] = {
    "random": _random,
    "zero": lambda shape, _: torch.zeros(shape),
    "large": lambda shape, generator: _random(shape, generator) * 1e4,
    "subnormal": lambda shape, generator: _random(shape, generator) * 1e-39,
    "one-hot": _one_hot,
}
