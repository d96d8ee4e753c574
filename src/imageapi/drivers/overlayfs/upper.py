"""Where the writes of an overlay go: to directories of its own, which go with it, or to a place in another mount, where
they stay.

In another mount no file of anybody's is ever removed; only an acquire that fails takes away the directories it made.
The way to them may hold no symbolic link and no other mount: whoever wrote to that mount could lead us elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

from imageapi.drivers import holders, locks, mounts
from imageapi.errors import Conflict, Exhausted, Invalid, Problem
from imageapi.linux import mountinfo, syncfs
from imageapi.linux.mountinfo import Mount
from imageapi.linux.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from imageapi.linux.tree import remove_tree
from imageapi.records import AnyRecord
from imageapi.spec import Overlay

VOLATILE = "work/incompat/volatile"
"""The directory in the work directory by which the kernel knows an upper whose last user did not sync."""
PATIENCE = 5.0
"""Seconds for which another overlay that is just being made may have the directories; a mount takes milliseconds. Who
else writes to that mount can keep a lock for ever."""
_INSIDE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV


class Upper(NamedTuple):
    """The two directories that an overlay writes to, on one file system."""

    upper: str
    work: str


def make(undo: ExitStack, own: Upper, like: str) -> Upper:
    """Make the overlay's own directories; its root looks as the directory `like` does."""
    for path in own:
        mounts.make_tree(undo, path)
    _look_like(own.upper, like)
    return own


def _look_like(upper: str, lower: str) -> None:
    """The root directory of an overlay is its upper's: give it the mode and owner of the topmost layer's."""
    found = os.stat(lower)
    os.chown(upper, found.st_uid, found.st_gid)
    os.chmod(upper, found.st_mode & 0o7777)


# ------------------------------------------------------------------------------------------ in another mount


def inside(undo: ExitStack, opened: ExitStack, definition: Overlay, on: AnyRecord, lowers: list[str]) -> Upper:
    """The directories in the mount `on`, made where they are missing. Until `opened` ends, no other overlay is given
    them.

    Raises: errors.Problem about the upper.
    """
    if on.facts.mountpoint is None:
        raise Invalid(f"{on.key} is not mounted", path="$.upper")
    if on.facts.detail.get("depth"):
        raise Invalid(
            f"{on.key} is an overlay, and no upper can be on one; give what it writes to itself", path="$.upper"
        )
    top = mountinfo.place(on.facts.mountpoint)
    if os.statvfs(top).f_flag & os.ST_RDONLY:
        raise Invalid(f"{on.key} is read-only, and an upper is written", path="$.upper")
    place = posixpath.normpath(posixpath.join(top, (definition.upper_path or "/").strip("/")))
    try:
        found = Upper(*(_directory(undo, opened, top, f"{place}/{name}", lowers[0]) for name in ("upper", "work")))
    except OSError as error:
        raise _refusal(error, on) or error from None
    _check_apart(top, found.upper, lowers)
    _check_unused(on, found.upper)
    _check_synced(definition, found.work)
    undo.callback(clear_marker, found.work)
    return found


def _directory(undo: ExitStack, opened: ExitStack, top: str, path: str, like: str) -> str:
    """The directory `path`, `upper` or `work` at a place that is inside of `top`."""
    place = os.path.dirname(path)
    fd = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    reached = top
    for name in filter(None, path.removeprefix(top).split("/")):
        reached = f"{reached}/{name}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=fd)
            undo.callback(_remove_made, reached, whole=reached == f"{place}/work")
            if reached == f"{place}/upper":
                _look_like(reached, like)
        fd = openat2(fd, name, os.O_RDONLY | os.O_DIRECTORY, _INSIDE)
        opened.callback(os.close, fd)
    if not holders.until(lambda: locks.try_lock(fd), PATIENCE):
        sentence = f"another program keeps a lock on '{path.removeprefix(top)}' in that mount (flock(2)); end it there"
        raise Conflict(f"{sentence}, or choose another upper_path", path="$.upper_path", holders=[f"a lock on {path}"])
    return reached


def _remove_made(path: str, *, whole: bool) -> None:
    """Undo the making of a directory; `whole`: with what the kernel made in it."""
    with contextlib.suppress(OSError):
        if whole:
            remove_tree(path)
        else:
            os.rmdir(path)


def _refusal(error: OSError, on: AnyRecord) -> Problem | None:
    name = errno.errorcode.get(error.errno or 0, "")
    match error.errno:
        case errno.ELOOP | errno.ENOTDIR | errno.EXDEV:
            sentence = f"the way to '{error.filename}' in {on.key} leads over something that is no directory of that "
            sentence += "file system: a symbolic link, a file, or another mount; choose another upper_path"
            return Invalid(sentence, path="$.upper_path", errno=name)
        case errno.ENOSPC | errno.EDQUOT:
            return Exhausted(f"{on.key} is full; make room in it, or use another upper", path="$.upper", errno=name)
    return None


def _check_apart(top: str, upper: str, lowers: list[str]) -> None:
    """Raises: errors.Invalid for an upper in `top` that lies in a lower, which the kernel allows, and what it then does
    is not defined."""
    while upper != os.path.dirname(top):
        for at, lower in enumerate(lowers):
            if os.path.samefile(upper, lower):
                raise Invalid(f"the upper lies in what is $.lower[{at}], too; leave one of the two out", path="$.upper")
        upper = os.path.dirname(upper)


# ------------------------------------------------------------------------------------- used by another overlay


def _check_unused(on: AnyRecord, upper: str) -> None:
    """Raises: errors.Conflict when an overlay here writes to the directory already, by whatever mount it came there:
    the kernel would warn, and allow it."""
    known = mountinfo.read()
    dev = mountinfo.holding(upper, known).dev
    for overlay, other in _uppers(known):
        same_store = mountinfo.holding(other, known).dev == dev  # any other might hang
        if same_store and _same(upper, other):
            raise Conflict(
                f"the overlay at {overlay.mountpoint} writes to this place in {on.key} already; delete it first, or "
                "choose another upper_path",
                path="$.upper",
                holders=[f"the mount at {overlay.mountpoint}"],
            )


def _uppers(known: list[Mount]) -> Iterator[tuple[Mount, str]]:
    for overlay in known:
        if overlay.fstype == "overlay" and (found := shown(overlay)):
            yield overlay, found.upper


def shown(overlay: Mount) -> Upper | None:
    """Where an overlay writes, as mountinfo has it: of another server's, the work directory may be elsewhere."""
    found = re.search(r"upperdir=(/.*),workdir=", overlay.super_options)
    path = found and re.sub(r"\\([\\:,])", r"\1", found[1])
    return Upper(path, f"{os.path.dirname(path)}/work") if path else None


def _same(upper: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(upper, other)
    return False


# --------------------------------------------------------------------------------------------------- volatile


def _check_synced(definition: Overlay, work: str) -> None:
    """Raises: errors.Invalid for an upper whose last overlay was volatile, and did not come to its end."""
    if not os.path.exists(f"{work}/{VOLATILE}"):
        return
    inside_upper = posixpath.join("/", definition.upper_path or "", "work", VOLATILE)
    raise Invalid(
        "the last overlay on this upper was volatile and was not deleted in order (the host crashed, or the store "
        "refused writes), so that files in it may be missing or cut off; use another upper_path, or, if you trust "
        f"what is there, remove the directory {inside_upper} from that mount",
        path="$.upper",
    )


def settle(work: str) -> None:
    """Write out what a volatile overlay, gone by now, has not, and take the kernel's mark away. Where the store does
    not take it the mark stays, and the next overlay is told."""
    if os.path.exists(f"{work}/{VOLATILE}"):
        with contextlib.suppress(OSError):
            syncfs.syncfs(work)
            clear_marker(work)


def clear_marker(work: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(f"{work}/{VOLATILE}/dirty")
    with contextlib.suppress(OSError):
        os.rmdir(f"{work}/{VOLATILE}")


# -------------------------------------------------------------------------------------------------- the release


def remove(own: Upper) -> None:
    """Remove the overlay's own directories and all in them; nothing when they are gone.

    Raises: errors.Conflict.
    """
    _clear_work(own.work)
    for path in own:
        try:
            remove_tree(path)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EBUSY):
                raise
            sentence = f"something is mounted in {path}, and not by this server; umount it there, and delete again"
            raise Conflict(sentence, holders=[f"mounts in {path}"]) from None


def _clear_work(path: str) -> None:
    """Remove what overlayfs leaves of itself, which is nearly always all there is: so nothing need be searched."""
    with contextlib.suppress(OSError):
        os.unlink(f"{path}/{VOLATILE}/dirty")
        for directory in (VOLATILE, "work/incompat", "work"):
            os.rmdir(f"{path}/{directory}")
