"""Tables of tuned configurations as files: how they are named, what they hold, and how several writers share one.

A table is JSON by number of rows: `{"1": {"num_warps": 4, …}, "64": {}, "256": null}`. `{}`: the kernel's own rule is
as good; null: something else than the kernel is faster. Beside `NAME.json` lies `NAME.meta.json`, which says how each
entry was found, and which no look-up needs.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from ..errors import TableError

Entry = Mapping[str, Any] | None
"""A configuration by the names of files, `{}` for the kernel's own rule, None for another back end."""

ROOTED = {"block_scaled_mm": ("N", "K"), "experts": ("E", "N")}
"""Ops whose tables other systems have too, named by these fields and without a folder; the rest have one, by the op."""


class Readable(Protocol):
    """What is asked of a path, which may be a resource of a package."""

    @property
    def name(self) -> str:
        """The last part."""

    def read_text(self, encoding: str | None = None) -> str:
        """What the file holds."""


@dataclass(frozen=True)
class Name:
    """What a table is of.

    Args:
        op: the name of the op whose kernel is configured.
        fields: what it is configured for, but for the number of rows, in the order of the file's name. Values are
            compared without spaces: `[128,128]` is `[128, 128]`.
        device: as torch names it, with `_` for spaces.
    """

    op: str
    fields: tuple[tuple[str, str], ...]
    device: str

    @staticmethod
    def of(op: str, key: Mapping[str, object], device: str) -> "Name":
        """The table of `key`, whose fields that are None or False count as left out."""
        fields = tuple((name, _tight(value)) for name, value in key.items() if value is not None and value is not False)
        return Name(op, fields, device.replace(" ", "_"))

    @property
    def key(self) -> frozenset[tuple[str, str]]:
        """The fields whatever their order."""
        return frozenset(self.fields)

    @property
    def path(self) -> Path:
        """The file's, below a folder of tables, spelled as the known systems spell theirs."""
        parts = [(name, value.replace(",", ", ")) for name, value in self.fields if name != "down"]
        first = len(ROOTED.get(self.op, parts))
        parts.insert(first, ("device_name", self.device))
        down = "_down" if ("down", "True") in self.fields else ""
        stem = ",".join(f"{name}={value}" for name, value in parts)
        return Path("" if self.op in ROOTED else self.op, f"{stem}{down}.json")

    @staticmethod
    def parse(folder: str, file: str) -> "Name | None":
        """What the file `file` in the folder `folder` ("" for none) is a table of; None: it is no table."""
        stem = file.removesuffix(".json")
        if stem == file or stem.endswith(".meta"):
            return None
        down = stem.endswith("_down")
        parts = [part.partition("=") for part in _split(stem.removesuffix("_down"))]
        given = {name.strip(): _tight(value) for name, _, value in parts}
        device = given.pop("device_name", "")
        ops = [op for op, names in ROOTED.items() if not folder and tuple(given)[: len(names)] == names]
        if not device or not given or not all(equals for _, equals, _ in parts) or not (folder or ops):
            return None
        return Name(folder or ops[0], (*given.items(), *([("down", "True")] if down else [])), device)


def _tight(value: object) -> str:
    return str(value).replace(" ", "")


def _split(text: str) -> Iterator[str]:
    """At commas that are in no brackets."""
    part, depth = "", 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            yield part
            part = ""
        else:
            part += letter
    yield part


def read(path: Readable) -> tuple[dict[int, Entry], list[str]]:
    """The entries of a table by number of rows, and the keys beside them that are no numbers.

    Raises:
        TableError: the file holds no table.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"it cannot be read: {error}", str(path), "Delete it, or tune again") from error
    if not isinstance(given, dict):
        raise TableError(f"it holds a {type(given).__name__}", str(path), "A table is an object, by number of rows")
    found: dict[int, Entry] = {}
    for text, entry in given.items():
        if text.isdecimal():
            if entry is not None and not isinstance(entry, dict):
                raise TableError(f"the entry of {text} is {entry!r}", str(path), "Pass an object, or null")
            found[int(text)] = entry
    return found, [text for text in given if not text.isdecimal()]


def merge(folder: Path, name: Name, entries: Mapping[int, Entry], records: Mapping[int, Mapping[str, Any]]) -> Path:
    """Add entries, and how they were found, to a table; those of the same number of rows are replaced.

    Several processes may do so at a time, on one host or on a file system that they share, if it has locks. Whoever
    reads the table meanwhile finds it as it was before, or as it is then.

    Args:
        folder: of tables; need not exist.
        name: of the table. A file that spells it otherwise is the one that is added to.
        entries: by number of rows.
        records: by number of rows, JSON.

    Returns:
        Where the table is.

    Raises:
        TableError: what is there is no table.
    """
    path = folder / name.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for other in sorted(path.parent.iterdir()):
            found = Name.parse(name.path.parent.name, other.name)
            if found is not None and (found.op, found.key, found.device) == (name.op, name.key, name.device):
                path = other
        if entries:
            known = read(path)[0] if path.exists() else {}
            kept = {text: json.loads(path.read_text("utf-8"))[text] for text in (read(path)[1] if known else ())}
            _write(path, kept | _sorted({**known, **entries}))
        # The table first: what its metadata has is in it, whenever a writer is killed.
        _write(meta_path(path), {"measured": _sorted({**measured(path), **records})})
    return path


def meta_path(path: Path) -> Path:
    """Where the metadata of the table at `path` are."""
    return path.with_name(path.name.removesuffix(".json") + ".meta.json")


def measured(path: Path) -> dict[int, dict[str, Any]]:
    """How the entries of the table at `path` were found, by number of rows; of a foreign table nothing is known."""
    try:
        given = json.loads(meta_path(path).read_text("utf-8"))
        return {int(m): record for m, record in given["measured"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, AttributeError) as error:
        raise TableError(f"it cannot be read: {error}", str(meta_path(path)), "Delete it, or tune again") from error


def _sorted(entries: Mapping[int, Any]) -> dict[str, Any]:
    return {str(m): entries[m] for m in sorted(entries)}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """As a whole, or not at all. One entry a line; who holds the lock is the only one to write."""
    made = path.with_name(path.name + ".tmp")
    with made.open("w", encoding="utf-8") as file:
        if path.name.endswith(".meta.json"):
            file.write(json.dumps(value, indent=1))
        else:
            file.write("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}")
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
