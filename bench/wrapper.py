"""How an op should be launched: from Inductor's own wrapper, as Inductor's own code, or as an opaque operator.

A chain of add + RMSNorm + static FP8 with a copy between two rounds, so that nothing fuses over the edge; per round,
with and without a CUDA graph. `python -m bench.wrapper --out FILE`.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusionpass
from bench.machine import facts, require_gpu
from fusionpass.tuning.timing import time_calls, warm_up

ROUNDS = 8


class Chain(nn.Module):
    """`ROUNDS` sites whose codes feed a library GEMM."""

    def __init__(self, width: int, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque
        self.scale = nn.Parameter(torch.tensor(0.02), requires_grad=False)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.rand(width).add(0.5).to(torch.bfloat16), requires_grad=False) for _ in range(ROUNDS)
        )
        matrix = torch.randn(width, width).to(torch.float8_e4m3fn)
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        site = fusionpass.ops.add_rms_norm_quantize
        call = site if self.opaque else site.reference
        for weight in self.weights:
            codes, residual = call(x, residual, weight, self.scale)
            x = torch._scaled_mm(codes, self.matrix.t(), self.scale, self.scale, out_dtype=torch.bfloat16)
        return x, residual


def variants(width: int) -> dict[str, Callable[..., Any]]:
    """The compiled chains, by how each launches its sites."""
    made: dict[str, Callable[..., Any]] = {}
    with torch.no_grad():
        made["fusionpass"] = fusionpass.compile(Chain(width, opaque=False).cuda())
        made["inductor"] = torch.compile(Chain(width, opaque=False).cuda(), dynamic=False)
        pdl = {"triton.enable_pdl": True}
        made["inductor+pdl"] = torch.compile(Chain(width, opaque=False).cuda(), dynamic=False, options=pdl)
        made["opaque operator"] = torch.compile(Chain(width, opaque=True).cuda(), dynamic=False)
    return made


def host_time(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median microseconds of a call without a CUDA graph, the host's work included."""
    for _ in range(5):
        call()
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


def _call(function: Callable[[], Any], _: int) -> Any:
    return function()


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the checkout cannot say it")
    arguments = parser.parse_args()
    require_gpu()
    warm_up()
    rows = []
    with torch.no_grad():
        for tokens in arguments.tokens:
            torch._dynamo.reset()
            x, residual = (torch.randn(tokens, arguments.hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            for name, chain in variants(arguments.hidden).items():
                call = functools.partial(chain, x, residual)
                graph = statistics.median(time_calls(functools.partial(_call, call), 1)) / ROUNDS
                host = host_time(call) / ROUNDS
                rows.append({"tokens": tokens, "launched": name, "graph_us": graph, "host_us": host})
    print(f"{'tokens':>6}  {'launched by':<16} {'µs a round, CUDA graph':>24} {'without one':>12}")
    for row in rows:
        print(f"{row['tokens']:>6}  {row['launched']:<16} {row['graph_us']:>24.2f} {row['host_us']:>12.2f}")
    if arguments.out:
        record = {**facts(arguments.commit), "hidden": arguments.hidden, "rounds": ROUNDS, "cells": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
