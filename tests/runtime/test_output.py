"""What the supervisor takes off a pipe or a socket in one turn has an end, whoever fills it, and so has a log."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from imageapi.runtime import container, output
from imageapi.runtime.surroundings import Surroundings

pytestmark = pytest.mark.pure

ENOUGH = 100
"""How often who never ends goes on, so that a test ends all the same."""


class Flooded(output.Place):
    """The logs of a container's pipe that is filled again whenever some of it goes into a log."""

    def __init__(self, directory: int, end: int) -> None:
        super().__init__(directory, 1 << 30, lambda _: None)
        self.opened = 0
        self._end = end

    def open(self, name: str) -> int:
        self.opened += 1
        if self.opened < ENOUGH:
            os.write(self._end, b"x" * output.CHUNK)
        return super().open(name)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_what_is_left_is_moved_though_somebody_goes_on_printing(directory: int, tmp_path: Path) -> None:
    end = output.make(directory, "pipe")
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(end, b"x" * (4 * output.CHUNK))
    place = Flooded(directory, end)
    output.Copier(end, place, "0.log", "container(0)", lambda _: None, 0).drain()
    os.close(end)
    assert (tmp_path / "0.log").stat().st_size == 4 * output.CHUNK
    assert place.opened < ENOUGH


def test_a_log_that_cannot_be_put_aside_takes_no_more_until_it_can(directory: int, tmp_path: Path) -> None:
    end, told = output.make(directory, "pipe"), list[int]()
    copier = output.Copier(end, output.Place(directory, 10, lambda _: None), "0.log", "container(0)", told.append, 0)

    def print_through(text: bytes) -> None:
        os.write(end, text)
        copier.copy()

    (tmp_path / "0.log.1").mkdir()
    for text in (b"so many bytes", b"too many", b"and more"):
        print_through(text)
    assert ((tmp_path / "0.log").read_bytes(), told) == (b"so many bytes", [errno.EISDIR])
    (tmp_path / "0.log.1").rmdir()
    print_through(b"again")
    os.close(end)
    assert (tmp_path / "0.log.1").read_bytes() == b"so many bytes"
    assert b"16 bytes that it printed here are lost" in (tmp_path / "0.log").read_bytes()
    assert ((tmp_path / "0.log").read_bytes()[-5:], told) == (b"again", [errno.EISDIR, 0])


class Talkative:
    """A socket with always one message more."""

    def __init__(self) -> None:
        self.left = ENOUGH

    def recv(self, _: int) -> bytes:
        self.left -= 1
        return b"READY=1" if self.left else b""


def test_one_that_notifies_without_end_is_not_read_without_end() -> None:
    life = container.Container(cast(Surroundings, None), lambda *_: None)
    life._notify = talkative = Talkative()  # type: ignore[assignment]
    life._on_notify()
    assert talkative.left > 0
