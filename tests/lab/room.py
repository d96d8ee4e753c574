"""Run directories with little room: a file system of the test's own, and ways to use it up."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.images import formatted
from lab.server import Server, eventually, running_as

PAGE = 4096


@contextlib.contextmanager
def tmpfs(place: Path, options: str) -> Iterator[Path]:
    """A tmpfs with these options (tmpfs(5))."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=755,{options}", "room", place], check=True)
    try:
        yield place
    finally:
        eventually(lambda: not subprocess.run(["umount", place], check=False).returncode, f"{place} is let go")


@contextlib.contextmanager
def subvolume(place: Path, image: Path) -> Iterator[Path]:
    """A btrfs, which can be made read-only under a running server (`set_read_only`)."""
    formatted(image, "btrfs", "128M")
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        set_read_only(place, on=False)
        eventually(lambda: not subprocess.run(["umount", place], check=False).returncode, f"{place} is let go")
        image.unlink()


def set_read_only(place: Path, *, on: bool) -> None:
    """From now on every write below `place` fails with EROFS, or none does, whoever has what open there."""
    subprocess.run(["btrfs", "property", "set", "-ts", place, "ro", "true" if on else "false"], check=True)


@contextlib.contextmanager
def running_in(place: Path, *options: str) -> Iterator[Server]:
    """A server whose run directory is a file system of its own; what it logs itself is outside."""
    server = Server(place, *options)
    server.log = place.parent / "server.log"
    with running_as(server):
        yield server


class Filler:
    """What uses up the space of a file system, or its inodes."""

    def __init__(self, place: Path) -> None:
        self._file = place / "filler"
        self._directory = place / "many"
        self._directory.mkdir()

    def space(self, left: int = 0) -> None:
        """Leave so many pages."""
        with self._file.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        os.truncate(self._file, max(0, self._file.stat().st_size - left * PAGE))

    def inodes(self, left: int = 0) -> None:
        """Leave so many inodes."""
        with contextlib.suppress(OSError):
            for number in range(100_000):
                (self._directory / str(number)).touch()
        for name in sorted(self._directory.iterdir())[:left]:
            name.unlink()

    def release(self) -> None:
        """There is room again."""
        self._file.unlink(missing_ok=True)
        for name in self._directory.iterdir():
            name.unlink()


@contextlib.contextmanager
def in_group(name: str) -> Iterator[Path]:
    """This process, and what it starts, is in a cgroup of the version 1 hierarchy `pids`."""
    root = Path("/sys/fs/cgroup/pids")
    group = root / name
    group.mkdir(exist_ok=True)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield group
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        eventually(lambda: _removed(group), "what was started in the group has ended")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()
