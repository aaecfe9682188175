"""Planned launches in Inductor's schedule and code."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from ..launch import Empty, Launch
from ..op import OPS
from ..passes.inplace import WRITTEN_BACK
from ..passes.lower import LAUNCH, Planned


def register_lowerings() -> None:
    """Teach Inductor to lower our ops: to the launch that `lower` planned, else to a call of the op."""
    from torch._inductor import lowering

    if WRITTEN_BACK not in lowering.lowerings:
        lowering.register_lowering(WRITTEN_BACK, type_promotion_kind=None)(lambda cache, new: None)
    for overload in OPS:
        if overload not in lowering.lowerings:
            lowering.register_lowering(overload, type_promotion_kind=None)(functools.partial(_lower_op, overload))


def _lower_op(overload: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    node = V.graph.current_node
    planned: Planned | None = node.meta.get(LAUNCH)
    if planned is None:
        # Called by the model and compiled without our passes.
        return lowering.fallback_handler(overload, add_to_fallback_set=False)(*args, **kwargs)
    device = planned.launch.device
    given = OPS[overload].bind(args, kwargs)
    earlier: dict[int, Any] = {}
    arguments: dict[str, Any] = {}
    for launch in _early_or_late(planned.launch).all:
        arguments, written = {}, list(launch.mutates)
        for name, value in launch.args.items():
            if isinstance(value, Empty):
                if id(value) not in earlier:
                    written.append(name)
                arguments[name] = earlier[id(value)] if id(value) in earlier else _allocate(value, device)
            elif isinstance(value, torch.Tensor):
                source = given[planned.sources[id(value)]]
                arguments[name] = _copied(source) if name in launch.mutates and not planned.in_place else source
            else:
                arguments[name] = _expression(value)
        earlier |= {id(v): arguments[name] for name, v in launch.args.items() if isinstance(v, Empty)}
        with _known_writes(written):
            _launch_kernel_class()(launch, arguments)
    returns = planned.launch.returns
    assert all(isinstance(arguments[name], ir.TensorBox) for name in returns)
    results = [arguments[name] for name in returns]
    return results[0] if OPS[overload].single else results


def _early_or_late(launch: Launch) -> Launch:
    """Inductor's own kernels, where they are launched early, may write to what the kernel before still reads."""
    from torch._inductor import config

    return launch if config.triton.enable_pdl else launch.launching_early()


def _copied(box: Any) -> Any:
    """A copy with the same strides, which the launch was planned for."""
    from torch._inductor import ir, lowering

    made = ir.ExternKernel.require_exact_strides(lowering.clone(box), box.get_stride())
    made.realize()
    return made


def _expression(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _allocate(empty: Empty, device: torch.device) -> Any:
    """An uninitialised buffer of Inductor's, with its layout fixed."""
    from torch._inductor import ir, lowering

    shape = [_expression(s) for s in empty.shape]
    stride = (
        ir.FlexibleLayout.contiguous_strides(shape) if empty.stride is None else [_expression(s) for s in empty.stride]
    )
    box = lowering.empty_strided(shape, stride, dtype=empty.dtype, device=device)
    box.realize()
    return box


@contextlib.contextmanager
def _known_writes(names: Sequence[str]) -> Iterator[None]:
    """Tell Inductor which kernel arguments are written; its own analysis gives up on PDL's inline assembly."""
    from torch._higher_order_ops import triton_kernel_wrap

    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):  # 2.14
        from torch._inductor.dependencies import ReadWrites, StarDep
        from torch.utils._ordered_set import OrderedSet

        writes: Any = OrderedSet([StarDep(name) for name in names])
        empty: Any = OrderedSet()
        accesses = triton_kernel_wrap.TensorAccesses(
            read_writes=ReadWrites(empty, writes, empty, None, None), can_fuse_epilogue=False
        )
        with mock.patch.object(triton_kernel_wrap, "identify_accessed_tensors", return_value=accesses):
            yield
    else:
        with mock.patch.object(triton_kernel_wrap, "identify_mutated_tensors", return_value=list(names)):
            yield


@functools.cache
def _launch_kernel_class() -> type:
    from torch._inductor import ir

    class LaunchKernel(ir.UserDefinedTritonKernel):
        """A planned launch in Inductor's schedule: the wrapper calls the kernel itself, no operator dispatch."""

        def __init__(self, launch: Launch, arguments: dict[str, Any]) -> None:
            self.launch = launch
            grid = [tuple(_expression(size) for size in (*launch.grid, 1, 1)[:3])]
            options: dict[str, Any] = {
                "kernel_idx": -1,
                "grid": grid,
                "tma_descriptor_metadata": {},
                "kernel_args": arguments,
            }
            if "launch_kwargs" in ir.UserDefinedTritonKernel.__init__.__annotations__:
                options["launch_kwargs"] = ()
            super().__init__(**options)

        def get_kernel_and_metadata(self) -> tuple[Any, list[Any], list[str], list[str]]:
            import triton

            config = triton.Config({}, num_warps=self.launch.num_warps, num_stages=self.launch.num_stages)
            return self.launch.kernel, [config], [], []

        def codegen(self, wrapper: Any) -> None:
            # Inductor shares a definition between launches whose arguments agree; ours may differ in warps or PDL too.
            self.kwargs["launch options"] = str(self.launch.options())
            define = wrapper.define_kernel

            def define_as_planned(name: str, body: str, *args: Any, **kwargs: Any) -> Any:
                return define(name, _as_planned(body, self.launch), *args, **kwargs)

            try:
                with mock.patch.object(wrapper, "define_kernel", define_as_planned):
                    super().codegen(wrapper)
            finally:
                del self.kwargs["launch options"]

    return LaunchKernel


def _as_planned(body: str, launch: Launch) -> str:
    """Inductor's definition of a kernel, with what it has no way to be told: float32, `fp_fusion`, PDL before 2.14."""
    head = "triton_meta={"
    assert head in body, "Inductor no longer writes triton_meta={...}"
    if launch.pdl:
        body = body.replace(head, f"{head}'launch_pdl': True, ", 1)
    if not launch.fp_fusion:
        body = body.replace(head, f"{head}'enable_fp_fusion': False, ", 1)
    for name, value in launch.args.items():
        if isinstance(value, float):
            # Inductor types a Python float as float64, and then the kernel computes with it in float64.
            body = body.replace(f"'{name}': 'fp64'", f"'{name}': 'fp32'", 1)
    return body
