"""Which files a user's function consists of."""

import functools
import importlib
import importlib.metadata
import os
import sys
import types
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from fusionpass.runtime import keys
from fusionpass.runtime.keys import source_digest
from tests.runtime.projects import OLD, imported, project_in


@pytest.fixture
def project(tmp_path, monkeypatch):
    with project_in(tmp_path, monkeypatch) as write:
        yield write


def test_a_helper_two_imports_away(project):
    project(far="X = 1", near="import far", rule="import near\ndef f(x): return x", unrelated="# a")
    function = imported("rule").f
    before = source_digest([function])
    assert before is not None
    project(unrelated="# b")
    assert source_digest([function]) == before
    project(far="X = 2")
    after = source_digest([function])
    assert after not in (before, None)
    project(far="X = 1")
    assert source_digest([function]) == before
    project(rule="import near\ndef f(x): return -x")
    assert source_digest([function]) not in (before, after, None)


@pytest.mark.parametrize(
    "statement",
    [
        "import p.q.helper",
        "import os, p.q.helper as h",
        "from p.q import helper",
        "from p.q import other, helper as h",
        "from p.q.helper import NAME",
        "from p.q.helper import *",
        "from .q import helper",
        "from .q.helper import NAME",
        "from . import between",
        "from .between import *",
        "try:\n    import p.q.helper\nexcept ImportError:\n    pass",
        "def later():\n    from p.q import helper",
        "def later():\n    from .between import helper",
        "def later():\n    import p.around",
        "class C:\n    from p.q import helper",
        "if False:\n    import p.q.helper",
    ],
)
@pytest.mark.parametrize("load", [True, False], ids=["loaded", "not loaded"])
def test_every_way_to_import(project, statement, load):
    project(p__init="", p__q__init="", p__q__helper="NAME = 1", p__between="from .q import helper", p__q__other="")
    project(p__around__init="from . import inner", p__around__inner="from ..q import helper")
    project(p__rule=f"{statement}\ndef f(x): return x")
    function = imported("p.rule").f
    if load:
        imported("p.q.helper")
    before = source_digest([function])
    assert before is not None
    project(p__q__helper="NAME = 2")
    assert source_digest([function]) not in (before, None)


@pytest.mark.parametrize("changed", ["p__init", "p__q__init"])
def test_the_packages_around_a_module_count(project, changed):
    project(p__init="", p__q__init="", p__q__rule="def f(x): return x")
    function = imported("p.q.rule").f
    before = source_digest([function])
    project(**{changed: "A = 1"})
    assert source_digest([function]) not in (before, None)


def test_what_a_package_imports_counts(project):
    project(helper="A = 1", p__init="import helper", p__rule="def f(x): return x")
    function = imported("p.rule").f
    before = source_digest([function])
    project(helper="A = 2")
    assert source_digest([function]) not in (before, None)


def test_nothing_is_imported_to_find_it(project):
    project(p__init="raise SystemExit", p__helper="raise SystemExit")
    project(rule="def f(x):\n    import p.helper\n    import not_there\n    return x")
    assert source_digest([imported("rule").f]) is not None
    assert "p" not in sys.modules


def test_a_module_that_appears_later(project):
    project(rule="try:\n    import helper\nexcept ImportError:\n    helper = None\ndef f(x): return x")
    function = imported("rule").f
    before = source_digest([function])
    project(helper="")
    assert source_digest([function]) not in (before, None)


def test_a_folder_without_init_is_a_package(project):
    project(space__helper="A = 1", rule="import space.helper\ndef f(x): return x")
    function = imported("rule").f
    before = source_digest([function])
    project(space__helper="A = 2")
    assert source_digest([function]) not in (before, None)


def test_a_name_in_a_module_is_not_another_module(project):
    project(name="A = 1", helper="name = 1", rule="from helper import name\ndef f(x): return x")
    function = imported("rule").f
    before = source_digest([function])
    assert before is not None
    project(name="A = 2")
    assert source_digest([function]) == before


def test_imports_in_a_circle(project):
    project(a="import b", b="import c", c="import a", rule="import a\ndef f(x): return x")
    function = imported("rule").f
    before = source_digest([function])
    project(c="import a # changed")
    assert source_digest([function]) not in (before, None)


def test_swapped_files_are_not_the_same(project):
    project(a="A = 1", b="A = 2", rule="import a, b\ndef f(x): return x")
    function = imported("rule").f
    before = source_digest([function])
    project(a="A = 2", b="A = 1")
    assert source_digest([function]) not in (before, None)


def test_a_file_under_another_name_is_not_the_same(project, tmp_path):
    project(one="A = 1", rule="try:\n    import one\nexcept ImportError:\n    import our\ndef f(x): return x")
    function = imported("rule").f
    before = source_digest([function])
    (tmp_path / "one.py").unlink()
    del sys.modules["one"]
    project(our="A = 1")
    assert source_digest([function]) not in (before, None)


def test_functions_of_equal_files_are_not_the_same(project):
    project(p__init="", q__init="", p__a="from . import b\ndef f(x): return x", p__b="", q__b="B = 1")
    project(q__a="from . import b\ndef f(x): return x")
    p, q = imported("p.a").f, imported("q.a").f
    assert source_digest([p, q]) != source_digest([q, p])


def test_what_is_in_every_key_is_not_read(project, monkeypatch):
    project(rule="import os, json, sys, _io, math, torch.nn, triton, fusionpass.ops\ndef f(x): return x")
    read, really = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or really(path))
    assert source_digest([imported("rule").f]) is not None
    assert read == ["rule.py"]


def test_functions_of_torch_and_of_this_package_need_no_file():
    assert None not in {
        source_digest([torch.nn.functional.silu]),
        source_digest([source_digest]),
        source_digest([functools.wraps]),
    }


def test_a_module_named_like_one_of_the_standard_library(project):
    project(antigravity="A = 1", rule="def f(x):\n    import antigravity\n    return x")
    function = imported("rule").f
    before = source_digest([function])
    project(antigravity="A = 2")
    assert source_digest([function]) not in (before, None)


@pytest.mark.parametrize("where", ["rule", "helper"])
def test_a_file_that_changed_after_this_process_started(project, tmp_path, where):
    project(helper="A = 1", rule="import helper\ndef f(x): return x")
    function = imported("rule").f
    assert source_digest([function]) is not None
    os.utime(tmp_path / f"{where}.py")
    assert source_digest([function]) is None


def test_a_module_with_no_file(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "ghost", types.ModuleType("ghost"))
    project(rule="import ghost\ndef f(x): return x")
    assert source_digest([imported("rule").f]) is None


@pytest.mark.parametrize("source", ["def (", "\x00", "from ...too.far import x"])
def test_a_module_whose_imports_are_unknown(project, source):
    project(p__init="", p__bad=source, p__rule="def f(x):\n    from . import bad\n    return x")
    assert source_digest([imported("p.rule").f]) is None


def test_a_compiled_extension_counts_by_its_bytes(project, tmp_path):
    project(rule="def f(x):\n    import native\n    return x")
    native = tmp_path / f"native{EXTENSION_SUFFIXES[0]}"
    found = set()
    for content in (b"\x7fELF\x00", b"\x7fELF\x01"):
        native.write_bytes(content)
        os.utime(native, (OLD, OLD))
        importlib.invalidate_caches()
        found.add(source_digest([imported("rule").f]))
    assert len(found) == 2
    assert None not in found


def test_bytecode_without_source(project, tmp_path):
    import py_compile

    project(helper="A = 1", rule="import helper\ndef f(x): return x")
    py_compile.compile(str(tmp_path / "helper.py"), str(tmp_path / "helper.pyc"))
    (tmp_path / "helper.py").unlink()
    os.utime(tmp_path / "helper.pyc", (OLD, OLD))
    assert source_digest([imported("rule").f]) is None


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`install(version, record)` of a package `lib` in a site-packages folder; version None: no metadata."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(version, record, source=""):
        (site / "lib").mkdir(exist_ok=True)
        (site / "lib" / "__init__.py").write_text(source)
        (site / "lib" / "inner.py").write_text(source)
        info = site / "some_lib-1.dist-info"
        if version is not None:
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some-lib\nVersion: {version}\n")
            (info / "top_level.txt").write_text("lib\n")
            (info / "RECORD").write_text(record)
        for path in (site / "lib").glob("*.py"):
            os.utime(path, (OLD, OLD))
        importlib.invalidate_caches()
        keys._distributions.cache_clear()
        keys._installed.cache_clear()

    yield install
    keys._distributions.cache_clear()
    keys._installed.cache_clear()


@pytest.mark.parametrize("statement", ["import lib", "from lib.inner import x"])
def test_an_installed_package_counts_by_version_and_record(project, installed, statement):
    installed("1.0", "lib/__init__.py,sha256=a,1")
    project(rule=f"def f(x):\n    {statement}\n    return x")
    function = imported("rule").f
    before = source_digest([function])
    installed("1.0", "lib/__init__.py,sha256=a,1", "A = 1")
    assert source_digest([function]) == before
    installed("1.0", "lib/__init__.py,sha256=b,1")
    assert source_digest([function]) not in (before, None)
    installed("1.1", "lib/__init__.py,sha256=a,1")
    assert source_digest([function]) not in (before, None)
    installed("1.0", "lib/__init__.py,sha256=a,1")
    assert source_digest([function]) == before


def test_an_installed_package_without_metadata_counts_by_its_files(project, installed):
    installed(None, "")
    project(rule="def f(x):\n    import lib.inner\n    return x")
    function = imported("rule").f
    before = source_digest([function])
    assert before is not None
    installed(None, "", "A = 1")
    assert source_digest([function]) not in (before, None)


def test_a_function_of_an_installed_package(installed):
    installed("1.0", "a", "def f(x): return x\ndef g(x): return x")
    try:
        module = imported("lib.inner")
        before = source_digest([module.f])
        assert source_digest([module.g]) not in (before, None)
        installed("1.1", "a", "def f(x): return x\ndef g(x): return x")
        assert source_digest([module.f]) not in (before, None)
    finally:
        del sys.modules["lib.inner"], sys.modules["lib"]


def test_distributions_are_pythons_own():
    """Found in the lists of files as text; Python's own looks each file up."""
    ours, pythons = keys._distributions(), importlib.metadata.packages_distributions()
    for package in ("torch", "hypothesis", "pytest", "_pytest", "rich", "typing_extensions"):
        assert {one.name for one in ours[package]} == set(pythons[package])
    assert "fusionpass_that_is_not_there" not in ours
