"""Nothing is read from where others can write."""

import errno
import os
import stat
import warnings
from pathlib import Path

import pytest

from fusionpass.runtime.cache import Cache, Entry
from tests.runtime.entries import assert_bad, fail, file_of, files

ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_may_write_to(cache, mode):
    file_of(cache, "key").chmod(mode)
    assert_bad(cache, "key", stat.filemode(stat.S_IFREG | mode))


def test_an_entry_that_others_may_read(cache):
    file_of(cache, "key").chmod(0o444)
    assert cache.load("key") is not None


@ROOT_ONLY
def test_an_entry_of_another_user(cache):
    os.chown(file_of(cache, "key"), 12345, -1)
    assert_bad(cache, "key", "another user (12345)")


def test_a_link_to_a_good_entry(cache, tmp_path):
    path = file_of(cache, "key")
    target = path.rename(tmp_path / "elsewhere")
    path.symlink_to(target)
    assert_bad(cache, "key")
    assert not path.is_symlink()
    assert target.exists()


def test_saving_over_a_link_replaces_the_link(cache, tmp_path):
    path, target = file_of(cache, "key"), tmp_path / "elsewhere"
    target.write_text("precious")
    path.unlink()
    path.symlink_to(target)
    assert cache.save("key", Entry(b"new")) is None
    assert cache.load("key") == Entry(b"new")
    assert target.read_text() == "precious"


def test_a_pipe_does_not_hang(cache):
    path = file_of(cache, "key")
    path.unlink()
    os.mkfifo(path)
    assert_bad(cache, "key", "not a regular file")


def test_a_folder_in_place_of_an_entry(cache):
    path = file_of(cache, "key")
    path.unlink()
    (path / "inside").mkdir(parents=True)
    assert_bad(cache, "key", "not a regular file", gone=False)
    assert "cannot be written" in cache.save("key", Entry(b""))
    assert files(cache) == [path.name]
    assert "cannot be cleared" in cache.clear()


def test_an_entry_that_cannot_be_read(cache, monkeypatch):
    file_of(cache, "key")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail(errno.EIO))
        assert_bad(cache, "key", os.strerror(errno.EIO), gone=False)
    assert files(cache) == []


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to(cache, mode):
    file_of(cache, "key")
    before = files(cache)
    cache.folder.chmod(mode)
    assert stat.filemode(stat.S_IFDIR | mode) in cache.refuse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load("key") is None
    assert cache.save("new", Entry(b"")) == cache.clear() == cache.refuse()
    assert files(cache) == before
    cache.folder.chmod(0o755)
    assert cache.refuse() is None
    assert cache.load("key") is not None


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("mode", "fine"), [(0o770, False), (0o707, False), (0o777, False), (0o1777, True)])
def test_a_parent_that_others_may_write_to(tmp_path, depth, mode, fine):
    cache = Cache(tmp_path / "0" / "1" / "2" / "cache")
    file_of(cache, "key")
    cache.folder.parents[depth].chmod(mode)
    assert (cache.refuse() is None) == fine
    assert (cache.load("key") is not None) == fine
    if not fine:
        assert str(cache.folder.parents[depth]) + " " in cache.refuse()


def test_a_folder_below_one_that_others_may_write_to_is_not_made(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "can be written to by others" in Cache(tmp_path / "open" / "cache").refuse()
    assert list((tmp_path / "open").iterdir()) == []


def test_a_folder_of_another_user(cache, monkeypatch):
    file_of(cache, "key")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert f"another user ({cache.folder.stat().st_uid})" in cache.refuse()
    assert cache.load("key") is None


@ROOT_ONLY
@pytest.mark.parametrize("depth", [0, 1])
def test_another_user_above(tmp_path, depth, monkeypatch):
    cache = Cache(tmp_path / "0" / "1" / "cache")
    assert cache.refuse() is None
    os.chown(cache.folder.parents[depth], 12345, -1)
    assert "another user (12345)" in cache.refuse()
    os.chown(cache.folder, 12345, -1)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cache.refuse() is None  # this user's or root's, all the way up
    os.chown(cache.folder, 0, -1)
    assert "another user (0)" in cache.refuse()


def test_links_are_resolved_once(tmp_path):
    good, evil, link = tmp_path / "good", tmp_path / "evil", tmp_path / "link"
    evil.mkdir()
    evil.chmod(0o777)
    link.symlink_to(good)  # dangling until the cache makes it
    cache = Cache(link / "cache")
    file_of(cache, "key")
    assert (good / "cache").is_dir()
    link.unlink()
    link.symlink_to(evil)
    assert cache.load("key") is not None
    assert "can be written to by others" in Cache(link).refuse()


def test_a_folder_that_became_a_link(cache, tmp_path):
    file_of(cache, "key")
    cache.folder.rename(tmp_path / "moved")
    cache.folder.symlink_to(tmp_path / "moved")
    assert "became a link" in cache.refuse()
    assert cache.load("key") is None


@pytest.mark.parametrize("kind", ["file", "below a file", "loop", "long"])
def test_a_folder_that_cannot_be(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "loop":
        path.symlink_to(path)
    elif kind != "long":
        path.touch()
    cache = Cache({"below a file": path / "y", "long": tmp_path / ("x" * 300)}.get(kind, path))
    assert "cannot be used" in cache.refuse()
    assert cache.load("key") is None
    assert cache.save("key", Entry(b"")) == cache.clear() == cache.refuse()


def test_missing_folders_are_made_for_the_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        assert Cache(tmp_path / "a" / "b" / "c").refuse() is None
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_without_owners_only_the_profile_is_trusted(cache, tmp_path, monkeypatch):
    file_of(cache, "key").chmod(0o666)  # as Windows shows every file
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.refuse() is None
    assert cache.load("key") is not None
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    assert "outside the user's profile" in cache.refuse()
    assert cache.load("key") is None


def test_the_default_folder(tmp_path, monkeypatch):
    import pwd

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.default_folder() == tmp_path / "fusionpass"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert Cache.default_folder() == Path("/home/me/.cache/fusionpass")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda user: (_ for _ in ()).throw(KeyError(user)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Cache.default_folder() == tmp_path / f"fusionpass-{os.getuid()}"
