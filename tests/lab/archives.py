"""Tar archives as tests need them, hostile ones too: nothing is checked."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from typing import Literal, NamedTuple

from backports import zstd

Compression = Literal["", "gz", "xz", "zst"]


class Member(NamedTuple):
    """One member. It is a directory when its name ends with a slash, a link where `link` or `symlink` is given. `more`
    are further fields of its tarfile.TarInfo."""

    name: str
    data: bytes = b""
    link: str | None = None
    symlink: str | None = None
    mode: int = 0o644
    pax: dict[str, str] = {}  # noqa: RUF012  (it is only read)
    more: dict[str, object] = {}  # noqa: RUF012

    def header(self) -> tarfile.TarInfo:
        found = tarfile.TarInfo(self.name)
        found.mode, found.size, found.pax_headers = self.mode, len(self.data), dict(self.pax)
        if self.name.endswith("/"):
            found.type = tarfile.DIRTYPE
        if self.link is not None:
            found.type, found.linkname = tarfile.LNKTYPE, self.link
        if self.symlink is not None:
            found.type, found.linkname = tarfile.SYMTYPE, self.symlink
        for field, value in self.more.items():
            setattr(found, field, value)
        return found


def archive(*members: Member, compression: Compression = "") -> bytes:
    """A pax archive of these members, in this order."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member.header(), io.BytesIO(member.data))
    return compressed(written.getvalue(), compression)


def compressed(data: bytes, compression: Compression) -> bytes:
    match compression:
        case "gz":
            return gzip.compress(data)
        case "xz":
            return lzma.compress(data)
        case "zst":
            return bytes(zstd.compress(data))
    return data
