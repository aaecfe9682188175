"""Saving that fails or is killed, and several who use one folder at once."""

import errno
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusionpass.runtime.cache import Cache, Entry
from tests.runtime.entries import META, OLD, fail, file_of, files

NOT_ROOT = pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.mark.parametrize("function", ["tempfile.mkstemp", "os.fsync", "os.replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_the_system_refuses_is_a_reason(cache, monkeypatch, function, number):
    path = file_of(cache, "key")
    with monkeypatch.context() as patch:
        patch.setattr(function, fail(number))
        assert os.strerror(number) in cache.save("key", Entry(b"new"))
    assert files(cache) == [path.name]
    assert cache.load("key").meta == META
    assert cache.save("key", Entry(b"new")) is None


@pytest.mark.parametrize("room", [0, 1, 30, 200, 3000])
def test_no_room_for_all_of_an_entry(cache, room):
    path = file_of(cache, "key")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # the write itself stops after so many bytes
    try:
        reason = cache.save("key", Entry(bytes(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in reason
    assert files(cache) == [path.name]
    assert cache.load("key").meta == META


@NOT_ROOT
def test_a_read_only_folder(cache):
    file_of(cache, "key")
    cache.folder.chmod(0o500)
    assert cache.refuse() is None
    assert cache.save("new", Entry(b"")) is not None
    assert cache.load("key") is not None
    cache.folder.chmod(0o700)


def test_a_read_only_file_system_is_read(cache, monkeypatch):
    file_of(cache, "key")
    monkeypatch.setattr(os, "utime", fail(errno.EROFS))
    assert cache.load("key") is not None


def test_eviction_that_fails_is_no_failure(cache, monkeypatch):
    cache.refuse()
    monkeypatch.setattr(Path, "iterdir", fail(errno.EIO))
    assert cache.save("key", Entry(b"")) is None


def test_an_interrupt_leaves_nothing_behind(cache, monkeypatch):
    path = file_of(cache, "key")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.save("key", Entry(b"new"))
    assert files(cache) == [path.name]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_killed_while_saving(cache, where):
    path = file_of(cache, "key")
    kept = cache.load("key")
    child = os.fork()
    if child == 0:
        try:
            setattr(os, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            cache.save("key", Entry(b"new"))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = set(files(cache)) - {path.name}
    assert cache.load("key") == kept
    # Another process may still be writing to a young one.
    assert cache.save("other", Entry(b"")) is None
    assert left in files(cache)
    os.utime(cache.folder / left, (OLD, OLD))
    assert cache.save("other", Entry(b"")) is None
    assert left not in files(cache)
    assert cache.load("key") == kept


def hammer(folder, name, seconds, wait):
    """Save and load in a folder that others use; counts what was done. Every payload carries its own checksum."""
    cache, draw, done = Cache(folder, limit=100_000), random.Random(name), Counter()
    wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        key = draw.choice(["0", "1", "2", f"{name} 0", f"{name} 1"])
        if draw.random() < 0.4:
            content = draw.randbytes(draw.randrange(20_000))
            entry = Entry(hashlib.sha256(content).digest() + content, {"key": key, "by": name, "size": len(content)})
            assert cache.save(key, entry) is None
            done["saved"] += 1
        elif (entry := cache.load(key)) is not None:
            assert hashlib.sha256(entry.payload[32:]).digest() == entry.payload[:32]
            assert (entry.meta["key"], entry.meta["size"]) == (key, len(entry.payload) - 32)
            done["own" if entry.meta["by"] == name else "others'"] += 1
        else:
            done["missed"] += 1
    return done


def hammer_in_a_process(folder, name, barrier, results):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results.put(hammer(folder, name, 1, barrier.wait))
    except BaseException as error:
        results.put(repr(error))


def check_hammered(cache, found):
    assert all(isinstance(done, Counter) for done in found), found
    for kind in ("saved", "own", "others'", "missed"):
        assert all(done[kind] for done in found), found
    left = [path.stat().st_size for path in cache.folder.iterdir()]
    assert 0 < sum(left) <= 100_000
    assert all(name.endswith(".fusionpass") for name in files(cache))


def test_two_processes(cache):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    child = context.Process(target=hammer_in_a_process, args=(cache.folder, "b", barrier, results))
    child.start()
    hammer_in_a_process(cache.folder, "a", barrier, results)
    found = [results.get(timeout=60) for _ in "ab"]
    child.join()
    check_hammered(cache, found)


@pytest.mark.filterwarnings("error::fusionpass.runtime.cache.CacheWarning")
def test_threads(cache):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda name: hammer(cache.folder, name, 0.5, int), "abcd"))
    finally:
        sys.setswitchinterval(before)
    check_hammered(cache, found)
