"""A mount by its number, which no other mount of this boot ever has: statmount(2) and listmount(2) (Linux 6.8).

Asking for one costs the same on a host with a thousand mounts, where /proc/self/mountinfo must be read whole. Like that
file, and unlike stat(2), it never touches the file system.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

from imageapi.linux.libc import (
    AT_FDCWD,
    AT_SYMLINK_NOFOLLOW,
    SYS_listmount,
    SYS_statmount,
    check,
    encode,
    libc,
    syscall,
)

AT_STATX_DONT_SYNC = 0x4000
"""Do not ask a server for what is looked at."""
OVERLAYFS_SUPER_MAGIC = 0x794C7630
"""<linux/magic.h>"""
STATX_MNT_ID_UNIQUE = 0x4000
STATX_ATTR_MOUNT_ROOT = 0x2000
STATMOUNT_SB_BASIC = 0x1
STATMOUNT_MNT_POINT = 0x10

_REQUEST = struct.Struct("=IIQQ")
"""struct mnt_id_req of <linux/mount.h>: its size, nothing, the mount, and what is asked (or the last one listed)."""
_STATMOUNT = struct.Struct("=IIQIIQ76xI")
"""struct statmount up to `mnt_point`: sizes, the mask, the device's two numbers, the magic number, and where the string
begins."""
_STRINGS = 512
_BUFFER = _STRINGS + 2 * 4096
_STATX = struct.Struct("=IIQ128xQ")
"""struct statx of <linux/stat.h> up to `stx_mnt_id`: the mask, the block size, the attributes."""


class Mount(NamedTuple):
    """`dev` is "major:minor" of the superblock, as in mountinfo; `magic` says of what type it is (statfs(2))."""

    dev: str
    mountpoint: str
    magic: int


def at(path: str) -> int | None:
    """The number of the topmost mount at exactly `path`; None when nothing is mounted there, or before Linux 6.8.

    Raises: OSError.
    """
    buffer = ctypes.create_string_buffer(256)
    flags = AT_SYMLINK_NOFOLLOW | AT_STATX_DONT_SYNC
    check(libc.statx(AT_FDCWD, encode(path), flags, STATX_MNT_ID_UNIQUE, buffer), path)
    mask, _, attributes, number = _STATX.unpack_from(buffer)
    known = mask & STATX_MNT_ID_UNIQUE and attributes & STATX_ATTR_MOUNT_ROOT
    return int(number) if known else None


def look(number: int) -> Mount | None:
    """The mount of this number; None when it is gone from this mount namespace, or before Linux 6.8.

    Raises: OSError.
    """
    request = _REQUEST.pack(_REQUEST.size, 0, number, STATMOUNT_SB_BASIC | STATMOUNT_MNT_POINT)
    buffer = ctypes.create_string_buffer(_BUFFER)
    try:
        syscall(SYS_statmount, request, ctypes.addressof(buffer), _BUFFER, 0)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOSYS):
            return None
        raise
    _, _, _, major, minor, magic, start = _STATMOUNT.unpack_from(buffer)
    return Mount(f"{major}:{minor}", os.fsdecode(buffer.raw[_STRINGS + start :].split(b"\0", 1)[0]), magic)


def bears_others(number: int) -> bool:
    """Whether anything is mounted on the mount of this number, or inside it. Raises: OSError."""
    request = _REQUEST.pack(_REQUEST.size, 0, number, 0)
    found = ctypes.create_string_buffer(8)
    return syscall(SYS_listmount, request, ctypes.addressof(found), 1, 0) > 0
