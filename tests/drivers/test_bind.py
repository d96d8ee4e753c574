"""The kind `bind`: what it shows, what it refuses, and what it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drivers.bench import Bench, place
from imageapi.errors import Conflict, Invalid
from imageapi.linux import mount, mountinfo

pytestmark = pytest.mark.kernel


def test_a_bind_shows_the_directory(bench: Bench, run_dir: Path) -> None:
    source = run_dir / "source"
    source.mkdir()
    record = bench.acquire(bench.bind(str(source)))
    (place(record) / "file").write_text("through it")
    assert (source / "file").read_text() == "through it"


def test_a_read_only_bind_leaves_its_source_writable(bench: Bench, run_dir: Path) -> None:
    source = run_dir / "source"
    source.mkdir()
    record = bench.acquire(bench.bind(str(source), ro=True))
    with pytest.raises(OSError, match="Read-only"):
        (place(record) / "file").touch()
    (source / "file").touch()
    assert (place(record) / "file").exists()


@pytest.fixture
def tree(run_dir: Path) -> Path:
    """A directory with a tmpfs mounted in it, on which a file is."""
    source = run_dir / "tree"
    (source / "inner").mkdir(parents=True)
    return source


@pytest.mark.parametrize("ro", [True, False])
def test_a_recursive_bind_has_what_is_mounted_inside(bench: Bench, tree: Path, ro: bool) -> None:
    mount.mount("inner", str(tree / "inner"), "tmpfs", 0, None)
    try:
        (tree / "inner/file").touch()
        record = bench.acquire(bench.bind(str(tree), recursive=True, ro=ro))
        assert (place(record) / "inner/file").exists()
        if ro:
            with pytest.raises(OSError, match="Read-only"):
                (place(record) / "inner/new").touch()
        else:
            (place(record) / "inner/new").touch()
        bench.release(record)
        assert mountinfo.at(str(tree / "inner")) is not None
    finally:
        mount.umount(str(tree / "inner"))


def test_a_plain_bind_has_not(bench: Bench, tree: Path) -> None:
    mount.mount("inner", str(tree / "inner"), "tmpfs", 0, None)
    try:
        (tree / "inner/file").touch()
        record = bench.acquire(bench.bind(str(tree)))
        assert not list((place(record) / "inner").iterdir())
    finally:
        mount.umount(str(tree / "inner"))


def test_what_is_mounted_at_the_source_later_does_not_come_along(bench: Bench, tree: Path) -> None:
    mount.mount("tree", str(tree), "tmpfs", 0, None)
    mount.mount(None, str(tree), None, mount.MS_SHARED, None)
    try:
        (tree / "inner").mkdir()
        record = bench.acquire(bench.bind(str(tree), recursive=True))
        mount.mount("later", str(tree / "inner"), "tmpfs", 0, None)
        assert mountinfo.below(str(place(record))) == []
        mount.umount(str(tree / "inner"))
        bench.release(record)
    finally:
        mount.umount(str(tree))


def test_a_stranger_inside_a_plain_bind_is_named_and_left(bench: Bench, tree: Path) -> None:
    record = bench.acquire(bench.bind(str(tree)))
    inner = place(record) / "inner"
    mount.mount("stranger", str(inner), "tmpfs", 0, None)
    try:
        with pytest.raises(Conflict) as refusal:
            bench.release(record)
        assert refusal.value.fields["holders"] == [f"the mount at {os.path.realpath(inner)}"]
    finally:
        mount.umount(str(inner))


def test_an_unbindable_mount_is_refused(bench: Bench, tree: Path) -> None:
    mount.mount("tree", str(tree), "tmpfs", 0, None)
    try:
        mount.mount(None, str(tree), None, mount.MS_UNBINDABLE, None)
        with pytest.raises(Invalid, match="unbindable"):
            bench.acquire(bench.bind(str(tree)))
    finally:
        mount.umount(str(tree))


def test_a_path_in_a_mount_stays_in_it(bench: Bench) -> None:
    layered = bench.layered()
    (place(layered) / "out").symlink_to("../../../../../../etc")
    record = bench.acquire(bench.bind_inside(layered, "/out"))
    assert os.path.samefile(place(record), place(layered) / "etc")


def test_what_is_no_directory_is_refused(bench: Bench, run_dir: Path) -> None:
    (run_dir / "file").touch()
    for path, reason in {"file": "no directory", "missing": "does not exist on this host"}.items():
        with pytest.raises(Invalid, match=reason) as refusal:
            bench.acquire(bench.bind(str(run_dir / path)))
        assert refusal.value.fields["path"] == "$.path"


def test_a_recursive_bind_of_our_own_mounts_is_refused(bench: Bench, run_dir: Path) -> None:
    for path in (run_dir, run_dir.parent, Path("/")):
        with pytest.raises(Invalid, match="this server's own mounts"):
            bench.acquire(bench.bind(str(path), recursive=True))
