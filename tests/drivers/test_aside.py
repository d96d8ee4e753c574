"""A call that hangs is killed, and what undoes it waits until its child is gone."""

from __future__ import annotations

import errno
import os
import signal
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
aside.call(sys.argv[1], 100, lambda: (open(sys.argv[2], "w").write("begun"), time.sleep(100)))
"""


def test_it_returns_when_the_call_has(tmp_path: Path) -> None:
    aside.call(NAME, 10, (tmp_path / "made").mkdir)
    assert (tmp_path / "made").is_dir()
    aside.settled(NAME, 0)


def test_the_calls_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        aside.call(NAME, 10, (tmp_path / "none").rmdir)


def test_a_call_that_hangs_is_killed() -> None:
    with pytest.raises(TimeoutError) as caught:
        aside.call(NAME, 0.05, lambda: time.sleep(100))
    assert caught.value.errno == errno.ETIMEDOUT
    aside.settled(NAME, 0)


def test_the_name_is_taken_until_a_child_whose_parent_died_is_gone(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, NAME, begun])
    eventually(lambda: begun.exists() and begun.read_text(), "the call has begun")
    with pytest.raises(TimedOut):
        aside.settled(NAME, 0.01)
    child = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text())
    os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    aside.settled(NAME, 10)
    eventually(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text(), "gone")
