"""A system call that may hang for a store, made by a process of its own, which goes on when its caller ends.

Some of the kernel's waits for a store end for a fatal signal only. What such a signal breaks off may be half done for
ever: an rbd image whose unmapping is broken off stays locked in its cluster, and nobody can write to it again while
this host lives. So the process is nobody's child, and neither our end nor the server's reaches it.

While a call is under way its file is locked, which the kernel ends when the process is gone: whoever undoes what the
call makes waits for that first. The file is in a directory of root's alone, so that nobody else can hold us up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable

from imageapi.drivers import locks
from imageapi.errors import TimedOut
from imageapi.linux import process

FIRST_PAUSE = 0.001
KILLED = 1.0
"""Seconds that a process has to end once it was killed; one that waits where no signal reaches it takes longer."""
_BUG = 255
"""What a process writes whose call failed by something else than the kernel; an errno is its own number, and 0 success.
One that is killed writes nothing."""


def call(path: str, seconds: float, function: Callable[[], object], *, expendable: bool) -> None:
    """Have `function` called, of which only the effect on the kernel counts, with the file `path` locked. One that
    takes longer than `seconds` is killed when it is `expendable`, and goes on otherwise.

    Raises: TimeoutError; the OSError that `function` raised; OSError(EALREADY) while another call is under way.
    """
    reading, writing = os.pipe()
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, reading)
        with contextlib.ExitStack() as handed:
            handed.callback(os.close, writing)
            lock = _locked(path)
            handed.callback(os.close, lock)
            child = os.fork()
            if child == 0:
                _leave(path, lock, writing, seconds if expendable else 0, function)
        os.waitpid(child, 0)
        _hear(reading, seconds + (KILLED if expendable else 0), path)


def _leave(path: str, lock: int, writing: int, seconds: float, function: Callable[[], object]) -> None:
    """In the child: end, and leave one behind that has no parent, and nothing of ours but its lock and its answer. The
    file is gone when the answer is there."""
    try:
        if os.fork() == 0:
            _detach(lock, writing)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = _outcome(function)
            _unlock(path, lock)
            os.write(writing, bytes([answer]))
    except OSError as error:
        os.write(writing, bytes([error.errno or _BUG]))
    finally:
        os._exit(0)


def _detach(*kept: int) -> None:
    os.setsid()
    process.name("imageapi-aside")
    process.close_all_but(*kept)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _outcome(function: Callable[[], object]) -> int:
    try:
        function()
    except OSError as error:
        return error.errno or _BUG
    except BaseException:
        return _BUG
    return 0


def _hear(reading: int, seconds: float, what: str) -> None:
    """The end of the call, as `call` raises it."""
    ready, _, _ = select.select([reading], [], [], max(seconds, 0))
    answer = os.read(reading, 1) if ready else b""
    if not answer:
        raise TimeoutError(errno.ETIMEDOUT, "it has not come back in time", what)
    if number := answer[0]:
        raise RuntimeError(f"{what}: a bug") if number == _BUG else OSError(number, os.strerror(number), what)


def settled(path: str, seconds: float, what: str) -> None:
    """Return once no call with this file is under way.

    Raises: errors.TimedOut, which says `what`, when one still is.
    """
    end, pause = time.monotonic() + seconds, FIRST_PAUSE
    while not _is_free(path):
        if time.monotonic() > end:
            raise TimedOut(what)
        time.sleep(pause)
        pause *= 2


def _locked(path: str) -> int:
    """A descriptor of the file, made and locked. Raises: OSError(EALREADY)."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    while True:
        with contextlib.ExitStack() as undo:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, lock)
            if not locks.try_lock(lock):
                raise OSError(errno.EALREADY, "a call is under way", path)
            if _is_at(path, lock):
                undo.pop_all()
                return lock


def _is_at(path: str, lock: int) -> bool:
    """Whether the file that is locked is there still."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _unlock(path: str, lock: int) -> None:
    """The file goes with its lock: nobody has another one of its name then."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(lock)


def _is_free(path: str) -> bool:
    """One that was killed has left its file."""
    if not os.path.exists(path):
        return True
    try:
        lock = _locked(path)
    except OSError as error:
        if error.errno != errno.EALREADY:
            raise
        return False
    _unlock(path, lock)
    return True
