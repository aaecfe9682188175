"""aot: compile every kernel ahead of time, for targets that need not be here."""

import argparse
from pathlib import Path
from typing import Any

from .options import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("aot", help="compile every kernel ahead of time, for targets that need not be here")
    parser.add_argument(
        "--arch", default="sm_90,sm_100,gfx942,gfx950", help="targets, separated by commas (%(default)s)"
    )
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    parser.add_argument("--tokens", type=int, default=64, help="rows that it is compiled for (64)")
    parser.add_argument("--width", type=int, default=2048, help="columns that it is compiled for (2048)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the PTX, or the AMD assembly, of each kernel here"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile and print one line for each op and target; 1 where a planned kernel does not compile."""
    from rich.console import Console
    from rich.table import Table

    from ..arch import Arch
    from ..errors import ConfigError, nearest
    from ..op import OPS

    targets = [Arch(name.strip()) for name in args.arch.split(",")]
    known = {op.name: op for op in OPS.values() if op.backends}
    for name in args.op or ():
        if name not in known:
            raise ConfigError(f"there is no op {name!r} with a kernel", "--op", nearest(name, known))
    table = Table("op", *(target.name for target in targets))
    failed = 0
    for name in args.op or known:
        cells = [_compiled(known[name], target, args) for target in targets]
        failed += sum(not right for right, _ in cells)
        table.add_row(name, *(text if right else f"[red]{text}[/]" for right, text in cells))
    Console().print(table)
    return 1 if failed else 0


def _compiled(op: Any, target: Any, args: argparse.Namespace) -> tuple[bool, str]:
    """Whether nothing failed, and the size of the binaries or why there is none."""
    from rich.markup import escape

    from ..aot import compile_launch
    from ..launch import Launch

    launch, reason = op.plan(target, sample(op, target, args.tokens, args.width))
    if not isinstance(launch, Launch):
        return True, f"[dim]{escape(reason)}[/]"
    try:
        stages = [compile_launch(part, target) for part in launch.all]
    except Exception as error:  # whatever Triton raises is what this command is there to find
        return False, escape(f"{type(error).__name__}: {error}".splitlines()[0])
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for number, stage in enumerate(stages):
            kind = "ptx" if "ptx" in stage else "amdgcn"
            (args.out / f"{op.name}.{number}.{target.name}.{kind}").write_text(stage[kind])
    binaries = [stage.get("cubin") or stage.get("hsaco") for stage in stages]
    return True, " + ".join(f"{len(binary)} B" for binary in binaries if binary is not None)


def sample(op: Any, target: Any, tokens: int, width: int) -> dict[str, Any]:
    """The op's own sample in bfloat16; for gfx942, whose FP8 has another bias, with its codes."""
    import torch

    arguments: dict[str, Any] = op.bind((), op.sample(tokens, width, torch.bfloat16, "cpu", torch.Generator()))
    if target.name != "gfx942":
        return arguments
    codes = torch.float8_e4m3fnuz
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn:
            arguments[name] = torch.empty_like(value, dtype=codes)
    return {**arguments, **({"scheme": "fp8_static,dtype=float8_e4m3fnuz"} if "scheme" in arguments else {})}
