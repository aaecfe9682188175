"""Compiled pieces on disk: a second process starts warm, and nothing is read that others could have written.

One file per entry: a first line that names the format, the SHA-256 of all that follows, a line of JSON with the key and
the metadata, the payload.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..op import Refusal
from .keys import FORMAT, digest, environment, source_digest

__all__ = ["Cache", "CacheWarning", "Entry", "digest", "environment", "source_digest"]

_MAGIC = b"fusionpass cache %d\n" % FORMAT
_BEGIN = len(_MAGIC) + hashlib.sha256().digest_size
_ENTRY, _TEMPORARY = ".fusionpass", ".fusionpass.tmp"
_ABANDONED = 3600
"""Seconds after which nobody is still writing to a temporary file."""
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
"""Follows no link, waits for no pipe."""


class CacheWarning(UserWarning):
    """An entry of the cache could not be used; what it held is compiled again."""


@dataclass(frozen=True)
class Entry:
    """What is kept under a key.

    Attributes:
        payload: any bytes.
        meta: JSON: a tuple comes back as a list, and a key as a string.
    """

    payload: bytes
    meta: dict[str, Any] = field(default_factory=dict)


class Cache:
    """A folder of entries, which processes and threads may share; no locks.

    Args:
        folder: need not exist; symbolic links in it are resolved now, once.
        limit: bytes of all entries together; the least recently used go first.
    """

    def __init__(self, folder: Path, limit: int = 2 << 30) -> None:
        self.folder, self.limit = Path(os.path.realpath(folder)), limit

    @staticmethod
    def default_folder() -> Path:
        """`fusionpass` in $XDG_CACHE_HOME, which counts only if absolute, or in ~/.cache.

        For a user without a home, `fusionpass-<user id>` in the folder for temporary files.
        """
        for caches in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
            if os.path.isabs(caches):
                return Path(caches, "fusionpass")
        return Path(tempfile.gettempdir(), f"fusionpass-{_user()}")

    def refuse(self) -> Refusal:
        """Why the folder cannot be trusted; makes it, readable by its owner alone, where it is missing.

        The folder must be this user's, and writable by nobody else. So must be every folder above it, but that those
        may also be root's, and writable by all where the sticky bit keeps others from renaming what is ours. Linux
        shows access lists in the group's bits; those of macOS are not looked at. On Windows neither owners nor access
        lists are: there a folder is trusted if it lies in the user's profile, which Windows keeps private.
        """
        for folder in (*reversed(self.folder.parents), self.folder):
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                status = os.lstat(folder)
            except OSError as error:
                return f"{folder} cannot be used: {error.strerror}"
            if not stat.S_ISDIR(status.st_mode):
                return f"{folder} became a link"
            if reason := _writers(status, above=folder != self.folder):
                return f"{folder} {reason}; choose another folder for the cache, or change that"
        if _user() is None and not self.folder.is_relative_to(os.path.realpath(os.path.expanduser("~"))):
            return f"{self.folder} is outside the user's profile, and access lists of Windows are not read"
        return None

    def load(self, key: str) -> Entry | None:
        """What was saved under `key`. None where there is nothing, or where the folder is refused.

        An entry that is damaged, that others could have written or that cannot be read is deleted, with a
        `CacheWarning`. The digest of the whole file is compared before anything in it is looked at.
        """
        if self.refuse() is not None:
            return None
        path = self._path(key)
        found = _read(path)
        entry = _decode(found, key) if isinstance(found, bytes) else found
        if isinstance(entry, str):
            with contextlib.suppress(OSError):
                path.unlink()
            text = f"{path}: {entry}. It is not used, and what it held is compiled again"
            warnings.warn(text, CacheWarning, stacklevel=2)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # eviction goes by the last use
        return entry

    def save(self, key: str, entry: Entry) -> Refusal:
        """Keep `entry` under `key`, or say why not. What was there is replaced in one step.

        Raises:
            TypeError: the metadata is not JSON.
        """
        head = json.dumps({"key": key, "meta": entry.meta}).encode() + b"\n"
        if (reason := self.refuse()) is not None:
            return reason
        size = _BEGIN + len(head) + len(entry.payload)
        if size > self.limit:
            return f"the entry takes {size} bytes, more than the whole cache may ({self.limit})"
        checksum = hashlib.sha256(head)
        checksum.update(entry.payload)
        try:
            descriptor, temporary = tempfile.mkstemp(_TEMPORARY, dir=self.folder)
            try:
                with open(descriptor, "wb") as file:
                    file.writelines((_MAGIC, checksum.digest(), head, entry.payload))
                    file.flush()
                    # A power failure must not leave the name with only part of the bytes.
                    os.fsync(descriptor)
                os.replace(temporary, self._path(key))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            return f"{self.folder} cannot be written to: {error.strerror}"
        with contextlib.suppress(OSError):
            self._evict(self._path(key))
        return None

    def clear(self) -> Refusal:
        """Delete all entries, or say why not; other files in the folder stay."""
        if (reason := self.refuse()) is not None:
            return reason
        try:
            for path in self.folder.iterdir():
                if path.name.endswith((_ENTRY, _TEMPORARY)):
                    path.unlink(missing_ok=True)
        except OSError as error:
            return f"{self.folder} cannot be cleared: {error.strerror}"
        return None

    def _path(self, key: str) -> Path:
        return self.folder / f"{digest(key)}{_ENTRY}"

    def _evict(self, kept: Path) -> None:
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process was faster
                status = os.lstat(path)
                if path.name.endswith(_ENTRY):
                    entries.append((status.st_mtime_ns, path, status.st_size))
                elif path.name.endswith(_TEMPORARY) and time.time() - status.st_mtime > _ABANDONED:
                    path.unlink()
        excess = sum(size for _, _, size in entries) - self.limit
        for _, path, size in sorted(entries):
            if excess > 0 and path != kept:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                    excess -= size


def _user() -> int | None:
    """None on Windows, where a file's owner is not a number."""
    return os.getuid() if hasattr(os, "getuid") else None


def _writers(status: os.stat_result, above: bool = False) -> Refusal:
    """Who else could write here; `above`: could rename what is ours in here."""
    if (user := _user()) is None:
        return None
    if status.st_uid != user and not (above and status.st_uid == 0):
        return f"belongs to another user ({status.st_uid})"
    sticky = above and status.st_mode & stat.S_ISVTX
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        return f"can be written to by others ({stat.filemode(status.st_mode)})"
    return None


def _read(path: Path) -> bytes | str | None:
    """The file's content; the reason why it is not read; None where there is none."""
    try:
        descriptor = os.open(path, _READ)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return "not a regular file"
            if reason := _writers(status):
                return reason
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _decode(data: bytes, key: str) -> Entry | str:
    if data[:_BEGIN] != _MAGIC + hashlib.sha256(memoryview(data)[_BEGIN:]).digest():
        return "damaged"
    end = data.index(b"\n", _BEGIN)
    head = json.loads(data[_BEGIN:end])
    if head["key"] != key:
        return "the entry of another key"
    return Entry(data[end + 1 :], head["meta"])
