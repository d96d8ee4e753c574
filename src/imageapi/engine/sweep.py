"""What stands in the kernel or under the run directory with our mark, and has no record: found at every check, and
removed at the start.

A record is written before anything is made, so this finds something only when a record was lost or removed by hand.
What a supervisor keeps is its own to clear away (runtime/supervisor.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from imageapi.config import Site
from imageapi.drivers import block, exported, progress, storage_daemon
from imageapi.errors import Problem
from imageapi.linux import iscsi, krbd, loop, mountinfo
from imageapi.linux.tree import remove_tree
from imageapi.records import Key
from imageapi.store import Contents, peek

log = logging.getLogger(__name__)

_OURS = re.compile(r"(mount|upper|work)_(\d{9})")


class Known(NamedTuple):
    """What there are records of: objects, the numbers of their directories, and devices. Where one cannot be read, the
    numbers are not `complete`."""

    keys: frozenset[Key]
    tokens: frozenset[int]
    devices: frozenset[str]
    complete: bool

    @classmethod
    def of(cls, contents: Contents) -> Known:
        devices = {record.facts.device_file or record.facts.detail.get("device") for record in contents.records}
        hidden = contents.hidden()
        return cls(
            frozenset({record.key for record in contents.records} | hidden),
            frozenset(record.token for record in contents.records),
            frozenset(filter(None, devices)),
            not hidden,
        )


class Stray(NamedTuple):
    """One thing without a record: what it is; the commands that would take it away; a function that does; and whose it
    would be: the number of a directory, or an object."""

    what: str
    remedy: str
    remove: Callable[[], object]
    of: Key | int | None


Search = Callable[[Site, Known], Iterator[Stray]]
"""What it yields it has found; TimeoutError at its end says what could not be looked at."""


def sweep(site: Site) -> list[str]:
    """Remove all strays; what was removed, for the log. To be done while nothing is made.

    What cannot be removed is left, and logged by its error: the next start tries again.
    """
    known = Known.of(peek(site.state_dir))
    removed = []
    for search in SEARCHES.values():
        try:
            for stray in search(site, known):
                removed += _attempt(stray)
        except TimeoutError as hung:
            log.warning("%s", hung)
    return removed


def _attempt(stray: Stray) -> list[str]:
    """What the stray is, if it could be removed, as a list of one or none.

    Raises: LeftOff, when the server has ceased to wait: by now it may have something of its own there.
    """
    progress.tell(f"removing {stray.what}")
    with contextlib.suppress(FileNotFoundError):
        try:
            stray.remove()
        except (OSError, Problem, TimeoutError) as error:
            log.warning("%s has no record, and cannot be removed: %s", stray.what, error)
            return []
    return [stray.what]


# ------------------------------------------------------------------------------------------------ what is looked for


def _mounts(site: Site, known: Known) -> Iterator[Stray]:
    names = sorted(os.listdir(site.mounts_dir)) if os.path.isdir(site.mounts_dir) else []
    for match in filter(None, map(_OURS.fullmatch, names)):
        if known.complete and int(match[2]) not in known.tokens:
            path = f"{site.mounts_dir}/{match[0]}"
            unmount = f"umount {path}; " * len(mountinfo.stack(path))
            removal = "rmdir" if match[1] == "mount" else "rm -r"
            yield Stray(
                f"the directory {path}", f"{unmount}{removal} {path}", partial(_clear_directory, path), int(match[2])
            )


def _clear_directory(path: str) -> None:
    while mountinfo.at(path):
        from imageapi.drivers.nfs import client

        client.unmount(path)  # what the mount is of may be silent: so it is not waited for
    if os.path.basename(path).startswith("mount_"):
        os.rmdir(path)
    else:
        remove_tree(path)


def _loops(site: Site, known: Known) -> Iterator[Stray]:
    marks, silent = block.marked_besides(site.mark_prefix, known.devices)
    for mark, device in marks.items():
        key = _marked(mark, site)
        if key is not None and key not in known.keys:
            what = f"the loop device {device}, marked {mark}"
            yield Stray(what, f"losetup -d {device}", partial(block.detach_loop, device, mark), key)
    if silent:
        files = (f"{device} on {loop.backing_path(device)}" for device in silent)
        raise TimeoutError(f"{', '.join(files)} does not say whose it is: its storage does not answer")


def _marked(mark: str, site: Site) -> Key | None:
    """The object of a mark of this site's; None for what only looks like one."""
    collection, _, number = mark.removeprefix(site.mark_prefix).partition("/")
    return Key(collection, int(number)) if number.isdigit() else None


def _exports(site: Site, known: Known) -> Iterator[Stray]:
    keys = storage_daemon.exports(site) if os.path.isdir(site.helpers_dir) else []
    for key in keys:
        if key not in known.keys:
            file = storage_daemon.export_path(site, key)
            remedy = f"umount {file}; rm -r {os.path.dirname(file)}"
            yield Stray(f"the storage daemon's export {file}", remedy, partial(exported.abandon, key, site), key)


def _daemons(site: Site, known: Known) -> Iterator[Stray]:
    for name, pid in storage_daemon.idle(site).items() if os.path.isdir(site.helpers_dir) else ():
        path = f"{site.helpers_dir}/{name}"
        what = f"the storage daemon {pid or ''} of {path}, which has no image,"
        kill = f"kill {pid}; " if pid else ""
        yield Stray(what, f"{kill}rm -r {path}", partial(storage_daemon.end_idle, site, name), None)


def _sessions(site: Site, known: Known) -> Iterator[Stray]:
    if not iscsi.available():
        return
    from imageapi.drivers.iscsi import kernel  # not for those who have no use for it: everything is forked from here

    for key in kernel.strays(site):
        if key not in known.keys:
            numbers = [session.id for session in kernel.ours(site, key)]
            remedy = "; ".join(f"iscsiadm -m session -r {number} -u" for number in numbers)
            what = f"the iSCSI sessions or records of {key}"
            yield Stray(what, remedy or "restart imageapi-server", partial(kernel.abandon, key, site), key)


def _images(site: Site, known: Known) -> Iterator[Stray]:
    for device in krbd.devices() if krbd.available() else ():
        mark = device.options.get("key", "")
        key = _marked(mark, site) if mark.startswith(site.mark_prefix) else None
        if key is not None and key not in known.keys:
            from imageapi.drivers.ceph import kernel

            what = f"the RBD device {device.file}, marked {mark}"
            yield Stray(what, f"rbd unmap {device.file}", partial(kernel.unmap, key, device.id, site), key)


SEARCHES: dict[str, Search] = {
    "the mounts": _mounts,
    "the loop devices": _loops,
    "the storage daemons' images": _exports,
    "the storage daemons": _daemons,
    "the iSCSI sessions": _sessions,
    "the RBD devices": _images,
}
"""By what is looked through. What stands on something comes before it."""
