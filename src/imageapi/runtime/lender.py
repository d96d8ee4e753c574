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
_DESCRIPTOR = struct.Struct("i")


def clone(flags: int, cgroup_fd: int | None) -> tuple[int, int, int, socket.socket]:
    """namespaces.clone in memory that is lent: the child's pid and pidfd, the lender's pidfd, and our end of a pair of
    which the child has the other, and nobody else; in the child (0, -1, -1, its end).

    Raises: OSError.
    """
    supervisor = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with ours, theirs:
        lender_pid, lender = namespaces.clone(0)
        if lender_pid == 0:
            return 0, -1, -1, _lend(flags, cgroup_fd, supervisor, theirs)
        with contextlib.ExitStack() as undo:
            undo.callback(end, lender)
            theirs.close()
            pid, tie = _introduced(ours)
            with contextlib.suppress(ProcessLookupError):
                pidfd.send_signal(lender, signal.SIGQUIT)
            descriptor = pidfd.pidfd_open(pid)
            undo.pop_all()
    return pid, descriptor, lender, tie


def _lend(flags: int, cgroup_fd: int | None, supervisor: int, theirs: socket.socket) -> socket.socket:
    """The lender's whole life. It is the child that returns."""
    try:
        process.die_with_parent(signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(0)
        process.name(NAME)
        process.forbid_dumps()
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        namespaces.clone(flags | LENT, cgroup_fd)
        tie, own_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with tie:
            socket.send_fds(theirs, [_BORN], [tie.fileno()])
    except OSError as error:
        with contextlib.suppress(OSError):
            theirs.send(b"%d" % (error.errno or errno.EIO))
        os._exit(1)
    return own_end


def _introduced(ours: socket.socket) -> tuple[int, socket.socket]:
    """The pid of the child that says it is there, for which the kernel vouches, and its tie.

    Raises: OSError, when there is none, with the reason.
    """
    room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_DESCRIPTOR.size)
    said, ancillary, _, _ = ours.recvmsg(16, room, socket.MSG_CMSG_CLOEXEC)
    if said != _BORN:
        number = int(said or errno.ECHILD)
        raise OSError(number, os.strerror(number))
    came = {kind: data for _, kind, data in ancillary}
    (descriptor,) = _DESCRIPTOR.unpack(came[socket.SCM_RIGHTS])
    pid: int = _CREDENTIALS.unpack(came[socket.SCM_CREDENTIALS])[0]
    return pid, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptor)


def end(lender: int) -> None:
    """End a lender, if it has not ended by itself, and reap it; a child that has its memory keeps it."""
    with contextlib.suppress(ProcessLookupError):
        pidfd.send_signal(lender, signal.SIGKILL)
    os.waitid(os.P_PIDFD, lender, os.WEXITED)
    os.close(lender)
