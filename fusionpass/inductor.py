"""Every touch of Inductor's internals. tests/test_inductor.py fails when a torch release moves one of them."""

import contextlib
import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from .config import Config
from .launch import Empty, Launch
from .op import OPS
from .passes.lower import LAUNCH, Planned
from .report.trace import GraphTrace

GraphPass = Callable[[Graph], None]
LatePass = Callable[[Graph, frozenset[Node]], None]


class _JointPass(CustomGraphPass):
    """Our early passes at `joint_custom_pre_pass`, behind whatever the user had set there."""

    def __init__(self, early: GraphPass, before: Any, key: Any) -> None:
        self.early, self.key = early, key
        self.before: list[Any] = (
            [] if before is None else list(before) if isinstance(before, list | tuple) else [before]
        )

    def __call__(self, graph: Graph) -> None:
        for function in self.before:
            function(graph)
        self.early(graph)

    def uuid(self) -> Any:
        if any(op.backends for op in OPS.values() if op.namespace != "fusionpass"):
            return None  # a user's kernel is not in the digest of our sources: no caching
        ids = [function.uuid() if isinstance(function, CustomGraphPass) else None for function in self.before]
        return None if None in ids else (package_digest(), self.key, *map(str, ids))


@functools.cache
def package_digest() -> str:
    """A hash of the package's own sources: any change to a pass, an op or a kernel invalidates Inductor's caches."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)
"""Options of `torch.compile` for a limit of recompiles of one's own (from torch 2.14): Dynamo counts by code object."""


def graph_break(gm: GraphModule) -> str:
    """Why Dynamo ended this graph early; empty if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(reason.reason) if reason is not None and reason.graph_break else ""


def compile_graph(
    gm: GraphModule, inputs: Sequence[Any], config: Config, trace: GraphTrace, early: GraphPass, late: LatePass
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs through Inductor, with `early` and `late` run on its aten graph.

    `late` is also given the inputs that hold parameters and buffers. Nothing global stays changed: options are patched
    for the length of the call. `late` runs in front of Inductor's cache look-up, not inside it, so that a warm cache
    still yields a report.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph_module: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        if options.get("is_inference", False):
            inputs = graph_module.graph.find_nodes(op="placeholder")
            late(graph_module.graph, frozenset(inputs[i] for i in options.get("static_input_idxs", ())))
            graph_module.recompile()
        compiled = compile_fx_inner(graph_module, example_inputs, **options)
        source = getattr(compiled, "source_code", "") or ""
        if source:
            trace.sources.append(source)
            trace.kernels += kernels_in(source)
        return compiled

    key = (sorted(config.disable), config.numerics, str(config.target))
    patches = {
        "joint_custom_pre_pass": _JointPass(early, inductor_config.joint_custom_pre_pass, key),
        "emulate_precision_casts": config.numerics == "eager" or inductor_config.emulate_precision_casts,
    }
    register_lowerings()
    # AOTAutograd's own cache would skip our passes, and with them the report.
    with inductor_config.patch(patches), functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, list(inputs), inner_compile=inner)  # type: ignore[return-value]


def trace_graph(gm: GraphModule, inputs: Sequence[Any], run: GraphPass) -> Callable[..., Any]:
    """Take one of Dynamo's graphs to the aten graph that Inductor would see, run `run` on it, and generate no code."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]
    from torch._inductor.decomposition import select_decomp_table

    def traced(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        run(graph_module.graph)
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)

    backend = aot_autograd(
        fw_compiler=traced, decompositions=select_decomp_table(), keep_inference_input_mutations=True
    )
    compiled: Callable[..., Any] = backend(gm, list(inputs))
    return compiled


_KERNEL = re.compile(r"^(\w+) = async_compile\.\w+\(", re.MULTILINE)


def kernels_in(source: str) -> int:
    """How many calls of generated or hand-written kernels (Triton or C++) Inductor's wrapper `source` makes."""
    call = source[source.find("def call(") :]
    return sum(len(re.findall(rf"\b{name}(?:\.run)?\(", call)) for name in set(_KERNEL.findall(source)))


def is_training(graph: Graph) -> bool:
    """Whether this is a joint graph with a backward in it."""
    return any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder"))


def register_lowerings() -> None:
    """Teach Inductor to lower our ops: to the launch that `lower` planned, else to a call of the op."""
    from torch._inductor import lowering

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
    launch, device = planned.launch, planned.launch.device
    given = OPS[overload].bind(args, kwargs)
    arguments: dict[str, Any] = {}
    for name, value in launch.args.items():
        if isinstance(value, Empty):
            arguments[name] = _allocate(value, device)
        elif isinstance(value, torch.Tensor):
            arguments[name] = given[planned.sources[name]]
        else:
            arguments[name] = _expression(value)
    written = [name for name, value in launch.args.items() if isinstance(value, Empty)]
    with _known_writes(written):
        _launch_kernel_class()(launch, arguments)
    assert all(isinstance(arguments[name], ir.TensorBox) for name in launch.returns)
    results = [arguments[name] for name in launch.returns]
    return results[0] if OPS[overload].single else results


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
    """Inductor's definition of a kernel, with what it has no way to be told: float32 numbers, and PDL before 2.14."""
    head = "triton_meta={"
    assert head in body, "Inductor no longer writes triton_meta={...}"
    if launch.pdl:
        body = body.replace(head, f"{head}'launch_pdl': True, ", 1)
    for name, value in launch.args.items():
        if isinstance(value, float):
            # Inductor types a Python float as float64, and then the kernel computes with it in float64.
            body = body.replace(f"'{name}': 'fp64'", f"'{name}': 'fp32'", 1)
    return body
