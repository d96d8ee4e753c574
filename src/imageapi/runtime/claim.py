"""What makes a process the supervisor of a site: a lock and a socket, each a file in the site's directory. Somebody may
remove them by hand; they are made again, so that no second supervisor begins beside this one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket

from imageapi.runtime import protocol

LOCK = "lock"


def lock(directory: int) -> int | None:
    """Take the site's lock; None where another has it. It is the process's own, over execve(2) as well, until that
    closes a descriptor of the file (fcntl(2), "Advisory record locking"): no child holds it on."""
    taken = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        fcntl.lockf(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(taken)
        return None
    return taken


def listen(directory: int) -> socket.socket:
    """The socket for servers, in place of a dead supervisor's; nobody is let in yet. Its path goes by the directory: it
    may be longer than a socket's address (unix(7), 108 bytes)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(protocol.SOCKET, dir_fd=directory)
    os.fchdir(directory)
    try:
        listener.bind(protocol.SOCKET)
    finally:
        os.chdir("/")
    return listener


def stands(directory: int, taken: int) -> bool:
    """Whether both files are there, and the lock's is the one that is `taken`."""
    try:
        os.stat(protocol.SOCKET, dir_fd=directory)
        return _is_at(directory, taken)
    except FileNotFoundError:
        return False


def renew(directory: int, taken: int) -> int | None:
    """The lock that is `taken`, or one that is taken in its place when its file was removed; None where another was
    quicker."""
    with contextlib.suppress(FileNotFoundError):
        if _is_at(directory, taken):
            return taken
    renewed = lock(directory)
    if renewed is not None:
        os.close(taken)
    return renewed


def _is_at(directory: int, taken: int) -> bool:
    return os.path.samestat(os.stat(LOCK, dir_fd=directory), os.fstat(taken))
