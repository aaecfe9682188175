"""Every guard matters: `python -m tests.guards` takes each one away and runs a test that must then fail.

tests/conditions.py says what a guard is, and tests/guards.json names a test for each;
`python -m tests.guards --find` looks for those that are missing there, and `--only passes/caches` checks a part.

The tests run in children forked behind pytest's collection, and there the guard's function gets other code.
"""

import argparse
import builtins
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tests.conditions import PACKAGE, ROOT, Change, Guard, guards, noting, patch, without

TABLE = Path(__file__).with_suffix(".json")
SECONDS = 120
"""How long a test may take without its guard: a search that never ends counts as a failure."""
NOT_RUN = 3
"""The exit code of a child that did not get as far as its test."""
PATIENCE = 60
"""Seconds of tests that `--find` tries for one guard."""
SLOW = (
    "gpu", "interpreter", "test_cli.py", "test_coverage.py", "test_demo.py", "test_examples.py", "test_grown.py",
    "test_guards.py",
)  # fmt: skip
"""Tests in which no guard is looked for: they take long, or run in another process."""


class Tests:
    """The collected tests by function, run in children: all parameters of one together."""

    def __init__(self, items: Iterable[pytest.Item]) -> None:
        self.items: dict[str, list[pytest.Item]] = {}
        for item in items:
            self.items.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for module in pkgutil.walk_packages([str(PACKAGE)], f"{PACKAGE.name}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        self._trace()
        gc.collect()
        self.functions = [
            f
            for f in gc.get_objects()
            if type(f) is FunctionType and f.__code__.co_filename.startswith(f"{PACKAGE}{os.sep}")
        ]
        # Children share memory as long as their collector does not touch it.
        gc.freeze()

    @staticmethod
    def _trace() -> None:
        """The spellings' patterns, which take longer than most tests: once for all children."""
        rules = importlib.import_module(f"{PACKAGE.name}.rules")
        for device in ("cpu", "cuda"):
            for rule in (*rules.SPELLINGS, *rules.FOLDS):
                if hasattr(rule, "patterns") and isinstance(getattr(rule, "producer", ()), tuple):
                    rule.patterns(device)

    def passes(self, test: str, changes: Mapping[Guard, Change]) -> bool:
        """Whether a test passes with these changes; one that is skipped altogether does not."""

        def run() -> int:
            signal.alarm(SECONDS)
            patch(changes, self.functions)
            return 0 if self._seconds(test) is not None else 1

        code = os.waitstatus_to_exitcode(os.waitpid(_forked(run), 0)[1])
        assert code != NOT_RUN, f"could not run {test} with {list(changes)}"
        return code == 0

    def seen(self, wanted: Iterable[Guard]) -> dict[str, dict[str, float]]:
        """The tests in which each guard refuses something, with their seconds, from one run of all."""
        read, write = os.pipe()
        child = _forked(lambda: self._see(wanted, write))
        os.close(write)
        found: dict[str, dict[str, float]] = {}
        with os.fdopen(read) as lines:
            for line in lines:
                guard, test, seconds = json.loads(line)
                found.setdefault(guard, {})[test] = seconds
        assert os.waitpid(child, 0)[1] == 0
        return found

    def _see(self, wanted: Iterable[Guard], write: int) -> int:
        refused: set[str] = set()

        def see(name: str, allows: bool, condition: Any) -> Any:
            if bool(condition) != allows:
                refused.add(name)
            return condition

        builtins._guard_seen = see  # type: ignore[attr-defined]
        patch({guard: noting(guard) for guard in wanted}, self.functions)
        for test in self.items:
            refused.clear()
            seconds = self._seconds(test)
            if seconds is not None:
                lines = [json.dumps([guard, test, seconds]) for guard in sorted(refused)]
                os.write(write, "".join(f"{line}\n" for line in lines).encode())
        return 0

    def _seconds(self, test: str) -> float | None:
        """Run a test with its parameters until one fails: None where one does, or all are skipped."""
        items, seconds, passed = self.items[test], 0.0, False
        for item, following in zip(items, [*items[1:], None], strict=True):
            for report in runtestprotocol(item, log=False, nextitem=following):
                if report.failed:
                    return None
                seconds += report.duration
                passed |= report.when == "call" and report.passed
        return seconds if passed else None


def _forked(work: Callable[[], int]) -> int:
    """The process in which `work` runs, which exits with what it returns and says nothing."""
    child = os.fork()
    if child == 0:
        code = NOT_RUN
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = work()
        finally:
            os._exit(code)
    return child


def check(tests: Tests, table: Mapping[str, str]) -> list[str]:
    """What is wrong with the table: tests that fail anyway, and tests that pass without their guard."""
    known = [guard for guard in guards() if guard.name in table]
    wrong = [f"there is no test {test}" for test in sorted(set(table.values()) - set(tests.items))]
    for test in sorted(set(table.values()) & set(tests.items)):
        own = [guard for guard in known if table[guard.name] == test]
        # Compiled anew and otherwise as it is: what fails now does not fail for want of a guard.
        if not tests.passes(test, dict.fromkeys(own, lambda condition: condition)):
            wrong.append(f"{test} does not pass")
            continue
        wrong += [f"{test} passes without {g.name}" for g in own if tests.passes(test, {g: without(g)})]
    return wrong


def incomplete(table: Mapping[str, str]) -> list[str]:
    """Which guards the table does not name, and which of its entries are stale."""
    known = [guard.name for guard in guards()]
    missing = [f"no test for {name}" for name in known if name not in table]
    stale = [f"no such guard: {name}" for name in table if name not in known]
    tests = [entry.partition("[")[0].split("::") for entry in dict.fromkeys(table.values())]
    gone = [f"no such test: {path}::{name}" for path, name in tests if f"def {name}(" not in (ROOT / path).read_text()]
    return missing + stale + gone


def find(tests: Tests, table: dict[str, str]) -> None:
    """Name a test for each guard that has none yet, as far as there is one; the shortest comes first."""
    known = {guard.name: guard for guard in guards()}
    for name in set(table) - set(known):
        del table[name]
    missing = [guard for guard in known.values() if guard.name not in table]
    seen = tests.seen(missing)
    for guard in missing:
        spent = 0.0
        candidates = sorted(seen.get(guard.name, {}).items(), key=lambda pair: pair[1])
        for test, seconds in candidates:
            spent += seconds
            if not tests.passes(test, {guard: without(guard)}):
                table[guard.name] = test
            if guard.name in table or spent > PATIENCE:
                break
        print(table.get(guard.name, f"none of {len(candidates)} tests"), guard.name, flush=True)
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


class _Plugin:
    """Collects, and then does `work` in place of running."""

    def __init__(self, work: Callable[[Tests], Any]) -> None:
        self.work = work

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.work(Tests(session.items))
        return True


def main() -> int:
    """Check the table, or complete it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--find", nargs="*", metavar="PATH", help="complete tests/guards.json, with tests of these")
    parser.add_argument("--only", default="", metavar="TEXT", help="check those guards whose names have it")
    arguments = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    chosen = {name: test for name, test in table.items() if arguments.only in name}
    wrong: list[str] = []

    def work(tests: Tests) -> None:
        if arguments.find is not None:
            find(tests, table)
        wrong.extend(incomplete(table) if arguments.find is not None else incomplete(table) + check(tests, chosen))

    if arguments.find is not None:
        files = [*(arguments.find or ["tests"]), *(f"--ignore={Path(__file__).parent / name}" for name in SLOW)]
    else:
        files = sorted({test.partition("::")[0] for test in chosen.values()})
    # Their timers and workers have no place in a child.
    plugins = [option for name in ("cacheprovider", "xdist", "timeout") for option in ("-p", f"no:{name}")]
    code = pytest.main(["-q", "-s", "--rootdir", str(ROOT), *plugins, *files], [_Plugin(work)])
    print("\n".join(wrong) or "every guard matters")
    return int(bool(wrong or code))


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    sys.exit(main())
