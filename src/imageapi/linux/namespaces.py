"""clone3(2), unshare(2), setns(2), sethostname(2).

All of these act on the calling thread: they are for processes with a single one.
"""

from __future__ import annotations

import ctypes
import os
import signal

from imageapi.linux.libc import SYS_clone3, check, libc

CLONE_VM = 0x00000100
CLONE_PIDFD = 0x00001000
CLONE_VFORK = 0x00004000
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_PARENT_SETTID = 0x00100000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_INTO_CGROUP = 0x200000000


class _CloneArgs(ctypes.Structure):
    """struct clone_args, version 2 (5.7)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    )


_pylibc = ctypes.PyDLL(None, use_errno=True)
"""Calls through it keep the GIL, so that the child has it and can go on running Python."""
_pylibc.syscall.restype = ctypes.c_long


def clone(flags: int, cgroup_fd: int | None = None, note_at: int | None = None) -> tuple[int, int]:
    """clone3(2) like fork(2), in new namespaces, born in the cgroup2 group `cgroup_fd`: (pid, pidfd), in the child
    (0, -1). With CLONE_PARENT the child ends for its new parent as the caller does for its own. The kernel writes the
    pid as a C int to the address `note_at`, too, before the child runs.

    No atfork handler runs. The child may call os.* and the functions of this package until it executes or ends.
    """
    pidfd = ctypes.c_int(-1)
    exit_signal = 0 if flags & CLONE_PARENT else signal.SIGCHLD
    arguments = _CloneArgs(flags=flags | CLONE_PIDFD, pidfd=ctypes.addressof(pidfd), exit_signal=exit_signal)
    if cgroup_fd is not None:
        arguments.flags |= CLONE_INTO_CGROUP
        arguments.cgroup = cgroup_fd
    if note_at is not None:
        arguments.flags |= CLONE_PARENT_SETTID
        arguments.parent_tid = note_at
    size = ctypes.c_size_t(ctypes.sizeof(arguments))
    pid = check(_pylibc.syscall(ctypes.c_long(SYS_clone3), ctypes.byref(arguments), size))
    return (pid, pidfd.value) if pid else (0, -1)


def unshare(flags: int) -> None:
    """Leave the namespaces `flags` for new ones."""
    check(libc.unshare(flags))


def setns(fd: int, flags: int) -> None:
    """Enter the namespace `fd` of the kind `flags`; a mount namespace's root becomes root and working directory.

    Raises: OSError(EINVAL) when `fd` is no such namespace.
    """
    check(libc.setns(fd, flags))


def sethostname(name: str) -> None:
    """The host name in this UTS namespace."""
    encoded = os.fsencode(name)
    check(libc.sethostname(encoded, len(encoded)), name)
