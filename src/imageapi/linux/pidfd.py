"""Processes by descriptor (pidfd_open(2)), and what /proc says of one (proc_pid_stat(5), proc_pid_status(5)).

A pid is reused; a process is its pid with its start time, or the inode of its pidfd where the kernel has one for each
(6.9). From 6.15 on a pidfd tells how its process ended, to anybody, once it has been reaped; and it can be parked: it
is then a mount, which outlives every process that had the descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import signal
import sys
from typing import NamedTuple

from imageapi.linux.libc import AT_EMPTY_PATH, AT_FDCWD, SYS_rt_sigtimedwait
from imageapi.linux.mount import MOVE_MOUNT_F_EMPTY_PATH, OPEN_TREE_CLOEXEC, OPEN_TREE_CLONE, move_mount, open_tree

PIDFD_INFO_EXIT = 1 << 3


class _PidfdInfo(ctypes.Structure):
    """struct pidfd_info as first published (64 bytes); see linux/pidfd.h."""

    _fields_ = (
        ("mask", ctypes.c_uint64),
        ("cgroupid", ctypes.c_uint64),
        ("identities", ctypes.c_uint32 * 11),
        ("exit_code", ctypes.c_int32),
    )


PIDFD_GET_INFO = 3 << 30 | ctypes.sizeof(_PidfdInfo) << 16 | 0xFF << 8 | 11
"""_IOWR(0xFF, 11, struct pidfd_info)."""


def pidfd_open(pid: int) -> int:
    """A descriptor of the process. Raises: ProcessLookupError, also where the number is that of a thread only, for
    which the kernel says ENOENT, and an older one EINVAL."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        raise


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal. Raises: ProcessLookupError when the process has been reaped."""
    signal.pidfd_send_signal(pidfd, number)


PF_FORKNOEXEC = 0x40
"""<linux/sched.h>: the process has not executed a program since it was cloned."""


class Stat(NamedTuple):
    """A process as /proc shows it: its first thread's state, one letter; the kernel's flags for it; how many threads it
    has; when it began, in clock ticks since the boot; and its wait status, if it has ended."""

    state: str
    flags: int
    threads: int
    began: int
    status: int

    @property
    def ended(self) -> bool:
        """Whether it has; nobody may have reaped it yet (a zombie). One whose first thread alone has ended goes on."""
        return self.state in "ZX" and self.threads <= 1


def look(pid: int) -> Stat | None:
    """The process `pid`; None when there is none. The status reads 0 where this process may not know it (see
    `zombie_status`)."""
    try:
        line = _read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = line[line.rindex(b")") + 2 :].split()  # the name before it may hold anything
    return Stat(fields[0].decode(), int(fields[6]), int(fields[17]), int(fields[19]), int(fields[49]))


def has_executed(pid: int) -> bool:
    """Whether a child that has executed a program or ended, and was not reaped, did execute one. One that lives has a
    program that the kernel can name, which is the quicker question; one that has ended is known by its flags."""
    try:
        os.readlink(f"/proc/{pid}/exe")
    except OSError:
        found = look(pid)
        return found is not None and not found.flags & PF_FORKNOEXEC
    return True


def start_time(pid: int) -> int | None:
    """When the process began, in clock ticks since the boot; None when it has ended (a zombie has, too)."""
    found = look(pid)
    return None if found is None or found.ended else found.began


def zombie_status(pid: int, began: int) -> int | None:
    """The wait status (wait(2)) of the process that began then, has ended, and has not been reaped by its parent yet;
    None when it is not there, and where the kernel does not let us know: it does so for whom it lets look at the
    process's namespaces, and says 0 to others (proc_pid_stat(5), exit_code)."""
    try:
        os.readlink(f"/proc/{pid}/ns/user")
    except OSError:
        return None
    found = look(pid)
    return found.status if found is not None and found.ended and found.began == began else None


def _read(path: str) -> bytes:
    """A short file of /proc, without what open() asks besides."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 1024)
    finally:
        os.close(file)


def exit_info(pidfd: int) -> int | None:
    """The wait status (wait(2)) of a process that has ended and been reaped, by whomever; None before that, and where
    the kernel does not keep it (older than 6.15)."""
    info = _PidfdInfo(mask=PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOTTY):
            return None
        raise
    return info.exit_code if info.mask & PIDFD_INFO_EXIT else None


def is_child(pidfd: int) -> bool:
    """Whether the process is a child of ours that nobody has waited for yet, be it alive or not."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def inode(pidfd: int) -> int | None:
    """What is the process's own until the next boot; None where all pidfds share one inode (older than 6.9)."""
    status = os.fstat(pidfd)
    return None if status.st_dev == _anonymous_device() else status.st_ino


def is_pidfd(descriptor: int) -> bool:
    """Whether a descriptor that was opened by path is a pidfd, and no file in its place."""
    try:
        signal.pidfd_send_signal(descriptor, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return True


@functools.cache
def _anonymous_device() -> int:
    """The device of descriptors that have no inode of their own; before 6.9 pidfds were among them."""
    descriptor = os.eventfd(0)
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)


def park(pidfd: int, path: str) -> None:
    """Mount the process's pidfd on the file `path`: opened later, it is the pidfd again.

    Raises: OSError(EINVAL) where the kernel cannot (older than 6.15).
    """
    tree = open_tree(pidfd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH)
    try:
        move_mount(tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal, or blocks it in some thread so as to fetch it, or is just
    waiting to fetch it (sigwait(3)); False once it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = [f"/proc/{pid}/task/{thread}" for thread in os.listdir(f"/proc/{pid}/task")]
        return any(_takes(thread, number) or _awaits(thread, number) for thread in threads)
    return False


def _takes(thread: str, number: int) -> bool:
    with open(f"{thread}/status", "rb") as file:
        fields = dict(line.split(b":", 1) for line in file)
    return _has(int(fields[b"SigBlk"], 16) | int(fields[b"SigCgt"], 16), number)


def _awaits(thread: str, number: int) -> bool:
    """Whether the thread is within rt_sigtimedwait(2), which takes what it waits for out of SigBlk for the time.
    Not every kernel lets us know, nor every memory (one on a storage that fails is EIO)."""
    with contextlib.suppress(OSError), open(f"{thread}/syscall") as file:
        call, _, arguments = file.read().partition(" ")
        if call == str(SYS_rt_sigtimedwait):
            with open(f"{thread}/mem", "rb", buffering=0) as memory:
                memory.seek(int(arguments.split()[0], 16))
                return _has(int.from_bytes(memory.read(8), sys.byteorder), number)
    return False


def _has(signals: int, number: int) -> bool:
    return bool(signals >> (number - 1) & 1)
