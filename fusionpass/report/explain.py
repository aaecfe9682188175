"""explain: what would fuse, from a trace alone."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx import Graph, GraphModule

from .. import inductor, pipeline
from ..arch import Arch
from ..config import Config
from ..errors import BuildError
from ..passes.whole import whole
from .assembly import assembly
from .dump import wants_ptx
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

    Raises:
        BuildError: the target is a GPU, and this build of torch knows of none.
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
            if wants_ptx():
                trace.assembly |= assembly(graph, options.target)

        report.model_graphs[-1].rewrites = whole(gm, options.disable)
        return inductor.trace_graph(gm, inputs, run, options.disable)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _FakeCopyOn(mode, device), _devices_copied_as(device):
        memo: dict[int, Any] = {}
        traced = copy.deepcopy(model, memo) if isinstance(model, torch.nn.Module) else model
        fake_args, fake_kwargs = copy.deepcopy((args, kwargs), memo)
    with mode, torch.no_grad(), _dynamo_cache_untouched() as options_of_compile, _capability_of(options.target):
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
    if target.is_cpu:
        return torch.device("cpu")
    if not torch.backends.cuda.is_built():
        raise BuildError(
            "this build of torch has no GPUs, not even for tensors without data",
            target.name,
            "Install one for CUDA or ROCm, which needs no GPU to trace for one",
        )
    return torch.device("cuda", 0)


@contextlib.contextmanager
def _devices_copied_as(device: torch.device | None) -> Iterator[None]:
    """Where a cache, say, has noted its device, its copy notes `device`."""
    kinds = {} if device is None else {torch.device: lambda noted, memo: device}
    with mock.patch.dict(copy._deepcopy_dispatch, kinds):  # type: ignore[attr-defined]
        yield


class _FakeCopyOn(FakeCopyMode):
    """Under this mode `copy.deepcopy` makes fake tensors, on `device`, of those in modules, caches and containers."""

    def __init__(self, mode: FakeTensorMode, device: torch.device | None) -> None:
        super().__init__(mode)
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and _of_another_dtype(args[0]) and id(args[0]) not in args[1]:
            tensor, memo = args
            with self.fake_mode:
                device = self.device or tensor.device
                memo[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            return memo[id(tensor)]
        made = super().__torch_function__(func, types, args, kwargs)
        if self.device is None or func not in (torch.Tensor.__deepcopy__, torch._C.TensorBase.clone):
            return made
        moved = made.to(self.device)
        if func is torch.Tensor.__deepcopy__:
            args[1][id(args[0])] = moved
        return moved


def _of_another_dtype(tensor: torch.Tensor) -> bool:
    """Whether setting its `data` left it a view of another dtype, of which PyTorch makes no fake tensor."""
    return tensor._base is not None and tensor._base.dtype != tensor.dtype
