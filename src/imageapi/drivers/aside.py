"""A system call that may hang, made in a child of its own, which can be killed.

Some of the kernel's waits for a store end for a fatal signal only, and such a signal ends the whole process: so who
wants to go on afterwards has the call made aside. While it is under way its name is taken, on a socket address that the
kernel frees when the last of the two processes is gone: whoever undoes what the call makes waits for that first.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from imageapi.errors import TimedOut
from imageapi.linux import pidfd, process

_MOST = 255
"""An exit status holds no larger number; errno(3) ends below it."""
FIRST_PAUSE = 0.001


def call(name: str, seconds: float, function: Callable[[], object]) -> None:
    """Have `function` called in a child, and return when it has returned.

    After `seconds` the child is killed; this returns only once it has ended, since it may still be making something.
    Raises: TimeoutError when it was killed; the OSError that `function` raised.
    """
    with _taken(name):
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            os._exit(_called(function, parent))
        in_time = _ends_within(child, seconds)
        if not in_time:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise TimeoutError(errno.ETIMEDOUT, f"it was killed after {seconds:.0f} s" if not in_time else "it was killed")
    if status:
        raise OSError(status, os.strerror(status))


def settled(name: str, seconds: float) -> None:
    """Return once no call of this name is under way.

    Raises: errors.TimedOut, when one still is.
    """
    end, pause = time.monotonic() + seconds, FIRST_PAUSE
    while not _is_free(name):
        if time.monotonic() > end:
            raise TimedOut("the kernel has not come back from making it; it is undone when it does")
        time.sleep(pause)
        pause *= 2


def _called(function: Callable[[], object], parent: int) -> int:
    """In the child: an errno, 0 for success."""
    try:
        process.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            return errno.EOWNERDEAD
        function()
    except OSError as error:
        return error.errno or errno.EIO
    except BaseException:
        return _MOST
    return 0


def _ends_within(child: int, seconds: float) -> bool:
    descriptor = pidfd.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], max(0, seconds))[0])
    finally:
        os.close(descriptor)


def _taken(name: str) -> socket.socket:
    """The address `name` (unix(7), abstract); a child has it too, until it ends."""
    address = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        address.bind(f"\0{name}")
    except OSError:
        address.close()
        raise
    return address


def _is_free(name: str) -> bool:
    try:
        _taken(name).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True
