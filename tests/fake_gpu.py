"""A GPU target without a GPU: enough of CUDA's device queries for Inductor to generate its Triton code.

`codegen(fn, make_args, arch)` gives the wrappers that Inductor would run there; nothing is launched.
"""

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this build of torch has no CUDA, not even for tensors without data"
)

# capability, multiprocessors, threads per multiprocessor, shared memory per block
_TARGETS = {
    "sm_90": ((9, 0), 132, 2048, 232448),
    "sm_100": ((10, 0), 148, 2048, 232448),
    "gfx942": ((9, 4), 304, 2048, 65536),
    "gfx950": ((9, 5), 256, 2048, 163840),
}


class _Driver:
    """What Triton asks of its active driver while code is generated."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def fake_gpu(arch: str) -> Iterator[None]:
    """Make torch and Triton believe that one GPU of `arch` is there."""
    import torch._dynamo.device_interface as device_interface
    import torch._inductor.utils as inductor_utils
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton as triton_utils
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    capability, units, threads, shared = _TARGETS[arch]
    rocm = arch.startswith("gfx")
    properties = types.SimpleNamespace(
        name=arch, major=capability[0], minor=capability[1], multi_processor_count=units, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=threads, max_threads_per_block=1024, warp_size=64 if rocm else 32,
        shared_memory_per_block=49152, shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared,
        L2_cache_size=50 << 20, total_memory=80 << 30, is_integrated=0,
        gcnArchName=f"{arch}:sramecc+:xnack-" if rocm else "",
    )  # fmt: skip
    target = GPUTarget("hip", arch, 64) if rocm else GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    no_block = contextlib.nullcontext
    cuda, interface = torch.cuda, device_interface.CudaInterface
    answers: dict[Any, dict[str, Any]] = {
        cuda: {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: capability,
            "_lazy_init": lambda: None,
            "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None,
            "_exchange_device": lambda device: 0,
            "_maybe_exchange_device": lambda device: 0,
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda device=None: None,
            "device": lambda *a: no_block(),
        },
        interface: {
            "get_device_properties": staticmethod(lambda device=None: properties),
            "current_device": staticmethod(lambda: 0),
            "device_count": staticmethod(lambda: 1),
            "synchronize": staticmethod(lambda device=None: None),
            "device": lambda *a: no_block(),
        },
        interface.Worker: {
            "get_device_properties": staticmethod(lambda device=None: properties),
            "current_device": staticmethod(lambda: 0),
        },
        fake_tensor: {"init_gpu_context": lambda device: None},
        torch.version: {"hip": "6.4.0" if rocm else None, "cuda": None if rocm else "13.0"},
    }

    def forget() -> None:
        for module in (inductor_utils, triton_utils):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
        DeviceProperties.create.cache_clear()

    active = triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        for owner, names in answers.items():
            for name, answer in names.items():
                stack.enter_context(mock.patch.object(owner, name, answer))
        triton.runtime.driver.set_active(_Driver(target))
        stack.callback(setattr, triton.runtime.driver, "_active", active)
        forget()
        stack.callback(forget)
        yield


class _StopError(Exception):
    pass


def codegen(
    fn: Callable[..., Any], make_args: Callable[[], Sequence[Any]], arch: str, backend: Callable[..., Any] | None = None
) -> list[str]:
    """Inductor's wrapper sources, kernels included, for `fn(*make_args())` on a faked `arch`.

    Args:
        fn: a function of tensors.
        make_args: builds its arguments with `device="cuda"`; called under a fake tensor mode.
        arch: a key of the table above.
        backend: a Dynamo backend, for example a fusionpass session; None: plain Inductor.
    """
    import torch._inductor.compile_fx as compile_fx
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    sources: list[str] = []

    def capture(self: Any) -> Any:
        sources.append(self.codegen()[0].value)
        raise _StopError

    real = compile_fx.compile_fx_inner

    def inner(*args: Any, **kwargs: Any) -> Any:
        # Only code generation sees the GPU: Inductor's own patterns are traced with real tensors before it.
        with fake_gpu(arch):
            return real(*args, **kwargs)

    def plain(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx.compile_fx(gm, inputs, inner_compile=inner)

    def stopping(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        count = len(sources)
        try:
            with mock.patch.object(compile_fx, "compile_fx_inner", inner):
                (backend or plain)(gm, inputs)
        except Exception:
            if len(sources) == count:
                raise
        return gm.forward

    torch._dynamo.reset()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        config.patch(force_disable_caches=True, compile_threads=1),
        mock.patch.object(GraphLowering, "compile_to_module", capture),
    ):
        torch.compile(fn, fullgraph=True, backend=stopping)(*make_args())
    return sources
