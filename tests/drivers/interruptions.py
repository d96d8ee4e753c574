"""Stop a function at any of its steps: by death, as a SIGKILL would, or by an error of one of the calls it makes.

The function runs in a forked child under a profile hook, which sees every call of ours and every system call that
Python makes for them. The steps are counted, so that a test can go through them one by one.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from imageapi.errors import Problem

RETURNED, RAISED, KILLED, UNEXPECTED, SURVIVED = range(40, 45)
"""How the child ended. SURVIVED: it returned, although one of its calls had failed."""
SYSTEM_CALLS = ("posix", "fcntl", "_io", "io")
KERNEL_CALLS = ("mount", "syscall")
"""Functions of imageapi.linux through which the calls go that Python has no function for."""
LOOKING = (
    *("mountinfo.py", "users.py", "superblock.py", "kmsg.py", "read", "readlink", "listdir", "stat", "lstat"),
    *("iscsi/pdu.py", "iscsi/chap.py", "iscsi/login.py", "iscsi/portals.py"),
)
"""Modules and calls that change nothing: a death after them is the same as one before."""
UNDOING = ("close", "rmdir", "unlink", "write", "read")
"""No error is put into what undoes or ends things, which only a broken kernel would give."""


def deaths(function: Callable[[], object], first: int = 1, every: int = 1) -> Iterator[int]:
    """Kill `function` after each of its steps in turn (or the `first` and then `every` so many), and yield the step's
    number; ends when it is not reached."""
    step = first
    while _run(function, _Killer(step)) == KILLED:
        yield step
        step += every


def some_deaths(function: Callable[[], object]) -> Iterator[int]:
    """`deaths` at every third step, beginning with one of the first three by chance: so all are tried in a few runs.
    In the long form (IMAGEAPI_EVERY_CRASH) all are in each."""
    if os.environ.get("IMAGEAPI_EVERY_CRASH"):
        return deaths(function)
    return deaths(function, 1 + secrets.randbelow(3), 3)


def errors(function: Callable[[], object]) -> Iterator[tuple[int, bool]]:
    """Let each call that `function` makes fail with EIO in turn, and yield its number, and whether the whole failed
    (some can be done without); ends when it is not reached."""
    step = 1
    while (outcome := _run(function, _Failure(step))) in (RAISED, SURVIVED):
        yield step, outcome == RAISED
        step += 1
    assert outcome == RETURNED, outcome


class _Hook:
    """Acts at one step of the process that it is made for, not of what that forks."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.process = 0

    def counts(self, frame: FrameType, event: str, argument: Any) -> bool:
        raise NotImplementedError

    def act(self) -> None:
        raise NotImplementedError

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.left and os.getpid() == self.process and self.counts(frame, event, argument):
            self.left -= 1
            if self.left == 0:
                self.act()


class _Killer(_Hook):
    def counts(self, frame: FrameType, event: str, argument: Any) -> bool:
        if event == "return":
            return _is_ours(frame) and not frame.f_code.co_filename.endswith(LOOKING)
        return event == "c_return" and _is_system_call(argument) and argument.__name__ not in LOOKING

    def act(self) -> None:
        os._exit(KILLED)


class _Failure(_Hook):
    def counts(self, frame: FrameType, event: str, argument: Any) -> bool:
        if event == "call":
            return _is_ours(frame) and frame.f_code.co_name in KERNEL_CALLS
        return event == "c_call" and _is_system_call(argument) and argument.__name__ not in UNDOING

    def act(self) -> None:
        raise OSError(errno.EIO, "injected")


def _is_ours(frame: FrameType) -> bool:
    return any(place in frame.f_code.co_filename for place in ("/imageapi/linux/", "/imageapi/drivers/"))


def _is_system_call(function: Any) -> bool:
    return getattr(function, "__module__", None) in SYSTEM_CALLS


def _run(function: Callable[[], object], hook: _Hook) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(_outcome(function, hook))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _outcome(function: Callable[[], object], hook: _Hook) -> int:
    hook.process = os.getpid()
    try:
        sys.setprofile(hook)
        try:
            function()
        finally:
            sys.setprofile(None)
    except (OSError, Problem):
        return RAISED
    except BaseException:
        return UNEXPECTED
    return RETURNED if hook.left else SURVIVED
