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
import errno
import os
import signal
import socket
import struct

from imageapi.linux import namespaces, pidfd, process

LENT = namespaces.CLONE_VM | namespaces.CLONE_VFORK | namespaces.CLONE_PARENT
NAME = "imageapi-memory"
_BORN = b"\n"
_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): the sender's pid, as the receiver's namespace numbers it, and more."""


def clone(flags: int, cgroup_fd: int | None, ours: socket.socket, theirs: socket.socket) -> tuple[int, int, int]:
    """namespaces.clone in memory that is lent: the child's pid and pidfd, and the lender's pidfd; in the child
    (0, -1, -1). `ours` and `theirs` are a pair, over which the child tells that it is there.

    Raises: OSError.
    """
    supervisor = os.getpid()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    lender_pid, lender = namespaces.clone(0)
    if lender_pid == 0:
        _lend(flags, cgroup_fd, supervisor, theirs)
        return 0, -1, -1
    with contextlib.ExitStack() as undo:
        undo.callback(end, lender)
        theirs.close()
        pid = _introduced(ours)
        with contextlib.suppress(ProcessLookupError):
            pidfd.send_signal(lender, signal.SIGQUIT)
        descriptor = pidfd.pidfd_open(pid)
        undo.pop_all()
    return pid, descriptor, lender


def _lend(flags: int, cgroup_fd: int | None, supervisor: int, theirs: socket.socket) -> None:
    """The lender's whole life. It is the child that returns."""
    try:
        process.die_with_parent(signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(0)
        process.name(NAME)
        process.forbid_dumps()
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        namespaces.clone(flags | LENT, cgroup_fd)
        theirs.send(_BORN)
    except OSError as error:
        with contextlib.suppress(OSError):
            theirs.send(b"%d" % (error.errno or errno.EIO))
        os._exit(1)


def _introduced(ours: socket.socket) -> int:
    """The pid of the child that says it is there: the kernel adds who it is that says so.

    Raises: OSError, when there is none, with the reason.
    """
    said, ancillary, _, _ = ours.recvmsg(16, socket.CMSG_SPACE(_CREDENTIALS.size))
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    if said == _BORN:
        pid: int = _CREDENTIALS.unpack(ancillary[0][2])[0]
        return pid
    number = int(said or errno.ECHILD)
    raise OSError(number, os.strerror(number))


def end(lender: int) -> None:
    """End a lender, if it has not ended by itself, and reap it; a child that has its memory keeps it."""
    with contextlib.suppress(ProcessLookupError):
        pidfd.send_signal(lender, signal.SIGKILL)
    os.waitid(os.P_PIDFD, lender, os.WEXITED)
    os.close(lender)
