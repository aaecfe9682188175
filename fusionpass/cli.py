"""The command line: `fusionpass`, or `python -m fusionpass`."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .commands import COMMANDS
from .errors import FusionpassError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 where a check failed, 2 for a mistake of the user's."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except FusionpassError as error:
        print(f"fusionpass {args.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionpass", description="Kernel fusion for torch.compile, with reasons.")
    parser.add_argument("--version", action="version", version=f"fusionpass {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
