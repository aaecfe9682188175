"""Cuts of the kernels that work by the row: norms, activations, quantisations."""

from dataclasses import dataclass

from ..arch import Arch
from .names import no_power_of_two
from .store import choose


@dataclass(frozen=True)
class Cut:
    """What one program of a kernel that works by the row takes.

    Args:
        rows: how many.
        columns: of each; a power of two.
        warps: that share them.
    """

    rows: int
    columns: int
    warps: int


def row_key(scheme: str | None, width: int, itemsize: int) -> dict[str, object]:
    """What tables of kernels that work by the row are for; the overrides of a scheme do not count."""
    return {"width": width, "scheme": scheme and scheme.partition(",")[0], "bytes": itemsize}


def choose_rows(
    rule: Cut,
    op: str,
    scheme: str | None,
    arch: Arch,
    rows: int | None,
    width: int,
    itemsize: int,
    *,
    whole: bool,
    fewest: int = 1,
) -> Cut | str:
    """`choose` for kernels that work by the row; a count stands for those within a factor of two.

    Args:
        rule: the kernel's own choice.
        op: its name.
        scheme: the string of a scheme, or None.
        arch: the target.
        rows: how many; None where the number is symbolic.
        width: columns of a row.
        itemsize: bytes of an element of the input.
        whole: a program needs whole rows.
        fewest: columns that it needs, at least.
    """

    def refuse(cut: Cut) -> str | None:
        if whole and cut.columns != rule.columns:
            return f"columns: a program needs whole rows, {rule.columns} columns, not {cut.columns}"
        if cut.columns < fewest:
            return f"columns: a program needs {fewest}, a whole group, not {cut.columns}"
        return no_power_of_two(cut, "rows", "columns", "warps")

    return choose(rule, op, row_key(scheme, width, itemsize), arch, rows, near="width", reach=2, refuse=refuse)


def tile(elements: int, width: int, fewest: int, warp_size: int, grouped: bool) -> Cut:
    """The rule for kernels that may take any part of any rows: so many of each that a tenth is wasted at most.

    Measured on an H200 over 21 cuts: few elements are spread over more programs; groups of many want 16 a thread, since
    a thread has a group's scale to compute whatever it has of the group; everything else 8.

    Args:
        elements: of all rows.
        width: columns of a row.
        fewest: columns that a program needs; a power of two.
        warp_size: threads of a warp.
        grouped: whether scales of groups are computed.
    """
    many = elements >= 2**20
    most = max(fewest, 2048 if many else 512 if elements <= 2**17 else 1024)
    columns = max(fewest, min(most, 1024))
    while columns > fewest and width < 0.9 * -(-width // columns) * columns:
        columns //= 2
    return Cut(most // columns, columns, max(1, most // (16 if many and grouped else 8) // warp_size))
