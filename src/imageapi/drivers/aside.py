"""A system call that may hang for a store, made by a process of its own, which goes on when its caller ends.

Some of the kernel's waits for a store end for a fatal signal only. What such a signal breaks off may be half done for
ever: an rbd image whose unmapping is broken off stays locked in its cluster, and nobody can write to it again while
this host lives. So the process is nobody's child, and neither our end nor the server's reaches it.

While a call is under way its place is locked, which the kernel ends when the process is gone: whoever undoes what the
call makes waits for that first. The place is a byte of a directory, which the kernel locks though there is nothing at
it: so no call needs a file made, and a delete works where there is no room for one. The directory is root's alone, so
that nobody else can hold us up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from imageapi.drivers import locks
from imageapi.errors import TimedOut
from imageapi.linux import process

FIRST_PAUSE = 0.001
KILLED = 1.0
"""Seconds that a process has to end once it was killed; one that waits where no signal reaches it takes longer."""
_BUG = 255
"""What a process writes whose call failed by something else than the kernel; an errno is its own number, and 0 success.
Before it comes whether the function was called at all. One that is killed writes nothing."""


class Place(NamedTuple):
    """What is locked while a call is under way: the byte `number` of a directory."""

    directory: str
    number: int


class Refused(OSError):
    """The OSError that the function raised: any other says that it was not called."""


def call(place: Place, seconds: float, function: Callable[[], object], *, expendable: bool) -> None:
    """Have `function` called, of which only the effect on the kernel counts, with `place` locked. One that takes
    longer than `seconds` is killed when it is `expendable`, and goes on otherwise.

    Raises: TimeoutError; Refused, when `function` raised an OSError; OSError(EALREADY) while another call is under way;
    OSError when the host has run out of what a call takes.
    """
    reading, writing = os.pipe()
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, reading)
        with contextlib.ExitStack() as handed:
            handed.callback(os.close, writing)
            lock = _locked(place)
            handed.callback(os.close, lock)
            child = os.fork()
            if child == 0:
                _leave(lock, writing, seconds if expendable else 0, function)
        os.waitpid(child, 0)
        _hear(reading, seconds + (KILLED if expendable else 0))


def _leave(lock: int, writing: int, seconds: float, function: Callable[[], object]) -> None:
    """In the child: end, and leave one behind that has no parent, and nothing of ours but its lock and its answer. The
    place is free when the answer is there."""
    try:
        if os.fork() == 0:
            _detach(lock, writing)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = _outcome(function)
            os.close(lock)
            os.write(writing, bytes([True, answer]))
    except OSError as error:
        os.write(writing, bytes([False, error.errno or _BUG]))
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


def _hear(reading: int, seconds: float) -> None:
    """The end of the call, as `call` raises it."""
    ready, _, _ = select.select([reading], [], [], max(seconds, 0))
    answer = os.read(reading, 2) if ready else b""
    if not answer:
        raise TimeoutError(errno.ETIMEDOUT, "it has not come back in time")
    called, number = answer
    if number == _BUG:
        raise RuntimeError("what was called aside failed: a bug")
    if number:
        raise (Refused if called else OSError)(number, os.strerror(number))


def settled(place: Place, seconds: float, what: str) -> None:
    """Return once no call with this place is under way.

    Raises: errors.TimedOut, which says `what`, when one still is.
    """
    end, pause = time.monotonic() + seconds, FIRST_PAUSE
    while not _is_free(place):
        if time.monotonic() > end:
            raise TimedOut(what)
        time.sleep(pause)
        pause *= 2


def _locked(place: Place) -> int:
    """A descriptor that holds the lock. A directory cannot be opened for writing, and so each lock of its bytes is one
    that others can share: whoever has it looks for others then, and of two that come at once both may give way.

    Raises: OSError; OSError(EALREADY).
    """
    os.makedirs(place.directory, mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as undo:
        lock = _opened(place)
        undo.callback(os.close, lock)
        locks.share_byte(lock, place.number)
        if locks.others_share_byte(lock, place.number):
            raise OSError(errno.EALREADY, "a call is under way")
        undo.pop_all()
        return lock


def _is_free(place: Place) -> bool:
    try:
        looking = _opened(place)
    except FileNotFoundError:
        return True
    try:
        return not locks.others_share_byte(looking, place.number)
    finally:
        os.close(looking)


def _opened(place: Place) -> int:
    return os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
