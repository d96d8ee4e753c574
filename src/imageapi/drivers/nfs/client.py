"""The kernel's NFS client: asked to mount with the options it understands, and to let go without losing what was
written. Both wait for the server, and no longer than told here.

What the kernel holds for a server that is silent is not given up: the mount stays, and its release is tried again.
Where nothing was ever written through a mount, which the kernel counts, there is nothing to lose: it goes at once.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from functools import partial

from imageapi.config import Site
from imageapi.drivers import holders, mounts
from imageapi.drivers.nfs import options, problems, server
from imageapi.drivers.nfs.options import Chosen
from imageapi.drivers.nfs.server import Reached
from imageapi.errors import TimedOut, Unsupported
from imageapi.linux import filesystems, killable, mount, mountinfo, nfs, syncfs
from imageapi.linux.mountinfo import Mount
from imageapi.records import AnyRecord
from imageapi.spec import Nfs

MOUNT_SECONDS = 14.0
"""For the kernel to mount, once the server has answered. The service gives a create 25 s."""
WRITE_SECONDS = 12.0
"""For the server to take what was written."""
UNMOUNT_SECONDS = 2.0
"""For the server to hear that the client leaves: then it is left to find out by itself."""

NEWEST_FIRST = ("4.2", "4.1", "4.0")


# -------------------------------------------------------------------------------------------------- the mount


def type_of(version: str) -> str:
    """The kernel's name of the file system for a version."""
    return "nfs" if version == "3" else "nfs4"


def check_kernel(version: str) -> None:
    """Raises: errors.Unsupported without the client, also after its module was asked for."""
    fs_type = type_of(version)
    if filesystems.needs_device(fs_type) is None:
        raise Unsupported(f"this kernel has no NFS client: 'modprobe {fs_type.replace('nfs4', 'nfsv4')}' must succeed")


def words(definition: Nfs, chosen: Chosen, reached: Reached) -> list[str]:
    """The options for the kernel, but for the version: those that were chosen, and what mount.nfs would add. A mount
    has a file system of its own unless it asks to share one: so what is done to it is done to no other."""
    own = chosen.own
    given = [f"addr={reached.address}", *chosen.words()]
    if definition.version == "3":
        given += [f"port={chosen.port}"] * ("port" not in own)
        given += ["nolock"] * (bool(chosen.flags & mount.MS_RDONLY) and not own.keys() & {"lock", "nolock"})
    elif definition.version in ("4", "4.0") and reached.own_address and "clientaddr" not in own:
        given.append(f"clientaddr={reached.own_address}")
    return given if "sharecache" in own or "nosharecache" in own else [*given, "nosharecache"]


def mount_export(definition: Nfs, flags: int, given: Sequence[str], path: str) -> None:
    """Mount the export at `path`, with the newest version that both sides speak when only `4` is asked for.

    Raises: errors.Problem.
    """
    versions = NEWEST_FIRST if definition.version == "4" else (definition.version,)
    for version in versions:
        fs_type, data = type_of(version), ",".join([f"vers={version}", *given])
        call = partial(mount.mount, server.source(definition), path, fs_type, flags, data)
        try:
            killable.call(call, MOUNT_SECONDS, path)
            return
        except OSError as error:
            if error.errno != errno.EPROTONOSUPPORT or version == versions[-1]:
                raise problems.explain(error, definition, fs_type, data) from None


# ------------------------------------------------------------------------------------------------ the release


def release(record: AnyRecord, site: Site) -> None:
    """Unmount, when the server has everything that was written.

    Raises: errors.TimedOut while a silent server lacks some of it; errors.Conflict naming who is in the way; the error
    with which the server has refused what was written, once.
    """
    found = mounts.find(record, site)
    dev = found.dev if found else record.facts.detail.get("dev")
    if found is not None and not nfs.is_off(found.dev) and nfs.may_have_written(found.mountpoint):
        _write_back(record, found)
    mounts.release(record, site, unmount=unmount)
    if dev is not None and not options.shares_cache(record.definition):
        _check_gone(record, dev)


def unmount(mountpoint: str, flags: int = 0) -> None:
    """umount2(2), which tells the server that the client leaves; one that does not listen is not waited for."""
    try:
        killable.call(partial(mount.umount, mountpoint, flags), UNMOUNT_SECONDS, mountpoint)
    except TimeoutError:
        if mountinfo.at(mountpoint) is not None:
            raise


def _write_back(record: AnyRecord, found: Mount) -> None:
    """Have the server take what the kernel holds, while the mount can still be reached."""
    address, port, version = _told(found, "addr"), _told(found, "port"), _told(found, "vers")
    reachable = address is None or server.answers(address, int(port or options.PORT), int((version or "4")[0]))
    if not reachable:
        raise _silent(record, found.dev, found.mountpoint)
    try:
        killable.call(partial(syncfs.syncfs, found.mountpoint), WRITE_SECONDS, found.mountpoint)
    except TimeoutError:
        raise _silent(record, found.dev, found.mountpoint) from None
    except OSError as error:
        raise problems.refused_writing(error, record.definition) from None


def _told(found: Mount, option: str) -> str | None:
    match = re.search(rf"(?:^|,){option}=([^,]*)", found.super_options)
    return match[1] if match else None


def _check_gone(record: AnyRecord, dev: str) -> None:
    """Raises: errors.Conflict while another mount namespace has the file system; errors.TimedOut while the kernel still
    writes for it."""
    if holders.until(lambda: not nfs.is_up(dev) or any(each.dev == dev for each in mountinfo.read(mention=dev))):
        return
    if pids := mountinfo.holders(dev):
        raise holders.busy(f"the file system of {server.source(record.definition)}", pids)
    raise _silent(record, dev, None)


def _silent(record: AnyRecord, dev: str, mountpoint: str | None) -> TimedOut:
    """What to do about data that a server does not take."""
    switch = nfs.off_switch(dev)
    by_hand = (
        f"'echo 1 > {switch}'" if switch else f"'umount -f {mountpoint}'" if mountpoint else "a restart of the host"
    )
    return TimedOut(
        f"server {record.definition.host} does not answer, and has not taken all that was written: it is tried again "
        f"until it does; to give that up, {by_hand} on this host",
        step="writing to the server",
    )
