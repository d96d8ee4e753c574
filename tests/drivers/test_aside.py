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
from imageapi.drivers.aside import Place
from imageapi.errors import TimedOut
from lab import room
from lab.server import eventually

pytestmark = pytest.mark.kernel


@pytest.fixture
def place(run_dir: Path) -> Place:
    """One in a directory that is not there yet."""
    return Place(str(run_dir / "helpers"), 7)


PARENT = """
import sys, time
from imageapi.drivers import aside
aside.call(aside.Place(sys.argv[1], 7), 0, lambda: open(sys.argv[2]).read(), expendable=False)
"""


def is_free(place: Place) -> bool:
    try:
        aside.settled(place, 0, "it is under way")
    except TimedOut:
        return False
    return True


def test_it_returns_when_the_call_has(place: Place, tmp_path: Path) -> None:
    aside.call(place, 10, (tmp_path / "made").mkdir, expendable=True)
    assert (tmp_path / "made").is_dir()
    assert os.listdir(place.directory) == []
    eventually(lambda: is_free(place), "nothing is under way")


def test_the_calls_error_is_raised(place: Place, tmp_path: Path) -> None:
    with pytest.raises(aside.Refused) as caught:
        aside.call(place, 10, (tmp_path / "none").rmdir, expendable=True)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(RuntimeError):
        aside.call(place, 10, lambda: 1 // 0, expendable=True)


def test_a_call_that_hangs_is_killed_if_it_may_be(place: Place) -> None:
    with pytest.raises(TimeoutError) as caught:
        aside.call(place, 0.05, lambda: time.sleep(100), expendable=True)
    assert caught.value.errno == errno.ETIMEDOUT
    eventually(lambda: is_free(place), "it is gone")
    assert os.listdir(place.directory) == []


def test_nobody_else_can_hold_a_call_up(place: Place) -> None:
    """Who may not open the directory cannot lock it."""
    aside.call(place, 10, os.getpid, expendable=True)
    assert stat.S_IMODE(os.stat(place.directory).st_mode) == 0o700


def test_of_two_calls_with_one_place_one_is_refused(place: Place, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "store")
    with pytest.raises(TimeoutError):
        aside.call(place, 0, (tmp_path / "store").read_text, expendable=False)
    with pytest.raises(OSError) as refusal:
        aside.call(place, 10, os.getpid, expendable=False)
    assert refusal.value.errno == errno.EALREADY
    assert not isinstance(refusal.value, aside.Refused)
    aside.call(place._replace(number=place.number + 1), 10, os.getpid, expendable=False)
    (tmp_path / "store").write_text("the store is back")
    eventually(lambda: is_free(place), "it is done")
    aside.call(place, 10, os.getpid, expendable=False)


@pytest.mark.parametrize("options", ["nr_inodes=1", "ro"])
def test_it_needs_no_room(run_dir: Path, tmp_path: Path, options: str) -> None:
    os.mkfifo(tmp_path / "store")
    with room.tmpfs(run_dir / "full", options) as full:
        with pytest.raises(OSError):
            (full / "file").touch()
        place = Place(str(full), 7)
        with pytest.raises(TimeoutError):
            aside.call(place, 0, (tmp_path / "store").read_text, expendable=False)
        assert not is_free(place)
        (tmp_path / "store").write_text("the store is back")
        eventually(lambda: is_free(place), "it is done")
        aside.call(place, 10, os.getpid, expendable=False)


def test_one_that_may_not_be_killed_goes_on_when_its_caller_has_ended(place: Place, tmp_path: Path) -> None:
    """It waits to open a FIFO."""
    os.mkfifo(tmp_path / "store")
    caller = subprocess.run(
        [sys.executable, "-c", PARENT, place.directory, tmp_path / "store"], capture_output=True, text=True, check=False
    )
    assert "TimeoutError" in caller.stderr
    with pytest.raises(TimedOut, match="it is under way"):
        aside.settled(place, 0.01, "it is under way")
    (tmp_path / "store").write_text("the store is back")
    eventually(lambda: is_free(place), "it is done")
