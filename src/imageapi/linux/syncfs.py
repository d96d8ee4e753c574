"""syncfs(2)."""

from __future__ import annotations

import os

from imageapi.linux.libc import check, libc


def syncfs(path: str) -> None:
    """Write what the file system at `path` holds to its store, and wait until it is there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        check(libc.syncfs(descriptor), path)
    finally:
        os.close(descriptor)
