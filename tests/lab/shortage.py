"""A server on a host that runs out of something, at any call: `python -m lab.shortage` is `imageapi-server` with a
hook before each call that takes a resource, of which there may be none left from one call on, until there is again.

Zygote, workers, supervisor and the containers' first processes are forked from it, and have the hooks too: a page of
memory that all of them share says which call is the first to fail. Nothing of it is in the product.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import select
import socket
import stat
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "IMAGEAPI_TEST_SHORTAGE"
"""Where the shared page is."""
_STATE = struct.Struct("=iii")
"""The errno of what has run out, or 0; how many calls still succeed; how many have failed."""


class Shortage:
    """The test's side of the shared page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(mmap.PAGESIZE))
        self._memory = _map(path)

    def begin(self, number: int, after: int) -> None:
        """Have every call fail with this errno, but for the first `after` of those that could."""
        _STATE.pack_into(self._memory, 0, number, after, 0)

    def end(self) -> int:
        """There is enough again; how many calls have failed meanwhile."""
        failed: int = _STATE.unpack_from(self._memory)[2]
        _STATE.pack_into(self._memory, 0, 0, 0, 0)
        return failed

    def close(self) -> None:
        """The page is not needed any more."""
        self._memory.close()


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), mmap.PAGESIZE)


# ------------------------------------------------------------------------------------------------ in the processes


class _Hook:
    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def lacks(self, *numbers: int) -> int:
        """The errno that a call now fails with which fails for these; 0 when it does not."""
        number, left, failed = _STATE.unpack_from(self._memory)
        if number not in numbers:
            return 0
        if left > 0:
            _STATE.pack_into(self._memory, 0, number, left - 1, failed)
            return 0
        _STATE.pack_into(self._memory, 0, number, 0, failed + 1)
        return int(number)

    def before(self, function: Callable[..., Any], *numbers: int) -> Callable[..., Any]:
        """The function, which fails for these errnos when they are due."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if number := self.lacks(*numbers):
                raise OSError(number, os.strerror(number))
            return function(*arguments, **named)

        return wrapped

    def in_c(self, function: Any, *numbers: int) -> Callable[..., int]:
        """The same for a function of the C library."""

        def wrapped(*arguments: Any) -> int:
            if number := self.lacks(*numbers):
                ctypes.set_errno(number)
                return -1
            return int(function(*arguments))

        return wrapped


def install(hook: _Hook) -> None:
    """Put the hooks in. To be called before anything of the server's is imported."""
    for name in ("mkdir", "mkfifo", "mknod"):
        setattr(os, name, hook.before(getattr(os, name), errno.ENOMEM, errno.EROFS))
    for name in ("rmdir", "unlink", "rename"):
        setattr(os, name, hook.before(getattr(os, name), errno.EROFS))
    os.fork = hook.before(os.fork, errno.ENOMEM, errno.EAGAIN)
    os.memfd_create = hook.before(os.memfd_create, errno.EMFILE, errno.ENOMEM)
    socket.socketpair = hook.before(socket.socketpair, errno.EMFILE, errno.ENOMEM)
    socket.send_fds = hook.before(socket.send_fds, errno.ENOMEM)
    socket.socket.accept = hook.before(socket.socket.accept, errno.EMFILE)  # type: ignore[method-assign]
    os.open = _opening(hook, os.open)
    _hook_kernel(hook)


class _Epoll:
    """The supervisor's epoll(7), which may have no memory to watch another descriptor."""

    def __init__(self, hook: _Hook) -> None:
        real = select.epoll()
        self.register = hook.before(real.register, errno.ENOMEM)
        self.unregister, self.poll, self.fileno, self.close = real.unregister, real.poll, real.fileno, real.close


def _opening(hook: _Hook, opened: Callable[..., int]) -> Callable[..., int]:
    """A file that is to be written cannot be on a read-only file system; a pipe and a device can."""

    def wrapped(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        kinds = [errno.EMFILE, errno.ENOMEM]
        if flags & (os.O_WRONLY | os.O_RDWR) and _is_file(path, dir_fd):
            kinds.append(errno.EROFS)
        if number := hook.lacks(*kinds):
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, mode, dir_fd=dir_fd)

    return wrapped


def _is_file(path: Any, directory: int | None) -> bool:
    try:
        return stat.S_ISREG(os.stat(path, dir_fd=directory).st_mode)
    except OSError:
        return True


def _hook_kernel(hook: _Hook) -> None:
    from imageapi.linux import libc

    libc.libc.mount = hook.in_c(libc.libc.mount, errno.ENOMEM)  # type: ignore[attr-defined]
    called = libc.libc.syscall

    def syscall(number: Any, *arguments: Any) -> int:
        if number.value in (libc.SYS_open_tree, libc.SYS_pidfd_open, libc.SYS_openat2):
            return hook.in_c(called, errno.EMFILE, errno.ENOMEM)(number, *arguments)
        return int(called(number, *arguments))

    libc.libc.syscall = syscall  # type: ignore[attr-defined]
    from imageapi.linux import namespaces
    from imageapi.runtime import loop

    loop.select = types.SimpleNamespace(epoll=lambda: _Epoll(hook), EPOLLIN=select.EPOLLIN)  # type: ignore[assignment,attr-defined]

    library: Any = namespaces._pylibc
    library.syscall = hook.in_c(library.syscall, errno.EAGAIN, errno.ENOMEM)


def main() -> None:
    install(_Hook(_map(Path(os.environ[VARIABLE]))))
    from imageapi import server

    sys.exit(server.main())


if __name__ == "__main__":
    main()
