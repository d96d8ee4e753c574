"""The C library and the raw syscalls: ctypes prototypes are bound here, once, and nowhere else.

Every failure is an OSError with the path in `filename`; where the kernel said more, it has an attribute `detail`.
"""

from __future__ import annotations

import ctypes
import errno
import os

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# Syscalls newer than the table of each architecture was split share their number on x86_64 and aarch64.
SYS_open_tree = 428
SYS_move_mount = 429
SYS_fsopen = 430
SYS_fsconfig = 431
SYS_fsmount = 432
SYS_pidfd_open = 434
SYS_clone3 = 435
SYS_openat2 = 437
SYS_mount_setattr = 442
SYS_statmount = 457
SYS_listmount = 458
SYS_pivot_root = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, -1)
SYS_rt_sigaction = {"x86_64": 13, "aarch64": 134}.get(os.uname().machine, -1)
SYS_rt_sigtimedwait = {"x86_64": 128, "aarch64": 137}.get(os.uname().machine, -1)
SYS_ustat = {"x86_64": 136}.get(os.uname().machine, -1)
"""-1 elsewhere, which the kernel answers with ENOSYS."""

libc = ctypes.CDLL(None, use_errno=True)
"""For functions without a prototype below, each of which is looked for in all libraries when it is first called, and in
a forked process again; calls release the GIL."""

libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
libc.mount.restype = ctypes.c_int
libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
libc.umount2.restype = ctypes.c_int
libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
libc.sethostname.restype = ctypes.c_int
libc.unshare.argtypes = (ctypes.c_int,)
libc.unshare.restype = ctypes.c_int
libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
libc.setns.restype = ctypes.c_int
libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
libc.statx.restype = ctypes.c_int
libc.prctl.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
libc.prctl.restype = ctypes.c_int
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.restype = ctypes.c_int
libc.syscall.restype = ctypes.c_long


class Explained(OSError):
    """An OSError for which the kernel gave its reason in words: `detail`; or of which is known what has run out, and
    what to do: `remedy`."""

    detail: str = ""
    remedy: str = ""


def encode(text: str | None) -> bytes | None:
    """`text` as the kernel takes a path or a string; None is a null pointer.

    Raises: OSError(EINVAL) for one that holds a NUL, which C would end at.
    """
    if text is None:
        return None
    if "\0" in text:
        raise OSError(errno.EINVAL, "a string for the kernel holds a NUL byte", text)
    return os.fsencode(text)


def check(result: int, *names: str | None) -> int:
    """`result`, the answer of a libc function, unless it is -1. `names` are the one or two paths it was about.

    Raises: OSError.
    """
    if result == -1:
        number = ctypes.get_errno()
        first, second = (*names, None, None)[:2]
        raise OSError(number, os.strerror(number), first, None, second)
    return result


def syscall(number: int, *arguments: int | bytes | ctypes.Structure | None, names: tuple[str | None, ...] = ()) -> int:
    """Syscall `number`. Integers go as 64 bits, bytes and structures as their address, None as a null pointer.

    Raises: OSError about `names`.
    """
    return check(libc.syscall(ctypes.c_long(number), *map(_register, arguments)), *names)


def _register(value: int | bytes | ctypes.Structure | None) -> object:
    """`value` as a variadic argument: ctypes would pass a plain int as 32 bits and leave the upper half to chance."""
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if value is None or isinstance(value, bytes):
        return ctypes.c_char_p(value)
    return ctypes.c_ulong(value)
