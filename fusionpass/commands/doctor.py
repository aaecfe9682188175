"""doctor: what is installed, what can run here and why not, the caches, and whether the kernels are right."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import Commands

PACKAGES = ("torch", "triton", "depyf", "rich", "transformers", "torchao", "compressed-tensors", "diffusers")
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Finding:
    """One line of what was found; `right` is False for what must be mended, None for what is only told."""

    about: str
    text: str
    right: bool | None = None


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("doctor", help="versions, target, backends, caches, and a self-test of the kernels")
    parser.add_argument("--no-test", action="store_true", help="leave out the self-test")
    parser.add_argument("--every", action="store_true", help="test every op, not one of each family")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 where something must be mended."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    right = True
    for finding in _findings(args):
        mark = {True: "[green]ok[/]  ", False: "[red]fail[/]", None: "    "}[finding.right]
        console.print(f"{mark} [bold]{escape(finding.about)}[/] {escape(finding.text)}", soft_wrap=True)
        right &= finding.right is not False
    return 0 if right else 1


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    import torch

    from ..arch import Arch

    yield from versions()
    arch = Arch.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.cuda.get_device_name() if not arch.is_cpu else platform.processor() or platform.machine()
    yield Finding("target", f"{arch.name}, {device}")
    yield from backends(arch)
    yield from caches()
    if not args.no_test:
        yield from self_test(arch, every=args.every)


def versions() -> Iterator[Finding]:
    """Of Python and of the packages that matter."""
    from .. import __version__

    yield Finding("fusionpass", f"{__version__}, Python {platform.python_version()}, {sys.platform}")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            needed = name == "torch"
            yield Finding(name, "not installed", False if needed else None)
            continue
        if name != "torch":
            yield Finding(name, version)
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        old = f", older than {'.'.join(map(str, OLDEST_TORCH))}, the oldest that is supported"
        yield Finding(name, version + (old if numbers < OLDEST_TORCH else ""), numbers >= OLDEST_TORCH)


def backends(arch: Any) -> Iterator[Finding]:
    """For each backend, how many ops it takes on `arch`, and why not the others."""
    from ..op import OPS
    from .aot import sample

    taken: dict[str, list[str]] = {}
    refused: dict[str, dict[str, list[str]]] = {}
    for op in OPS.values():
        for backend in op.backends:
            planned: Any = "a CPU has no Triton kernels: Inductor writes C++"
            if not arch.is_cpu:
                planned = backend.plan(arch, **sample(op, arch, 16, 2048))
            if isinstance(planned, str):
                refused.setdefault(backend.name, {}).setdefault(planned, []).append(op.name)
            else:
                taken.setdefault(backend.name, []).append(op.name)
    for name in dict.fromkeys([*taken, *refused]):
        yield Finding(f"backend {name}", f"takes {len(taken.get(name, ()))} ops")
        for reason, ops in refused.get(name, {}).items():
            shown = ", ".join(ops[:4]) + (f" and {len(ops) - 4} more" if len(ops) > 4 else "")
            yield Finding(f"backend {name}", f"not for {shown}: {reason}")


def caches() -> Iterator[Finding]:
    """Where compiled pieces are kept, how much there is, and whether the folder can be trusted."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from ..config import Config
    from ..runtime.cache import Cache

    config = Config.make()
    cache = Cache(config.cache_dir or Cache.default_folder())
    refusal = cache.refuse()
    if not config.cache:
        yield Finding("cache", "off (FUSIONPASS_CACHE)")
    elif refusal is not None:
        yield Finding("cache", f"not used: {refusal}", False)
    else:
        yield Finding("cache", f"{cache.folder}, {_size(cache.folder)}, owned and written by this user alone", True)
    inductor = Path(default_cache_dir())
    yield Finding("Inductor's cache", f"{inductor}, {_size(inductor)}")


def _size(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"


def self_test(arch: Any, *, every: bool = False) -> Iterator[Finding]:
    """Kernels beside their references on a GPU; on a CPU, the references compiled by Inductor beside themselves."""
    from ..op import OPS

    with_kernels = [op for op in OPS.values() if op.backends]
    families = {op.name: family(op) for op in with_kernels}
    first = [op for i, op in enumerate(with_kernels) if families[op.name] not in list(families.values())[:i]]
    check: Callable[..., str | None] = _compiled_alike if arch.is_cpu else _kernel_alike
    for op in with_kernels if every else first:
        try:
            wrong = check(op, arch)
        except Exception as error:  # a doctor tells what is broken, whatever it is
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        how = "Inductor's code" if arch.is_cpu else "its kernel"
        yield Finding(
            f"test {families[op.name]}", f"{op.name}: {wrong or f'{how} gives what its reference gives'}", wrong is None
        )


def family(op: Any) -> str:
    """The folder of ops/ that the kernel of an op is in; for a user's op, its namespace."""
    from ..arch import Arch
    from .aot import sample

    # Any target that has all kernels: only their names are asked for.
    target = Arch("sm_90")
    launch, _ = op.plan(target, sample(op, target, 16, 2048))
    parts = str(getattr(getattr(launch, "kernel", None), "__module__", "")).split(".")
    return parts[2] if parts[:2] == ["fusionpass", "ops"] else str(op.namespace)


def _kernel_alike(op: Any, arch: Any) -> str | None:
    import torch

    from ..launch import Launch
    from ..testing import disagreement

    device = torch.device("cuda")
    arguments = op.bind((), op.sample(16, 2048, torch.bfloat16, device, torch.Generator(device).manual_seed(0)))
    launch, reason = op.plan(arch, arguments)
    assert isinstance(launch, Launch), f"no kernel: {reason}"
    with torch.no_grad():
        expected = op.reference(**arguments)
        return disagreement(op, arguments, launch.run(), [expected] if op.single else expected)


def _compiled_alike(op: Any, _: Any) -> str | None:
    import torch

    from ..compile import compile as compile_function
    from ..testing import disagreement

    arguments = op.bind((), op.sample(16, 256, torch.bfloat16, "cpu", torch.Generator().manual_seed(0)))
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}

    def reference(tensors: dict[str, torch.Tensor]) -> Any:
        results = op.reference(**{**arguments, **tensors})
        return [results] if op.single else results

    with torch.no_grad():
        expected = reference(tensors)
        actual = compile_function(reference, numerics="eager", cache=False)(tensors)
        return disagreement(op, arguments, actual, expected)
