"""What makes a process the supervisor of a site: a lock and a socket, each a file in the site's directory. Somebody may
remove them by hand; they are made again, so that no second supervisor begins beside this one: a supervisor looks at
them when a server comes or goes, and at SIGHUP."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys

from imageapi.linux import mountinfo, pidfd
from imageapi.runtime import protocol

NAME = "imageapi-super"
"""What a supervisor's process is called."""
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


def recall(directory: int, mark: str) -> bool:
    """If a file is missing, and the supervisor lives whose keep has this mark, have it make its files again. Whether
    that is so."""
    files = os.listdir(directory)
    if LOCK in files and (protocol.SOCKET in files or _is_free(directory)):
        return False
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            if _is_supervisor(pid, mark):
                print(f"the supervisor, process {pid}, is asked to make its files again", file=sys.stderr, flush=True)
                os.kill(pid, signal.SIGHUP)
                return True
    return False


def _is_free(directory: int) -> bool:
    if (taken := lock(directory)) is not None:
        os.close(taken)
    return taken is not None


def _is_supervisor(pid: int, mark: str) -> bool:
    """One has its keep's file system as its root, and takes SIGHUP. Raises: OSError."""
    with open(f"/proc/{pid}/comm") as comm:
        if comm.read().strip() != NAME:
            return False
    roots = [mount for mount in mountinfo.read(pid, mark) if mount.mountpoint == "/" and mount.source == mark]
    return bool(roots) and pidfd.catches(pid, signal.SIGHUP)


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
