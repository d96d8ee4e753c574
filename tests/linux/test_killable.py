"""A call that is made in a child, and killed when it takes too long."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from imageapi.linux import killable
from lab.server import alive, eventually

pytestmark = pytest.mark.pure


def children() -> str:
    return Path("/proc/thread-self/children").read_text()


def raising(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_what_the_call_does_is_done_when_it_returns(tmp_path: Path) -> None:
    killable.call((tmp_path / "made").mkdir, 20, "a directory")
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOENT, errno.ENOTRECOVERABLE, 255, 512, 524])
def test_the_errno_of_the_call_is_raised_about_what_it_was(number: int) -> None:
    with pytest.raises(OSError) as caught:
        killable.call(lambda: raising(number), 20, "something")
    assert (caught.value.errno, caught.value.filename) == (number, "something")


def test_a_call_that_takes_too_long_is_killed_and_nothing_of_it_is_left() -> None:
    before = children()
    with pytest.raises(TimeoutError, match=r"not done within 0\.05s: 'something'"):
        killable.call(signal.pause, 0.05, "something")
    assert children() == before


def test_nothing_is_left_of_what_gives_no_answer() -> None:
    before = children()
    answers = killable.ask({"slow": signal.pause, "quick": os.getppid}, 0.05)
    assert (type(answers["slow"]), answers["quick"], children()) == (TimeoutError, os.getpid(), before)


def test_a_bug_is_one() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        killable.call(lambda: 1 // 0, 20, "something")


def test_the_child_ends_with_this_process(tmp_path: Path) -> None:
    def wait() -> None:
        (tmp_path / str(os.getpid())).mkdir()
        signal.pause()

    pid = os.fork()
    if pid == 0:
        killable.call(wait, 60, "something")
        os._exit(0)
    eventually(lambda: list(tmp_path.iterdir()), "the call is under way")
    [begun] = tmp_path.iterdir()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    eventually(lambda: not alive(int(begun.name)), "the child has ended")
