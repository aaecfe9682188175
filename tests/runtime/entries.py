"""Entries of a cache, and what every test of it asks."""

import os
import random
import warnings

from fusionpass.runtime.cache import CacheWarning, Entry

META = {"records": [{"op": "rms_norm", "µs": 1.5, "none": None}], "text": 'a\n"b" \ud800 é', "infinite": float("inf")}
OLD = 1_000_000_000


def files(cache):
    return sorted(path.name for path in cache.folder.iterdir())


def fail(number):
    def function(*_, **__):
        raise OSError(number, os.strerror(number))

    return function


def file_of(cache, key):
    """The file of `key`, found by saving it."""
    before = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()} if cache.folder.exists() else {}
    assert cache.save(key, Entry(random.Random(key).randbytes(3000), META)) is None
    (path,) = [path for path in cache.folder.iterdir() if before.get(path) != path.stat().st_mtime_ns]
    return path


def assert_bad(cache, key, text="", gone=True):
    """Loading `key` is a miss with exactly one warning, and the bad entry is gone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cache.load(key) is None
    assert [w.category for w in caught] == [CacheWarning]
    assert text in str(caught[0].message)
    if gone:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cache.load(key) is None
