"""dump: graphs before and after each pass, generated code, and what depyf writes."""

import contextlib
import contextvars
import warnings
from collections.abc import Iterator
from pathlib import Path

from .trace import GraphTrace

_ACTIVE: "contextvars.ContextVar[Path | None]" = contextvars.ContextVar("fusionpass_dump", default=None)


def active_dump() -> Path | None:
    """The folder of the innermost `dump` block, if one is open."""
    return _ACTIVE.get()


def write_graph(folder: Path, trace: GraphTrace) -> Path:
    """Write one graph's snapshots and generated code under `folder`, numbered; return its own folder."""
    own = folder / f"graph_{trace.index:03d}"
    taken = 0
    while own.exists():
        taken += 1
        own = folder / f"graph_{trace.index:03d}.{taken}"
    own.mkdir(parents=True)
    for number, (name, text) in enumerate(trace.snapshots):
        (own / f"{number:02d}_{name}.py").write_text(text)
    for number, source in enumerate(trace.sources):
        (own / f"{len(trace.snapshots) + number:02d}_generated.py").write_text(source)
    lines = [f"{kind}: {record}" for kind in ("fused", "refused", "missed") for record in getattr(trace, kind)]
    if trace.skipped:
        lines.append(f"left alone: {trace.skipped}")
    (own / "report.txt").write_text("\n".join([*lines, ""]))
    return own


@contextlib.contextmanager
def dump(path: str | Path) -> Iterator[Path]:
    """Write every graph that is compiled inside the block under `path`.

    For each: numbered files before the first pass and after each one, as readable Python; the Triton or C++ code that
    Inductor generated; the records of the report. depyf's decompiled bytecode goes to `path/depyf`. Inductor's caches
    are off inside the block, since depyf finds nothing in a warm one.

    Args:
        path: a folder, made if missing; files that are there stay.

    Yields:
        `path`.

    Warns:
        UserWarning: nothing was compiled inside the block, for example because the model had run before.
    """
    import depyf
    from torch._inductor import config as inductor_config

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    token = _ACTIVE.set(folder)
    try:
        with inductor_config.patch(force_disable_caches=True), depyf.prepare_debug(str(folder / "depyf")):
            yield folder
    finally:
        _ACTIVE.reset(token)
        made = sorted(p.name for p in set(folder.iterdir()) - before if p.name != "depyf")
        (folder / "index.txt").write_text("\n".join([*sorted(p.name for p in folder.iterdir() if p.is_dir()), ""]))
        if not made:
            warnings.warn(
                f"nothing was compiled inside fusionpass.dump({str(path)!r}): run a model in it that has not run "
                "before, or call torch._dynamo.reset() first",
                stacklevel=3,
            )
