"""What a definition's `path` and `base` name: a place on this host, or one that stays inside another mount."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from imageapi.errors import Invalid
from imageapi.linux.openat2 import open_in_root
from imageapi.records import AnyRecord
from imageapi.spec import Bind, Loopback

_REASONS = {
    errno.ENOENT: "does not exist {where}; give the path of one that does",
    errno.ENOTDIR: "goes through something {where} that is no directory; correct it",
    errno.ELOOP: "goes in circles of symbolic links {where}; give the path they were to lead to",
    errno.EACCES: "may not be reached by root {where}; see the rights of the file system it is on",
    errno.ENAMETOOLONG: "has a name longer than file systems allow",
}


PLACE = "the file system of "
"""How the stores begin that are known by a path alone."""


def store(path: str) -> str:
    """The store of what lies at a path of this host, which may be another host's, too: each directory or device is
    taken for one, since a look at what is mounted there may hang."""
    return PLACE + path


def open_path(definition: Loopback | Bind, inputs: Sequence[AnyRecord]) -> int:
    """A descriptor (O_PATH) of what the definition names.

    Raises: errors.Invalid with the remedy; OSError for what the storage refuses.
    """
    try:
        return _open_on_host(definition.path) if definition.base == "root" else _open_inside(definition.path, inputs)
    except OSError as error:
        where = "on this host" if definition.base == "root" else f"in {inputs[0].key}"
        raise refusal(error, definition.path, where) from None


def refusal(error: OSError, path: str, where: str = "on this host") -> Exception:
    """What to tell of a path that cannot be followed: the error itself, where that is not the path's fault."""
    reason = _REASONS.get(error.errno or 0)
    if reason is None:
        return error
    return Invalid(f"'{path}' {reason.format(where=where)}", path="$.path", errno=_name(error))


def reopen(fd: int, flags: int) -> int:
    """The file behind an O_PATH descriptor, opened with `flags`: it is the same one, whatever became of its path."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def _open_on_host(path: str) -> int:
    if not path.startswith("/"):
        raise Invalid(f"'{path}' is relative, to nothing; give an absolute path", path="$.path")
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def _open_inside(path: str, inputs: Sequence[AnyRecord]) -> int:
    mountpoint = inputs[0].facts.mountpoint if inputs else None
    if mountpoint is None:
        raise Invalid("base 'mount' needs a 'mount', in which the path is looked for", path="$.mount")
    root = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_in_root(root, path, os.O_PATH)
    finally:
        os.close(root)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "")
