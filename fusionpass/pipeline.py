"""The passes in order, one line each."""

import inspect
import time
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from .config import Config
from .op import Op
from .passes.attend import join_heads, read_codes, share_heads
from .passes.caches import slots_of_blocks
from .passes.cleanup import cleanup
from .passes.exact import keep_reductions
from .passes.fuse import fuse
from .passes.heads import bring_together
from .passes.layout import lay_out, lay_out_by_column
from .passes.lower import lower
from .passes.mixtures import mixtures
from .passes.normalize import normalize
from .passes.products import choose_algorithms, products
from .passes.recognise import recognise
from .report.nodes import node_records
from .report.replay import main_of
from .report.show import show
from .report.trace import GraphTrace
from .rule import Beside, Fold, Spelling
from .rules import FOLDS, SPELLINGS

Pass = tuple[str, Callable[[Graph], None]]


def early(config: Config, trace: GraphTrace) -> list[Pass]:
    """While every rounding of the model is still in the graph."""
    spellings = [*(rule for rule in config.rules if isinstance(rule, Spelling)), *SPELLINGS]

    def recognised(graph: Graph) -> None:
        slots_of_blocks(graph)
        recognise(graph, spellings, trace, config.disable, config.verify)
        mixtures(graph, trace, config.disable, config.verify)

    return [("normalize", normalize), ("recognise", recognised)]


def late(config: Config, trace: GraphTrace, parameters: frozenset[Node] = frozenset()) -> list[Pass]:
    """After the joint passes, before code generation; `parameters` are the graph's inputs that no kernel writes."""
    folds = [*(rule for rule in config.rules if isinstance(rule, Fold | Beside)), *FOLDS]

    def fused(graph: Graph) -> None:
        share_heads(graph)
        read_codes(graph)
        join_heads(graph)
        bring_together(graph)
        # A sum in another order may round the other way: "eager" keeps PyTorch's own products.
        products(graph, config.disable | {"linear"} if config.numerics == "eager" else config.disable)
        choose_algorithms(graph, config.gemm)
        fuse(graph, folds, trace, config.disable, config.verify)
        lay_out(graph)
        lay_out_by_column(graph, config.target)

    return [
        ("fuse", fused),
        ("lower", lambda graph: lower(graph, trace, config.target, config.disable, parameters, config.verify)),
        *([("keep_reductions", keep_reductions)] if config.numerics == "eager" else []),
        ("cleanup", cleanup),
    ]


def own_functions(config: Config) -> list[Callable[..., Any]]:
    """The functions that a user's own rules consist of."""
    found: list[Any] = []
    for rule in config.rules:
        for value in vars(rule).values():
            found += [v for v in (value if isinstance(value, tuple) else (value,)) if inspect.isfunction(v)]
        ops = [value for value in vars(rule).values() if isinstance(value, Op)]
        found += [op.reference for op in ops]
    return found


def run(passes: list[Pass], graph: Graph, config: Config, trace: GraphTrace, *, keep: bool) -> None:
    """Run `passes` on `graph` in place; with `keep`, render it before the first and after each."""

    def snapshot(name: str) -> None:
        trace.snapshots.append((name, show(graph)))
        trace.mains[name] = main_of(graph)

    if keep and not trace.snapshots:
        snapshot("captured")
    for name, function in passes:
        if name == "recognise":
            trace.before = node_records(graph)
        elif name == "lower":
            trace.after = node_records(graph)
        if name in config.disable and name not in ("lower", "cleanup"):
            continue
        start = time.perf_counter()
        function(graph)
        trace.seconds[name] = time.perf_counter() - start
        if keep:
            snapshot(name)
