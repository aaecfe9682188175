"""PTX, or AMD's assembly, of the kernels that are planned for a graph; none of it needs a GPU."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from torch.fx import Graph

from ..arch import Arch
from ..passes.beside import site_of
from ..passes.lower import LAUNCH


def assembly(graph: Graph, target: Arch | None) -> dict[str, str]:
    """What each kernel of ours in `graph` is compiled to, one that serves several sites once.

    Args:
        graph: behind `lower`.
        target: what it was lowered for; None: the device of its values.

    Returns:
        Texts by names of files, "NODE.0.ptx"; the first line says which ops, and where.
    """
    from ..aot import Specialised

    found: dict[tuple[Specialised, str], tuple[str, list[str]]] = {}
    for node in graph.nodes:
        planned = node.meta.get(LAUNCH)
        for number, launch in enumerate(planned.launch.all if planned is not None else ()):
            arch = (target or Arch.of(launch.device)).name
            told = f"{node.target} in {site_of(node).where or 'no module'}"
            found.setdefault((Specialised.of(launch), arch), (f"{node.name}.{number}", []))[1].append(told)
    made: dict[str, str] = {}
    for (kernel, arch), (name, ops) in found.items():
        stages = kernel.compile(Arch(arch)).asm
        kind = "ptx" if "ptx" in stages else "amdgcn"
        head = "".join(f"// {told}\n" for told in dict.fromkeys(ops))
        made[f"{name}.{kind}"] = head + stages[kind]
    return made


@contextlib.contextmanager
def all_stages(folder: Path) -> Iterator[None]:
    """Let Triton write every stage of every kernel that it compiles inside the block, Inductor's own too."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from torch._inductor import config as inductor_config
    from triton import knobs

    # In this process: Inductor's workers know nothing of the folder.
    with knobs.compilation.scope(), knobs.cache.scope(), inductor_config.patch(compile_threads=1):
        knobs.compilation.dump_ir = knobs.compilation.always_compile = True
        knobs.cache.dump_dir = str(folder)
        yield
