"""The cache of images: what is asked for is there whole, what nobody asks for any more goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools import cache

pytestmark = pytest.mark.pure

ASK = """
import sys
from tools import cache
cache.KEPT = 2
print(cache.made_once("thing", "d", sys.argv[1], lambda path: path.mkdir()), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "imageapi"


@contextmanager
def asked(made_of: str) -> Iterator[Path]:
    """The thing, made of this by a process that uses it until the end of the block."""
    command = [sys.executable, "-c", ASK, made_of]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as user:
        assert user.stdout is not None
        yield Path(user.stdout.readline().strip())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(cache.__file__).parents[1])}


def ask(made_of: str) -> Path:
    with asked(made_of) as path:
        return path


def test_it_is_made_once_and_others_that_are_many_or_old_go(home: Path) -> None:
    one = ask("one")
    inode = one.stat().st_ino
    two = ask("two")
    assert ask("one").stat().st_ino == inode
    three = ask("three")
    assert [path.is_dir() for path in (one, two, three)] == [True, False, True]
    long_ago = time.time() - (cache.DAYS + 1) * 86400
    for path in home.glob(f"*{cache.NOTE}"):
        os.utime(path, (long_ago, long_ago))
    last = ask("last")
    assert {path.name for path in home.iterdir()} == {last.name, f"{last.name}{cache.NOTE}", "thing.lock"}


def test_what_somebody_uses_stays() -> None:
    with asked("in use") as used:
        for name in "abc":
            ask(name)
        assert used.is_dir()
    ask("after")
    assert not used.exists()
