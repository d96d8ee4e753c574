"""What is compressed with gzip, zstd or xz, unpacked as it comes: bounded in memory, whatever it claims to become.

What it is says its beginning: RFC 1952 (gzip), RFC 8878 (zstd), the .xz file format. Parts that follow each other are
one content, as the programs of these formats have it; zeros behind the last one are padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Protocol

from imageapi.errors import Invalid

PIECE = 1 << 18
"""Bytes, the most that is unpacked at once."""
MOST_MEMORY = 160 << 20
"""Bytes that the dictionary of an xz may take: its largest preset, -9, needs 65 MiB, a zstd never more than 128."""
_BEGINNING = 6
"""Bytes by which the formats are known."""


class Decoder(Protocol):
    """One part; as lzma.LZMADecompressor."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib's decompressor, as a Decoder."""

    def __init__(self) -> None:
        import zlib

        self._zlib = zlib.decompressobj(31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        """What was unpacked to the bound may have more of its kind behind it, also when all of it is taken in."""
        return not self._full

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        found = self._zlib.decompress(self._zlib.unconsumed_tail + data, max(0, max_length))
        self._full = bool(self._zlib.unconsumed_tail) or len(found) == max_length
        return found


def _new_zstd() -> Decoder:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdDecompressor()


def _new_xz() -> Decoder:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_MEMORY)


FORMATS: tuple[tuple[bytes, str, Callable[[], Decoder]], ...] = (
    (b"\x1f\x8b", "gzip", _Gzip),
    (b"\x28\xb5\x2f\xfd", "zstd", _new_zstd),
    (b"\xfd7zXZ\0", "xz", _new_xz),
)


def unpacked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """`pieces`, unpacked if they are compressed.

    Raises: errors.Invalid, when they are damaged.
    """
    beginning = b""
    for piece in pieces:
        beginning += piece
        if len(beginning) >= _BEGINNING:
            break
    whole = chain([beginning], pieces)
    for magic, name, new in FORMATS:
        if beginning.startswith(magic):
            return _decoded(whole, name, new)
    return whole


def _decoded(pieces: Iterator[bytes], name: str, new: Callable[[], Decoder]) -> Iterator[bytes]:
    decoder: Decoder | None = new()
    for data in pieces:
        while data or (decoder and not decoder.needs_input):
            if decoder is None:
                data = data.lstrip(b"\0")
                if not data:
                    break
                decoder = new()
            yield _decompress(decoder, data, name)
            data = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise Invalid(f"its {name} data end in the middle: the file is not whole")


def _decompress(decoder: Decoder, data: bytes, name: str) -> bytes:
    """Raises: errors.Invalid. Each library has its own error, and none of them is the kernel's."""
    try:
        return decoder.decompress(data, PIECE)
    except MemoryError:
        raise
    except Exception as error:
        raise Invalid(f"its {name} data are damaged, or not to be unpacked here: {error}") from None
