"""Every touch of Inductor's, AOTAutograd's and Dynamo's internals.

tests/test_inductor.py fails when a torch release moves one of them.
"""

from .launches import register_lowerings
from .logs import artifacts, register_logs
from .pieces import Compiled, compile_graph, is_training, kernels_in, restore, trace_graph
from .sizes import holds, keep_strides, size_check
from .state import (
    ISOLATED,
    compile_options,
    graph_break,
    hardware,
    options_digest,
    package_digest,
    recompile_reason,
    warm_up,
)

__all__ = [
    "ISOLATED",
    "Compiled",
    "artifacts",
    "compile_graph",
    "compile_options",
    "graph_break",
    "hardware",
    "holds",
    "is_training",
    "keep_strides",
    "kernels_in",
    "options_digest",
    "package_digest",
    "recompile_reason",
    "register_logs",
    "register_lowerings",
    "restore",
    "size_check",
    "trace_graph",
    "warm_up",
]  # fmt: skip
