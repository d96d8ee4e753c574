"""A tar archive, read from front to back: its members, each with its data behind it (POSIX.1-2017 pax, "ustar
Interchange Format"; GNU tar, "Basic Tar Format"). The headers are read by Python's tarfile, the data by nobody but
the caller, so that nothing is kept.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from imageapi.errors import Invalid
from imageapi.linux import superblock

HEADERS = 1 << 20
"""Bytes that the headers of one member may have: long names, extended attributes, the map of a sparse file."""
_BEGINNING = 68 << 10
"""Bytes by which it is told what something is that is no archive."""


class Stream:
    """The bytes of an archive, forwards only. tarfile takes it for a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._position = 0
        self._headers = 0
        self._beginning = bytearray()
        self.ended = False
        """Whether the last that was read is what ends an archive."""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        """Forwards. Raises: errors.Invalid, when it ends before."""
        for _ in self.data(position - self._position):
            pass

    def read(self, size: int) -> bytes:
        """So many bytes of a header, or what is left.

        Raises: errors.Invalid, when one member has too many, or a number that cannot be.
        """
        if size < 0:
            raise Invalid("the archive is damaged: the size of a header cannot be")
        self._headers += size
        if self._headers > HEADERS:
            raise Invalid(f"the headers of one member have more than {HEADERS} bytes: it is no archive of an image")
        found = b"".join(self._take(size))
        self.ended = len(found) == tarfile.BLOCKSIZE and not found.strip(b"\0")
        return found

    def data(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes. Raises: errors.Invalid, when there are fewer."""
        if size < 0:
            raise Invalid("the archive is damaged: the size of a member cannot be")
        end = self._position + size
        yield from self._take(size)
        if self._position < end:
            raise Invalid("the archive ends in the middle of a member: the file is not whole")

    def drain(self) -> None:
        """Take what is behind the archive, which may be anything: so the whole is seen."""
        for piece in self._pieces:
            self._position += len(piece)

    def next_member(self) -> None:
        """The headers that come are another member's."""
        self._headers = 0

    def looks_like(self) -> str:
        """What it is, going by its beginning. Nothing can be read of it after that."""
        while len(self._beginning) < _BEGINNING and self._fill():
            pass
        file = os.memfd_create("beginning")
        try:
            os.write(file, self._beginning)
            return superblock.describe(file)
        finally:
            os.close(file)

    def _take(self, size: int) -> Iterator[memoryview]:
        while size and (self._piece or self._fill()):
            found, self._piece = self._piece[:size], self._piece[size:]
            self._position += len(found)
            size -= len(found)
            yield found

    def _fill(self) -> bool:
        """Whether there is more."""
        for piece in self._pieces:
            if piece:
                self._piece = memoryview(piece)
                if len(self._beginning) < _BEGINNING:
                    self._beginning += piece[: _BEGINNING - len(self._beginning)]
                return True
        return False


def members(stream: Stream) -> Iterator[tarfile.TarInfo]:
    """The members in their order, each before its data.

    Raises: errors.Invalid, when it is no archive, has no members, or ends too early.
    """
    found = False
    try:
        archive = tarfile.TarFile(fileobj=cast(IO[bytes], stream), mode="r")
        while (member := archive.next()) is not None:
            found = True
            _check_common(archive)
            stream.next_member()
            cast(Any, archive).members.clear()  # it would keep them all
            yield member
    except _DAMAGED as error:
        if found or not isinstance(error, tarfile.TarError):
            raise Invalid(f"it is damaged after {stream.tell()} bytes: {error}") from None
    if not found:  # an image may begin with zeros, which is how an archive ends
        looks = stream.looks_like()
        raise Invalid(f"it is no tar archive (plain, gzip, zstd or xz; an image needs its format): {looks}")
    if not stream.ended:
        raise Invalid(f"after {stream.tell()} bytes there is neither a member nor the end: it is damaged, or not whole")
    stream.drain()


_DAMAGED = (tarfile.TarError, ValueError, IndexError, RecursionError)
"""What tarfile raises at headers that cannot be: a number that is none, a map that is cut off, hundreds before one
member."""


def _check_common(archive: tarfile.TarFile) -> None:
    """What is said of all members that follow is kept, and more is said of them again and again.

    Raises: errors.Invalid, when it is too much.
    """
    if sum(len(name) + len(value) for name, value in archive.pax_headers.items()) > HEADERS:
        raise Invalid(f"the headers of all members have more than {HEADERS} bytes: it is no archive of an image")
