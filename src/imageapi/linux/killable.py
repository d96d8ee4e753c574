"""A call into the kernel that may wait for somebody who is gone, with a deadline.

A thread that waits in the kernel cannot be told to stop, but the waits of NFS and of most network file systems end when
their process is killed. So the call is made in a child of this process, which is slim and has a single thread.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable

from imageapi.linux.process import die_with_parent

_BUG = 255
"""The exit status of a child whose call failed by something else than the kernel; an errno is its own status."""


def call(action: Callable[[], object], seconds: float, what: str) -> None:
    """Do `action`, of which only the effect on the kernel counts, and kill it after `seconds`. It returns when the
    child has ended: one that waits for dirty pages to be written cannot be killed before they are.

    Raises: OSError about `what`, as the action raised it; TimeoutError when it was killed.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os._exit(_outcome(action, parent))
    status = _await(child, seconds)
    if os.WIFSIGNALED(status):
        raise TimeoutError(errno.ETIMEDOUT, f"not done within {seconds:g}s", what)
    if number := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{what}: a bug") if number == _BUG else OSError(number, os.strerror(number), what)


def _outcome(action: Callable[[], object], parent: int) -> int:
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            action()
    except OSError as error:
        return error.errno or _BUG
    except BaseException:
        return _BUG
    return 0


def _await(child: int, seconds: float) -> int:
    """How the child ended, by itself or killed. It has ended, too, when this fails."""
    try:
        _kill_after(child, seconds)
        return os.waitpid(child, 0)[1]
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def _kill_after(child: int, seconds: float) -> None:
    pidfd = os.pidfd_open(child)
    try:
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        if not ended.poll(seconds * 1000):
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(pidfd)
