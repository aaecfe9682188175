"""The commands of the command line: each module has `add(commands)`, its options, and `run(args)`, which does it."""

from . import aot, bench, demo, doctor, dump, explain, tune

COMMANDS = (demo, explain, doctor, dump, bench, tune, aot)
"""In the order that the help names them."""

__all__ = ["COMMANDS"]
