"""What a container prints: a FIFO for each, copied into its log file.

The container holds the FIFO open for reading as well: it gets no SIGPIPE when the supervisor dies, waits when the
pipe is full, and the next supervisor goes on where the last one stopped. We hold it open for writing as well: there
is no end of file, however often the container closes its own.

Its mode tells the next supervisor whether a first process came to execute its command: until then the sticky bit is
set, which means nothing for a FIFO (inode(7)).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import termios
from collections.abc import Callable, Collection

from imageapi.linux import whole
from imageapi.runtime import logs

CHUNK = 64 << 10
"""A pipe's size by default (pipe(7)), in bytes: the most that one read of it gives."""
SUFFIX = ".out"
EXECUTED = 0o666
UNEXECUTED = EXECUTED | stat.S_ISVTX
"""The modes of a FIFO, before and after. In the container everybody may open it, as /dev/stdout; on the host its
directory is root's alone."""


def make(directory: int, name: str, mode: int = UNEXECUTED) -> int:
    """A new FIFO in the supervisor's directory, under a name that nothing had before (SUFFIX is added), and our end of
    it, which does not block."""
    os.mkfifo(name + SUFFIX, dir_fd=directory)
    end = reopen(directory, name)
    os.fchmod(end, mode)
    return end


def is_unexecuted(directory: int, name: str) -> bool:
    """Whether who prints into the FIFO has not executed its command."""
    with contextlib.suppress(FileNotFoundError):
        return bool(os.stat(name + SUFFIX, dir_fd=directory).st_mode & stat.S_ISVTX)
    return False


def reopen(directory: int, name: str) -> int:
    """Our end of a FIFO that is there. Raises: FileNotFoundError."""
    return os.open(name + SUFFIX, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)


def recover(pid: int, name: str) -> int | None:
    """Our end of a FIFO that somebody has removed, from the process that prints into it; None when that does not. It
    cannot be given a name again (linkat(2)): so the next supervisor finds it here, too."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            path = f"/proc/{pid}/fd/{number}"
            if os.readlink(path).endswith(f"/{name}{SUFFIX} (deleted)") and stat.S_ISFIFO(os.stat(path).st_mode):
                return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    return None


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


class Place:
    """Where the logs are: a descriptor of their directory; and how many bytes a log grows to before it is put aside
    as `<log>.1` (logs.OLDER), in place of the last one of that name. `renew` has the descriptor be of the directory
    that is there now, when somebody has removed the one that was."""

    def __init__(self, directory: int, limit: int, renew: Callable[[int], None]) -> None:
        self.directory = directory
        self.limit = limit
        self._renew = renew

    def open(self, name: str) -> int:
        """A log to be written at its end; not open for appending, which splice(2) refuses. Raises: OSError."""
        try:
            return self._open(name)
        except FileNotFoundError:
            self._renew(self.directory)
            return self._open(name)

    def renew_if_gone(self) -> bool:
        """Whether the directory was removed; it is another one then. Raises: OSError."""
        gone = os.fstat(self.directory).st_nlink == 0
        if gone:
            self._renew(self.directory)
        return gone

    def _open(self, name: str) -> int:
        log = os.open(name, logs.FLAGS & ~os.O_APPEND, logs.MODE, dir_fd=self.directory)
        os.lseek(log, 0, os.SEEK_END)
        return log


class Copier:
    """Moves what a container prints from `end`, our end of its FIFO, to its log.

    What the log does not take is lost, since a full disk must not stop the container: the log tells of it, as `who`,
    once it takes something again. `on_trouble` is called with the errno when that begins, and with 0 when it is over.
    `trouble` is what was told last; None when nobody knows that any more, so that the first copy tells in any case.
    """

    __slots__ = ("_full", "_logfile", "_lost", "_on_trouble", "_place", "_trouble", "_who", "end")

    def __init__(
        self,
        end: int,
        place: Place,
        logfile: str,
        who: str,
        on_trouble: Callable[[int], None],
        trouble: int | None,
    ) -> None:
        self.end = end
        self._place = place
        self._logfile = logfile
        self._who = who
        self._on_trouble = on_trouble
        self._trouble = trouble
        self._lost = 0
        self._full = False

    @property
    def trouble(self) -> int | None:
        """The errno for which the log does not take what is printed, or 0; None while that is not known."""
        return self._trouble

    def miss(self, trouble: int) -> None:
        """The log has not taken something already, for this errno."""
        self._trouble = trouble

    def copy(self) -> int:
        """Move what is there, one chunk at most, and say how many bytes that was. splice(2) takes from the pipe what it
        has written and nothing else: a supervisor that is killed over it neither loses nor repeats any."""
        try:
            moved = self._move()
        except BlockingIOError:
            return 0
        except OSError as error:
            return self._lose(error.errno or errno.EIO)
        self._say(0)
        return moved

    def drain(self) -> None:
        """Move all that is left of a container whose processes have ended, and no more: somebody else may have got hold
        of the pipe, and print for ever."""
        left = int.from_bytes(fcntl.ioctl(self.end, termios.FIONREAD, bytes(4)), sys.byteorder)
        while left > 0 and (moved := self.copy()):
            left -= moved
        with contextlib.suppress(OSError):
            self._make_room()

    def _move(self) -> int:
        """To the end of the log: nobody else writes while a container runs. Raises: BlockingIOError, when there is
        nothing; OSError of the log."""
        self._make_room()
        log = self._place.open(self._logfile)
        try:
            if self._lost:
                whole.write_all(log, self._told_loss())
                self._lost = 0
            moved = os.splice(self.end, log, CHUNK)
            self._full = os.fstat(log).st_size >= self._place.limit
        finally:
            os.close(log)
        return moved

    def _lose(self, trouble: int) -> int:
        lost = 0
        with contextlib.suppress(BlockingIOError):
            lost = len(os.read(self.end, CHUNK))
        self._lost += lost
        self._say(trouble)
        return lost

    def _told_loss(self) -> bytes:
        """What the log must say first."""
        why = os.strerror(self._trouble or 0)
        return logs.lines(self._who, [f"{self._lost} bytes that it printed here are lost: {why}"])

    def _say(self, trouble: int) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._on_trouble(trouble)

    def _make_room(self) -> None:
        """Put a full log aside. Raises: OSError, where that cannot be, and then it takes no more."""
        if self._full:
            directory = self._place.directory
            with contextlib.suppress(FileNotFoundError):  # somebody has removed it
                os.rename(self._logfile, self._logfile + logs.OLDER, src_dir_fd=directory, dst_dir_fd=directory)
            self._full = False
