"""mount(2) and the calls of the newer mount API that say more or build a tree before it has a place.

mount(2) is the faster way and makes every ordinary mount here. The newer API explains a refusal (`explain`), and
works on a tree that nobody can see yet (`open_tree`, `mount_setattr`, then `move_mount`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from imageapi.linux import ceilings
from imageapi.linux.libc import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    Explained,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fsopen,
    SYS_mount_setattr,
    SYS_move_mount,
    SYS_open_tree,
    SYS_pivot_root,
    check,
    encode,
    libc,
    syscall,
)

MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_SYNCHRONOUS = 1 << 4
MS_REMOUNT = 1 << 5
MS_DIRSYNC = 1 << 7
MS_NOSYMFOLLOW = 1 << 8
MS_NOATIME = 1 << 10
MS_NODIRATIME = 1 << 11
MS_BIND = 1 << 12
MS_MOVE = 1 << 13
MS_REC = 1 << 14
MS_SILENT = 1 << 15
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_I_VERSION = 1 << 23
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_SYMLINKS = 0x10
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None) -> None:
    """mount(2). `data` is the file system's own options, joined by commas, less than one page.

    Raises: OSError about the target, `filename2` the source; E2BIG for options that the kernel would cut off without a
    word; Explained at the ceiling of mounts.
    """
    options = encode(data)
    if options is not None and len(options) >= os.sysconf("SC_PAGE_SIZE"):
        raise OSError(errno.E2BIG, "the mount options have a page or more", target, None, source)
    result = libc.mount(encode(source), encode(target), encode(fstype), flags, options)
    try:
        check(result, target, source)
    except OSError as error:
        if error.errno == errno.ENOSPC and ceilings.mounts_are_full():
            raise ceilings.reached(error, "fs.mount-max") from error
        raise


def umount(target: str, flags: int = 0) -> None:
    """umount2(2) of the topmost mount at `target`, whoever made it.

    Raises: OSError; EBUSY while something in this mount namespace uses it.
    """
    check(libc.umount2(encode(target), flags), target)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2); `pivot_root(".", ".")` stacks the old root on the new one, for a umount to take away."""
    syscall(SYS_pivot_root, encode(new), encode(old), names=(new, old))


# ----------------------------------------------------------------------------------------------------- trees


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """open_tree(2): a descriptor of the mount at `path`; with OPEN_TREE_CLONE of a detached copy, which keeps its
    superblock busy until the descriptor is closed."""
    return syscall(SYS_open_tree, dirfd, encode(path), flags, names=(path,))


def move_mount(from_fd: int, from_path: str, to_fd: int, to_path: str, flags: int) -> None:
    """move_mount(2): put a tree where it is to be seen."""
    syscall(SYS_move_mount, from_fd, encode(from_path), to_fd, encode(to_path), flags, names=(to_path, from_path))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(
    fd: int, path: str, *, set: int = 0, clear: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """mount_setattr(2) (5.12): MOUNT_ATTR_* to set and clear, and MS_PRIVATE and its like as propagation, on the
    mount at `path`, or on `fd` itself when that is empty; all below it too when `recursive`, or none at all."""
    attributes = _MountAttr(set, clear, propagation, 0)
    flags = (AT_RECURSIVE if recursive else 0) | (0 if path else AT_EMPTY_PATH)
    size = ctypes.sizeof(attributes)
    syscall(SYS_mount_setattr, fd, encode(path), flags, attributes, size, names=(path or None,))


# ------------------------------------------------------------------------------------------- a mount in steps


def fsopen(fstype: str) -> int:
    """fsopen(2): the context of a file system to be made. Raises: OSError(ENODEV) for a type the kernel lacks."""
    return syscall(SYS_fsopen, encode(fstype), FSOPEN_CLOEXEC, names=(fstype,))


def fsconfig(fd: int, command: int, key: str | None = None, value: str | None = None) -> None:
    """fsconfig(2). Raises: Explained about the key, with what the kernel logged for it, if anything."""
    try:
        syscall(SYS_fsconfig, fd, command, encode(key), encode(value), 0, names=(key,))
    except OSError as error:
        explained = Explained(error.errno, error.strerror, key)
        explained.detail = "; ".join(_log(fd))
        raise explained from None


def fsmount(fd: int, attributes: int = 0) -> int:
    """fsmount(2): the detached mount of a context that was created, with MOUNT_ATTR_* `attributes`."""
    return syscall(SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes)


def _log(fd: int) -> Iterator[str]:
    """The messages waiting in a context, without their class letter ("e ", "w ", "i ")."""
    with contextlib.suppress(OSError):  # ENODATA: there is no more
        while line := os.read(fd, 8192):
            yield line.decode("utf-8", "replace")[2:].strip()


def configure(fd: int, source: str | None, options: Iterable[tuple[str, str | None]]) -> None:
    """Give a context its source and options (None: a flag) and create the file system, which may sleep on storage.

    Raises: Explained; its filename is the option refused, or None when that was the whole.
    """
    if source is not None:
        fsconfig(fd, FSCONFIG_SET_STRING, "source", source)
    for key, value in options:
        fsconfig(fd, FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING, key, value)
    fsconfig(fd, FSCONFIG_CMD_CREATE)


def explain(fstype: str, source: str | None, options: Mapping[str, str | None]) -> str:
    """Why the kernel refuses such a mount: what it logs when the same is tried in steps, else the option it stopped
    at; "" when it has nothing to say or would do it. Nothing is left mounted."""
    try:
        fd = fsopen(fstype)
    except OSError as error:
        return f"the kernel has no file system {fstype}" if error.errno == errno.ENODEV else ""
    try:
        configure(fd, source, options.items())
    except Explained as error:
        return error.detail or (f"it refuses the option {error.filename}" if error.filename else "")
    finally:
        os.close(fd)
    return ""


# --------------------------------------------------------------------------------------------------- options

_ATIME = MS_NOATIME | MS_RELATIME | MS_STRICTATIME

FLAGS: dict[str, tuple[int, int]] = {
    "ro": (MS_RDONLY, 0),
    "rw": (0, MS_RDONLY),
    "nosuid": (MS_NOSUID, 0),
    "suid": (0, MS_NOSUID),
    "nodev": (MS_NODEV, 0),
    "dev": (0, MS_NODEV),
    "noexec": (MS_NOEXEC, 0),
    "exec": (0, MS_NOEXEC),
    "sync": (MS_SYNCHRONOUS, 0),
    "async": (0, MS_SYNCHRONOUS),
    "dirsync": (MS_DIRSYNC, 0),
    "nosymfollow": (MS_NOSYMFOLLOW, 0),
    "symfollow": (0, MS_NOSYMFOLLOW),
    "noatime": (MS_NOATIME, _ATIME),
    "atime": (0, MS_NOATIME),
    "relatime": (MS_RELATIME, _ATIME),
    "norelatime": (0, MS_RELATIME),
    "strictatime": (MS_STRICTATIME, _ATIME),
    "nostrictatime": (0, MS_STRICTATIME),
    "nodiratime": (MS_NODIRATIME, 0),
    "diratime": (0, MS_NODIRATIME),
    "lazytime": (MS_LAZYTIME, 0),
    "nolazytime": (0, MS_LAZYTIME),
    "iversion": (MS_I_VERSION, 0),
    "noiversion": (0, MS_I_VERSION),
    "silent": (MS_SILENT, 0),
    "loud": (0, MS_SILENT),
}
"""mount(8), "FILESYSTEM-INDEPENDENT MOUNT OPTIONS": the flags that each sets and clears."""

_FOR_FSTAB = frozenset({"defaults", "auto", "noauto", "nofail", "_netdev"})
"""Options that speak to the readers of fstab(5), and never reach the kernel."""


def split_options(options: Sequence[str]) -> tuple[int, list[str]]:
    """The MS_ flags in mount options, later ones winning, and the rest, which is the file system's own data.
    An item may hold several, with commas between them; a comma in double quotes divides nothing."""
    flags, data = 0, []
    for option in (part for item in options for part in at_commas(item)):
        if option in FLAGS:
            add, remove = FLAGS[option]
            flags = flags & ~remove | add
        elif option not in _FOR_FSTAB and not option.startswith("x-"):
            data.append(option)
    return flags, data


def at_commas(text: str) -> Iterator[str]:
    """The single options in one item."""
    start, quoted = 0, False
    for at, letter in enumerate(f"{text},"):
        if letter == '"':
            quoted = not quoted
        elif letter == "," and (not quoted or at == len(text)):
            if text[start:at].strip():
                yield text[start:at].strip()
            start = at + 1
