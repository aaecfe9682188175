"""The documentation is run: every Python block of the README and of docs/, in order, one document a test.

What it says is printed is printed; what its shell blocks call is there, and takes these options; names and links lead
somewhere.
"""

import argparse
import builtins
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import types
import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

import fusionpass
from fusionpass import cli
from fusionpass.op import OPS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("explain", "dump")
"""The commands that a document's shell blocks really run; the options of the others are read by the real parser."""
ELSEWHERE = ("cd", "git", "pip", "pre-commit")
"""Programs that are not ours."""

each = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


class Blocks:
    """What becomes of the blocks of one document; `printed` is what those that ran last did print."""

    def __init__(self) -> None:
        self.printed = ""

    def python(self, example: Example) -> None:
        with self._kept():
            PythonEvaluator()(example)
        example.namespace["__builtins__"] = builtins  # sybil takes it away, and Dynamo asks for it

    def shell(self, example: Example) -> None:
        with self._kept():
            for line in example.parsed.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                if words:
                    run_command(*words)

    def text(self, example: Example) -> None:
        """Each of its lines was printed, in this order; "…" is anything."""
        rest = "\n".join(line.strip() for line in self.printed.splitlines())
        for line in filter(None, example.parsed.splitlines()):
            wanted = ".*".join(re.escape(part.strip()) for part in line.split("…"))
            found = re.search(rf"^{wanted}$", rest, re.M)
            assert found, f"{example.path}:{example.line}: not printed: {line!r}, but\n{self.printed}"
            rest = rest[found.end() :]

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        with contextlib.redirect_stdout(io.StringIO()) as told:
            yield
        self.printed = told.getvalue() or self.printed


def run_command(program: str, *args: str) -> None:
    """Run a line of a shell block where that is cheap, else check that there is such a thing.

    Raises:
        AssertionError: there is not, or it failed.
        SystemExit: the command line knows no such option.
    """
    program = program.removeprefix(".venv/bin/")
    if program == "fusionpass":
        asked = cli._parser().parse_args(args)
        assert asked.command not in RUN or cli.main(args) == 0, args
    elif program == "make":
        targets = [word for word in args if "=" not in word]
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets), args
    elif program == "python" and args[0] == "-m":
        assert importlib.util.find_spec(args[1]), args
    elif program == "python" and Path(args[0]).exists():
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *args], env=env, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout)
    else:
        assert (program, *args) == ("python", "my_model.py") or program in ELSEWHERE, (program, *args)


def parse(path: Path) -> Document:
    blocks = Blocks()
    kinds = {"python": blocks.python, "sh": blocks.shell, "text": blocks.text}
    return Document.parse(str(path), *(CodeBlockParser(name, run) for name, run in kinds.items()), SkipParser())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; ops and modules that a document makes are forgotten behind it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    ops, modules = set(OPS), set(sys.modules)
    yield tmp_path
    for overload in set(OPS) - ops:
        del OPS[overload]
    for name in set(sys.modules) - modules:
        module = sys.modules[name]
        if type(module) is types.SimpleNamespace or str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_blocks(path: Path) -> None:
    document, module = parse(path), types.ModuleType("document")
    # Classes that a block defines find their module, as they would in a program.
    document.namespace = module.__dict__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "document", module)
        for example in document.examples():
            with contextlib.suppress(unittest.SkipTest):  # sybil's way to leave out one block, with a reason
                example.evaluate()


@each
def test_blocks(path: Path, place: Path) -> None:
    run_blocks(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\nand\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nprint(1)\n```\n```text\n2\n```\n", AssertionError),
        ("<!-- skip: next -->\n```python\n1 / 0\n```\n```python\n[][0]\n```\n", IndexError),
        ("```sh\nfusionpass explain DIR --tragte sm_90\n```\n", SystemExit),
        ("```sh\nmake nothing\n```\n", AssertionError),
        ("```sh\nfusionpas doctor\n```\n", AssertionError),
    ],
    ids=["python", "text", "skip", "option", "make", "program"],
)
def test_a_block_that_fails_fails(text: str, error: type[BaseException], place: Path) -> None:
    path = place / "wrong.md"
    path.write_text(text)
    with pytest.raises(error):
        run_blocks(path)


@each
def test_every_block_has_a_language_that_is_run(path: Path) -> None:
    """Else a block could leave the tests by a misspelt language; one that is left out says why."""
    known = {"python", "sh", "text", "{toctree}", "{eval-rst}", ""}  # the last for diagrams
    fences = re.findall(r"^ *```(.*)$", path.read_text(), re.M)
    assert {language.strip() for language in fences[::2]} <= known
    assert all("reason=" in line for line in re.findall(r"skip: (?:next|start).*", path.read_text()))


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


@each
def test_names_in_the_prose(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for code in re.findall(r"`([^`\n]+)`", prose):
        for name in re.findall(r"\bfusionpass((?:\.\w+)+)", code):
            found = fusionpass
            for part in name[1:].split("."):
                if found is fusionpass and hasattr(fusionpass.ops, part):  # as a graph prints a call of an op
                    found = fusionpass.ops
                if not hasattr(found, part):
                    importlib.import_module(f"{found.__name__}.{part}")
                found = getattr(found, part)
        if match := re.match(r"(?:\.venv/bin/)?fusionpass (\w+)", code):
            known = {option for action in parsers()[match[1]]._actions for option in action.option_strings}
            assert set(re.findall(r"(?<=\s)--[\w-]+", code)) <= known, code


@each
def test_links(path: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_reference_has_every_public_name() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^\.\. (?:auto\w+|py:\w+):: fusionpass\.([\w.]+)", text, re.M))
    public = set(fusionpass.__all__) - {"ops"} | {f"ops.{name}" for name in fusionpass.ops.__all__}
    assert public - shown == {"FusionpassError"}, "among the members of fusionpass.errors"
    assert all(f".. automodule:: fusionpass.{name}\n   :members:" in text for name in ("testing", "errors"))
