"""openat2(2): open a path that may be hostile without leaving the directory it is meant to stay in."""

from __future__ import annotations

import ctypes
import errno
import os

from imageapi.linux.libc import SYS_openat2, encode, syscall

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_ATTEMPTS = 128
"""A rename or mount anywhere on the host while ".." is resolved answers EAGAIN: the kernel could not tell."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(dirfd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2), close-on-exec. Raises: OSError."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return syscall(SYS_openat2, dirfd, encode(path), how, ctypes.sizeof(how), names=(path,))
        except OSError as error:
            if error.errno != errno.EAGAIN or attempt == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def open_in_root(dirfd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as if `dirfd` were the root directory, whatever `..`, absolute paths or symlinks it goes through.

    Raises: OSError.
    """
    return openat2(dirfd, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS, mode)
