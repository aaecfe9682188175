"""bench: the measurements of a checkout; an installed package has none."""

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

from ..errors import ModelError
from .options import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("bench", help="measure kernels, in a checkout: fusionpass bench kernels --help")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="then draw what this GPU's results show, as SVG")
    parser.add_argument("what", help="kernels, gemm, attention, e2e, …: a module of bench/")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own options")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run that module with these options."""
    root = str(Path(__file__).parents[2])
    sys.path.insert(0, root)
    try:
        found = importlib.util.find_spec("bench")
        if found is None or importlib.util.find_spec(f"bench.{args.what}") is None:
            what = "there is no bench/ beside the package" if found is None else f"there is no bench/{args.what}.py"
            raise ModelError(what, "bench", "Run it in a checkout of the repository")
        sys.argv = [f"fusionpass bench {args.what}", *args.rest]
        runpy.run_module(f"bench.{args.what}", run_name="__main__", alter_sys=True)
        if args.plot:
            sys.argv = ["fusionpass bench plot", "--out", str(args.plot)]
            runpy.run_module("bench.plot", run_name="__main__", alter_sys=True)
    finally:
        sys.path.remove(root)
    return 0
