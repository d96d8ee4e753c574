"""Locks that several processes share: of a whole file by flock(2), or of one of its bytes by fcntl(2). The kernel frees
both with the last descriptor of what was opened."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

from imageapi.drivers.deadline import Deadline

_FLOCK = struct.Struct("hhqqi0q")
"""struct flock of fcntl(2): type, whence, start, length, pid."""


def locked_directory(path: str, deadline: Deadline) -> int | None:
    """A descriptor of the directory `path`, which holds its lock; None when it was removed meanwhile.

    Raises: TimeoutError.
    """
    with contextlib.ExitStack() as undo:
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, directory)
            deadline.wait(lambda: try_lock(directory))
            if not os.path.samestat(os.fstat(directory), os.stat(path)):
                return None
        except FileNotFoundError:
            return None
        undo.pop_all()
        return directory


def try_lock(descriptor: int) -> bool:
    """Whether the lock could be had: nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share_byte(descriptor: int, number: int) -> None:
    """Lock the byte `number`, which need not be there, for whoever has what was opened: a child that was forked, too.

    Raises: OSError.
    """
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, number, 1, 0))


def others_share_byte(descriptor: int, number: int) -> bool:
    """Whether anybody else has locked it."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted))
    return bool(kind != fcntl.F_UNLCK)
