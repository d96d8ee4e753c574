"""A call that hangs is killed, and what undoes it waits until its child is gone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imageapi.drivers import aside
from imageapi.errors import TimedOut
from lab.server import eventually

pytestmark = pytest.mark.kernel
NAME = f"imageapi:test:{os.getpid()}"

PARENT = """
import sys, time
from imageapi.drivers import aside
aside.call(sys.argv[1], 0, lambda: open(sys.argv[2]).read(), expendable=False)
"""


def is_free(name: str = NAME) -> bool:
    try:
        aside.settled(name, 0, "it is under way")
    except TimedOut:
        return False
    return True


def test_it_returns_when_the_call_has(tmp_path: Path) -> None:
    aside.call(NAME, 10, (tmp_path / "made").mkdir, expendable=True)
    assert (tmp_path / "made").is_dir()
    eventually(is_free, "nothing is under way")


def test_the_calls_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        aside.call(NAME, 10, (tmp_path / "none").rmdir, expendable=True)
    with pytest.raises(RuntimeError):
        aside.call(NAME, 10, lambda: 1 // 0, expendable=True)


def test_a_call_that_hangs_is_killed_if_it_may_be() -> None:
    with pytest.raises(TimeoutError) as caught:
        aside.call(NAME, 0.05, lambda: time.sleep(100), expendable=True)
    assert caught.value.errno == errno.ETIMEDOUT
    eventually(is_free, "it is gone")


def test_one_that_may_not_be_killed_goes_on_when_its_caller_has_ended(tmp_path: Path) -> None:
    """It waits to open a FIFO."""
    os.mkfifo(tmp_path / "store")
    caller = subprocess.run(
        [sys.executable, "-c", PARENT, NAME, tmp_path / "store"], capture_output=True, text=True, check=False
    )
    assert "TimeoutError" in caller.stderr
    with pytest.raises(TimedOut, match="it is under way"):
        aside.settled(NAME, 0.01, "it is under way")
    (tmp_path / "store").write_text("the store is back")
    eventually(is_free, "it is done")
