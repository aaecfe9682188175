"""What the keys of the cache are made of: where code was compiled, and what a user's functions consist of."""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import accumulate
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from ..inductor import package_digest
from ..tuning import store

FORMAT = 2
"""The number of the cache's format; one more whenever its files, or what a payload is, change."""
_KEYED = ("fusionpass", "torch", "triton")
"""Packages that `environment` stands for."""
_STDLIB = Path(os.__file__).parent
_INSTALLED = frozenset(("site-packages", "dist-packages"))
"""Folders whose packages are identified by what was installed, instead of file by file."""
_TOP = re.compile(r"^([^\s/.,]+)[/.]", re.MULTILINE)
"""The first part of each path in a list of installed files."""
_STARTED = time.time()
"""When this module was imported, which is early: a file changed later may differ from what is loaded."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""Types whose `repr` tells values apart and is the same in every process."""


def digest(*parts: str | bytes) -> str:
    """SHA-256 of `parts`, each with its length and type: no two lists of parts are the same bytes."""
    made = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        made.update(f"{type(part).__name__} {len(data)} ".encode())
        made.update(data)
    return made.hexdigest()


def environment() -> tuple[str, ...]:
    """What every key contains: whatever compiled code depends on, beside the graph, the options and the GPU."""
    try:
        import triton

        installed = triton.__version__
    except ImportError:
        installed = "none"
    return (
        f"format {FORMAT}",
        f"fusionpass {package_digest()}",
        f"tables {store.digest()}",
        f"torch {torch.__version__} {torch.version.git_version}",
        f"triton {installed}",
        f"cuda {torch.version.cuda} hip {torch.version.hip}",
        f"python {platform.python_implementation()} {platform.python_version()}",
        f"{sys.platform} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        f"cpu {sorted(torch.cpu.get_capabilities().items())}",
    )


class _UnknownError(Exception):
    """What a function consists of cannot be known."""


def source_digest(functions: Iterable[Callable[..., Any]]) -> str | None:
    """A hash of what functions of the user's consist of; None where that cannot be known: then cache nothing.

    Seen: the file of each function's module and of every module that it imports, anywhere in the file and through
    further modules, with the packages around them; of an installed package its version and its RECORD, which holds the
    hashes of its files; which function of its file it is; its defaults and the values in its closure, if they are plain
    (None, numbers, strings, dtypes, devices), functions, `functools.partial` or tuples of those.

    Not seen: globals changed at run time, what a function reads from files or the environment, modules imported by a
    computed name or by a compiled extension, and installed packages edited by hand. Python, Torch, Triton and
    fusionpass are `environment`'s.

    None: a function without a source file (REPL, exec), any other value in a closure or a default, a callable that is
    neither a function nor a partial, a file that cannot be read, or one that changed after this process started, so
    that it may not be what runs.
    """
    owners: set[str] = set()
    try:
        parts = [_describe(function, owners, {}) for function in functions]
        contents = _sources(owners)
    except (_UnknownError, OSError, ImportError, SyntaxError, ValueError):
        return None
    return digest(*parts, *(part for name in sorted(contents) for part in (name, contents[name])))


def sources_of(modules: Iterable[str]) -> str | None:
    """A hash of the files of modules, whoever installed them, and of all that they import, as `source_digest` sees it.

    None: a file cannot be read, or changed after this process started.
    """
    try:
        files = {name: _file(name) for name in set(modules) if name.partition(".")[0] not in _KEYED}
        contents = _sources(set(files))
    except (_UnknownError, OSError, ImportError, SyntaxError, ValueError):
        return None
    own = [part for name in sorted(files) for part in (name, files[name])]
    return digest(*own, *(part for name in sorted(contents) for part in (name, contents[name])))


def _file(name: str) -> bytes:
    """The source of a loaded module; of Python's own nothing, as its version says it all."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        raise _UnknownError
    if Path(file).is_relative_to(_STDLIB) and _INSTALLED.isdisjoint(Path(file).parts):
        return b""
    if os.stat(file).st_mtime > _STARTED:
        raise _UnknownError
    return Path(file).read_bytes()


def _describe(value: Any, owners: set[str], seen: dict[int, int]) -> str:
    """The same text for the same value in every process; the modules of functions are added to `owners`."""

    def inner(*values: Any) -> str:
        return digest(*(_describe(v, owners, seen) for v in values))

    if type(value) in _PLAIN:
        return repr(value)
    if type(value) is tuple:
        return digest("tuple", inner(*value))
    if id(value) in seen:
        return digest("seen", str(seen[id(value)]))  # a function may be in its own closure
    seen[id(value)] = len(seen)
    if type(value) is functools.partial:
        return digest("partial", inner(value.func, value.args, tuple(value.keywords.items())))
    if type(value) is not FunctionType:
        raise _UnknownError
    code, owner = value.__code__, value.__globals__.get("__name__", "")
    file = getattr(sys.modules.get(owner), "__file__", None)
    if file is None or not os.path.samefile(file, code.co_filename):
        raise _UnknownError
    owners.add(owner)
    captured = tuple(cell.cell_contents for cell in value.__closure__ or ())
    # Lines and columns tell the lambdas of one line apart; where Python was told to drop columns, names and constants.
    where = (value.__qualname__, code.co_firstlineno, code.co_linetable, code.co_names)
    constants = tuple(c for c in code.co_consts if type(c) in _PLAIN)
    named = tuple((value.__kwdefaults__ or {}).items())
    return digest(owner, inner(where, constants, captured, value.__defaults__, named))


def _sources(owners: set[str]) -> dict[str, bytes]:
    """`owners` and whatever they import, by name: a file's content, or which version of it is installed."""
    contents: dict[str, bytes] = {}
    done: set[str] = set()
    todo = set(owners)
    while todo:
        done.add(name := todo.pop())
        for part, file, package, installed in _modules(name):
            if part in contents:
                continue
            if os.stat(file).st_mtime > _STARTED or not file.endswith((".py", *EXTENSION_SUFFIXES)):
                raise _UnknownError
            contents[part] = installed or Path(file).read_bytes()
            if file.endswith(".py") and not installed:
                todo |= _imports(contents[part], package) - done
    return contents


def _modules(name: str) -> Iterator[tuple[str, str, str, bytes]]:
    """(module, file, package, what is installed) of the packages around `name`, then of itself; none is run.

    Ends at a package that is installed, and has nothing of what is in every key.
    """
    if name.partition(".")[0] in _KEYED:
        return
    places: Any = None
    for part in accumulate(name.split("."), "{}.{}".format):
        module = sys.modules.get(part)
        if module is not None:
            file, places, package = map(vars(module).get, ("__file__", "__path__", "__package__"))
        else:
            finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
            spec = next(filter(None, (find(part, places) for find in finders if find)), None)
            if spec is None:
                return  # an attribute, or not there
            file, places, package = spec.origin if spec.has_location else None, spec.submodule_search_locations, ""
        if file is not None:
            library = not _INSTALLED.isdisjoint(Path(file).parts)
            if Path(file).is_relative_to(_STDLIB) and not library:
                return
            installed = _installed(part.partition(".")[0]) if library else b""
            yield part, file, package or (part if places is not None else part.rpartition(".")[0]), installed
            if installed:
                return
        elif places is None and part not in sys.stdlib_module_names:
            raise _UnknownError
        if places is None:
            return


@functools.cache
def _installed(package: str) -> bytes:
    """What identifies the installed distributions of a top-level package; nothing where none is known."""
    found = {f"{d.name} {d.version} {d.read_text('RECORD')}" for d in _distributions().get(package, ())}
    return "\n".join(sorted(found)).encode()


@functools.cache
def _distributions() -> dict[str, list[importlib.metadata.Distribution]]:
    """The distributions that have files of a top-level package, from their lists as text.

    `importlib.metadata.packages_distributions` looks up each file, which takes a second or two where much is installed.
    """
    found: dict[str, list[importlib.metadata.Distribution]] = {}
    for one in importlib.metadata.distributions():
        names = {*_TOP.findall(one.read_text("RECORD") or ""), *(one.read_text("top_level.txt") or "").split()}
        for name in names:
            found.setdefault(name, []).append(one)
    return found


@functools.cache
def _imports(source: bytes, package: str) -> frozenset[str]:
    """The modules that `source` may import; of what it takes from one the name there, as that may be a module too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)
