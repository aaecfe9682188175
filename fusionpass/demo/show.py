"""What the demo prints."""

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from ..report import Report
from .checks import Check
from .measure import Measured


def answers(console: Console, prompts: tuple[str, ...], variants: dict[str, Measured]) -> None:
    """Each prompt with every variant's answer."""
    for number, prompt in enumerate(prompts):
        table = Table(title=prompt, title_justify="left", show_header=False, expand=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=1)
        for name, measured in variants.items():
            table.add_row(name, measured.answers[number])
        console.print(table)


def figures(console: Console, variants: dict[str, Measured], launches: dict[str, str]) -> None:
    """Perplexity, time per token and kernels of every variant."""
    table = Table(title="Figures", title_justify="left")
    for column in ("", "perplexity", "ms per token", "kernels per token"):
        table.add_column(column, justify="right" if column else "left")
    for name, measured in variants.items():
        row = (f"{measured.perplexity:.4f}", f"{measured.seconds_per_token * 1e3:.1f}", launches.get(name, ""))
        table.add_row(name, *row)
    console.print(table)


def fusions(console: Console, report: Report) -> None:
    """What fused, by op and place; then whatever did not, with its reason."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for record in report.fused:
        places[record.op, record.rule, record.backend, record.reason].append(record.where)
    table = Table(title="What fused", title_justify="left")
    table.add_column("op, by rule, run by", no_wrap=True)
    table.add_column("sites", justify="right")
    table.add_column("where, and why no more", overflow="fold")
    for (op, rule, backend, reason), paths in places.items():
        table.add_row(
            f"{op}\n  {rule}, {backend}", str(len(paths)), "\n".join([*folded(paths), f"[dim]{reason}[/dim]"])
        )
    console.print(table)
    for title, records in (("refused", report.refused), ("missed", report.missed)):
        for record in records:
            console.print(f"{title}: {record}", style="yellow", markup=False, soft_wrap=True)


def folded(paths: list[str]) -> list[str]:
    """Paths with the number of the layer folded: "model.layers.{0-29}.mlp"."""
    numbers: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for path in paths:
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            numbers[path,] = []
        else:
            numbers[".".join(parts[:at]), ".".join(parts[at + 1 :])].append(int(parts[at]))
    return [
        ".".join(part for part in (key[0], f"{{{ranges(found)}}}", key[1]) if part) if found else key[0]
        for key, found in numbers.items()
    ]


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def verdicts(console: Console, checks: list[Check]) -> None:
    """One line for each check."""
    for check in checks:
        mark, style = ("ok  ", "green") if check.passed else ("FAIL", "bold red")
        console.print(f"{mark} {check.name}: {check.seen}", style=style, markup=False, highlight=False, soft_wrap=True)
