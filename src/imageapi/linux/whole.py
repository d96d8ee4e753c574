"""Small files that are only ever read whole: a writer that is killed at any instruction leaves one old or new.

A page is copied by the kernel in one step, which SIGKILL does not divide: what fits one is written in place. That takes
no new inode, which some file systems give slowly. What is larger is written beside it and renamed. Nothing is synced.
"""

from __future__ import annotations

import os

PAGE = 4096
"""Bytes, the smallest that a page has anywhere."""
BESIDE = ".new"
"""What is added to the name of a file that is still being written."""
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC


def write(path: str, data: bytes, directory: int | None = None) -> None:
    """Have `data` in the file, then blanks up to its former size; `path` is relative to `directory`, a descriptor. A
    file that is empty was begun, and not written.

    Raises: OSError.
    """
    descriptor = os.open(path, _WRITE, 0o600, dir_fd=directory)
    try:
        size = os.fstat(descriptor).st_size
        if max(size, len(data)) <= PAGE:
            write_all(descriptor, data.ljust(size))
            return
    finally:
        os.close(descriptor)
    _replace(path, data, directory)


def _replace(path: str, data: bytes, directory: int | None) -> None:
    descriptor = os.open(path + BESIDE, _WRITE | os.O_TRUNC, 0o600, dir_fd=directory)
    try:
        write_all(descriptor, data)
    except OSError:
        os.unlink(path + BESIDE, dir_fd=directory)
        raise
    finally:
        os.close(descriptor)
    os.rename(path + BESIDE, path, src_dir_fd=directory, dst_dir_fd=directory)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All of `data`; a file system that fills up takes a part of it first, and then says why."""
    while data:
        data = data[os.write(descriptor, data) :]
