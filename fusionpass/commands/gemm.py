"""explain --gemm: what computes each kind of product on a target, and why the rest does not."""

import argparse

from ..arch import Arch
from ..errors import ConfigError, nearest


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("products", "without a model: what computes `x @ w.T`, by its kind")
    group.add_argument("--gemm", action="store_true", help="print the table of products, with every rejection")
    group.add_argument("--kind", action="append", help="only this kind; may be given several times")
    group.add_argument("--rows", type=int, action="append", metavar="M", help="rows of x; several times (1, 64, 2048)")
    group.add_argument("--columns", type=int, default=4096, metavar="N", help="rows of w (4096)")
    group.add_argument("--k", type=int, default=4096, metavar="K", help="columns of both (4096)")
    group.add_argument(
        "--layout", default="linear", help="how a weight of blocks lies: linear, swizzled, trtllm or deepgemm (linear)"
    )
    group.add_argument("--out-dtype", default="bfloat16", help="of the result (bfloat16)")


def run(args: argparse.Namespace) -> int:
    """Print a line for each kind, number of rows and algorithm."""
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..ops.gemm import OUTPUTS
    from ..ops.gemm.dispatch import KINDS, Request, choose, why_not
    from ..quantize.repack import LAYOUTS

    arch = Arch(args.target) if args.target else Arch.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for name in args.kind or ():
        if name not in KINDS:
            raise ConfigError(f"there is no kind of product {name!r}", "--kind", nearest(name, KINDS))
    if args.out_dtype not in OUTPUTS:
        raise ConfigError(f"a result is not {args.out_dtype!r}", "--out-dtype", nearest(args.out_dtype, OUTPUTS))
    if args.layout not in LAYOUTS:
        raise ConfigError(f"a weight does not lie {args.layout!r}", "--layout", nearest(args.layout, LAYOUTS))
    title = f"[M, {args.k}] × [{args.columns}, {args.k}]ᵀ → {args.out_dtype} on {arch.name}"
    table = Table("kind", "M", "algorithm", title=title, title_justify="left", title_style="bold")
    table.add_column("why not", overflow="fold")
    for kind in args.kind or KINDS:
        for rows in args.rows or (1, 64, 2048):
            request = Request(kind, rows, args.columns, args.k, args.out_dtype, args.layout)
            chosen = choose(arch, request).algorithm
            for i, name in enumerate(KINDS[kind]):
                reason = why_not(arch, request, name)
                style, told = (
                    ("green", "chosen") if name == chosen else ("dim", reason or "could, but others come first")
                )
                first = (kind, str(rows)) if i == 0 else ("", "")
                table.add_row(*first, f"[{style}]{name}[/]", f"[{style}]{escape(told)}[/]", end_section=False)
        table.add_section()
    console = Console() if Console().is_terminal else Console(width=160)
    console.print(table)
    return 0
