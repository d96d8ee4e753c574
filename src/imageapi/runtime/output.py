"""What a container prints: a FIFO for each, copied into its log file.

The container holds the FIFO open for reading as well: it gets no SIGPIPE when the supervisor dies, waits when the
pipe is full, and the next supervisor goes on where the last one stopped. We hold it open for writing as well: there
is no end of file, however often the container closes its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection

from imageapi.runtime import logs

LIMIT = 16 << 20
"""A log that has grown to so many bytes becomes `<log>.1` (logs.OLDER)."""
CHUNK = 64 << 10
"""A pipe's size by default (pipe(7)), in bytes: the most that one read of it gives."""
SUFFIX = ".out"


def make(directory: int, name: str) -> int:
    """A new FIFO in the supervisor's directory, under a name that nothing had before (SUFFIX is added), and our end of
    it, which does not block.

    In the container everybody may open it, as /dev/stdout; on the host its directory is root's alone.
    """
    os.mkfifo(name + SUFFIX, dir_fd=directory)
    end = reopen(directory, name)
    os.fchmod(end, 0o666)
    return end


def reopen(directory: int, name: str) -> int:
    """Our end of a FIFO that is there. Raises: FileNotFoundError."""
    return os.open(name + SUFFIX, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)


def attach(directory: int, name: str) -> None:
    """Have this process print into the FIFO."""
    end = os.open(name + SUFFIX, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
    os.dup2(end, 1)
    os.dup2(end, 2)
    os.close(end)


def remove(directory: int, name: str) -> None:
    """Remove the FIFO; one that is gone is no error."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name + SUFFIX, dir_fd=directory)


def sweep(directory: int, known: Collection[str]) -> None:
    """Remove the FIFOs of all but those `known`: a supervisor that dies leaves that of its child in waiting, and of a
    life that it had not noted yet."""
    for file in os.listdir(directory):
        name = file.removesuffix(SUFFIX)
        if name != file and name not in known:
            remove(directory, name)


def copy(end: int, directory: int, logfile: str) -> bool:
    """Copy what is there, one chunk at most, to the log `logfile` in the logs directory; whether there was anything.

    A log that cannot be written loses the chunk: a full disk must not stop the container.
    """
    try:
        data = os.read(end, CHUNK)
    except BlockingIOError:
        return False
    with contextlib.suppress(OSError):
        _write(directory, logfile, data)
    return bool(data)


def drain(end: int, directory: int, logfile: str) -> None:
    """Copy all that is left of a container whose processes have ended."""
    while copy(end, directory, logfile):
        pass


def _write(directory: int, logfile: str, data: bytes) -> None:
    log = logs.open_log(logfile, directory)
    try:
        while data:
            data = data[os.write(log, data) :]
        full = os.fstat(log).st_size >= LIMIT
    finally:
        os.close(log)
    if full:
        os.rename(logfile, logfile + logs.OLDER, src_dir_fd=directory, dst_dir_fd=directory)
