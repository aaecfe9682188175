"""dump: graphs before and after each pass, generated code, and what depyf writes."""

import contextlib
import contextvars
import re
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .assembly import all_stages
from .replay import program
from .trace import GraphTrace, ModelGraph

_ACTIVE: "contextvars.ContextVar[Path | None]" = contextvars.ContextVar("fusionpass_dump", default=None)


_PTX: "contextvars.ContextVar[bool]" = contextvars.ContextVar("fusionpass_dump_ptx", default=False)


@contextlib.contextmanager
def asking_for_ptx(asked: bool = True) -> Iterator[None]:
    """Graphs that are traced or compiled inside the block have their kernels' assembly in `GraphTrace.assembly`."""
    token = _PTX.set(asked)
    try:
        yield
    finally:
        _PTX.reset(token)


def wants_ptx() -> bool:
    """Whether assembly is asked for here."""
    return _PTX.get()


def active_dump() -> Path | None:
    """The folder of the innermost `dump` block, if one is open."""
    return _ACTIVE.get()


def of_rank(folder: str | Path) -> Path:
    """`folder`, or its own folder for this process among several that run together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Path(folder) / f"rank_{distributed.get_rank()}"
    return Path(folder)


def write_graph(folder: Path, trace: GraphTrace) -> Path:
    """Write one graph's snapshots and generated code under `folder`, numbered; return its own folder.

    Args:
        folder: made if missing; a graph that is there already stays.
        trace: of the graph, with snapshots.
    """
    own = folder / f"graph_{trace.index:03d}"
    taken = 0
    while own.exists():
        taken += 1
        own = folder / f"graph_{trace.index:03d}.{taken}"
    own.mkdir(parents=True)
    for number, (name, text) in enumerate(trace.snapshots):
        (own / f"{number:02d}_{name}.py").write_text(program(text, trace.mains.get(name, "")))
    for number, source in enumerate(trace.sources):
        (own / f"{len(trace.snapshots) + number:02d}_generated.py").write_text(_annotated(source, trace))
    lines = [f"{kind}: {record}" for kind in ("fused", "refused", "missed") for record in getattr(trace, kind)]
    if trace.skipped:
        lines.append(f"left alone: {trace.skipped}")
    (own / "report.txt").write_text("\n".join([*lines, ""]))
    if trace.origins:
        lines = ["| kernel | computes |", "|---|---|"]
        lines += [f"| `{kernel}` | {', '.join(_computed(trace, kernel, '**', '`'))} |" for kernel in trace.origins]
        (own / "kernels.md").write_text("\n".join([*lines, ""]))
    for name, text in trace.assembly.items():
        (own / "ptx").mkdir(exist_ok=True)
        (own / "ptx" / name).write_text(text)
    return own


def _computed(trace: GraphTrace, kernel: str, strong: str = "", code: str = "") -> list[str]:
    """The ops, with their modules, and the other nodes that a kernel of the generated code computes."""
    records = {record.node: record for record in trace.fused}
    told: dict[str, None] = {}
    for node in trace.origins.get(kernel, ()):
        record = records.get(trace.inlined.get(node, node))
        where = record.where or "no module" if record else ""
        told[f"{strong}{record.op}{strong} in {where}" if record else f"{code}{node}{code}"] = None
    return sorted(told)


def _annotated(source: str, trace: GraphTrace) -> str:
    """Generated code with a comment above each kernel: what it computes."""

    def comment(found: re.Match[str]) -> str:
        told = textwrap.wrap(", ".join(_computed(trace, found[1])), 116)
        return "".join(f"# {line}\n" for line in (["fusionpass: what the next kernel computes", *told] if told else ()))

    return re.sub(r"^(?=(\w+) = async_compile\.)", comment, source, flags=re.MULTILINE)


def write_pieces(folder: Path, title: str, record: ModelGraph, folders: Mapping[int, str]) -> None:
    """Add one of Dynamo's graphs to `folder/pieces.md`: its pieces, and where the code of each is.

    Args:
        folder: is there already.
        title: of the model.
        record: the graph.
        folders: for a compiled graph, by index, the name of its folder.
    """
    lines = [f"## {title or 'a function'}, graph {record.index}", ""]
    lines += [f"- ended early by a graph break: {record.graph_break}"] if record.graph_break else []
    lines += [f"- compiled again because {record.recompiled}"] if record.recompiled else []
    for piece in record.pieces:
        where = folders.get(piece.graph, "compiled before") if piece.graph is not None else ""
        link = f"[{where}]({where}/)" if where.startswith("graph_") else where or "runs eagerly"
        span = " to ".join(dict.fromkeys(path for path in piece.modules if path))
        cut = f"; cut: {piece.why}" if piece.why else ""
        lines.append(f"- {piece.name}: {link}{f', {span}' if span else ''}{cut}")
    with (folder / "pieces.md").open("a") as file:
        file.write("\n".join([*lines, "", ""]))


def write_index(folder: Path) -> None:
    """Write `folder/index.md`, which lists the graphs that are there and tells what their kernels compute."""
    lines = ["# Graphs before and after each pass", ""]
    lines += ["`python FILE` runs a graph on random inputs; `--against OTHER` compares it with another.", ""]
    if (pieces := folder / "pieces.md").is_file():
        lines += [pieces.read_text()]
    for own in sorted(path for path in folder.glob("graph_*") if path.is_dir()):
        files = sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file())
        lines += [f"## {own.name}", "", *(f"- [{name}]({own.name}/{name})" for name in files), ""]
        if (kernels := own / "kernels.md").is_file():
            lines += [kernels.read_text()]
    others = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("graph_"))
    lines += [f"[{name}]({name}/)" for name in others]
    (folder / "index.md").write_text("\n".join([*lines, ""]))


@contextlib.contextmanager
def _decompiled(folder: Path) -> Iterator[None]:
    """Let depyf write under `folder` what Dynamo compiles inside the block.

    depyf puts its own decompilation in the place of what Dynamo made, and gives up on some bytecode. Here it only
    writes, and its failure costs its files, not the run.
    """
    import depyf
    from depyf import code_transform
    from depyf.explain import enable_debugging as debugging

    decompile, full_source = debugging.DebuggableHook.__call__, depyf.explain.dump_src

    def attempt(function: Callable[..., Any], code: types.CodeType, *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            with (folder / "failed.txt").open("a") as file:
                file.write(f"{code.co_qualname}: {type(error).__name__}: {error}\n")
            return None

    def hook(self: Any, code: types.CodeType, new_code: types.CodeType) -> None:
        attempt(decompile, code, self, code, new_code)

    def source(code: types.CodeType, module: Any) -> str:
        return attempt(full_source, code, code, module) or "# depyf could not decompile this: see failed.txt\n"

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(debugging.DebuggableHook, "__call__", hook))
        stack.enter_context(mock.patch.object(depyf.explain, "dump_src", source))
        # It makes code that can run in the other's place; 0.20 recurses without end where an argument is in a closure.
        stack.enter_context(mock.patch.object(code_transform, "fix_irregular_code", lambda code, text, **_: text))
        with warnings.catch_warnings():
            # It says each time that it is a debugger.
            warnings.simplefilter("ignore")
            stack.enter_context(depyf.prepare_debug(str(folder)))
        yield


@contextlib.contextmanager
def dump(path: str | Path, *, ptx: bool = False) -> Iterator[Path]:
    """Write every graph that is compiled inside the block under `path`.

    For each: numbered files before the first pass and after each one, as Python that runs the graph on random inputs;
    the Triton or C++ code that Inductor generated, with what each kernel in it computes; the records of the report.
    `path/index.md` lists them, and which piece of the model has which. Where processes run together
    (torch.distributed), each has `path/rank_N`. depyf's decompiled bytecode goes to `path/depyf`, or to
    `path/depyf/failed.txt` why there is none. Inductor's caches are off inside the block, since depyf finds nothing in
    a warm one.

    Args:
        path: a folder, made if missing; files that are there stay.
        ptx: also the PTX, or AMD's assembly, of our kernels in each graph's own folder, and under `path/triton` every
            stage of every kernel that Triton compiles, Inductor's own too. Kernels are compiled anew for it.

    Yields:
        The folder that is written to.

    Warns:
        UserWarning: nothing was compiled inside the block, for example because the model had run before.
    """
    from torch._inductor import config as inductor_config

    folder = of_rank(path)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    token = _ACTIVE.set(folder)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(inductor_config.patch(force_disable_caches=True))
            stack.enter_context(_decompiled(folder / "depyf"))
            if ptx:
                stack.enter_context(asking_for_ptx())
                stack.enter_context(all_stages(folder / "triton"))
            yield folder
    finally:
        _ACTIVE.reset(token)
        made = sorted(p.name for p in set(folder.iterdir()) - before if p.name != "depyf")
        write_index(folder)
        if not made:
            warnings.warn(
                f"nothing was compiled inside fusionpass.dump({str(path)!r}): run a model in it that has not run "
                "before, or call torch._dynamo.reset() first",
                stacklevel=3,
            )
