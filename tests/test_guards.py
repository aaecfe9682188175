"""Every guard of the package has a test that fails without it; tests/conditions.py says what a guard is.

The nightly profile checks all, in about a minute and a half of one core: pytest collects once, and each guard is
taken away in a fork of that. It has a process of its own, since it changes the package under test.
"""

import ast
import json
import os
import subprocess
import sys

from tests.conditions import ROOT, conditions
from tests.guards import TABLE, incomplete
from tests.profiles import by_night


def test_the_table_is_complete() -> None:
    wrong = incomplete(json.loads(TABLE.read_text()))
    assert not wrong, "Give each new guard a test, then run `python -m tests.guards --find`.\n" + "\n".join(wrong)


SOURCE = """
def refuse(x, y) -> str | None:
    if x.empty or y.empty:
        return "empty"
    if x == y:
        y = x
    if x.whole:
        return None
    def inner(z) -> str:
        if z.wrong:
            return "wrong"
    return "x" if x.odd else None

def last(x) -> Refusal:
    return None if x.fits else "too wide"

def either(x) -> Refusal:
    return first(x) or second(x)

def literal(x) -> _State | None:
    if x.other:
        return None
    return x if x.same and x.near else None

def note(x, attempt) -> None:
    if x.short:
        attempt.fail("short")
        return
"""


def test_what_is_a_guard() -> None:
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    found = {(f.name, ast.unparse(test), allows) for f in functions for test, allows in conditions(f)}
    assert found == {
        ("refuse", "x.empty", False),
        ("refuse", "y.empty", False),
        ("refuse", "x.odd", False),
        ("last", "x.fits", True),
        ("either", "first(x)", False),
        ("literal", "x.other", False),
        ("literal", "x.same", True),
        ("literal", "x.near", True),
        ("note", "x.short", False),
    }


@by_night
def test_every_guard_matters() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "tests.guards"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-10_000:] + made.stderr[-2_000:]
