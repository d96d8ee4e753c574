"""What every figure needs: a place in memory, our own programs compiled, and an image with two of them in it."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from imageapi.linux.mount import MS_NODEV, MS_NOSUID, mount, umount
from tools.bench.client import Client
from tools.bench.service import Service, running

SOURCES = Path(__file__).parent / "c"
ON_THE_HOST = ("limit", "launch")
IN_THE_IMAGE = ("stamp", "wait")
"""Without a C library: their first instruction is theirs."""
BARE = ("-static", "-nostdlib", "-fno-stack-protector", "-fno-builtin")
LET_GO = 10.0
"""Seconds until what is mounted is not used any more when all that was started has ended."""
DIRECTORIES = ("bin", "dev", "etc", "proc", "run", "sys", "tmp", "usr/bin", "var/lib")


class Lab(NamedTuple):
    """`place` is a directory on a tmpfs that is gone in the end."""

    place: Path
    rounds: int

    @property
    def image(self) -> Path:
        """A squashfs with `/bin/stamp` and `/bin/wait`, which write the time as the first thing they do."""
        return self.place / "image.sqsh"

    def program(self, name: str) -> str:
        return str(self.place / name)

    def directory(self, name: str) -> Path:
        """A new one, empty."""
        path = self.place / name
        path.mkdir()
        return path

    def service(self, *options: str) -> contextlib.AbstractContextManager[tuple[Service, Client]]:
        return running(self.place, *options)


@contextlib.contextmanager
def opened(rounds: int) -> Iterator[Lab]:
    """Raises: subprocess.CalledProcessError when something cannot be made; what was said is on standard error."""
    with _place() as place:
        _make(lab := Lab(place, rounds))
        yield lab


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A tmpfs of our own: /run is one on nodes, but not on every machine that this runs on, and on a disk one measures
    its journal."""
    place = Path(tempfile.mkdtemp(prefix="imageapi-bench-", dir="/run"))
    try:
        mount("imageapi-bench", str(place), "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
        yield place
    finally:
        _unmount(str(place))
        place.rmdir()


def _unmount(place: str) -> None:
    """The kernel may still be about the last of what was in it: namespaces that end, devices that are let go.

    Raises: OSError, when it is in use for longer than that takes.
    """
    deadline = time.monotonic() + LET_GO
    while True:
        try:
            umount(place)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _make(lab: Lab) -> None:
    tree = lab.directory("tree")
    for name in DIRECTORIES:
        (tree / name).mkdir(parents=True)
    for name in ON_THE_HOST:
        _compile(name, lab.place / name)
    for name in IN_THE_IMAGE:
        _compile(name, tree / "bin" / name, *BARE)
    subprocess.run(["mksquashfs", str(tree), str(lab.image), "-quiet", "-no-progress"], check=True)


def _compile(name: str, program: Path, *flags: str) -> None:
    source = str(SOURCES / f"{name}.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(program), source], check=True)
