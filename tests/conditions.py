"""The guards of the package, and taking one away.

A guard is a condition behind which a reason is returned or noted, or "no match" is: of an `if`, of `a if b else None`,
or the `a` of `return a or b`. Where a condition is "a or b", a and b are guards of their own; where it is the one for
going on, so are the a and b of "a and b".
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeGuard

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fusionpass"

Change = Callable[[ast.expr], ast.expr]


@dataclass(frozen=True)
class Guard:
    """One guard.

    Attributes:
        name: "file:function:condition", the same wherever in the file it stands.
        file: relative to the repository.
        index: which expression of the file it is.
        allows: the condition's value with which it refuses nothing.
    """

    name: str
    file: str
    index: int
    allows: bool


def guards() -> list[Guard]:
    """All guards of the package."""
    found: dict[str, Guard] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())
        order = {node: i for i, node in enumerate(_expressions(tree))}
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            for condition, allows in conditions(function):
                name = same = f"{file}:{function.name}:{ast.unparse(condition)}"
                while name in found:
                    name = f"{same}#{int(name.removeprefix(same)[1:] or 1) + 1}"
                found[name] = Guard(name, file, order[condition], allows)
    return list(found.values())


def _expressions(tree: ast.AST) -> list[ast.expr]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.expr)]


def conditions(function: ast.FunctionDef) -> Iterator[tuple[ast.expr, bool]]:
    """The conditions of a function's own guards, nested functions left out, and the value that refuses nothing."""
    returns = ast.unparse(function.returns) if function.returns else ""
    refuses = any(kind in returns for kind in ("Refusal", "| str", "str |", "None, str]", "tuple[Node, Node]"))
    nothing = returns in ("_State | None", "Node | None", "None") or returns.endswith(" | Refusal")
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and not node.orelse:
            last = node.body[-1]
            says = isinstance(last, ast.Return) and (
                (refuses and not _is_none(last.value))
                or (nothing and _is_none(last.value))
                or (returns == "bool" and last.value is not None and ast.unparse(last.value) == "False")
            )
            if says or _notes_reason(node):
                yield from ((part, False) for part in _parts(node.test))
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.IfExp):
            choice = node.value
            if refuses and (_is_none(choice.orelse) or ast.unparse(choice.test).endswith(", str)")):
                yield from ((part, False) for part in _parts(choice.test))
            elif (refuses and _is_none(choice.body)) or (nothing and _is_none(choice.orelse)):
                yield from ((part, True) for part in _parts(choice.test, ast.And))
        elif isinstance(node, ast.Return) and refuses and _is(node.value, ast.Or):
            yield from ((part, False) for part in node.value.values[:-1])


def _is(test: ast.expr | None, operator: type[ast.boolop]) -> TypeGuard[ast.BoolOp]:
    return isinstance(test, ast.BoolOp) and isinstance(test.op, operator)


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _parts(test: ast.expr, operator: type[ast.boolop] = ast.Or) -> list[ast.expr]:
    return test.values if _is(test, operator) else [test]


def _notes_reason(node: ast.If) -> bool:
    calls = [n for statement in node.body for n in ast.walk(statement) if isinstance(n, ast.Call)]
    return isinstance(node.body[-1], ast.Return) and any(
        ast.unparse(call.func).endswith("attempt.fail") for call in calls
    )


def without(guard: Guard) -> Change:
    """The guard's condition with the value that refuses nothing; its names stay, so that closures are the same."""
    operator = ast.Or() if guard.allows else ast.And()
    return lambda condition: ast.BoolOp(operator, [ast.Constant(guard.allows), condition])


def noting(guard: Guard) -> Change:
    """The guard's condition, telling `_guard_seen` when it refuses."""
    call = f"__import__('builtins')._guard_seen({guard.name!r}, {guard.allows}, 0)"

    def change(condition: ast.expr) -> ast.expr:
        made: Any = ast.parse(call, mode="eval").body
        made.args[-1] = condition
        return made  # type: ignore[no-any-return]

    return change


def patch(changes: Mapping[Guard, Change], functions: Iterable[FunctionType]) -> None:
    """Give the functions of the package other code: that of their files with the guards' conditions changed."""
    for file in {guard.file for guard in changes}:
        path = ROOT / file
        tree = ast.parse(path.read_text())
        order = _expressions(tree)
        wanted = {order[guard.index]: change for guard, change in changes.items() if guard.file == file}

        class Rewrite(ast.NodeTransformer):
            def visit(self, node: ast.AST, wanted: Mapping[Any, Change] = wanted) -> Any:
                self.generic_visit(node)
                return ast.copy_location(wanted[node](node), node) if node in wanted else node  # type: ignore[arg-type]

        codes = dict(_codes(compile(ast.fix_missing_locations(Rewrite().visit(tree)), str(path), "exec")))
        for function in functions:
            code = function.__code__
            if code.co_filename == str(path) and code.co_name != "<lambda>":
                function.__code__ = codes[code.co_qualname, code.co_firstlineno]


def _codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield (const.co_qualname, const.co_firstlineno), const
            yield from _codes(const)
