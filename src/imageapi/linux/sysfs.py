"""Attributes in sysfs: one read(2) or write(2) each (Documentation/filesystems/sysfs.rst)."""

from __future__ import annotations

import os


def read(path: str) -> str:
    """What the attribute says. Raises: OSError."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read().rstrip("\n")


def write(path: str, text: str) -> None:
    """Have the attribute take `text`, as a whole. Raises: OSError, which names the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)
