"""Reading an image as a node does: through a loop device with direct I/O, so that the file system's own cache is the
only one, and each time mounted anew, so that this cache is empty."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from imageapi.linux import loop, mount

MARK = "bench-images"
_BUFFER = bytearray(1 << 20)
PIECES = 2000
PAGE = 4096
"""Bytes of a piece."""


def measure(image: Path, fs_type: str, mountpoint: Path) -> dict[str, float]:
    """One round: milliseconds for each way of reading the whole image, or pieces of it."""
    taken: dict[str, float] = {}
    with _mounted(image, fs_type, mountpoint):
        taken["list"], files = _timed(lambda: _files(mountpoint))
        taken["read"], _ = _timed(lambda: _read_all(files))
        taken["again"], _ = _timed(lambda: _read_all(files))
    with _mounted(image, fs_type, mountpoint):
        shuffled = _shuffled(files)
        taken["shuffled"], _ = _timed(lambda: _read_all(shuffled))
    with _mounted(image, fs_type, mountpoint):
        taken["pieces"], _ = _timed(lambda: _read_pieces(files))
    return taken


@contextlib.contextmanager
def _mounted(image: Path, fs_type: str, mountpoint: Path) -> Iterator[None]:
    """The image on a fresh loop device, none of it in memory."""
    file = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        device, _ = loop.attach(
            file, MARK, read_only=True, block_size=4096 if os.fstat(file).st_size % 4096 == 0 else 512
        )
    finally:
        os.close(file)
    try:
        mount.mount(device, str(mountpoint), fs_type, mount.MS_RDONLY, None)
        try:
            yield
        finally:
            mount.umount(str(mountpoint))
    finally:
        loop.detach(device)


Result = TypeVar("Result")


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """The milliseconds that it took, and what it returned."""
    begun = time.perf_counter_ns()
    result = work()
    return (time.perf_counter_ns() - begun) / 1e6, result


def _files(directory: Path) -> list[tuple[str, int]]:
    """Every regular file and its size: all directories and inodes are read."""
    found = []
    for path, _, names in os.walk(directory):
        for name in sorted(names):
            state = os.lstat(f"{path}/{name}")
            if stat.S_ISREG(state.st_mode):
                found.append((f"{path}/{name}", state.st_size))
    return found


def _shuffled(files: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The same in another order, always the same one."""
    return random.Random(1).sample(files, len(files))


def _read_all(files: list[tuple[str, int]]) -> None:
    for path, _ in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(_BUFFER):
                pass


def _read_pieces(files: list[tuple[str, int]]) -> None:
    """What a program does that is mapped and runs: a page here, a page there."""
    chance = random.Random(2)
    large = [each for each in files if each[1] > PAGE]
    piece = memoryview(_BUFFER)[:PAGE]
    for path, size in chance.choices(large, [size for _, size in large], k=PIECES):
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.seek(chance.randrange(size // PAGE) * PAGE)
            file.readinto(piece)
