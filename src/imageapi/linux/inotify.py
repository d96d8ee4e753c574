"""Changes of files and directories, told by the kernel: inotify(7).

An instance may be shared: a process that was forked from its owner adds watches, and the owner reads.
"""

from __future__ import annotations

import contextlib
import os

from imageapi.linux.libc import check, encode, libc

IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_DONT_FOLLOW = 0x0200_0000

ENTRIES = IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF
"""What happens to the names in a directory, and to the directory itself."""
FILE = IN_MODIFY | IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF
"""What happens to a file's content and size, its names (the number of its links is an attribute), and its times."""
_CHUNK = 1 << 16


def create() -> int:
    """A new instance, which does not block. Raises: OSError (EMFILE, where a user has too many)."""
    return check(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")


def add(instance: int, path: str, mask: int) -> int:
    """Watch what is at `path`; the watch's number, the same for the same file. It looks the path up, and may wait where
    that does. Raises: OSError."""
    return check(libc.inotify_add_watch(instance, encode(path), mask), path)


def remove(instance: int, watch: int) -> None:
    """Watch it no more; one that has ended with its file is no error."""
    libc.inotify_rm_watch(instance, watch)


def drain(instance: int) -> None:
    """Take all that has been told, and forget it."""
    with contextlib.suppress(BlockingIOError):
        while os.read(instance, _CHUNK):
            pass
