"""dump: the graphs of a model before and after each pass, as files."""

import argparse
from pathlib import Path

from ..errors import ModelError
from .options import Commands, add_model, program


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("dump", help="write a model's graphs before and after each pass, as runnable Python")
    add_model(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where; made if missing")
    parser.add_argument("--run", action="store_true", dest="compile", help="compile and run it, for the generated code")
    parser.add_argument("--ptx", action="store_true", help="also the PTX, or AMD's assembly, of each kernel")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trace the model, or compile and run it, and write what there is."""
    import torch

    from ..compile import compile as compile_model
    from ..report.dump import asking_for_ptx, dump, write_graph, write_index, write_pieces

    found, config = program(args, weights=args.compile)
    if args.compile:
        with dump(args.out, ptx=args.ptx), torch.no_grad():
            compile_model(found.model, None if args.target is None else config)(*found.args, **found.kwargs)
    else:
        with asking_for_ptx(args.ptx):
            report = found.explain(config)
        if not report.graphs:
            raise ModelError("Dynamo made no graph of it", found.name, "Look at TORCH_LOGS=graph_breaks,recompiles")
        names = {trace.index: write_graph(args.out, trace).name for trace in report.graphs}
        for graph in report.model_graphs:
            write_pieces(args.out, found.name, graph, names)
        write_index(args.out)
    print(f"{found.name}: see {args.out / 'index.md'}")
    return 0
