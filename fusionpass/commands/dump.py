"""dump: the graphs of a model before and after each pass, as files."""

import argparse
from pathlib import Path

from .options import Commands, add_model, program


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("dump", help="write a model's graphs before and after each pass, as runnable Python")
    add_model(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where; made if missing")
    parser.add_argument("--run", action="store_true", dest="compile", help="compile and run it, for the generated code")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trace the model, or compile and run it, and write what there is."""
    import torch

    from ..compile import compile as compile_model
    from ..report.dump import dump, write_graph, write_index

    found, config = program(args, weights=args.compile)
    if args.compile:
        with dump(args.out), torch.no_grad():
            compile_model(found.model, None if args.target is None else config)(*found.args, **found.kwargs)
    else:
        for trace in found.explain(config).graphs:
            write_graph(args.out, trace)
        write_index(args.out)
    print(f"{found.name}: see {args.out / 'index.md'}")
    return 0
