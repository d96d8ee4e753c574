"""An image file as a block device: a loop device, found again by our mark in its name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from imageapi.config import Site
from imageapi.drivers import block, paths
from imageapi.drivers.audit import DELETE, Host, Wrong, gone
from imageapi.drivers.base import LOCAL_STORE, LocalDriver
from imageapi.drivers.paths import open_path, reopen
from imageapi.errors import Invalid, Unsupported
from imageapi.linux import inotify, loop, superblock
from imageapi.records import AnyRecord, Facts
from imageapi.spec import Loopback


class Driver(LocalDriver):
    """The kind `loopback`."""

    def store(self, definition: Loopback) -> str:
        """Its directory's: images that lie together are lost together."""
        return paths.store(os.path.dirname(definition.path)) if definition.base == "root" else LOCAL_STORE

    def acquire(self, record: AnyRecord, inputs: Sequence[AnyRecord], site: Site) -> Facts:
        """`detail` of the facts: see `_facts`; `cut` the bytes at the file's end that fill no sector, and which the
        device therefore lacks; `changed` when the file was last written to, in ns since the epoch."""
        definition: Loopback = record.definition
        mark = site.mark(record.key)
        with ExitStack() as undo, ExitStack() as opened:
            path = open_path(definition, inputs)
            opened.callback(os.close, path)
            found = os.fstat(path)
            _check_file(definition.path, found)
            file, read_only = _open(path, read_only=definition.ro)
            opened.callback(os.close, file)
            device, state = attach(file, mark, definition, read_only=read_only)
            undo.callback(loop.detach, device, mark)
            facts = _facts(device, state)
            facts.detail["cut"] = found.st_size % superblock.SECTOR
            facts.detail["changed"] = found.st_mtime_ns
            undo.pop_all()
        return facts

    def release(self, record: AnyRecord, site: Site) -> None:
        device = record.facts.device_file or _find(record, site)
        if device is not None:
            block.detach_loop(device, site.mark(record.key), record.facts.detail.get("sequence"))

    def observe(self, record: AnyRecord, site: Site) -> Facts | None:
        device = _find(record, site)
        state = None if device is None else loop.status(device)
        return None if device is None or state is None else _facts(device, state)

    def audit(self, record: AnyRecord, site: Site, host: Host) -> Wrong | None:
        """sysfs tells of the device without asking its file, which may be another host's and hang."""
        device, detail = record.facts.device_file or "", record.facts.detail
        backing = loop.backing_path(device)
        if not backing or _is_anothers(device, detail):
            return gone()
        if backing.endswith(DELETED):
            return _replaced(record)
        return _changed(record, backing, device, host) if host.is_local(backing) else None


def _is_anothers(device: str, detail: Mapping[str, Any]) -> bool:
    """Whether the kernel has made something else of the device since: that is not asked, its file may hang."""
    sequence = loop.attribute(device, "diskseq")
    return sequence != str(detail.get("sequence") or sequence)


def _find(record: AnyRecord, site: Site) -> str | None:
    """Where a mount has the file, only the end of its path is known here."""
    definition, known = record.definition, record.facts.device_file
    if known is not None:
        if _is_anothers(known, record.facts.detail):
            return None
        file = ""
    elif definition.base == "root":
        file = os.path.realpath(definition.path)
    else:
        file = "/" + os.path.basename(definition.path)
    return block.find_loop(site.mark(record.key), known, file)


def _facts(device: str, state: loop.Status) -> Facts:
    """`read_only` is the device's, which may be so where the definition is not; `backing` the file's st_dev and
    st_ino; `sequence` the kernel's number for what the device is."""
    detail = {"read_only": state.read_only, "backing": list(state.backing), "sequence": state.sequence}
    return Facts(device_file=device, detail=detail)


# -------------------------------------------------------------------------------- what somebody else did to its file

DELETED = " (deleted)"
"""What the kernel adds to the path of a file that has no name any more."""


def _changed(record: AnyRecord, backing: str, device: str, host: Host) -> Wrong | None:
    """`backing` is where the file is now."""
    path = record.definition.path if record.definition.base == "root" else backing
    host.watch(path, inotify.FILE)
    host.watch(path, inotify.FILE | inotify.IN_DONT_FOLLOW)
    try:
        found = os.stat(path)
    except OSError:
        return _replaced(record)
    detail = record.facts.detail
    if [found.st_dev, found.st_ino] != detail.get("backing"):
        return _replaced(record)
    if found.st_size < int(loop.attribute(device, "size") or 0) * superblock.SECTOR:
        return _cut(record, found.st_size)
    if detail["read_only"] and found.st_mtime_ns != detail.get("changed", found.st_mtime_ns):
        return _written(record)
    return None


def _replaced(record: AnyRecord) -> Wrong:
    """Those who use it have the old file still, as long as they like."""
    path = record.definition.path
    problem = (
        f"'{path}' is another file now, or none: this is still the one from before; to have the new one, delete this"
    )
    return Wrong(problem, f"delete {record.key}, and make it again")


def _cut(record: AnyRecord, size: int) -> Wrong:
    what = f"was cut to {size} bytes while it was attached"
    problem = f"'{record.definition.path}' {what}: what lay behind is lost; delete this, and make it again"
    return Wrong(problem, DELETE, f"has lost a part of its file, which {what}")


def _written(record: AnyRecord) -> Wrong:
    """It may be that nothing has changed but the file's time, so nobody who uses it is kept from it."""
    problem = f"'{record.definition.path}' was written to while it was attached, and what is read may be wrong"
    return Wrong(f"{problem}: delete this, and make it again", DELETE)


def _check_file(path: str, found: os.stat_result) -> None:
    """Raises: errors.Invalid for what is no image file."""
    if stat.S_ISDIR(found.st_mode):
        raise Invalid(f"'{path}' is a directory; give an image file, or use the mount kind 'bind'", path="$.path")
    if stat.S_ISBLK(found.st_mode):
        raise Invalid(f"'{path}' is a block device already; use the kind 'local'", path="$.path")
    if not stat.S_ISREG(found.st_mode):
        raise Invalid(f"'{path}' is no regular file; give an image file", path="$.path")
    if found.st_size < superblock.SECTOR:
        what = "is empty" if found.st_size == 0 else f"has {found.st_size} bytes, less than one sector"
        raise Invalid(f"'{path}' {what}; give an image file", path="$.path")


_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ETXTBSY)


def _open(path: int, *, read_only: bool) -> tuple[int, bool]:
    """The file read-write, or read-only where that is asked for or file or file system allow no more."""
    if not read_only:
        try:
            return reopen(path, os.O_RDWR), False
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
    return reopen(path, os.O_RDONLY), True


def attach(file: int, mark: str, definition: Loopback, *, read_only: bool) -> tuple[str, loop.Status]:
    """The open `file` on a free loop device that carries our mark. Raises: errors.Unsupported; OSError."""
    partitions = definition.readPartitions
    block_size = superblock.table_block(file) if partitions else superblock.block_size(file)
    try:
        return loop.attach(file, mark, read_only=read_only, block_size=block_size, partitions=partitions)
    except OSError as error:
        if error.filename == "/dev/loop-control" and error.errno in (errno.ENOENT, errno.ENODEV):
            raise Unsupported("this kernel has no loop devices: 'modprobe loop' must succeed") from None
        raise
