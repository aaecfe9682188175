"""What values are called in every process: the same for what does the same, another for what was changed."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionpass.runtime.identity import Identities, UnknownError, code_digest


def plain(x: int) -> int:
    return x + 1


def defaulted(x: int, by: int = 1) -> int:
    return x + by


def adder(by: Any) -> Any:
    def add(x: int) -> int:
        return x + by

    return add


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


class Shape:
    sides = 4

    def area(self, x: int) -> int:
        return x * self.sides

    @staticmethod
    def of(x: int) -> int:
        return x

    @property
    def corners(self) -> int:
        return self.sides


class Square(Shape):
    pass


def describe(value: Any) -> str:
    return Identities().describe(value)


def test_what_a_function_closes_over_is_part_of_it() -> None:
    assert describe(adder(1)) == describe(adder(1))
    assert len({describe(adder(by)) for by in (1, 2, 1.0, "1", plain, defaulted, (1, plain))}) == 7
    assert describe(wrapped(plain)) != describe(plain), "though it has its name"


def test_a_default_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(defaulted)
    monkeypatch.setattr(defaulted, "__defaults__", (2,))
    assert describe(defaulted) != before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sides", 5),
        ("area", plain),
        ("area", wrapped(Shape.area)),
        ("of", staticmethod(plain)),
        ("corners", property(plain)),
        ("extra", plain),
    ],
)
def test_a_class_that_was_patched_is_another(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(Shape), describe(Square)
    monkeypatch.setattr(Shape, name, value, raising=False)
    assert describe(Shape) != before[0]
    assert describe(Square) != before[1], "it inherits that"


def test_what_has_no_name_is_told() -> None:
    class Local:
        pass

    for value in (object(), Local, Local(), torch.zeros(1)):
        with pytest.raises(UnknownError):
            describe(value)


def test_a_name_that_leads_elsewhere_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Shape", Square)
    with pytest.raises(UnknownError, match="Shape is not found by its name"):
        describe(Shape)


def test_bytecode_counts_and_its_lines_do_not() -> None:
    here: dict[str, Any] = {}
    exec("def f(x):\n    return x + 1", here)
    lower: dict[str, Any] = {}
    exec("\n\n\ndef f(x):\n    return x + 1", lower)
    other: dict[str, Any] = {}
    exec("def f(x):\n    return x + 2", other)
    assert code_digest(here["f"].__code__) == code_digest(lower["f"].__code__)
    assert code_digest(here["f"].__code__) != code_digest(other["f"].__code__)


def test_other_processes_say_the_same() -> None:
    """Whatever seed their hashes have: sets of constants have no order."""
    text = (
        "from fusionpass.runtime.identity import *; import torch; from tests.runtime import test_identity as t; "
        "d = Identities().describe; print(d(t.Square), d(t.in_a_set), d(torch.nn.Linear), d(torch.ops.aten.mm.default))"
    )
    told = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        told.add(
            subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(told) == 1


def in_a_set(x: str) -> bool:
    return x in {"a", "b", "c", "d", "e", "f"}
