"""One content from the first of several addresses that serves it: piece by piece, counted, and checked at its end.

Nothing is kept here but the piece at hand. Where the SHA-256 is known, all addresses must serve the same, so what one
has begun the next may finish; else each begins anew.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from imageapi.drivers import progress
from imageapi.drivers.paths import open_path, reopen
from imageapi.drivers.progress import LeftOff
from imageapi.drivers.uri.room import Room
from imageapi.errors import Invalid, Problem, TimedOut
from imageapi.spec import Loopback

PIECE = 1 << 18
"""Bytes, the most that is read at once."""


class Interrupted(TimedOut):
    """The address serves it, but not from the middle on: it has to begin again."""


class Source(Protocol):
    """One address. `where` names it without its secrets; `total` is the size in bytes, once that is known."""

    where: str
    total: int | None

    def pieces(self, position: int) -> Iterator[bytes]:
        """The content from `position` on. Raises: errors.Problem; OSError of the file's storage."""
        ...


class File:
    """A file of this host."""

    where = "this host"

    def __init__(self, address: str) -> None:
        from urllib.parse import unquote

        self._path = unquote(address[len("file://") :].removeprefix("localhost"))
        self.total: int | None = None

    def pieces(self, position: int) -> Iterator[bytes]:
        file = self._open()
        try:
            self.total = os.fstat(file).st_size
            os.lseek(file, position, os.SEEK_SET)
            while piece := os.read(file, PIECE):
                position += len(piece)
                yield piece
        finally:
            os.close(file)
        if position < self.total:
            raise Invalid(f"'{self._path}' became shorter while it was read; ask again when it is whole")

    def _open(self) -> int:
        """Raises: errors.Invalid for what is no regular file; opening one never waits for a writer."""
        place = open_path(Loopback(self._path, "root"), ())
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                raise Invalid(f"'{self._path}' is no regular file; give an archive or an image file")
            return reopen(place, os.O_RDONLY)
        finally:
            os.close(place)


class Fetch:
    """The content, from the first of `addresses` on that serves it; `first` is the place of the first in the request.
    `refused` gets the problem of each that does not."""

    def __init__(
        self, addresses: Sequence[str], first: int, sha256: str | None, room: Room, refused: dict[int, Problem]
    ) -> None:
        from hashlib import sha256 as new_hash

        self._addresses = addresses
        self.at = first
        self._sha256 = sha256 and sha256.lower()
        self._room = room
        self._refused = refused
        self._hash = new_hash()
        self._position = 0

    def pieces(self) -> Generator[bytes]:
        """The whole content, in order. Its end is reached only when it is what it should be.

        Raises: errors.Problem, about the address `at`.
        """
        while True:
            try:
                yield from self._current()
                break
            except LeftOff:
                raise
            except (Problem, OSError) as error:
                problem = as_problem(error)
                last = self.at + 1 == len(self._addresses)
                if last or (self._position and not self._sha256):
                    raise problem from None
                self._refused[self.at] = problem
                self.at += 1
        self._check()

    def _current(self) -> Iterator[bytes]:
        source = source_of(self._addresses[self.at], known=self._sha256 is not None)
        step = f"fetching from {source.where}"
        progress.tell(step, self._position, source.total)
        for piece in source.pieces(self._position):
            self._room.check(max(self._position + len(piece), source.total or 0))
            self._room.look(self._position, self._position + len(piece))
            self._hash.update(piece)
            self._position += len(piece)
            progress.tell(step, self._position, source.total)
            yield piece

    def _check(self) -> None:
        found = self._hash.hexdigest()
        if self._sha256 and found != self._sha256:
            sentence = (
                f"the SHA-256 of its {self._position} bytes is {found}, not the one asked for: it was changed or "
                "damaged, or the digest is another's"
            )
            raise Invalid(sentence, path="$.sha256", detail=f"asked for {self._sha256}")


def source_of(address: str, *, known: bool) -> Source:
    """`known`: whether its content is known by its digest, so that it may be resumed whatever the server says."""
    if address.startswith("file:"):
        return File(address)
    from imageapi.drivers.uri.web import Web

    return Web(address, known=known)


def as_problem(error: Problem | OSError) -> Problem:
    """An error of the storage below a file, as it is told beside others."""
    if isinstance(error, Problem):
        return error
    return Problem(f"it cannot be read: {error.strerror}", errno=errno.errorcode.get(error.errno or 0, ""))
