"""Time the passes on a large graph: all rules on 10,000 nodes. `python -m bench.matcher`; needs no GPU."""

import argparse
import time

import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fusionpass.ops import quantize, rms_norm, silu_mul
from fusionpass.passes.fuse import fuse
from fusionpass.passes.normalize import normalize
from fusionpass.passes.recognise import recognise
from fusionpass.report.trace import GraphTrace
from fusionpass.rules import FOLDS, SPELLINGS


def stack(nodes: int) -> Graph:
    """The graph of layers of norm, quantise, product and activation, with `nodes` operators or a few more."""

    def layers(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            codes = quantize.reference(rms_norm.reference(x, weight), scale)[0]
            gate, up = codes.to(x.dtype) * 2, codes.to(x.dtype) * 3
            x = x + quantize.reference(silu_mul.reference(gate, up), scale)[0].to(x.dtype)
        return x

    def trace(count: int) -> Graph:
        with FakeTensorMode(), torch.no_grad():
            inputs = torch.zeros(4, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16), torch.tensor(1.0)
            table = select_decomp_table()
            return make_fx(lambda *t: layers(*t, count), decomposition_table=table)(*inputs).graph

    return trace(-(-nodes // (len(trace(2).nodes) - len(trace(1).nodes))))


def measure(nodes: int) -> dict[str, float]:
    """Seconds of each pass on a graph of `nodes` operators."""
    graph, trace = stack(nodes), GraphTrace(0)
    seconds: dict[str, float] = {"nodes": len(graph.nodes)}
    for name, run in (
        ("normalize", lambda: normalize(graph)),
        ("recognise", lambda: recognise(graph, SPELLINGS, trace)),
        ("fuse", lambda: fuse(graph, FOLDS, trace)),
    ):
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 2500, 5000, 10000])
    torch.set_num_threads(1)
    measure(100)  # spellings are traced once per process
    print(f"{'nodes':>7} {'normalize':>10} {'recognise':>10} {'fuse':>10} {'all':>10}  seconds")
    for nodes in parser.parse_args().nodes:
        found = measure(nodes)
        passes = [found[name] for name in ("normalize", "recognise", "fuse")]
        print(f"{found['nodes']:>7}", *(f"{s:>10.3f}" for s in (*passes, sum(passes))))


if __name__ == "__main__":
    main()
