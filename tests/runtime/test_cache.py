"""What is saved is what is loaded, within the limit; a damaged entry is a miss."""

import errno
import hashlib
import json
import os
import random
import stat
import time
import warnings
from pathlib import Path

import pytest

from fusionpass.runtime.cache import Cache, Entry
from tests.runtime.entries import META, OLD, assert_bad, fail, file_of, files


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def signed(text, body):
    """A file as in the module's docstring."""
    return text + hashlib.sha256(body).digest() + body


@pytest.mark.parametrize("payload", [b"", b"\n", b"\n\n{}\n", b"\x00\xff" * 7, random.Random(0).randbytes(1_000_003)])
@pytest.mark.parametrize("meta", [{}, META], ids=["empty", "nested"])
def test_round_trip(cache, payload, meta):
    assert cache.load("key") is None
    assert cache.save("key", Entry(payload, meta)) is None
    for reader in (cache, Cache(cache.folder)):
        assert reader.load("key") == Entry(payload, meta)
    assert len(files(cache)) == 1


@pytest.mark.parametrize("key", ["", ".", "../../key", "/key", "a/b\x00c", "é\ud800", "k" * 10_000])
def test_any_text_is_a_key_and_stays_in_the_folder(cache, key):
    assert cache.save("other", Entry(b"other")) is None
    assert cache.save(key, Entry(b"this")) is None
    assert cache.load(key) == Entry(b"this")
    assert cache.load("other") == Entry(b"other")
    assert [p.name for p in cache.folder.parent.iterdir()] == ["cache"]
    assert len(files(cache)) == 2


def test_the_last_save_wins(cache):
    for payload in (b"long" * 1000, b"short", b""):
        assert cache.save("key", Entry(payload)) is None
        assert cache.load("key") == Entry(payload)
    assert len(files(cache)) == 1


def test_the_format_is_the_documented_one(cache):
    path = file_of(cache, "key")
    first, rest = path.read_bytes().split(b"\n", 1)
    checksum, body = rest[:32], rest[32:]
    assert first == b"fusionpass cache 2"
    assert checksum == hashlib.sha256(body).digest()
    head, payload = body.split(b"\n", 1)
    assert json.loads(head) == {"key": "key", "meta": META}
    assert payload == random.Random("key").randbytes(3000)


def test_metadata_that_is_not_json_is_an_error_and_writes_nothing(cache):
    with pytest.raises(TypeError):
        cache.save("key", Entry(b"", {"set": {1}}))
    assert not cache.folder.exists()


def test_files_are_the_owners_alone(cache):
    before = os.umask(0)
    try:
        path = file_of(cache, "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_clear_leaves_the_files_of_others(cache):
    file_of(cache, "a")
    file_of(cache, "b")
    (cache.folder / "x.fusionpass.tmp").touch()
    (cache.folder / "notes.txt").touch()
    assert cache.clear() is None
    assert files(cache) == ["notes.txt"]
    assert cache.clear() is None
    assert cache.load("a") is None


def test_clear_says_why_not(cache, monkeypatch):
    file_of(cache, "a")
    monkeypatch.setattr(Path, "unlink", fail(errno.EROFS))
    assert "Read-only" in cache.clear()


@pytest.mark.parametrize("damage", ["flip", "overwrite", "truncate"])
def test_two_hundred_random_offsets(cache, damage, monkeypatch):
    draw = random.Random(damage)
    path = file_of(cache, "key")
    good, entry = path.read_bytes(), cache.load("key")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 200 of them take long
    parse = json.loads
    for _ in range(200):
        offset = draw.randrange(len(good))
        bad = bytearray(good)
        if damage == "flip":
            bad[offset] ^= 1 << draw.randrange(8)
        elif damage == "overwrite":
            bad[offset] = draw.choice([value for value in range(256) if value != good[offset]])
        else:
            del bad[offset:]
        path.write_bytes(bad)
        with monkeypatch.context() as patch:
            patch.setattr(json, "loads", lambda *_: pytest.fail("parsed before its digest was compared"))
            assert_bad(cache, "key", str(path))
        assert not path.exists()
        assert cache.save("key", entry) is None
        assert json.loads is parse
        assert cache.load("key") == entry


def test_every_byte_of_the_header_counts(cache):
    path = file_of(cache, "key")
    good = path.read_bytes()
    for offset in range(good.index(b"{")):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
        assert_bad(cache, "key", "damaged")


@pytest.mark.parametrize("content", [b"", b"\n", b"fusionpass cache 1\n", b"x" * 51, b"x" * 100_000])
def test_what_is_no_entry_at_all(cache, content):
    file_of(cache, "key").write_bytes(content)
    assert_bad(cache, "key", "damaged")


def test_something_behind_the_entry(cache):
    path = file_of(cache, "key")
    path.write_bytes(path.read_bytes() + b"\x00")
    assert_bad(cache, "key", "damaged")


def test_an_entry_of_another_format(cache):
    path = file_of(cache, "key")
    body = path.read_bytes()[51:]
    path.write_bytes(signed(b"fusionpass cache 2\n", body))
    assert cache.load("key") is not None
    path.write_bytes(signed(b"fusionpass cache 3\n", body))
    assert_bad(cache, "key", "damaged")


def test_an_entry_under_another_name(cache):
    a, b = file_of(cache, "a"), file_of(cache, "b")
    kept = cache.load("a")
    b.write_bytes(a.read_bytes())
    assert_bad(cache, "b", "another key")
    assert cache.load("a") == kept


def test_a_bad_entry_that_cannot_be_deleted(cache, monkeypatch):
    path = file_of(cache, "key")
    path.write_bytes(b"")
    monkeypatch.setattr(Path, "unlink", fail(errno.EACCES))
    assert_bad(cache, "key", "damaged", gone=False)
    assert path.exists()


def saved_at(cache, key, seconds):
    path = file_of(cache, key)
    os.utime(path, (seconds, seconds))
    return path


def test_the_least_recently_used_go_first(cache):
    a, b, c = (saved_at(cache, key, OLD + i) for i, key in enumerate("abc"))
    cache.limit = 3 * a.stat().st_size
    assert cache.load("a") is not None
    d = file_of(cache, "d")
    assert {p.name for p in (a, c, d)} == set(files(cache))
    cache.limit = 1 * a.stat().st_size
    e = file_of(cache, "e")
    assert files(cache) == [e.name]
    assert not b.exists()


def test_the_limit_itself_is_within_the_limit(cache):
    a, b = (saved_at(cache, key, OLD + i) for i, key in enumerate("ab"))
    cache.limit = 3 * a.stat().st_size
    c = file_of(cache, "c")
    assert a.exists()
    assert b.exists()
    cache.limit -= 1
    file_of(cache, "c")
    assert not a.exists()
    assert b.exists()
    assert c.exists()


def test_what_was_just_saved_stays_whatever_the_clock_says(cache):
    a = saved_at(cache, "a", time.time() + 10_000)
    cache.limit = a.stat().st_size
    b = file_of(cache, "b")
    assert files(cache) == [b.name]


def test_an_entry_over_the_limit_is_refused_and_evicts_nothing(cache):
    a = file_of(cache, "a")
    cache.limit = a.stat().st_size
    assert "bytes" in cache.save("a", Entry(random.Random(1).randbytes(3001), META))
    assert cache.save("b", Entry(bytes(10_000))) is not None
    assert files(cache) == [a.name]
    assert cache.load("a") == Entry(random.Random("a").randbytes(3000), META)
    assert Cache(cache.folder, limit=0).save("a", Entry(b"")) is not None


def test_what_cannot_be_evicted_does_not_count_as_freed(cache, monkeypatch):
    a, b, c = (saved_at(cache, key, OLD + i) for i, key in enumerate("abc"))
    unlink = Path.unlink

    def in_use(path, missing_ok=False):
        if path == a:
            raise PermissionError(errno.EACCES, "in use")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", in_use)
    cache.limit = 3 * a.stat().st_size
    d = file_of(cache, "d")
    assert not b.exists()
    assert set(files(cache)) == {p.name for p in (a, c, d)}


def test_what_another_process_evicted_first_counts_as_freed(cache, monkeypatch):
    a, b = (saved_at(cache, key, OLD + i) for i, key in enumerate("ab"))
    unlink = Path.unlink

    def beaten(path, missing_ok=False):
        unlink(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", beaten)
    cache.limit = 2 * a.stat().st_size
    c = file_of(cache, "c")
    assert set(files(cache)) == {b.name, c.name}


def test_other_files_neither_count_nor_go(cache):
    a = saved_at(cache, "a", OLD)
    for name in ("notes.txt", "x.tmp"):
        (cache.folder / name).write_bytes(bytes(100_000))
        os.utime(cache.folder / name, (OLD, OLD))
    cache.limit = 2 * a.stat().st_size
    b = file_of(cache, "b")
    assert set(files(cache)) == {a.name, b.name, "notes.txt", "x.tmp"}


@pytest.mark.parametrize(("function", "found"), [("open", False), ("fstat", True)])
def test_an_entry_evicted_while_it_is_read(cache, monkeypatch, function, found):
    path = file_of(cache, "key")
    entry, really = cache.load("key"), getattr(os, function)

    def evicted(*args):
        path.unlink()
        return really(*args)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(os, function, evicted)
        assert cache.load("key") == (entry if found else None)
    assert not path.exists()


def test_no_file_stays_open(cache):
    def free():
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    path, before = file_of(cache, "key"), free()
    assert cache.load("key") is not None
    path.chmod(0o666)
    assert_bad(cache, "key", "others")
    assert cache.save("key", Entry(b"")) is None
    assert free() == before
