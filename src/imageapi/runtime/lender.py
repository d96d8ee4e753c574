"""A process that lends its memory to a child that is to execute a command.

An exec takes the memory of who executes apart, page by page, before it loads the program: half a millisecond for a
Python, and somebody waits for it. It only lets go of memory that another process has as well. So a child is not cloned
from the supervisor itself: a lender is, and the child is the lender's clone with CLONE_VM and CLONE_VFORK (clone(2)).
The lender sleeps in that call until the child has executed or ended, and takes the memory apart then, aside.

It must never run again, since the child has used its stack. A SIGQUIT is pending for it, which does not wake who sleeps
for a clone, as a SIGKILL does, and ends it before its next instruction; no core is dumped. It dies with the supervisor,
too. Whoever ends it earlier does no harm: the child has the memory alone then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
from typing import NamedTuple

from imageapi.linux import namespaces, pidfd, process

LENT = namespaces.CLONE_VM | namespaces.CLONE_VFORK | namespaces.CLONE_PARENT
NAME = "imageapi-memory"
_BORN = b"\n"
PATIENCE = 10.0
"""Seconds for a child to say that it is there."""


class Lender(NamedTuple):
    """One that is a child of ours still.

    The kernel wakes it where its child is in the middle of an exec, and it would go first there: so it is of the policy
    SCHED_IDLE (sched(7)) until that is over. On a busy host it would not end for long then.
    """

    pid: int
    pidfd: int

    def wait(self) -> None:
        """Let everybody go first."""
        self._schedule(os.SCHED_IDLE)

    def hurry(self) -> None:
        """Let it end like any other process."""
        self._schedule(os.SCHED_OTHER)

    def _schedule(self, policy: int) -> None:
        with contextlib.suppress(OSError):  # it may not be allowed, and costs time then
            os.sched_setscheduler(self.pid, policy, os.sched_param(0))

    def end(self) -> None:
        """End it, if it has not ended by itself, and reap it; a child that has its memory keeps it."""
        if os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG) is None:
            self.hurry()
            pidfd.send_signal(self.pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)


def clone(flags: int, cgroup_fd: int | None) -> tuple[int, int, Lender | None, socket.socket]:
    """namespaces.clone in memory that is lent: the child's pid and pidfd, the lender, and our end of a pair of which
    the child has the other, and nobody else; in the child (0, -1, None, its end).

    Raises: OSError.
    """
    supervisor = os.getpid()
    note = mmap.mmap(-1, mmap.PAGESIZE)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    with note, ours, theirs:
        lender = Lender(*namespaces.clone(0))
        if lender.pid == 0:
            return 0, -1, None, _lend(flags, cgroup_fd, supervisor, theirs, note)
        with contextlib.ExitStack() as undo:
            undo.callback(_end_unknown, note)
            undo.callback(lender.end)
            theirs.close()
            tie = _introduced(ours)
            with contextlib.suppress(ProcessLookupError):
                pidfd.send_signal(lender.pidfd, signal.SIGQUIT)
            lender.wait()
            pid = _noted(note)
            descriptor = pidfd.pidfd_open(pid)
            undo.pop_all()
    return pid, descriptor, lender, tie


def _lend(flags: int, cgroup_fd: int | None, supervisor: int, theirs: socket.socket, note: mmap.mmap) -> socket.socket:
    """The lender's whole life. It is the child that returns: whatever happens, neither goes on as the supervisor."""
    try:
        process.die_with_parent(signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(0)
        process.name(NAME)
        process.forbid_dumps()
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        namespaces.clone(flags | LENT, cgroup_fd, ctypes.addressof(ctypes.c_int.from_buffer(note)))
        tie, own_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with tie:
            socket.send_fds(theirs, [_BORN], [tie.fileno()])
    except BaseException as error:
        with contextlib.suppress(OSError):
            theirs.send(b"%d" % _number(error))
        os._exit(1)
    return own_end


def _number(error: BaseException) -> int:
    """The errno that says what has happened."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return (isinstance(error, OSError) and error.errno) or errno.EIO


def _introduced(ours: socket.socket) -> socket.socket:
    """The tie of the child that says it is there.

    Raises: OSError, when there is none, with the reason.
    """
    said, descriptors, _, _ = socket.recv_fds(ours, 16, 1, socket.MSG_CMSG_CLOEXEC)
    if said != _BORN:
        number = int(said or errno.ECHILD)
        raise OSError(number, os.strerror(number))
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptors[0])


def _noted(note: mmap.mmap) -> int:
    return ctypes.c_int.from_buffer_copy(note).value


def _end_unknown(note: mmap.mmap) -> None:
    """End and reap a child that has been cloned, and has not said so."""
    if pid := _noted(note):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
