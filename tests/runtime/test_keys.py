"""What every key contains, and which function of a file is which."""

import functools
import hashlib
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionpass.runtime import keys
from fusionpass.runtime.keys import digest, environment, source_digest
from tests.runtime.projects import imported, project_in

ROOT = Path(__file__).parents[2]
PARTS = st.lists(st.text() | st.binary(), max_size=4)


@pytest.fixture
def project(tmp_path, monkeypatch):
    with project_in(tmp_path, monkeypatch) as write:
        yield write


def test_digest_is_a_sha256_of_type_length_and_content():
    assert digest() == hashlib.sha256(b"").hexdigest()
    assert digest("é", b"", "b") == hashlib.sha256("str 2 é".encode() + b"bytes 0 str 1 b").hexdigest()


@settings(max_examples=100)
@given(PARTS, PARTS)
def test_other_parts_are_another_digest(a, b):
    assert (digest(*a) == digest(*b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [(("ab", "c"), ("a", "bc")), (("a",), (b"a",)), ((), ("",)), (("1 a",), ("1", "a")), (("\ud800",), ("?",))],
)
def test_parts_do_not_run_into_each_other(a, b):
    assert digest(*a) != digest(*b)


def test_everything_that_code_depends_on_is_in_the_environment(monkeypatch):
    before = environment()
    assert before == environment()
    assert all(type(part) is str for part in before)
    changes = [
        (torch, "__version__", "9.9"),
        (torch.version, "git_version", "abc"),
        (torch.version, "cuda", "99"),
        (torch.version, "hip", "99"),
        (triton, "__version__", "9.9"),
        (platform, "python_version", lambda: "9.9"),
        (platform, "python_implementation", lambda: "Other"),
        (platform, "machine", lambda: "other"),
        (sys, "platform", "other"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "OTHER"),
        (torch.cpu, "get_capabilities", lambda: {"amx_tile": True}),
        (keys, "package_digest", lambda: "other"),
        (keys.store, "digest", lambda: "other"),
        (keys, "FORMAT", 99),
    ]
    for holder, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, value)
            assert environment() != before, name
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton none" in environment()


def test_the_same_in_another_process(project, tmp_path):
    helpers = [f"helper{i}" for i in range(9)]  # a set of so many names has another order there
    project(**dict.fromkeys(helpers, "NAME = 1"))
    project(rule=f"import {', '.join(helpers)}\ndef f(x, y={{'a': 1}}.get('a'), *, z=('s', 1.5)): return x")
    code = (
        "import rule; from fusionpass.runtime.cache import environment, source_digest; "
        "print(environment()); print(source_digest([rule.f]))"
    )
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.splitlines() == [str(environment()), source_digest([imported("rule").f])]


def scaling(factor):
    return lambda x: x * factor


def defaulting(factor):
    return lambda x, y=factor: x * y


def naming(factor):
    return lambda x, *, y=factor: x * y


def recursive(factor):
    def function(n):
        return function(n - 1) * factor if n else 1

    return function


MAKERS = [scaling, defaulting, naming, recursive, lambda factor: functools.partial(pow, factor)]
PLAIN = [
    0,
    1,
    -0.0,
    0.0,
    1.0,
    True,
    None,
    "1",
    b"1",
    1j,
    torch.float32,
    torch.bfloat16,
    torch.device("cpu"),
    (1,),
    ((1,),),
]


@pytest.mark.parametrize("make", MAKERS[:4])
def test_each_plain_value_counts(make):
    found = [source_digest([make(value)]) for value in PLAIN]
    assert None not in found
    assert len(set(found)) == len(PLAIN)
    assert found == [source_digest([make(value)]) for value in PLAIN]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("value", [[], {}, {1}, object(), torch.ones(1), (1, []), types, int, len])
def test_other_values_are_not_guessed_at(make, value):
    assert source_digest([make(value)]) is None


@pytest.mark.parametrize("make", MAKERS[:4])
def test_a_function_that_is_held_counts_with_its_files(make, project):
    project(far="A = 1", near="import far\ndef g(x): return x\ndef h(x): return x")
    near = imported("near")
    before = source_digest([make(near.g)])
    assert before is not None
    assert source_digest([make(near.h)]) not in (before, None)
    project(far="A = 2")
    assert source_digest([make(near.g)]) not in (before, None)


def test_a_decorated_function_counts_with_both_files(project):
    project(deco="import functools\ndef d(f):\n    @functools.wraps(f)\n    def w(x): return f(x)\n    return w")
    project(rule="def f(x): return x")
    function = imported("deco").d(imported("rule").f)
    before = source_digest([function])
    assert before is not None
    project(rule="def f(x): return -x")
    after = source_digest([function])
    assert after not in (before, None)
    project(deco="")
    assert source_digest([function]) not in (before, after, None)


def test_functions_of_one_file_differ():
    one_line = [lambda x: x + 1, lambda x: x + 2, lambda x: x.relu(), lambda x: x.gelu(), lambda x: x + 1]
    functions = [scaling, defaulting, *one_line]
    found = [source_digest([f]) for f in functions]
    assert None not in found
    assert len(set(found)) == len(functions)
    without = [f.__code__.replace(co_linetable=b"") for f in one_line[:4]]
    assert len({source_digest([types.FunctionType(code, globals())]) for code in without}) == 4


def test_the_order_and_number_of_functions_count():
    found = [source_digest(fs) for fs in ([], [scaling], [naming], [scaling, naming], [naming, scaling])]
    assert len(set(found)) == 5
    assert None not in found


def test_a_partial_counts_with_its_arguments():
    partials = [
        scaling,
        functools.partial(scaling),
        functools.partial(scaling, 1),
        functools.partial(scaling, 2),
        functools.partial(scaling, factor=1),
        functools.partial(scaling, factor=2),
        functools.partial(naming, factor=2),
    ]
    found = [source_digest([p]) for p in partials]
    assert None not in found
    assert len(set(found)) == len(partials)


def test_defaults_and_closures_are_not_mixed_up():
    def two(a, b):
        return lambda x, y=a, *, z=b: (x, y, z)

    assert source_digest([two(1, 2)]) != source_digest([two(2, 1)])


def test_an_empty_cell_is_unknown():
    def function(x):
        return later(x)

    assert source_digest([function]) is None
    later = scaling
    assert source_digest([function]) is not None


class Callable:
    def __call__(self, x):
        return x

    def method(self, x):
        return x


@pytest.mark.parametrize(
    "function", [len, torch.relu, Callable, Callable(), Callable().method, functools.cache(scaling)]
)
def test_what_is_no_function_is_unknown(function):
    assert source_digest([scaling, function]) is None


@pytest.mark.parametrize("name", [None, "__main__", "no_such_module", __name__, "sys", "torch"])
def test_no_source_is_unknown(name):
    namespace = {} if name is None else {"__name__": name}
    exec("def f(x): return x", namespace)
    assert source_digest([namespace["f"]]) is None


def test_code_of_another_file_than_its_modules(tmp_path):
    path = tmp_path / "generated.py"
    path.write_text("def f(x): return x")
    namespace = {"__name__": __name__}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    assert source_digest([namespace["f"]]) is None
