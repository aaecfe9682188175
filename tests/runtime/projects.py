"""A user's modules in a folder."""

import contextlib
import importlib
import os
import sys

OLD = 1_000_000_000


@contextlib.contextmanager
def project_in(tmp_path, monkeypatch):
    """Yields `write(name=source, ...)`: old files to be imported; `a__b` is a/b.py, `a__init` is a/__init__.py."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**sources):
        for name, source in sources.items():
            *folders, last = name.split("__")
            path = tmp_path.joinpath(*folders, "__init__.py" if last == "init" else f"{last}.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
            os.utime(path, (OLD, OLD))
        importlib.invalidate_caches()

    yield write
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in repr(module)]:
        del sys.modules[name]


def imported(name):
    return importlib.import_module(name)
