"""Run every op's kernel at odd sizes, under a sanitizer: `compute-sanitizer --tool memcheck python -m bench.sample`.

Run it once without, so that nothing is left to compile.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

from fusionpass.arch import Arch
from fusionpass.launch import Launch
from fusionpass.op import OPS, Op
from fusionpass.ops.quant import sample_scale
from fusionpass.testing import relative_error

from .machine import require_gpu

SIZES = ((3, 576), (17, 2880), (5, 1664))
SCHEMES = ("fp8_token", "fp8_group128,layout=column_major", "mxfp8,layout=swizzled", "nvfp4", "int8_token")
IN_ALL = ("quantize", "add_rms_norm_quantize", "silu_mul_quantize")
"""Ops whose kernels between them are those of all that quantise."""
CLOSE = 0.05
"""The norm of the difference to the reference's: more than a code here and there, less than any wrong element."""


def samples(device: str) -> Iterator[tuple[str, Op, dict[str, Any]]]:
    """A title, an op and its arguments, for each op, and for some in each scheme."""
    for op in OPS.values():
        for tokens, width in SIZES if op.backends else ():
            generator = torch.Generator(device).manual_seed(0)
            given = op.bind((), op.sample(tokens, width, torch.bfloat16, device, generator))
            yield f"{op.name} {tokens} × {width}", op, given
            for scheme in SCHEMES if op.name in IN_ALL else ():
                # The groups of some schemes want another width.
                if "group128" not in scheme or width % 128 == 0:
                    changed = {**given, "scheme": scheme, "scale": sample_scale(scheme, device)}
                    yield f"{op.name} {scheme} {tokens} × {width}", op, changed


def verdict(op: Op, arguments: dict[str, Any], arch: Arch, pdl: bool) -> str | None:
    """Run the kernel: None if it is right, else what is not; "" where there is no kernel to run."""
    launch, _ = op.plan(arch, arguments, frozenset({"cublas"}) | (frozenset() if pdl else {"pdl"}))
    if not isinstance(launch, Launch):
        return ""
    outputs = launch.run()
    torch.cuda.synchronize()
    # On a CPU, where no kernel of torch's is looked at by the sanitizer.
    there = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    result = op.reference(**there)
    for name, got, want in zip(op.outputs(arguments), outputs, [result] if op.single else result, strict=True):
        error = relative_error(got.cpu().double(), want.double())
        # A NaN is no number below the limit.
        if not error <= CLOSE:
            return f"{name} is off by {error:.3g}"
    return None


def main() -> None:
    """Run the samples; the exit status says whether all results were right."""
    parser = argparse.ArgumentParser(prog="python -m bench.sample", description=__doc__)
    parser.add_argument("--op", nargs="+", help="only these")
    parser.add_argument("--no-pdl", action="store_true", help="where a tool cannot follow dependent launches")
    options = parser.parse_args()
    require_gpu()
    arch, console, wrong, ran = Arch.of(torch.device("cuda")), Console(soft_wrap=True), 0, 0
    for title, op, arguments in samples("cuda"):
        if options.op and op.name not in options.op:
            continue
        found = verdict(op, arguments, arch, not options.no_pdl)
        ran += found != ""
        wrong += bool(found)
        text = {None: "right", "": "no kernel"}.get(found, f"WRONG: {found}")
        console.print(f"{title}: {text}", markup=False, highlight=False)
    console.print(f"{ran} kernels ran, {wrong} wrong")
    sys.exit(1 if wrong or not ran else 0)


if __name__ == "__main__":
    main()
