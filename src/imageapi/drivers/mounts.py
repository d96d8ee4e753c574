"""What all kinds of mount share: a mountpoint of the record's own, finding what is mounted there, and taking it away.

A mountpoint carries the record's token, so whatever lies lowest there is ours, also when a crash came before the
facts were written. What somebody else put on top is never touched.

Mounts are nodev and nosuid where the host's users see them. `staging` in the `detail` of the facts has the MOUNT_ATTR_*
flags of them that a container's own copy is not to have.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

from imageapi.config import Site
from imageapi.drivers import holders
from imageapi.drivers.audit import DELETE, Host, Wrong, gone
from imageapi.drivers.base import LocalDriver
from imageapi.errors import Conflict, legible
from imageapi.linux import mount, mountid, mountinfo, users, ustat
from imageapi.linux.mountinfo import Mount
from imageapi.linux.tree import remove_tree
from imageapi.records import AnyRecord, Facts


def make_directory(undo: ExitStack, path: str) -> str:
    """A directory that goes again when the acquire fails. Raises: FileExistsError for one that was not released."""
    os.mkdir(path, 0o755)
    undo.callback(_remove_mountpoint, path)
    return path


def make_tree(undo: ExitStack, path: str) -> str:
    """The same for one that the kernel fills."""
    os.mkdir(path, 0o755)
    undo.callback(remove_tree, path)
    return path


def find(record: AnyRecord, site: Site) -> Mount | None:
    """The record's mount, if it stands."""
    stack = mountinfo.stack(site.mountpoint(record.token))
    return stack[0] if stack and _is_ours(record, stack[0], site) else None


def made(record: AnyRecord, site: Site) -> dict[str, Any]:
    """How the record's mount, just made, is known again: for the `detail` of its facts. `dev` is the file system's,
    `mount` its number, where the kernel has such numbers.

    Raises: OSError when another program was quick to unmount it.
    """
    path = site.mountpoint(record.token)
    number = mountid.at(path)
    known = None if number is None else mountid.look(number)
    if known is not None:
        return {"dev": known.dev, "mount": number}
    found = find(record, site)
    if found is None:
        raise OSError(errno.ENOENT, "another program has unmounted it again", path)
    return {"dev": found.dev, "source": found.source}


def stands(record: AnyRecord, site: Site) -> bool:
    """Whether the record's mount stands where it was made. A kernel without mount numbers is asked by `find`."""
    number: int | None = record.facts.detail.get("mount")
    known = None if number is None else mountid.look(number)
    return known is not None and known.mountpoint == _real(site.mountpoint(record.token))


def _real(path: str) -> str:
    """A mountpoint as the kernel names it."""
    directory, name = os.path.split(path)
    return f"{_resolved(directory)}/{name}"


@cache
def _resolved(directory: str) -> str:
    """The run directory stays where it is as long as a server works in it."""
    return os.path.realpath(directory)


def observe(record: AnyRecord, site: Site, facts: Callable[[Mount], Facts]) -> Facts | None:
    """What stands of the record's mount: its own facts, or those of what was found; None when it is gone."""
    if stands(record, site):
        return record.facts
    found = find(record, site)
    return None if found is None else facts(found)


class MountDriver(LocalDriver):
    """What is the same for all kinds of mount."""

    def check_not_elsewhere(self, record: AnyRecord, site: Site) -> None:
        """Raises: errors.Conflict naming where else in this mount namespace what only this mount was made of can be
        seen, and would be after a release: somebody has bound it there. It reads all mounts of the host."""
        path, mark = _real(site.mountpoint(record.token)), site.mark(record.key)
        if all(each == path for each in _here(mark)):
            return
        others = [each.mountpoint for each in mountinfo.beside(path) if each.source == mark]
        if others:
            raise holders.busy(str(record.key), (), (f"the mount at {each}" for each in others))

    def audit(self, record: AnyRecord, site: Site, host: Host) -> Wrong | None:
        path = site.mountpoint(record.token)
        stack = host.stack(_real(path))
        ours = bool(stack) and _is_ours(record, stack[0], site)
        if ours and len(stack) == 1:
            return None
        if not stack:
            return gone()
        over = _over(_stranger(stack[-1]), path)
        if ours:
            return Wrong(f"{over}; umount it there", f"umount {path}")
        remedy = f"umount {path}, and {DELETE}"
        return Wrong(f"it is gone from the kernel, and {over}", remedy, "is gone from the kernel")


def _is_ours(record: AnyRecord, lowest: Mount, site: Site) -> bool:
    """Whether the lowest mount at the record's mountpoint is its own. A device number is no proof where there is a
    better one: an overlay's or a tmpfs's is given to the next one at once."""
    detail = record.facts.detail
    if "mount" in detail:
        return stands(record, site)
    return bool(detail.get("dev", lowest.dev) == lowest.dev and detail.get("source", lowest.source) == lowest.source)


Unmount = Callable[[str, int], None]
"""umount2(2) of a mountpoint with these flags, or what a kind makes of it."""


def release(record: AnyRecord, site: Site, *, with_inner: bool = False, unmount: Unmount = mount.umount) -> None:
    """Unmount the record's mount and remove its mountpoint, which also detaches the copies that other mount
    namespaces have of it there. `with_inner`: what is mounted inside belongs to it.

    Raises: errors.Conflict naming who is in the way; nothing has changed then.
    """
    path = site.mountpoint(record.token)
    if stands(record, site) and not mountid.bears_others(record.facts.detail["mount"]):
        _umount(path, path, unmount)
    else:
        _release_stack(record, site, unmount, with_inner=with_inner)
    _remove_mountpoint(path)


def _release_stack(record: AnyRecord, site: Site, unmount: Unmount, *, with_inner: bool) -> None:
    """Unmount what lies at the mountpoint and belongs to the record, if anything does: mountinfo tells all there is."""
    path = site.mountpoint(record.token)
    mounts = mountinfo.read(mention=mountinfo.place(path))
    stack = mountinfo.stack(path, mounts)
    if stack:
        _check_top(path, stack, ours=_is_ours(record, stack[0], site))
        inner = mountinfo.below(path, mounts)
        _check_inner(path, inner, with_inner=with_inner)
        for each in (*inner, stack[0]):
            _umount(path, each.mountpoint, unmount)


def _check_top(path: str, stack: list[Mount], *, ours: bool) -> None:
    if len(stack) > 1 or not ours:
        strange = _stranger(stack[-1])
        raise Conflict(f"{_over(strange, path)}; umount it there, and delete again", holders=[strange])


def _stranger(top: Mount) -> str:
    return f"{legible(top.source) or 'something'} ({top.fstype})"


def _over(strange: str, path: str) -> str:
    return f"{strange} is mounted over {path}, and not by this server"


def _check_inner(path: str, inner: list[Mount], *, with_inner: bool) -> None:
    if not inner:
        return
    if not with_inner:
        raise holders.busy(path, (), (f"the mount at {each.mountpoint}" for each in inner))
    if pids := users.using(path):  # before the first of several is gone
        raise holders.busy(path, pids)


def _umount(path: str, mountpoint: str, unmount: Unmount) -> None:
    if not holders.until(lambda: _unmounted(mountpoint, unmount)):
        raise holders.busy(path, users.using(path))


def _unmounted(mountpoint: str, unmount: Unmount) -> bool:
    """Whether it could be unmounted now, or somebody else has just done it."""
    try:
        unmount(mountpoint, mount.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno != errno.EINVAL:
            raise
    return True


def _remove_mountpoint(path: str) -> None:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise Conflict(
                f"{path} holds files that were written while nothing was mounted there; move them away",
                holders=[f"files in {path}"],
            ) from None
        if error.errno == errno.EBUSY:
            raise Conflict(f"something was just mounted on {path} by another program; umount it there") from None
        raise


def check_gone(what: str, source: str, dev: str | None) -> None:
    """Raises: errors.Conflict while another mount of `source` is left, here or in another mount namespace: the file
    system is still up. `dev`, its st_dev where that is known, spares the search of all namespaces."""
    if not holders.until(lambda: _is_gone(source, dev)):
        raise holders.busy(what, elsewhere(source), (f"the mount at {each}" for each in _here(source)))


def _is_gone(source: str, dev: str | None) -> bool:
    if dev is not None and ustat.is_up(dev) is False:
        return True
    return not (_here(source) or elsewhere(source))


def _here(source: str) -> list[str]:
    """Where `source` is mounted in this mount namespace: a bind of it, or itself when it was moved."""
    return [each.mountpoint for each in mountinfo.read(mention=source) if each.source == source]


def elsewhere(source: str) -> list[int]:
    """One process of every other mount namespace that has `source` mounted."""
    return mountinfo.namespaces_where(lambda each: each.source == source, mention=source)
