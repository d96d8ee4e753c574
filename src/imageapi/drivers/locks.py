"""Locks that several processes share: flock(2), which the kernel frees with the last descriptor of what was opened."""

from __future__ import annotations

import contextlib
import fcntl
import os

from imageapi.drivers.deadline import Deadline


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
