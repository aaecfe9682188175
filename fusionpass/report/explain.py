"""explain: what would fuse, from a trace alone."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_map_only

from .. import inductor, pipeline
from ..arch import Arch
from ..config import Config
from .trace import Report


def explain(model: Callable[..., Any], *args: Any, config: Config | None = None, **kwargs: Any) -> Report:
    """What `compile` would fuse in a model called with these arguments, what not, and why.

    Traces only: parameters and arguments are replaced by fake tensors, so it needs neither a GPU nor memory for the
    model, and touches neither the model nor what it was compiled with.

    Args:
        model: a module or a function of tensors.
        args: its arguments; only the shapes, dtypes and strides of tensors matter.
        config: options; `Config(target=Arch("sm_90"))` explains another target than the tensors' own device.
        kwargs: its keyword arguments.

    Returns:
        A report with one graph per graph of Dynamo's; nothing is generated, so `kernels` is 0.
    """
    options = Config.make(config)
    report = Report(
        type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", "function")
    )
    device = _device(options.target)

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        trace = report.new_graph(inductor.graph_break(gm))

        def run(graph: Graph) -> None:
            passes = [*pipeline.early(options, trace), *pipeline.late(options, trace)]
            pipeline.run(passes, graph, options, trace, keep=True)

        return inductor.trace_graph(gm, inputs, run)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        traced = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model
    with mode, torch.no_grad():
        if isinstance(traced, torch.nn.Module) and device is not None:
            _move(traced, device)
        fake_args, fake_kwargs = tree_map_only(torch.Tensor, lambda t: _fake(mode, t, device), (args, kwargs))
        with _dynamo_cache_untouched() as options_of_compile, _capability_of(options.target):
            torch.compile(traced, backend=backend, dynamic=False, **options_of_compile)(*fake_args, **fake_kwargs)
    return report


@contextlib.contextmanager
def _capability_of(target: Arch | None) -> Iterator[None]:
    """Where there is no GPU, models that ask for its compute capability while they are traced get the target's."""
    if target is None or not target.is_cuda or torch.cuda.is_available():
        yield
        return
    capability = divmod(target.capability, 10)

    # A function, which Dynamo can trace, unlike a mock.
    def get_device_capability(device: Any = None) -> tuple[int, int]:
        return capability

    with mock.patch("torch.cuda.get_device_capability", get_device_capability):
        yield


@contextlib.contextmanager
def _dynamo_cache_untouched() -> Iterator[dict[str, Any]]:
    """Options for `torch.compile` under which a trace does not count towards the recompilations of the traced code.

    Dynamo compiles one code object eight times and then silently runs it eagerly, whoever asked.
    """
    if inductor.ISOLATED:
        yield inductor.ISOLATED
        return
    # Before torch 2.14: forget the code, so that a model of the same class that ran compiled compiles once more.
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.convert_frame import register_bytecode_hook

    traced: list[Any] = []
    hook = register_bytecode_hook(lambda code, new: traced.append(code))
    try:
        yield {}
    finally:
        hook.remove()
        for code in traced:
            reset_code(code)


def _device(target: Arch | None) -> torch.device | None:
    if target is None:
        return None
    return torch.device("cpu") if target.is_cpu else torch.device("cuda", 0)


def _move(module: torch.nn.Module, device: torch.device) -> None:
    """Move a fake copy; shared tensors stay shared (`Module.to` cannot swap fake parameters)."""
    moved: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                new = moved.setdefault(
                    id(parameter), torch.nn.Parameter(parameter.detach().to(device), requires_grad=False)
                )
                child._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    fake: torch.Tensor = mode.from_tensor(tensor)
    return fake if device is None else fake.to(device)
