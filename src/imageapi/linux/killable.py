"""A call into the kernel that may wait for somebody who is gone, with a deadline.

A thread that waits in the kernel cannot be told to stop, but the waits of NFS and of most network file systems end when
their process is killed. So the call is made in a child of this process, which is slim and has a single thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import signal
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from imageapi.linux.pidfd import pidfd_open
from imageapi.linux.process import die_with_parent

_DONE, _REFUSED, _BUG = range(3)
"""The exit status of a child: its call is done, has failed with an errno, which it has written to a pipe (NFS has some
that are too large for a status), or by something else than the kernel."""
_ERRNO = struct.Struct("i")
REAPED_IN = 0.1
"""Seconds in which a process that was killed has ended, if a signal reaches it."""


def call(action: Callable[[], object], seconds: float, what: str) -> None:
    """Do `action`, of which only the effect on the kernel counts, and kill it after `seconds`. It returns when the
    child has ended: one that waits for dirty pages to be written cannot be killed before they are.

    Raises: OSError about `what`, as the action raised it; TimeoutError when it was killed.
    """
    parent = os.getpid()
    ours, theirs = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            os._exit(_outcome(action, parent, theirs))
        status = _await(child, seconds)
        if os.WIFSIGNALED(status):
            raise TimeoutError(errno.ETIMEDOUT, f"not done within {seconds:g}s", what)
        _check_outcome(os.waitstatus_to_exitcode(status), ours, what)
    finally:
        os.close(ours)
        os.close(theirs)


def _outcome(action: Callable[[], object], parent: int, pipe: int) -> int:
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            action()
    except OSError as error:
        os.write(pipe, _ERRNO.pack(error.errno or 0))
        return _REFUSED
    except BaseException:
        return _BUG
    return _DONE


def _check_outcome(status: int, pipe: int, what: str) -> None:
    """Raises: OSError, as the child's action did."""
    if status == _REFUSED:
        (number,) = _ERRNO.unpack(os.read(pipe, _ERRNO.size))
        raise OSError(number, os.strerror(number), what)
    if status != _DONE:
        raise RuntimeError(f"{what}: a bug")


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
    descriptor = pidfd_open(child)
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        if not ended.poll(seconds * 1000):
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------- many, with answers


def ask(questions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """The answer to each question, by its name: what the function returns, or the exception that it raised. Each is
    asked in a child of its own, all at once. One that has not answered after `seconds` is killed, and not waited for:
    its answer is a TimeoutError."""
    ends = {name: _child_for(function) for name, function in questions.items()}
    said = _hear({end: name for name, (_, end) in ends.items()}, time.monotonic() + seconds)
    for pid, end in ends.values():
        os.close(end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _reap([pid for pid, _ in ends.values()])
    return {name: _answer(data) for name, data in said.items()}


def _reap(pids: list[int]) -> None:
    """Wait for children that were killed, but not for long: one that no signal reaches is left to whoever has it when
    this process ends."""
    deadline = time.monotonic() + REAPED_IN
    while (pids := [pid for pid in pids if not os.waitpid(pid, os.WNOHANG)[0]]) and time.monotonic() < deadline:
        time.sleep(0.001)


def _child_for(function: Callable[[], Any]) -> tuple[int, int]:
    """A child that has been asked, and the end of the pipe in which its answer comes."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            die_with_parent(signal.SIGKILL)
            os.close(ours)
            with open(theirs, "wb") as pipe:
                pipe.write(_outcome_of(function))
        os._exit(0)
    os.close(theirs)
    return child, ours


def _outcome_of(function: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(function())
    except Exception as error:
        return pickle.dumps(OSError(f"{type(error).__name__}: {error}"))


def _hear(pending: dict[int, str], deadline: float) -> dict[str, bytes]:
    """What has come until the deadline from each end of a pipe; nothing of one that was not closed by then."""
    said = dict.fromkeys(pending.values(), b"")
    poller = select.poll()
    for end in pending:
        poller.register(end, select.POLLIN)
    while pending and (left := deadline - time.monotonic()) > 0:
        for end, _ in poller.poll(left * 1000):
            data = os.read(end, 1 << 16)
            said[pending[end]] += data
            if not data:
                poller.unregister(end)
                del pending[end]
    return {name: b"" if name in pending.values() else data for name, data in said.items()}


def _answer(data: bytes) -> Any:
    return pickle.loads(data) if data else TimeoutError("it hangs")
