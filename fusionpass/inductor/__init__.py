"""Every touch of Inductor's, AOTAutograd's and Dynamo's internals.

tests/test_inductor.py fails when a torch release moves one of them.
"""

from .frames import traces_of
from .launches import register_lowerings
from .logs import artifacts, register_logs
from .pieces import Compiled, compile_graph, is_training, kernels_in, restore, trace_graph
from .sizes import guards, holds, keep_strides, size_check
from .state import (
    ISOLATED,
    compile_module,
    compile_options,
    dynamo_digest,
    graph_break,
    hardware,
    keeps_traces,
    options_digest,
    package_digest,
    recompile_reason,
    warm_up,
)
from .traces import Rebuilt, Recorded, Trace, UnsaveableError, fits, rebuild, save

__all__ = [
    "ISOLATED",
    "Compiled",
    "Rebuilt",
    "Recorded",
    "Trace",
    "UnsaveableError",
    "artifacts",
    "compile_graph",
    "compile_module",
    "compile_options",
    "dynamo_digest",
    "fits",
    "graph_break",
    "guards",
    "hardware",
    "holds",
    "is_training",
    "keep_strides",
    "keeps_traces",
    "kernels_in",
    "options_digest",
    "package_digest",
    "rebuild",
    "recompile_reason",
    "register_logs",
    "register_lowerings",
    "restore",
    "save",
    "size_check",
    "trace_graph",
    "traces_of",
    "warm_up",
]  # fmt: skip
