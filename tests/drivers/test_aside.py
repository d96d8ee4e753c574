"""A call that hangs is killed, and what undoes it waits until its child is gone."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imageapi.drivers import aside
from imageapi.errors import TimedOut
from lab.server import eventually

pytestmark = pytest.mark.kernel


@pytest.fixture
def lock(run_dir: Path) -> str:
    """The file of a call, in a directory that is not there yet."""
    return str(run_dir / "helpers" / "call")


PARENT = """
import sys, time
from imageapi.drivers import aside
aside.call(sys.argv[1], 0, lambda: open(sys.argv[2]).read(), expendable=False)
"""


def is_free(path: str) -> bool:
    try:
        aside.settled(path, 0, "it is under way")
    except TimedOut:
        return False
    return True


def test_it_returns_when_the_call_has(lock: str, tmp_path: Path) -> None:
    aside.call(lock, 10, (tmp_path / "made").mkdir, expendable=True)
    assert (tmp_path / "made").is_dir()
    assert os.listdir(os.path.dirname(lock)) == []
    eventually(lambda: is_free(lock), "nothing is under way")


def test_the_calls_error_is_raised(lock: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        aside.call(lock, 10, (tmp_path / "none").rmdir, expendable=True)
    with pytest.raises(RuntimeError):
        aside.call(lock, 10, lambda: 1 // 0, expendable=True)


def test_a_call_that_hangs_is_killed_if_it_may_be(lock: str) -> None:
    with pytest.raises(TimeoutError) as caught:
        aside.call(lock, 0.05, lambda: time.sleep(100), expendable=True)
    assert caught.value.errno == errno.ETIMEDOUT
    eventually(lambda: is_free(lock), "it is gone")
    assert os.listdir(os.path.dirname(lock)) == []


def test_nobody_else_can_hold_a_call_up(lock: str) -> None:
    """Who may not open the file cannot lock it."""
    with pytest.raises(TimeoutError):
        aside.call(lock, 0.05, lambda: time.sleep(100), expendable=True)
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (os.path.dirname(lock), lock)]
    assert modes == [0o700, 0o600]
    eventually(lambda: is_free(lock), "it is gone")


def test_one_that_may_not_be_killed_goes_on_when_its_caller_has_ended(lock: str, tmp_path: Path) -> None:
    """It waits to open a FIFO."""
    os.mkfifo(tmp_path / "store")
    caller = subprocess.run(
        [sys.executable, "-c", PARENT, lock, tmp_path / "store"], capture_output=True, text=True, check=False
    )
    assert "TimeoutError" in caller.stderr
    with pytest.raises(TimedOut, match="it is under way"):
        aside.settled(lock, 0.01, "it is under way")
    (tmp_path / "store").write_text("the store is back")
    eventually(lambda: is_free(lock), "it is done")
