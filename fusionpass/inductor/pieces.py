"""One graph through AOTAutograd and Inductor, with our passes at their hooks."""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from ..config import Config
from ..op import OPS
from ..passes.attend import attend
from ..report.trace import GraphTrace
from ..runtime.rows import row_dims_by_symbol
from ..tuning import store
from .launches import register_lowerings
from .sizes import guards, keep_strides
from .state import package_digest

GraphPass = Callable[[Graph], None]


LatePass = Callable[[Graph, frozenset[Node]], None]


class _JointPass(CustomGraphPass):
    """Our early passes at `joint_custom_pre_pass`, behind whatever the user had set there.

    With no `key` it is like no other: AOTAutograd's own look-up, which would skip it and the report, never finds it.
    """

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
        if self.key is None:
            return uuid.uuid4().hex
        if any(op.backends for op in OPS.values() if op.namespace != "fusionpass"):
            return None  # a user's kernel is not in the digest of our sources: no caching
        ids = [function.uuid() if isinstance(function, CustomGraphPass) else None for function in self.before]
        return None if None in ids else (package_digest(), store.digest(), self.key, *map(str, ids))


@dataclass(frozen=True)
class Compiled:
    """One graph, compiled.

    Attributes:
        call: takes the graph's inputs in order and returns its outputs.
        payload: what `restore` takes in another process; None where it cannot be saved.
        guards: what was assumed of the sizes, for `holds`.
        mutated: the inputs that it writes to, by position.
        uncapturable: why it cannot be in a CUDA graph; empty if it can.
        rows: as `runtime.program.Step.rows`.
        key: what it is kept under on disk; None where it is not.
    """

    call: Callable[..., Any]
    payload: bytes | None = None
    guards: str | None = None
    mutated: tuple[int, ...] = ()
    uncapturable: str = ""
    rows: dict[str, tuple[int | None, ...] | str] = field(default_factory=dict)
    key: str | None = None

    def facts(self) -> dict[str, Any]:
        """All but the code and its key, as plain JSON values."""
        return {"guards": self.guards, "mutated": self.mutated, "uncapturable": self.uncapturable, "rows": self.rows}

    @staticmethod
    def of(call: Callable[..., Any], facts: Mapping[str, Any]) -> "Compiled":
        """Code with what `facts` gave in another process."""
        rows = {symbol: tuple(dims) if isinstance(dims, list) else dims for symbol, dims in facts["rows"].items()}
        return Compiled(call, None, facts["guards"], tuple(facts["mutated"]), facts["uncapturable"], rows)


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    config: Config,
    trace: GraphTrace,
    early: GraphPass,
    late: LatePass,
    weights: Collection[int] | None = None,
    outputs: Sequence[Any] = (),
    save: bool = False,
    origins: bool = False,
) -> Compiled:
    """Compile one of Dynamo's graphs, or a piece of one, through Inductor; `early` and `late` run on its aten graph.

    `late` is also given the inputs that hold parameters and buffers. Nothing global stays changed: options are patched
    for the length of the call. `late` runs in front of Inductor's cache look-up, not inside it, so that a warm cache
    still yields a report.

    Args:
        weights: the inputs that are parameters or buffers, by position; None: what Dynamo says of them.
        outputs: what the graph returns, as fake tensors: what reads it was traced with these strides.
        save: compile so that the result can be saved.
        origins: note in the trace which nodes each kernel computes; Inductor then adds comments to its code.
    """
    from torch._functorch import config as functorch_config
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    facts: dict[str, Any] = {}

    def inner(graph_module: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        if options.get("is_inference", False):
            placeholders = graph_module.graph.find_nodes(op="placeholder")
            if weights is not None and len(placeholders) == len(inputs):
                options["static_input_idxs"] = sorted(weights)
            keep_strides(graph_module.graph, outputs)
            facts.update(_facts(graph_module.graph, len(inputs)))
            late(graph_module.graph, frozenset(placeholders[i] for i in options.get("static_input_idxs", ())))
            graph_module.recompile()
        compiled = compile_fx_inner(graph_module, example_inputs, **options)
        source = getattr(compiled, "source_code", "") or ""
        if source:
            trace.sources.append(source)
            trace.kernels += kernels_in(source)
        if origins:
            trace.origins |= kernel_origins()
        return compiled

    key = None if save else (sorted(config.disable), config.numerics, str(config.target), sorted(config.gemm.items()))
    patches = {
        "joint_custom_pre_pass": _JointPass(early, inductor_config.joint_custom_pre_pass, key),
        "emulate_precision_casts": config.numerics == "eager" or inductor_config.emulate_precision_casts,
    }
    if origins:
        # The level that notes these and traces nothing else; code from Inductor's cache comes without them.
        patches["trace.provenance_tracking_level"] = inductor_config.trace.provenance_tracking_level or 2
        patches["fx_graph_cache"] = False
    bundled = {"enable_autograd_cache": save, "force_autograd_cache": save, "bundled_autograd_cache": save}
    # Its own cache keeps nothing; all that is left of saving is to part the code from what can be written.
    unsaved = mock.patch.object(AOTAutogradCache, "save", lambda key, entry, *args, **kwargs: entry.pre_save())
    register_lowerings()
    attend(gm, config.disable)
    with inductor_config.patch(patches), functorch_config.patch(bundled), unsaved, _one_triton_cache():
        call: Any = compile_fx(gm, list(inputs), inner_compile=inner)
    payload = _serialised(call) if save else None
    return Compiled(call, payload, guards(inputs), **facts)


@contextlib.contextmanager
def _one_triton_cache() -> Iterator[None]:
    """Kernels' launchers go where Inductor keeps the kernels.

    Its workers name that folder in their environment; this process does so only where it compiles kernels itself, as
    the next one will: there gcc would build all launchers once more, 0.2 s each.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    if "TRITON_CACHE_DIR" in os.environ or not torch.cuda.is_available():
        yield
        return
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=triton_cache_dir(torch.cuda.current_device())):
        yield


def restore(payload: bytes) -> Callable[..., Any]:
    """What `Compiled.payload` was made of, in any process with the same versions and the same target.

    It holds pickles: the caller vouches for where it comes from.
    """
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    call: Callable[..., Any] = BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(payload)
    return call


def _serialised(call: Any) -> bytes | None:
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    if getattr(call, "serialize", None) is None:
        return None
    bundle = BundledAOTAutogradSerializableCallable(call)
    return BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(bundle)


def _facts(graph: Graph, count: int) -> dict[str, Any]:
    """What the runtime wants to know of a functional graph of `count` inputs."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    known = context.fw_metadata.input_info if context is not None and context.fw_metadata is not None else []
    same = len(known) == count == len(graph.find_nodes(op="placeholder"))
    mutated = tuple(i for i, info in enumerate(known) if info.mutates_data) if same else tuple(range(count))
    return {"mutated": mutated, "uncapturable": _uncapturable(graph), "rows": row_dims_by_symbol(graph)}


def _uncapturable(graph: Graph) -> str:
    """Why no CUDA graph can hold this graph; on a machine of CPUs alone there is none to ask."""
    for node in graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.cudagraph_unsafe in target.tags:
            return f"{target} is tagged cudagraph_unsafe"
        val = node.meta.get("val")
        on_cpu = isinstance(val, torch.Tensor) and val.device.type == "cpu"
        if on_cpu and any(_on_gpu(other) for other in (*node.all_input_nodes, *node.users)):
            return f"{node.name} is on the CPU: a graph would keep its value"
    return ""


def _on_gpu(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.device.type == "cuda"


def trace_graph(
    gm: GraphModule, inputs: Sequence[Any], run: GraphPass, disable: Collection[str] = ()
) -> Callable[..., Any]:
    """Take one of Dynamo's graphs to the aten graph that Inductor would see, run `run` on it, and generate no code."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]
    from torch._inductor.decomposition import select_decomp_table

    def traced(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        run(graph_module.graph)
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)

    attend(gm, disable)
    backend = aot_autograd(
        fw_compiler=traced, decompositions=select_decomp_table(), keep_inference_input_mutations=True
    )
    compiled: Callable[..., Any] = backend(gm, list(inputs))
    return compiled


def kernel_origins() -> dict[str, list[str]]:
    """For each kernel of the last graph, the names of the nodes that it computes, in no order."""
    from torch._inductor import debug

    found: dict[str, list[str]] = {}
    for name, nodes in debug._inductor_triton_kernel_to_post_grad_node_info.items():
        # "triton_poi_fused_add_0:3": each call has a number of its own.
        found.setdefault(name.partition(":")[0], []).extend(nodes)
    return found


_KERNEL = re.compile(r"^(\w+) = async_compile\.\w+\(", re.MULTILINE)


def kernels_in(source: str) -> int:
    """How many calls of generated or hand-written kernels (Triton or C++) Inductor's wrapper `source` makes."""
    call = source[source.find("def call(") :]
    return sum(len(re.findall(rf"\b{name}(?:\.run)?\(", call)) for name in set(_KERNEL.findall(source)))


def is_training(graph: Graph) -> bool:
    """Whether this is a joint graph with a backward in it."""
    return any(node.name.startswith("tangents") for node in graph.find_nodes(op="placeholder"))
