"""The members of an archive as files, below a directory that nothing in the archive can lead out of.

A member's directory is opened by openat2(2) beneath the root and without symlinks; what is made there is made by its
name alone, and never over what is there. Owners, modes, times and holes are the archive's. So are the extended
attributes that belong to a file wherever it is, `user.*` and capabilities (capabilities(7)); labels and signatures are
those of the host that made the archive. Device nodes are left out: a container has its own, and here they would put
the host's within reach of whoever wrote the archive.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, cast

from imageapi.drivers.uri.archive import Stream, members
from imageapi.errors import Invalid
from imageapi.linux.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from imageapi.linux.whole import write_all

_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_XATTR = "SCHILY.xattr."
"""What pax headers call an extended attribute: as star, GNU tar and libarchive do."""
_CAPABILITY = "security.capability"
_SECOND = 10**9
"""In nanoseconds."""


class _Refused(Exception):
    """A member that is not made: the reason, as it follows its name in a sentence."""


class Place(NamedTuple):
    """Where a member goes: the path of its directory, "" for the root, and its name there, "" for the root itself."""

    directory: str
    name: str

    def __str__(self) -> str:
        return f"{self.directory}/{self.name}" if self.directory else self.name


def unpack(root: int, pieces: Iterator[bytes]) -> int:
    """Make all members of the archive below the directory `root`; how many were left out.

    Raises: errors.Problem, naming the member; OSError, ENOSPC when there is no room.
    """
    stream = Stream(pieces)
    tree = _Tree(root)
    try:
        for member in members(stream):
            tree.add(member, stream)
        tree.finish()
        return tree.left_out
    finally:
        tree.close()


class _Tree:
    """The tree below `root` as far as it is made."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._path = ""
        self._directory = os.open(".", _DIRECTORY, dir_fd=root)
        """The last directory something was made in, and its path: mostly the next is made there, too."""
        self._times: dict[str, int] = {}
        """The directories and their times, which what is made in them would change."""
        self.left_out = 0

    def close(self) -> None:
        os.close(self._directory)

    def add(self, member: tarfile.TarInfo, stream: Stream) -> None:
        """Raises: errors.Problem, naming the member; OSError, ENOSPC when there is no room."""
        with _named(member.name):
            self._add(member, stream)

    def finish(self) -> None:
        """What can only be done when all is there. Raises: errors.Problem, naming the member; OSError."""
        for path, moment in self._times.items():
            with _named(path):
                self._set_time(path, moment)

    def _set_time(self, path: str, moment: int) -> None:
        directory = openat2(self._root, path or ".", _DIRECTORY, _BENEATH)
        try:
            os.utime(directory, ns=(moment, moment))
        finally:
            os.close(directory)

    def _add(self, member: tarfile.TarInfo, stream: Stream) -> None:
        if member.isblk() or member.ischr():
            self.left_out += 1
            return
        place = _place(member.name)
        if member.isdir():
            self._make_directory(member, place)
            return
        if not place.name:
            raise _Refused("is the root of the archive, and no directory")
        directory = self._enter(place.directory)
        if member.isreg():
            _make_file(directory, place.name, member, stream)
        elif member.issym():
            _make_symlink(directory, place.name, member)
        elif member.islnk():
            self._link(directory, place, member)
        elif member.isfifo():
            _make_fifo(directory, place.name, member)
        else:
            raise _Refused(f"has the type {member.type!r}, which no file has")

    # ---------------------------------------------------------------------------------------------- directories

    def _enter(self, path: str) -> int:
        """The directory at `path`, made if it is not there."""
        if path != self._path:
            directory = self._open(path)
            os.close(self._directory)
            self._directory, self._path = directory, path
        return self._directory

    def _open(self, path: str) -> int:
        try:
            return openat2(self._root, path or ".", _DIRECTORY, _BENEATH)
        except FileNotFoundError:
            return self._make_all(path)

    def _make_all(self, path: str) -> int:
        """The directory at `path`, and those above it that are not there."""
        directory = os.open(".", _DIRECTORY, dir_fd=self._root)
        for name in path.split("/"):
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=directory)
                inner = openat2(directory, name, _DIRECTORY, _BENEATH)
            finally:
                os.close(directory)
            directory = inner
        return directory

    def _make_directory(self, member: tarfile.TarInfo, place: Place) -> None:
        """One that is there already gets the owner, mode and time of the later member."""
        directory = self._enter(str(place))
        _describe(directory, member)
        self._times[str(place)] = _time(member)

    def _link(self, directory: int, place: Place, member: tarfile.TarInfo) -> None:
        """A further name of a member that was there before."""
        target = _place(member.linkname)
        try:
            above = openat2(self._root, target.directory or ".", _DIRECTORY, _BENEATH)
            with contextlib.ExitStack() as opened:
                opened.callback(os.close, above)
                _over(place.name, directory)
                os.link(target.name, place.name, src_dir_fd=above, dst_dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            linked = _legible(member.linkname)
            raise _Refused(f"is a hard link to '{linked}', which is not before it in the archive") from None


# ----------------------------------------------------------------------------------------------------- one member


def _make_file(directory: int, name: str, member: tarfile.TarInfo, stream: Stream) -> None:
    _over(name, directory)
    file = os.open(name, _NEW_FILE, 0o600, dir_fd=directory)
    try:
        for offset, size in _parts(member):
            os.lseek(file, offset, os.SEEK_SET)
            for piece in stream.data(size):
                write_all(file, piece)
        if os.fstat(file).st_size < member.size:
            os.truncate(file, member.size)
        _describe(file, member)
        os.utime(file, ns=(_time(member), _time(member)))
    finally:
        os.close(file)


def _parts(member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """Where the data go: offset and size of each part that is no hole."""
    return cast(list[tuple[int, int]], member.sparse) if member.issparse() else [(0, member.size)]


def _make_symlink(directory: int, name: str, member: tarfile.TarInfo) -> None:
    """Wherever it leads: it is followed only in a container, whose root this is then."""
    _over(name, directory)
    os.symlink(member.linkname, name, dir_fd=directory)
    os.chown(name, member.uid, member.gid, dir_fd=directory, follow_symlinks=False)
    os.utime(name, ns=(_time(member), _time(member)), dir_fd=directory, follow_symlinks=False)


def _make_fifo(directory: int, name: str, member: tarfile.TarInfo) -> None:
    _over(name, directory)
    os.mkfifo(name, 0o600, dir_fd=directory)
    os.chown(name, member.uid, member.gid, dir_fd=directory)
    os.chmod(name, stat.S_IMODE(member.mode), dir_fd=directory)
    os.utime(name, ns=(_time(member), _time(member)), dir_fd=directory)


def _over(name: str, directory: int) -> None:
    """Take away what an earlier member of the same name has made: the last one counts, as with tar(1)."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        raise _Refused("was a directory before in the same archive") from None


def _describe(file: int, member: tarfile.TarInfo) -> None:
    """Owner, mode and extended attributes, in this order: a new owner takes capabilities and the set-id bits away."""
    os.fchown(file, member.uid, member.gid)
    os.fchmod(file, stat.S_IMODE(member.mode))
    for key, text in member.pax_headers.items():
        name = key.removeprefix(_XATTR)
        if key.startswith(_XATTR) and (name == _CAPABILITY or name.startswith("user.")):
            _set_attribute(file, name, text.encode("utf-8", "surrogateescape"))


def _set_attribute(file: int, name: str, value: bytes) -> None:
    try:
        os.setxattr(file, name, value)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise _Refused(
            f"has the extended attribute {name}, which a tmpfs of this kernel cannot keep (user.* needs Linux 6.6): "
            "make the archive without it, or an image"
        ) from None


def _time(member: tarfile.TarInfo) -> int:
    """When it was changed, in nanoseconds since the epoch. A float has not enough digits."""
    text = member.pax_headers.get("mtime", "")
    whole, _, fraction = text.partition(".")
    if not whole.isdigit() or not fraction.isdigit():
        return int(member.mtime * _SECOND)
    return int(whole) * _SECOND + int(fraction[:9].ljust(9, "0"))


# --------------------------------------------------------------------------------------------- names and refusals


def _place(name: str) -> Place:
    """Where a member's name leads. Raises: errors.Invalid, when that is out of the archive."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise _Refused(f"names '{_legible(name)}', which is not below the root of the archive")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return Place("/".join(parts[:-1]), parts[-1] if parts else "")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What the archive is refused for within, as a problem of its member `name`."""
    try:
        yield
    except (_Refused, OSError, OverflowError, ValueError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise Invalid(f"its member '{_legible(name)}' {reason}") from None


_REASONS = {
    errno.E2BIG: "has an extended attribute that is larger than the kernel takes",
    errno.ENOENT: "is a symbolic link to nothing at all",
    errno.ELOOP: "lies behind a symbolic link of the archive, which would lead out of it",
    errno.ENOTDIR: "is a directory, or lies in one, that was something else before in the same archive",
    errno.EFBIG: "is larger than a file can be",
    errno.EXDEV: "is not below the root of the archive",
    errno.ENAMETOOLONG: "has a name that is longer than file systems allow",
    errno.EINVAL: "has an owner, a time or an attribute that no file can have",
    errno.ERANGE: "has an extended attribute that no file can have",
    errno.EPERM: "is a link to what can have no second name",
}


def _reason(error: _Refused | OSError | OverflowError | ValueError) -> str | None:
    """What a member is refused for; None when it is nothing that the archive says."""
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, ValueError):
        return "has a time, a target or an attribute that no file can have"
    number = errno.EINVAL if isinstance(error, OverflowError) else error.errno
    return _REASONS.get(number or 0)


def _legible(name: str) -> str:
    """A name as a message can hold it."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return text if len(text) <= 200 else f"{text[:100]}…{text[-99:]}"
