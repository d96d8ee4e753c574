"""The log file of a container: what the service says of it, and what the container says itself.

A line of the service's reads `2021/02/11 00:08:34 container(0): container created`, in the host's local time. Where
the time zone's file is out of sight, time.localtime() must have been called before it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable

from imageapi.linux import whole

MODE = 0o640
OLDER = ".1"
"""What is added to the name of a log that has grown too large, in place of the last one of that name."""
FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def lines(who: str, texts: Iterable[str]) -> bytes:
    """Lines as of now; a line break in a text becomes a space."""
    stamp = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime())
    told = [f"{stamp} {who}: {' '.join(text.splitlines())}\n" for text in texts]
    return "".join(told).encode("utf-8", "replace")


def open_log(path: str, directory: int | None = None) -> int:
    """The log for appending; it is made when it is not there."""
    return os.open(path, FLAGS, MODE, dir_fd=directory)


def append(path: str, who: str, *texts: str) -> None:
    """Write lines. `who` is `container(<id>)` or `init`. Raises: OSError."""
    log = open_log(path)
    try:
        os.write(log, lines(who, texts))
    finally:
        os.close(log)


def append_last(path: str, who: str, text: str) -> None:
    """Write a line, unless it is the log's last one already. Raises: OSError."""
    log = os.open(path, FLAGS & ~os.O_WRONLY | os.O_RDWR, MODE)
    try:
        end = f" {who}: {text}\n".encode()
        if os.pread(log, len(end), max(0, os.fstat(log).st_size - len(end))) != end:
            os.write(log, lines(who, [text]))
    finally:
        os.close(log)


class Log:
    """A log for one that has something else to do than to write it: what it does not take is lost, and `trouble` is
    the errno for that, or 0."""

    def __init__(self, path: str, directory: int) -> None:
        self.trouble = 0
        self._file = -1
        try:
            self._file = open_log(path, directory)
        except OSError as error:
            self.trouble = error.errno or errno.EIO

    def write(self, data: bytes) -> None:
        if self._file < 0:
            return
        try:
            whole.write_all(self._file, data)
        except OSError as error:
            self.trouble = error.errno or errno.EIO


class Writer:
    """A log for one that does a step after the other: lines are kept until `flush`, and written together."""

    def __init__(self, log: Log, who: str) -> None:
        self._log = log
        self._who = who
        self._texts: list[str] = []

    def add(self, *texts: str) -> None:
        self._texts += texts

    def flush(self) -> None:
        if self._texts:
            self._log.write(lines(self._who, self._texts))
            self._texts.clear()


def remove(path: str) -> None:
    """Remove a log, and its older part; one that is gone is no error."""
    for name in (path, path + OLDER):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
