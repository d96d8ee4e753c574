"""Paths that strangers made: opened within a root, deleted without leaving it, and whose users are named."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imageapi.linux import mount, users
from imageapi.linux.openat2 import open_in_root
from imageapi.linux.tree import remove_tree
from lab.elsewhere import working_in

pytestmark = pytest.mark.kernel


@contextmanager
def directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


WAYS = ("file", "/file", "../../file", "inner/../../../file", "absolute", "climbing", "inner/up")


@pytest.mark.parametrize("path", WAYS)
def test_every_way_ends_inside_the_root(run_dir: Path, path: str) -> None:
    root = run_dir / "root"
    (root / "inner").mkdir(parents=True)
    (root / "file").write_text("inside")
    (run_dir / "file").write_text("outside")
    (root / "absolute").symlink_to("/file")
    (root / "climbing").symlink_to("../../../../../file")
    (root / "inner/up").symlink_to("../../file")
    with directory(root) as fd:
        found = open_in_root(fd, path, os.O_RDONLY)
        with os.fdopen(found) as file:
            assert file.read() == "inside"


def test_a_magic_link_is_not_followed() -> None:
    with directory(Path("/proc")) as fd, pytest.raises(OSError, match="symbolic links") as refusal:
        open_in_root(fd, "self/root", os.O_RDONLY)
    assert (refusal.value.errno, refusal.value.filename) == (errno.ELOOP, "self/root")


def test_what_others_rename_meanwhile_does_not_matter(run_dir: Path) -> None:
    """The kernel answers EAGAIN when it cannot tell whether `..` led out."""
    (run_dir / "root/inner").mkdir(parents=True)
    ended = threading.Event()

    def rename() -> None:
        while not ended.is_set():
            os.rename(run_dir / "root/inner", run_dir / "root/moved")
            os.rename(run_dir / "root/moved", run_dir / "root/inner")

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        with directory(run_dir / "root") as fd:
            for _ in range(3000):
                os.close(open_in_root(fd, "../" * 20, os.O_PATH))
    finally:
        ended.set()
        thread.join()


def test_a_descriptor_does_not_survive_an_exec(run_dir: Path) -> None:
    with directory(run_dir) as fd:
        found = open_in_root(fd, "/", os.O_PATH)
        assert not os.get_inheritable(found)
        os.close(found)


# -------------------------------------------------------------------------------------------------- deleting


def test_a_tree_is_removed_whatever_is_in_it(run_dir: Path) -> None:
    tree = run_dir / "tree"
    (tree / "a/b/c").mkdir(parents=True)
    (tree / "a/b/c/file").write_text("x")
    (tree / "a/same").mkdir()
    (tree / "same").mkdir()
    (tree / "locked").mkdir(mode=0)
    (tree / "dangling").symlink_to("nowhere")
    os.mkfifo(tree / "a/fifo")
    os.mknod(tree / "node", 0o20600, os.makedev(1, 3))
    remove_tree(str(tree))
    assert not tree.exists()
    remove_tree(str(tree))


def test_symlinks_are_not_followed(run_dir: Path) -> None:
    (run_dir / "kept").mkdir()
    (run_dir / "kept/file").touch()
    tree = run_dir / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "link").symlink_to(run_dir / "kept")
    (tree / "deep/link").symlink_to("../../kept")
    remove_tree(str(tree))
    assert (run_dir / "kept/file").exists()
    tree.symlink_to(run_dir / "kept")
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        remove_tree(str(tree))
    assert (run_dir / "kept/file").exists()


def test_a_tree_deeper_than_any_path_is_removed(run_dir: Path) -> None:
    tree = run_dir / "tree"
    tree.mkdir()
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(5000):
        os.mkdir("deeper", dir_fd=fd)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    remove_tree(str(tree))
    assert not tree.exists()


@pytest.mark.parametrize("where", ["", "spot", "deep/spot"])
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_what_is_mounted_in_it_is_not_emptied(run_dir: Path, where: str, kind: str) -> None:
    (run_dir / "kept").mkdir()
    place = run_dir / "tree" / where
    place.mkdir(parents=True)
    flags, source = (mount.MS_BIND, str(run_dir / "kept")) if kind == "bind" else (0, "tmpfs")
    mount.mount(source, str(place), kind, flags, None)
    try:
        (place / "file").touch()
        with pytest.raises(OSError, match=r"busy|cross-device") as refusal:
            remove_tree(str(run_dir / "tree"))
        assert refusal.value.errno in (errno.EXDEV, errno.EBUSY)
        assert (place / "file").exists()
    finally:
        mount.umount(str(place))


# --------------------------------------------------------------------------------------------------- users


def test_a_working_directory_is_a_use(run_dir: Path) -> None:
    (run_dir / "inner").mkdir()
    with working_in(run_dir / "inner") as pid:
        assert users.using(str(run_dir)) == [pid]
        assert users.using(str(run_dir / "inner")) == [pid]
        assert users.command(pid) == "sleep"
    assert users.using(str(run_dir)) == []


def test_an_open_file_is_a_use(run_dir: Path) -> None:
    with open(run_dir / "file", "w"):
        assert users.using(str(run_dir / "file")) == [os.getpid()]
    assert users.using(str(run_dir / "file")) == []


def test_a_path_that_only_begins_alike_is_none(run_dir: Path) -> None:
    (run_dir / "inner").mkdir()
    with working_in(run_dir / "inner"):
        assert users.using(str(run_dir / "inn")) == []
