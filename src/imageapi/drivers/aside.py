"""A system call that may hang, made in a child of its own, which can be killed.

Some of the kernel's waits for a store end for a fatal signal only, and such a signal ends the whole process: so who
wants to go on afterwards has the call made aside. While it is under way its name is taken, on a socket address that the
kernel frees when the last of the two processes is gone: whoever undoes what the call makes waits for that first.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable

from imageapi.errors import TimedOut
from imageapi.linux import killable

FIRST_PAUSE = 0.001


def call(name: str, seconds: float, function: Callable[[], object]) -> None:
    """Have `function` called in a child, which is killed after `seconds` (killable.call).

    Raises: TimeoutError when it was killed; the OSError that `function` raised.
    """
    with _taken(name):
        killable.call(function, seconds, name)


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
