"""lower: each op → a Triton launch, a call that chooses later, or plain aten again. Every choice leaves its reason."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..arch import Arch
from ..errors import FusionpassError
from ..graphs import CAST, erase_unused, inherit, same_shape, same_strides, value, values
from ..launch import Empty, Late, Launch, Plain
from ..op import OPS, Op
from ..report.trace import GraphTrace, Record
from ..verify import check_launch
from .beside import site_of
from .inplace import copies_back, keep_in_place

LAUNCH = "fusionpass_launch"
"""The metadata key under which a node that stays an op carries what was `Planned` for it."""


@dataclass(frozen=True)
class Planned:
    """A launch and where its inputs are.

    Attributes:
        sources: for each tensor in it, by identity, the op's argument that it is.
        in_place: whether what it mutates is written where it is, not to a copy.
    """

    launch: Launch
    sources: Mapping[int, str]
    in_place: bool = False


def _sources(launch: Launch, arguments: Mapping[str, Any]) -> dict[int, str]:
    named = {id(v.meta["val"]): name for name, v in arguments.items() if isinstance(v, Node)}
    tensors = [v for part in launch.all for v in part.args.values() if isinstance(v, torch.Tensor)]
    return {id(v): named[id(v)] for v in tensors}


_ROUNDING = ("low_precision_pointwise_barrier",)
"""What tracing notes on a node so that Inductor rounds there as eager mode does (`numerics="eager"`)."""


def lower(
    graph: Graph,
    trace: GraphTrace,
    target: Arch | None = None,
    disable: frozenset[str] = frozenset(),
    parameters: frozenset[Node] = frozenset(),
    verify: bool = False,
) -> None:
    """Decide for every op in `graph` who runs it; those that no kernel takes become aten nodes again, in place.

    An op whose choice is `Late` stays as it is, and one that another library than PyTorch runs.

    Args:
        graph: after `fuse`.
        trace: takes a record of every op.
        target: None: that of the values' device.
        disable: names of backends to leave out.
        parameters: inputs that no kernel writes, so that a launch with PDL may read them before it waits.
        verify: run each kernel beside the op's reference first, where there is a GPU to run it on.
    """
    waiting = [node for node in graph.nodes if node.target in OPS]
    while waiting:
        node = waiting.pop(0)
        op = OPS[node.target]
        arguments = op.bind(node.args, node.kwargs)
        chosen, reason = _choose(op, node, values(arguments), target, disable)
        launch = chosen if isinstance(chosen, Launch) else None
        if launch is not None and verify and launch.device.type == "cuda" and torch.cuda.is_available():
            wrong = check_launch(op, values(arguments), target or Arch.of(launch.device), disable)
            if wrong:
                launch, chosen, reason = None, None, wrong
                trace.refused.append(_refused(op, node, arguments, wrong))
        site = site_of(node)
        whole = trace.inlined.get(node.name, node.name)
        if chosen is None and op.parts is not None:
            parts = [made for made in inline(graph, node, op, arguments, op.parts) if made.target in OPS]
            note = "; ".join(part for part in (site.note, f"not {op.name}: {reason}") if part)
            for part in parts:
                last = part is parts[-1]  # what the fold was asked for, and the rules that had found it
                part.meta["fusionpass"] = dataclasses.replace(
                    site, rules=site.rules[:-1] if last else (), note=note if last else ""
                )
            trace.inlined |= dict.fromkeys((part.name for part in parts), whole)
            waiting = parts + waiting
            continue
        backs = copies_back(op, node, arguments, launch) if launch is not None else []
        copied = backs if isinstance(backs, str) else None
        alone = _alone(op, node) if whole == node.name else ""
        told = "" if isinstance(chosen, Plain) else reason
        trace.fused.append(
            Record(
                op=op.name,
                rule=site.rules[-1] if site.rules else "",
                reason="; ".join(part for part in (told, alone, copied, site.note) if part),
                where=site.where,
                source=site.source,
                scheme=str(arguments.get("scheme", "")),
                backend=_backend(chosen, reason),
                rules=site.rules,
                node=whole,
            )
        )
        if chosen is None or (isinstance(chosen, Plain) and chosen.traced):
            function = op.reference if chosen is None else chosen.function
            made = inline(graph, node, op, arguments, function)
            trace.inlined |= dict.fromkeys((inlined.name for inlined in made), whole)
        if launch is not None:
            sources = _sources(launch, arguments)
            early = [part.args[name] for part in launch.all for name in part.early]
            if all(arguments[sources[id(tensor)]] in parameters for tensor in early):
                launch = launch.reading_early()
            if not isinstance(backs, str):
                keep_in_place(backs)
            node.meta[LAUNCH] = Planned(launch, sources, bool(backs) and copied is None)
            node.meta["eager_input_vals"] = (values(node.args), values(node.kwargs))


def _backend(chosen: Launch | Late | Plain | None, name: str) -> str:
    """Who runs what was chosen, as `Record` has it; `name` is that of a backend that chose PyTorch's own call."""
    if isinstance(chosen, Plain):
        return name
    return "inductor" if chosen is None else "late" if isinstance(chosen, Late) else "triton"


def _refused(op: Op, node: Node, arguments: Mapping[str, Any], reason: str) -> Record:
    site = site_of(node)
    scheme = str(arguments.get("scheme", ""))
    rule = site.rules[-1] if site.rules else ""
    return Record(op.name, rule, reason, site.where, site.source, scheme, node=node.name)


def _choose(
    op: Op, node: Node, vals: Mapping[str, Any], target: Arch | None, disable: frozenset[str]
) -> tuple[Launch | Late | Plain | None, str]:
    device = next(v.device for v in vals.values() if isinstance(v, torch.Tensor))
    try:
        arch = target or Arch.of(device)
    except FusionpassError as error:
        return None, str(error)
    if arch.is_cpu:
        return None, "a CPU target: Inductor writes C++"
    launch, reason = op.plan(arch, vals, disable)
    if launch is None or isinstance(launch, Plain):
        return launch, reason
    if isinstance(launch, Late):
        return launch, launch.reason
    for source in node.all_input_nodes:
        if widened := _just_widened(source):
            return None, f"{source.name} is {widened} made float32 just before: Inductor need not write that out"
    results = [node.meta["val"]] if op.single else node.meta["val"]
    for name, expected in zip(launch.returns, results, strict=True):
        if not _laid_out_alike(launch.args[name], expected):
            return None, f"{reason} would lay out {name} unlike eager mode, with strides {tuple(expected.stride())}"
    return launch, launch.note


def _just_widened(source: Node) -> torch.dtype | None:
    """The dtype of what a cast to float32 widens, where the result would only be written to be read by a kernel."""
    val = value(source)
    if source.target is not CAST or val is None or val.dim() < 2 or len(source.users) > 1:
        return None
    before: torch.dtype = source.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return before if before.itemsize == 2 and val.dtype == torch.float32 else None


def _laid_out_alike(made: Empty | torch.Tensor, expected: torch.Tensor) -> bool:
    if isinstance(made, torch.Tensor):
        stride: Any = made.stride()
    elif made.stride is not None:
        stride = made.stride
    else:
        stride = torch._prims_common.make_contiguous_strides_for(made.shape)
    return (
        made.dtype == expected.dtype
        and same_shape(made.shape, expected.shape)
        and same_strides(made.shape, stride, expected.stride())
    )


def _alone(op: Op, node: Node) -> str:
    """Why an op that reads another kernel's output was not taken into it."""
    if op.name != "quantize":
        return ""
    source = node.args[0]
    while isinstance(source, Node) and source.target is getitem:
        source = source.args[0]
    name = source.target if isinstance(source, Node) and source.op == "call_function" else "an input of the graph"
    return f"no rule folds it into {name}, which it reads"


def inline(
    graph: Graph, node: Node, op: Op, arguments: Mapping[str, Any], function: Callable[..., Any] | None = None
) -> list[Node]:
    """Replace an op node by the nodes of `function`, its reference if there is none; return them."""
    names = [k for k, v in arguments.items() if isinstance(v, Node)]
    inputs = [arguments[k] for k in names]

    def call(*tensors: torch.Tensor) -> Any:
        return (function or op.reference)(**{**arguments, **dict(zip(names, tensors, strict=True))})

    vals = [value(n) for n in inputs]
    with vals[0].fake_mode, torch.no_grad():  # type: ignore[union-attr]
        body = make_fx(call, decomposition_table=select_decomp_table())(*vals).graph
    body.eliminate_dead_code()  # results that are not tensors have no value in their node's meta
    copies: dict[Node, Any] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for source in body.nodes:
            if source.op == "call_function":
                copies[source] = graph.node_copy(source, lambda n: copies[n])
                barrier = {key: source.meta[key] for key in _ROUNDING if key in source.meta}
                copies[source].meta = inherit(node, source.meta["val"], barrier)
    result: Any = body.find_nodes(op="output")[0].args[0]
    if op.single:
        node.replace_all_uses_with(copies[result])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(copies[result[user.args[1]]])
            erase_unused(graph, user)
    erase_unused(graph, node)
    return [copies[source] for source in body.nodes if source.op == "call_function"]
