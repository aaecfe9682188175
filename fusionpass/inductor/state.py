"""What Dynamo and Inductor say of themselves: options, versions, why they were called."""

import functools
import hashlib
import inspect
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import GraphModule


@functools.cache
def package_digest() -> str:
    """A hash of the package's own sources: any change to a pass, an op or a kernel invalidates Inductor's caches."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)
"""Options of `torch.compile` for a limit of recompiles of one's own (from torch 2.14): Dynamo counts by code object."""


def compile_options(guards: str) -> dict[str, Any]:
    """Options of `torch.compile` for `Config.guards`."""
    # A dictionary of its own for each call, which takes entries out.
    return {**ISOLATED, "options": {"guard_filter_fn": _of_inputs}} if guards == "inputs" else ISOLATED


def keeps_traces() -> bool:
    """Whether this version of torch is one whose guards `traces.py` is tested with."""
    major, minor = torch.__version__.split(".")[:2]
    return (2, 11) <= (int(major), int(minor)) <= (2, 14)


def compile_module(model: torch.nn.Module, backend: Any, guards: str) -> None:
    """Compile a module in place, whole.

    Dynamo leaves out the frames of torch's own modules, a Sequential for one, and before torch 2.14 would compile what
    it holds one by one.
    """
    from torch._dynamo import external_utils, trace_rules

    options = {"backend": backend, **compile_options(guards)}
    if isinstance(model.forward, types.MethodType) and trace_rules.check(model.forward):
        model._compiled_call_impl = torch.compile(external_utils.wrap_inline(model._call_impl), **options)
    else:
        model.compile(**options)


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards are not about the module that was compiled, or about globals."""
    return [not (guard.is_global or _root(guard.orig_guard.originating_source) == "self") for guard in guards]


def _root(source: Any) -> str:
    """The local variable that a value was reached from; empty if it was none."""
    while hasattr(source, "base"):
        source = source.base
    return str(getattr(source, "local_name", ""))


def warm_up() -> None:
    """Let Inductor's compile workers start while Dynamo traces; kernels are compiled one by one until they have.

    On a machine without a GPU there is nothing for them to do.
    """
    if not torch.cuda.is_available():
        return
    from torch._inductor import async_compile

    async_compile.maybe_warm_pool()
    async_compile.AsyncCompile.use_process_pool()


def graph_break(gm: GraphModule) -> str:
    """Why Dynamo ended this graph early; empty if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(reason.reason) if reason is not None and reason.graph_break else ""


def recompile_reason() -> str:
    """The guard that failed, inside a backend that Dynamo calls since it did; empty at a first compilation."""
    from torch._dynamo.utils import get_metrics_context

    reason = str(getattr(get_metrics_context(), "_metrics", {}).get("recompile_reason") or "")
    return reason.partition("\n")[0]


_USERS_PASSES = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
)


def options_digest() -> str | None:
    """A hash of Inductor's and AOTAutograd's options; None where a pass of the user's says not what it is."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    parts: list[Any] = [inductor_config.save_config_portable(), functorch_config.save_config_portable()]
    for name in _USERS_PASSES:
        given = getattr(inductor_config, name, None)
        for function in given if isinstance(given, list | tuple) else [given] if given is not None else []:
            parts.append(function.uuid() if isinstance(function, CustomGraphPass) else None)
            if parts[-1] is None:
                return None
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def dynamo_digest() -> str:
    """A hash of Dynamo's options: they change what it traces, and what it guards."""
    from torch._dynamo import config as dynamo_config

    options = dynamo_config.save_config_portable()
    parts = [(name, sorted(map(repr, v)) if isinstance(v, set | frozenset) else v) for name, v in options.items()]
    return hashlib.sha256(repr(sorted(parts, key=str)).encode()).hexdigest()


def hardware(inputs: Sequence[Any]) -> list[str]:
    """The GPUs that code for `inputs` is made for."""
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
    if not devices or not torch.cuda.is_available():
        return sorted(map(str, devices))
    known = [torch.cuda.get_device_properties(device) for device in devices]
    return sorted({f"{p.name} {p.major}.{p.minor} {p.multi_processor_count}" for p in known})
